//! The records of a run, read back.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// What an output folder says of its run.
#[derive(Debug)]
pub(crate) struct Run {
    /// The folder's name.
    pub(super) name: String,
    /// Lines of `metrics.jsonl`, in order.
    records: Vec<Value>,
    /// `config.toml`, when the run wrote one.
    pub(super) config: Option<String>,
}

impl Run {
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!(
                "cannot read {}\ngive the output folder of `planish train`",
                path.display()
            )
        })?;
        let mut records = Vec::new();
        let lines: Vec<&str> = text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            match serde_json::from_str(line) {
                Ok(record) => records.push(record),
                // A run under way may be writing its last line.
                Err(_) if index + 1 == lines.len() && index > 0 => {}
                Err(error) => bail!("{}:{}: not JSON: {error}", path.display(), index + 1),
            }
        }
        if records.is_empty() {
            bail!("{}: has no record yet", path.display());
        }
        let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
        let name = whole
            .file_name()
            .unwrap_or(whole.as_os_str())
            .to_string_lossy()
            .into_owned();
        let config = std::fs::read_to_string(dir.join("config.toml")).ok();
        Ok(Self { name, records, config })
    }

    /// The records of a kind.
    pub(super) fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.records.iter().filter(move |record| record["kind"] == kind)
    }

    /// The first line, which says what the run was going to do.
    pub(super) fn plan(&self) -> &Value {
        self.of_kind("plan").next().unwrap_or(&Value::Null)
    }

    /// The last line of a run that is over.
    pub(super) fn end(&self) -> &Value {
        self.of_kind("end").last().unwrap_or(&Value::Null)
    }

    /// A field over the steps; a gap where it was not finite. Steps that came twice keep the later value.
    pub(super) fn series(&self, kind: &str, field: &str) -> Vec<(f64, Option<f64>)> {
        let mut points: Vec<(f64, Option<f64>)> = Vec::new();
        for record in self.of_kind(kind) {
            let (Some(step), Some(value)) = (record["step"].as_f64(), record.get(field)) else {
                continue;
            };
            while points.last().is_some_and(|(last, _)| *last >= step) {
                points.pop();
            }
            points.push((step, value.as_f64()));
        }
        points
    }

    /// The training loss of each epoch, from its first on.
    pub(super) fn epoch_losses(&self) -> Vec<Weighted> {
        let mut epochs: Vec<Weighted> = Vec::new();
        let mut before = 0.0;
        for record in self.of_kind("train") {
            let (Some(tokens), Some(epoch)) = (record["tokens"].as_f64(), record["epoch"].as_f64()) else {
                continue;
            };
            let index = (epoch.ceil() as usize).saturating_sub(1);
            if epochs.len() <= index {
                epochs.resize(index + 1, Weighted::default());
            }
            if let Some(loss) = record["loss"].as_f64() {
                epochs[index] = [
                    epochs[index],
                    Weighted {
                        sum: loss * (tokens - before),
                        tokens: tokens - before,
                    },
                ]
                .into_iter()
                .sum();
            }
            before = tokens;
        }
        epochs
    }

    /// The settings as `section.key` and value.
    pub(super) fn settings(&self) -> Vec<(String, String)> {
        let mut section = String::new();
        let mut settings = Vec::new();
        for line in self.config.as_deref().unwrap_or_default().lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name.to_owned();
            } else if let Some(key) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is unset")) {
                settings.push((format!("{section}.{key}"), "unset".to_owned()));
            } else if let Some((key, value)) = line.split_once(" = ") {
                settings.push((format!("{section}.{key}"), value.to_owned()));
            }
        }
        settings
    }
}

/// A sum of losses weighted by trained tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Weighted {
    sum: f64,
    tokens: f64,
}

impl Weighted {
    /// `None` where nothing was summed.
    pub(super) fn mean(self) -> Option<f64> {
        (self.tokens > 0.0).then(|| self.sum / self.tokens)
    }
}

impl std::iter::Sum for Weighted {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |a, b| Self {
            sum: a.sum + b.sum,
            tokens: a.tokens + b.tokens,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn epochs_weigh_their_intervals_by_tokens() {
        let record = |epoch: f64, tokens: u64, loss: f64| json!({"kind": "train", "epoch": epoch, "tokens": tokens, "loss": loss});
        let run = Run {
            name: String::new(),
            records: vec![record(0.5, 30, 2.0), record(1.0, 40, 6.0), record(2.0, 80, 1.0)],
            config: None,
        };
        let means: Vec<Option<f64>> = run.epoch_losses().into_iter().map(Weighted::mean).collect();
        assert_eq!(means, [Some(3.0), Some(1.0)]);
    }
}

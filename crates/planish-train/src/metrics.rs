//! `metrics.jsonl`: one JSON object a line, flushed a line, readable while the run goes on.
//!
//! A number that is not finite is written as `null` and its field is listed under `nonfinite`, since JSON has no NaN.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::events::{
    EvalReport, Figures, GuardReport, Memory, Position, RunPlan, SampleReport, SaveReport, Summary, TrainReport,
};
use crate::{Error, Result};

/// Version of the layout, written in the `plan` line.
pub const SCHEMA: u32 = 1;

/// One line of the file: its kind, its position, and its fields in order.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    fields: Map<String, Value>,
    nonfinite: Vec<Value>,
}

impl Record {
    /// A line of the given kind.
    pub fn new(kind: &str, position: Position) -> Self {
        let mut record = Self {
            fields: Map::new(),
            nonfinite: Vec::new(),
        };
        record.fields.insert("kind".to_owned(), kind.into());
        record.integer("step", position.step as u64);
        record.number("epoch", position.epoch);
        record.integer("micro_step", position.micro_step as u64);
        record
    }

    /// The line of a report.
    pub(crate) fn of_train(report: &TrainReport) -> Self {
        let mut record = Self::new("train", report.position);
        record.number("loss", report.loss);
        record.optional("loss_weighted", report.loss_weighted);
        if let Some(distrust) = &report.distrust {
            record.number("ess", distrust.ess);
            record.number("ess_fraction", distrust.ess_fraction);
            record.number("distrust_value", distrust.value);
            record.number("weight_max", distrust.weight_max);
        }
        record.figures(&report.figures);
        record.number("lr", report.lr);
        record.optional("lr_b", report.lr_b);
        record.number("grad_norm", report.grad_norm);
        record.number("clipped", report.clipped);
        record.integer("tokens", report.tokens);
        record.integer("tokens_total", report.tokens_total);
        record.integer("examples", report.examples);
        record.number("tokens_per_second", report.tokens_per_second);
        record.number("steps_per_second", report.steps_per_second);
        record.number("elapsed_seconds", report.elapsed_seconds);
        record.number("eta_seconds", report.eta_seconds);
        record.memory(&report.memory);
        record.number("padding_fraction", report.padding_fraction);
        record.integer("shapes_seen", report.shapes_seen as u64);
        record.integer("skipped_steps", report.skipped_steps);
        record
    }

    /// The line of an evaluation.
    pub(crate) fn of_eval(report: &EvalReport) -> Self {
        let mut record = Self::new("eval", report.position);
        record.number("val_loss", report.loss);
        record.optional("val_ppl", report.perplexity);
        record.optional("val_ppl_se", report.perplexity_se);
        record.figures(&report.figures);
        record.integer("val_tokens", report.tokens as u64);
        record.optional("val_loss_weighted", report.loss_weighted);
        record.value("best", report.best.into());
        record.integer("best_step", report.best_step as u64);
        record.value(
            "patience_left",
            report.patience_left.map_or(Value::Null, |left| (left as u64).into()),
        );
        record.number("seconds", report.seconds);
        record
    }

    /// The line of something saved; `path` is relative to the output folder.
    pub(crate) fn of_save(report: &SaveReport, path: &str) -> Self {
        let mut record = Self::new("save", report.position);
        record.value("path", path.into());
        record.value("sha256", report.sha256.as_str().into());
        record.number("seconds", report.seconds);
        record
    }

    /// The line of the guard.
    pub(crate) fn of_guard(report: &GuardReport) -> Self {
        let mut record = Self::new("guard", report.position);
        record.value("reason", report.reason.name().into());
        record.number("grad_norm", report.grad_norm);
        record.value("rows", report.rows.clone().into());
        record.integer("skipped_steps", report.skipped_steps);
        record
    }

    /// The first line of a run. `context` holds what the recipe cannot know: versions, backend, configuration.
    pub(crate) fn of_plan(plan: &RunPlan, context: &Map<String, Value>) -> Self {
        let mut record = Self::new(
            "plan",
            Position {
                step: plan.first_step,
                ..Position::default()
            },
        );
        record.integer("schema", SCHEMA.into());
        record.integer("total_steps", plan.total_steps as u64);
        record.integer("steps_per_epoch", plan.steps_per_epoch as u64);
        record.integer("warmup_steps", plan.warmup_steps as u64);
        record.value("plan_hash", plan.plan_hash.as_str().into());
        record.integer("trainable", plan.trainable as u64);
        record.integer("total", plan.total as u64);
        record.integer("rank", plan.rank as u64);
        record.number("scale", plan.scale);
        record.integer("examples", plan.data.examples as u64);
        record.integer("target_tokens", plan.data.target_tokens as u64);
        record.number("padding_fraction", plan.data.padding_fraction);
        let shapes = plan
            .data
            .shapes
            .iter()
            .map(|s| Value::from(vec![s.rows, s.length, s.batches]));
        record.value("shapes", shapes.collect());
        record.optional("ess_fraction", plan.effective_share);
        if let Some(bytes) = plan.step_memory_bytes {
            record.integer("step_memory_bytes", bytes);
        }
        record.fields.extend(context.clone());
        record
    }

    /// The last line of a run.
    pub(crate) fn of_end(summary: &Summary) -> Self {
        let mut record = Self::new("end", summary.position);
        record.value("reason", summary.end.name().into());
        record.optional("loss", summary.last_loss);
        record.optional("best_val_loss", summary.best.map(|(_, loss)| loss));
        record.value(
            "best_step",
            summary.best.map_or(Value::Null, |(step, _)| (step as u64).into()),
        );
        record.value(
            "adapter_step",
            summary.adapter_step.map_or(Value::Null, |step| (step as u64).into()),
        );
        record.integer("tokens", summary.tokens);
        record.integer("skipped_steps", summary.skipped_steps);
        record.number("elapsed_seconds", summary.elapsed_seconds);
        record
    }

    /// The line of a generated sample.
    pub(crate) fn of_sample(position: Position, report: &SampleReport) -> Self {
        let mut record = Self::new("sample", position);
        record.value("when", report.when.into());
        record.value("prompt", report.prompt.as_str().into());
        record.value("text", report.text.as_str().into());
        record.value("expected", report.expected.as_str().into());
        record
    }

    /// The fields as they will be written.
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = self.fields.clone();
        if !self.nonfinite.is_empty() {
            fields.insert("nonfinite".to_owned(), self.nonfinite.clone().into());
        }
        fields
    }

    /// Adds any JSON value.
    pub fn value(&mut self, name: &str, value: Value) {
        self.fields.insert(name.to_owned(), value);
    }

    /// Adds a number; one that is not finite becomes `null`.
    pub fn number(&mut self, name: &str, value: f64) {
        if !value.is_finite() {
            self.nonfinite.push(name.into());
        }
        self.fields.insert(name.to_owned(), value.into());
    }

    fn optional(&mut self, name: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.number(name, value);
        }
    }

    fn integer(&mut self, name: &str, value: u64) {
        self.fields.insert(name.to_owned(), value.into());
    }

    fn figures(&mut self, figures: &Figures) {
        figures.iter().for_each(|(name, value)| self.number(name, value));
    }

    fn memory(&mut self, memory: &Memory) {
        self.integer("peak_memory_bytes", memory.peak_bytes);
        self.integer("active_memory_bytes", memory.active_bytes);
        self.integer("cache_memory_bytes", memory.cache_bytes);
        self.value("rss_bytes", memory.rss_bytes.map_or(Value::Null, Value::from));
    }
}

/// Appends records to the file.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    path: PathBuf,
    offset: u64,
}

impl MetricsWriter {
    /// Opens the file to append to it, or makes it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io {
            path: path.to_owned(),
            action: "open",
            source,
        };
        let file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
        let offset = file.metadata().map_err(io)?.len();
        Ok(Self {
            file,
            path: path.to_owned(),
            offset,
        })
    }

    /// Cuts the file to `offset` bytes, so that steps after a checkpoint are not written twice.
    ///
    /// # Errors
    /// [`Error::Io`]; also when the file is shorter than `offset`.
    pub fn cut(&mut self, offset: u64) -> Result<()> {
        let io = |source| Error::Io {
            path: self.path.clone(),
            action: "cut",
            source,
        };
        if self.offset < offset {
            let reason = format!(
                "it has {} bytes, and the checkpoint was written after {offset}",
                self.offset
            );
            return Err(io(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, reason)));
        }
        self.file.set_len(offset).map_err(io)?;
        self.offset = offset;
        Ok(())
    }

    /// Appends one line.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = Value::from(record.fields()).to_string();
        line.push('\n');
        let io = |source| Error::Io {
            path: self.path.clone(),
            action: "append to",
            source,
        };
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.flush())
            .map_err(io)?;
        self.offset += line.len() as u64;
        Ok(())
    }

    /// Bytes written so far: what a checkpoint stores.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Makes sure that everything written is on disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| Error::Io {
            path: self.path.clone(),
            action: "flush",
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(path: &Path) -> Vec<Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn report(step: usize, loss: f64) -> Record {
        Record::of_train(&TrainReport {
            position: Position {
                step,
                epoch: 0.5,
                micro_step: step,
            },
            loss,
            ..TrainReport::default()
        })
    }

    #[test]
    fn non_finite_numbers_are_null_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path).unwrap();
        writer.write(&report(1, f64::NAN)).unwrap();
        writer.write(&report(2, 1.5)).unwrap();
        let lines = lines(&path);
        assert_eq!(lines[0]["loss"], Value::Null);
        assert_eq!(lines[0]["nonfinite"], serde_json::json!(["loss"]));
        assert_eq!(lines[1]["loss"], 1.5);
        assert!(lines[1].get("nonfinite").is_none());
    }

    #[test]
    fn reopening_cuts_what_came_after_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::open(&path).unwrap();
        writer.write(&report(1, 1.0)).unwrap();
        let offset = writer.offset();
        writer.write(&report(2, 2.0)).unwrap();
        drop(writer);
        let mut writer = MetricsWriter::open(&path).unwrap();
        writer.cut(offset).unwrap();
        writer.write(&report(2, 3.0)).unwrap();
        let lines = lines(&path);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1]["loss"], 3.0);
        let refused = writer.cut(1 << 20).unwrap_err();
        assert!(refused.to_string().contains("metrics.jsonl"), "{refused}");
    }
}

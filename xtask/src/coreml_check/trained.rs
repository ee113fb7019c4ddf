//! A real model with a trained adapter through `planish export coreml`, against `planish logits`: the last proof of an
//! export, on weights and activations that no random model has.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use planish_checkpoint::fuse::{FuseOptions, export_safetensors};
use planish_tensors::{Dtype, TensorStore};
use serde_json::{Value, json};

use super::{Judge, LAYOUTS, output, packages, text};
use crate::repo;

/// Tokens of the prompt, one call of `prefill`.
const PROMPT: usize = 64;
/// Tokens decoded after it.
const STEPS: usize = 32;
/// Positions of the cache: little more than what is used, so that a interpreter in Python ends in minutes.
const CONTEXT: usize = 128;
/// Share of decoded positions whose most likely token must be the model's, with fp16 rounding.
const TOP1: f64 = 0.95;
/// Largest difference of a logit with f32 arithmetic on the stored weights.
const EXACT: f32 = 1e-2;

/// The model folder, the adapter folder (the base model alone without), and the program that exports.
pub(super) struct Trained<'a> {
    pub(super) model: &'a Path,
    pub(super) adapter: Option<&'a Path>,
    pub(super) planish: &'a Path,
}

impl Trained<'_> {
    /// All layouts; an error lists those that miss a bound.
    pub(super) fn run(&self, judge: &Judge) -> Result<()> {
        let work = judge.work.join("trained");
        std::fs::create_dir_all(&work)?;
        let stored = work.join("stored");
        // What fp16 leaves of the merged weights, as a model folder: `planish logits` then shows what the graph itself errs.
        let fuse = FuseOptions {
            dtype: Some(Dtype::F16),
            ..FuseOptions::default()
        };
        export_safetensors(self.model, self.adapter, &stored, &fuse)?;
        let mut failures = Vec::new();
        for (file, layout, cache, judged_as) in LAYOUTS {
            let found = self
                .layout(judge, &work, &stored, (file, layout, cache, judged_as))
                .with_context(|| format!("{layout}/{cache}"))?;
            println!("  {layout}/{cache}: {found}");
            if !found.passes() {
                failures.push(format!("{layout}/{cache}"));
            }
        }
        ensure!(failures.is_empty(), "beyond a bound: {}", failures.join(", "));
        Ok(())
    }

    fn layout(
        &self,
        judge: &Judge,
        work: &Path,
        stored: &Path,
        (file, layout, cache, judged_as): (&str, &str, &str, &str),
    ) -> Result<Found> {
        let out = work.join(file);
        let mut export = Command::new(self.planish);
        export.args(["export", "coreml", "--verify", "--layout", layout, "--cache", cache]);
        export.args([
            "--context",
            &CONTEXT.to_string(),
            "--prefill",
            &PROMPT.to_string(),
            "--model",
        ]);
        export.arg(self.model).arg("--out").arg(&out);
        if let Some(adapter) = self.adapter {
            export.arg("--adapter").arg(adapter);
        }
        output(&mut export)?;
        for package in packages(&out)? {
            judge.tool("validate.py", &[&text(&package)])?;
        }
        let (request, decoded) = (work.join("request.json"), work.join("decoded.safetensors"));
        let request_body = json!({
            "package": out, "layout": judged_as, "context_length": CONTEXT, "prompt": prompt(&out)?, "steps": STEPS,
            "out": decoded,
        });
        std::fs::write(&request, request_body.to_string())?;
        output(
            Command::new(&judge.python)
                .arg(repo::root().join("xtask/coreml/decode.py"))
                .arg(&judge.tools)
                .arg(&request),
        )?;
        let decoded = TensorStore::open(&decoded)?;
        let read = |name: &str| -> Result<Vec<f32>> { Ok(decoded.require(name)?.to_f32()?) };
        let ids: Vec<u32> = read("ids")?.iter().map(|id| *id as u32).collect();
        let original = self.logits(work, self.model, self.adapter, &ids)?;
        let stored = self.logits(work, stored, None, &ids)?;
        let v = original.len() / ids.len();
        // The row at a position predicts the token after it.
        let rows = (PROMPT - 1) * v..(PROMPT + STEPS - 1) * v;
        Ok(Found {
            halves: compare(&read("f16")?, &original[rows.clone()], v),
            exact: largest_difference(&read("f32")?, &stored[rows.clone()]),
            rounding: largest_difference(&stored[rows.clone()], &original[rows]),
        })
    }

    /// f32 logits of `planish logits`, `[tokens, v]`.
    fn logits(&self, work: &Path, model: &Path, adapter: Option<&Path>, ids: &[u32]) -> Result<Vec<f32>> {
        let out = work.join("logits.safetensors");
        let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
        let mut command = Command::new(self.planish);
        // On the CPU every weight is widened to f32 first.
        command.args(["logits", "--backend", "cpu", "--tokens", &ids.join(","), "--model"]);
        command.arg(model).arg("--out").arg(&out);
        if let Some(adapter) = adapter {
            command.arg("--adapter").arg(adapter);
        }
        output(&mut command)?;
        Ok(TensorStore::open(&out)?.require("logits")?.to_f32()?)
    }
}

/// The prompt that the exporter put into the bundle for a Mac.
fn prompt(out: &Path) -> Result<Vec<u32>> {
    let bundle = if out.join("Manifest.json").is_file() {
        out.with_extension("verify")
    } else {
        out.join("verify")
    };
    let path: PathBuf = bundle.join("expected.json");
    let expected: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let prompt: Vec<u32> = serde_json::from_value(expected["prompt"].clone())?;
    ensure!(
        prompt.len() == PROMPT,
        "{}: {} tokens, expected {PROMPT}",
        path.display(),
        prompt.len()
    );
    Ok(prompt)
}

/// What one layout showed.
struct Found {
    halves: Halves,
    /// f32 arithmetic on the stored weights against `planish logits` on the same weights.
    exact: f32,
    /// What rounding the merged weights to fp16 does, both sides by `planish logits`: no fault of the package.
    rounding: f32,
}

impl Found {
    fn passes(&self) -> bool {
        self.halves.top1 >= TOP1 && self.halves.in_top5 == 1.0 && self.exact <= EXACT
    }
}

impl std::fmt::Display for Found {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{STEPS} tokens, fp16 rounding: top-1 {:.1} %, in top-5 {:.1} %, largest logit error {:.4}; f32 arithmetic: {:.5} \
             (rounding the weights to fp16 moves the model itself by {:.5}): {}",
            self.halves.top1 * 100.0,
            self.halves.in_top5 * 100.0,
            self.halves.error,
            self.exact,
            self.rounding,
            if self.passes() { "OK" } else { "FAIL" }
        )
    }
}

/// Agreement of most likely tokens.
#[derive(Debug, PartialEq)]
struct Halves {
    top1: f64,
    in_top5: f64,
    error: f32,
}

fn compare(package: &[f32], model: &[f32], v: usize) -> Halves {
    let (mut same, mut contained, mut rows) = (0, 0, 0);
    for (p, m) in package.chunks(v).zip(model.chunks(v)) {
        let best = (0..v).fold(0, |best, i| if p[i] > p[best] { i } else { best });
        let above = m.iter().filter(|logit| **logit > m[best]).count();
        rows += 1;
        same += usize::from(above == 0);
        contained += usize::from(above < 5);
    }
    let share = |count: usize| count as f64 / f64::from(rows.max(1));
    Halves {
        top1: share(same),
        in_top5: share(contained),
        error: largest_difference(package, model),
    }
}

/// NaN when a value is, or when the lengths differ.
fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    if a.len() != b.len() {
        return f32::NAN;
    }
    let worse = |m: f32, d: f32| if d.is_nan() || d > m { d } else { m };
    a.iter()
        .zip(b)
        .map(|(x, y)| (x - y).abs())
        .fold(0.0, |m, d| if m.is_nan() { m } else { worse(m, d) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_agree_by_rank_in_the_model() {
        let model = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        let with_best = |best: usize| {
            let mut row = [0f32; 8];
            row[best] = 9.0;
            compare(&row, &model, 8)
        };
        assert_eq!((with_best(7).top1, with_best(7).in_top5), (1.0, 1.0));
        assert_eq!((with_best(3).top1, with_best(3).in_top5), (0.0, 1.0));
        assert_eq!((with_best(2).top1, with_best(2).in_top5), (0.0, 0.0));
    }

    #[test]
    fn a_nan_is_no_small_difference() {
        assert!(largest_difference(&[f32::NAN, 1.0], &[0.0, 1.0]).is_nan());
        assert!(largest_difference(&[0.0], &[0.0, 1.0]).is_nan());
        assert_eq!(largest_difference(&[0.0, 1.5], &[0.5, 1.0]), 0.5);
        let found = Found {
            halves: Halves {
                top1: 1.0,
                in_top5: 1.0,
                error: 0.0,
            },
            exact: f32::NAN,
            rounding: 0.0,
        };
        assert!(!found.passes());
    }
}

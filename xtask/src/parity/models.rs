//! Models against mlx-lm: logits, greedy text and perplexity.
//!
//! Logits must lie within 1e-3 of the largest, the 64 greedy tokens must be the same unless mlx-lm's two likeliest were
//! within 0.05, perplexity within 0.5 %.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use planish_tensors::TensorStore;
use serde_json::Value;

use super::work_folder;
use crate::program::output;
use crate::repo;

const LOGITS_LIMIT: f64 = 1e-3;
const GAP_LIMIT: f64 = 0.05;
const PERPLEXITY_LIMIT: f64 = 0.005;
const MAX_TOKENS: &str = "64";
type Check = fn(&Path, &Path, &Reference) -> Result<()>;
const CHECKS: [Check; 4] = [logits, greedy_tokens, greedy_text, perplexity];

/// Compares each model, prints what was found, and returns what failed.
pub(super) fn compare(planish: &Path, models: &[PathBuf]) -> Result<Vec<String>> {
    let python = super::mlx_lm_python()?;
    let mut failures = Vec::new();
    for model in models {
        println!("{}", model.display());
        let reference = Reference::compute(&python, model)?;
        for check in CHECKS {
            if let Err(error) = check(planish, model, &reference) {
                println!("  FAILED {error:#}");
                failures.push(format!("{}: {error:#}", model.display()));
            }
        }
    }
    Ok(failures)
}

/// What mlx-lm computed.
struct Reference {
    json: Value,
    tensors: TensorStore,
}

struct Prompt<'a> {
    text: Option<&'a str>,
    tokens: Vec<u32>,
    greedy: Vec<u32>,
    gaps: Vec<f64>,
    prefixes: Vec<&'a str>,
}

impl Reference {
    fn compute(python: &Path, model: &Path) -> Result<Self> {
        let name = model.file_name().context("a model is a folder")?;
        let folder = work_folder().join("reference").join(name);
        let script = repo::root().join("xtask/parity");
        let mut command = Command::new(python);
        command.arg(script.join("mlx_lm_reference.py")).arg(model).arg(&folder);
        command
            .arg("--prompts")
            .arg(script.join("prompts.txt"))
            .arg("--data")
            .arg(script.join("texts.jsonl"));
        output(command.args(["--max-tokens", MAX_TOKENS]))?;
        let json = serde_json::from_slice(&std::fs::read(folder.join("reference.json"))?)?;
        let tensors = TensorStore::open(&folder.join("reference.safetensors"))?;
        Ok(Reference { json, tensors })
    }

    fn prompts(&self) -> Result<Vec<Prompt<'_>>> {
        let prompts = self.json["prompts"]
            .as_array()
            .context("reference.json has no prompts")?;
        prompts
            .iter()
            .map(|prompt| Prompt::read(prompt).context("reference.json has a prompt of another form"))
            .collect()
    }
}

impl<'a> Prompt<'a> {
    fn read(json: &'a Value) -> Option<Self> {
        let tokens = |key: &str| -> Option<Vec<u32>> {
            json[key]
                .as_array()?
                .iter()
                .map(|id| u32::try_from(id.as_u64()?).ok())
                .collect()
        };
        Some(Prompt {
            text: json["text"].as_str(),
            tokens: tokens("tokens")?,
            greedy: tokens("greedy")?,
            gaps: json["gaps"]
                .as_array()?
                .iter()
                .map(Value::as_f64)
                .collect::<Option<_>>()?,
            prefixes: json["prefixes"]
                .as_array()
                .map_or(Some(Vec::new()), |texts| texts.iter().map(Value::as_str).collect())?,
        })
    }
}

fn logits(planish: &Path, model: &Path, reference: &Reference) -> Result<()> {
    let mut worst: f64 = 0.0;
    for (index, prompt) in reference.prompts()?.iter().enumerate() {
        let expect = reference.tensors.require(&format!("logits.{index}"))?.to_f32()?;
        let found = super::planish_logits(planish, model, None, &prompt.tokens)?;
        let difference = super::relative_difference(&found, &expect).with_context(|| format!("prompt {index}"))?;
        worst = worst.max(difference);
    }
    report(
        "logits",
        &format!("largest difference {worst:.1e} of the largest logit"),
        worst <= LOGITS_LIMIT,
    )
}

/// Given mlx-lm's tokens, planish's likeliest token at each step must be the same one.
fn greedy_tokens(planish: &Path, model: &Path, reference: &Reference) -> Result<()> {
    let (mut equal, mut total) = (0, 0);
    for (index, prompt) in reference.prompts()?.iter().enumerate() {
        let all = [&prompt.tokens[..], &prompt.greedy].concat();
        let logits = super::planish_logits(planish, model, None, &all)?;
        let vocab_size = logits.len() / all.len();
        for (step, &expect) in prompt.greedy.iter().enumerate() {
            let row = &logits[(prompt.tokens.len() + step - 1) * vocab_size..][..vocab_size];
            let likeliest = (0..vocab_size).max_by(|&one, &other| row[one].total_cmp(&row[other]));
            total += 1;
            if likeliest == Some(expect as usize) {
                equal += 1;
            } else if prompt.gaps[step] >= GAP_LIMIT {
                bail!(
                    "prompt {index}, token {step}: {likeliest:?}, mlx-lm has {expect} by {}",
                    prompt.gaps[step]
                );
            }
        }
    }
    report(
        "greedy tokens",
        &format!("{equal} of {total} equal, the others within {GAP_LIMIT}"),
        true,
    )
}

/// The text that `planish generate` writes, with its cache, up to the first near tie.
fn greedy_text(planish: &Path, model: &Path, reference: &Reference) -> Result<()> {
    let (mut equal, mut total) = (0, 0);
    for (index, prompt) in reference.prompts()?.iter().enumerate() {
        let Some(text) = prompt.text else { return Ok(()) };
        let mut command = Command::new(planish);
        command.args([
            "generate",
            "--backend",
            "cpu",
            "--raw",
            "--json",
            "--max-tokens",
            MAX_TOKENS,
            "--prompt",
            text,
        ]);
        let printed: Value = serde_json::from_str(&output(command.arg("--model").arg(model))?)?;
        let found = printed["text"]
            .as_str()
            .context("`planish generate --json` printed no text")?;
        let agreed = agreed_tokens(found, &prompt.prefixes);
        total += 1;
        if agreed == prompt.greedy.len() {
            equal += 1;
        } else if prompt.gaps[agreed] >= GAP_LIMIT {
            bail!(
                "prompt {index}: after {agreed} tokens {found:?}, mlx-lm has {:?}",
                prompt.prefixes.last()
            );
        }
    }
    report("greedy text", &format!("{equal} of {total} equal to the end"), true)
}

/// How many tokens the text shares with the reference.
fn agreed_tokens(text: &str, prefixes: &[&str]) -> usize {
    // The tokens of one character may end in the middle of it, which decoding shows as U+FFFD.
    let shared = |prefix: &str| text.starts_with(prefix.trim_end_matches('\u{fffd}'));
    prefixes.iter().rposition(|prefix| shared(prefix)).unwrap_or(0)
}

fn perplexity(planish: &Path, model: &Path, reference: &Reference) -> Result<()> {
    let Some(expect) = reference.json.get("data") else {
        return Ok(());
    };
    let data = repo::root().join("xtask/parity/texts.jsonl");
    let mut command = Command::new(planish);
    command
        .args(["eval", "--backend", "cpu", "--json", "--model"])
        .arg(model)
        .arg("--data")
        .arg(data);
    let found: Value = serde_json::from_str(&output(&mut command)?)?;
    ensure!(
        found["tokens"] == expect["tokens"],
        "{} tokens counted, mlx-lm has {}",
        found["tokens"],
        expect["tokens"]
    );
    let (found, expect) = (found["perplexity"].as_f64(), expect["perplexity"].as_f64());
    let (found, expect) = found.zip(expect).context("no perplexity")?;
    let difference = (found / expect - 1.0).abs();
    report(
        "perplexity",
        &format!("{found:.4}, mlx-lm {expect:.4}"),
        difference <= PERPLEXITY_LIMIT,
    )
}

pub(super) fn report(what: &str, finding: &str, passed: bool) -> Result<()> {
    ensure!(passed, "{what}: {finding}");
    println!("  {what}: {finding}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_is_counted_in_tokens() {
        let prefixes = ["", " a", " a\u{fffd}", " aé b"];
        assert_eq!(agreed_tokens(" aé b and more", &prefixes), 3);
        assert_eq!(agreed_tokens(" aé", &prefixes), 2);
        assert_eq!(agreed_tokens(" x", &prefixes), 0);
    }
}

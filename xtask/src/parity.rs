//! `cargo xtask parity`: the `planish` program against real mlx-lm, which runs in a virtual environment of its own.
//!
//! For each model: logits, greedy text and perplexity. The limits are those of the project's first issue: logits within
//! 1e-3 of the largest, the same 64 greedy tokens unless mlx-lm's two likeliest were within 0.05, perplexity within 0.5 %.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use planish_checkpoint::tensors::TensorStore;
use serde_json::Value;

use crate::repo;

/// What the virtual environment holds.
const PACKAGES: [&str; 2] = ["mlx[cpu]==0.32.2", "mlx-lm==0.32.2"];
/// Tiny models of each family in the repository; all but the first have random weights and no tokenizer.
const TINY_MODELS: [&str; 5] = [
    "crates/planish-nn/tests/fixtures/tiny-llama-1m",
    "crates/planish-nn/tests/goldens/llama3-rope",
    "crates/planish-nn/tests/goldens/llama-linear-bias",
    "crates/planish-nn/tests/goldens/qwen2",
    "crates/planish-nn/tests/goldens/qwen3",
];
const LOGITS_LIMIT: f64 = 1e-3;
const GAP_LIMIT: f64 = 0.05;
const PERPLEXITY_LIMIT: f64 = 0.005;
const MAX_TOKENS: &str = "64";
type Check = fn(&Path, &Path, &Reference) -> Result<()>;
const CHECKS: [Check; 4] = [logits, greedy_tokens, greedy_text, perplexity];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of a model to compare; may be given several times. Without it: the tiny models and SmolLM2-135M
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// Leave out SmolLM2-135M, which is fetched
    #[arg(long)]
    tiny_only: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let python = virtual_environment()?;
    let planish = build_planish()?;
    let mut failures = Vec::new();
    for model in models(args, &planish)? {
        println!("{}", model.display());
        let reference = Reference::compute(&python, &model)?;
        for check in CHECKS {
            if let Err(error) = check(&planish, &model, &reference) {
                println!("  FAILED {error:#}");
                failures.push(format!("{}: {error:#}", model.display()));
            }
        }
    }
    ensure!(
        failures.is_empty(),
        "{} comparisons failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    Ok(())
}

fn models(args: &Args, planish: &Path) -> Result<Vec<PathBuf>> {
    if !args.model.is_empty() {
        return Ok(args.model.clone());
    }
    let mut models: Vec<PathBuf> = TINY_MODELS.iter().map(|model| repo::root().join(model)).collect();
    if !args.tiny_only {
        let printed = output(Command::new(planish).args(["pull", "smollm2-135m", "--dtype", "f32"]))?;
        let folder = printed.lines().last().context("`planish pull` printed no folder")?;
        models.push(PathBuf::from(folder));
    }
    Ok(models)
}

/// What mlx-lm computed.
struct Reference {
    json: Value,
    tensors: TensorStore,
    folder: PathBuf,
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
        Ok(Reference { json, tensors, folder })
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
        let found = planish_logits(planish, model, reference, &prompt.tokens)?;
        ensure!(
            found.len() == expect.len(),
            "prompt {index}: {} logits, expected {}",
            found.len(),
            expect.len()
        );
        let difference = found
            .iter()
            .zip(&expect)
            .map(|(one, other)| f64::from((one - other).abs()))
            .fold(0.0, f64::max);
        let largest = expect.iter().map(|value| f64::from(value.abs())).fold(0.0, f64::max);
        worst = worst.max(difference / largest);
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
        let logits = planish_logits(planish, model, reference, &all)?;
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

fn planish_logits(planish: &Path, model: &Path, reference: &Reference, tokens: &[u32]) -> Result<Vec<f32>> {
    let file = reference.folder.join("planish.safetensors");
    let tokens = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new(planish);
    command
        .args(["logits", "--backend", "cpu", "--tokens", &tokens, "--model"])
        .arg(model)
        .arg("--out")
        .arg(&file);
    output(&mut command)?;
    Ok(TensorStore::open(&file)?.require("logits")?.to_f32()?)
}

fn report(what: &str, finding: &str, passed: bool) -> Result<()> {
    ensure!(passed, "{what}: {finding}");
    println!("  {what}: {finding}");
    Ok(())
}

/// The Python of an environment with mlx-lm, made on first use.
fn virtual_environment() -> Result<PathBuf> {
    let folder = work_folder().join("venv");
    let python = folder.join("bin/python");
    let complete = folder.join(".complete");
    if std::fs::read_to_string(&complete).is_ok_and(|packages| packages == PACKAGES.join(" ")) {
        return Ok(python);
    }
    println!("making a virtual environment with {}", PACKAGES.join(", "));
    output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    output(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args(PACKAGES),
    )?;
    std::fs::write(complete, PACKAGES.join(" "))?;
    Ok(python)
}

fn build_planish() -> Result<PathBuf> {
    let status = repo::command(&["cargo", "build", "--release", "-p", "planish-cli"]).status()?;
    ensure!(status.success(), "planish does not build");
    Ok(target_folder().join("release/planish"))
}

fn work_folder() -> PathBuf {
    target_folder().join("parity")
}

fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo::root().join("target"), PathBuf::from)
}

/// What a command prints; its own messages go to the terminal only when it fails.
fn output(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot start {line}"))?;
    if !output.status.success() {
        bail!("{line} failed:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{line} printed something that is not UTF-8"))
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

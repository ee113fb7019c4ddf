//! `cargo xtask parity`: the `planish` program against the real mlx-lm, PEFT and llama.cpp, each in an environment of its
//! own under `target/parity`.

mod adapters;
mod gguf;
mod models;
mod templates;
mod training;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use planish_tensors::TensorStore;

use crate::program::{build_planish, output, target_folder};
use crate::repo;

/// What the virtual environments hold.
const MLX_LM: [&str; 2] = ["mlx[cpu]==0.32.2", "mlx-lm==0.32.2"];
const PEFT: [&str; 3] = ["peft==0.21.2", "transformers==5.23.0", "torch==2.15.0"];
/// Tiny models of each family in the repository; all but the first have random weights and no tokenizer.
const TINY_MODELS: [&str; 5] = [
    "crates/planish-nn/tests/fixtures/tiny-llama-1m",
    "crates/planish-nn/tests/goldens/llama3-rope",
    "crates/planish-nn/tests/goldens/llama-linear-bias",
    "crates/planish-nn/tests/goldens/qwen2",
    "crates/planish-nn/tests/goldens/qwen3",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which comparisons; may be given several times. Without it: all
    #[arg(long, value_name = "PART")]
    only: Vec<Part>,
    /// Folder of a model to compare with mlx-lm; may be given several times. Without it: the tiny models and SmolLM2-135M
    #[arg(long, value_name = "DIR")]
    model: Vec<PathBuf>,
    /// Leave out SmolLM2-135M, which is fetched
    #[arg(long)]
    tiny_only: bool,
    /// A program that is built already
    #[arg(long, value_name = "FILE")]
    planish: Option<PathBuf>,
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Logits, greedy text and perplexity against mlx-lm
    Models,
    /// Adapters carried between planish, mlx-lm and PEFT: each loads the others', and all give the same logits
    Adapters,
    /// 50 iterations of `train --compat mlx-lm` against mlx-lm's own trainer: losses and adapters
    Training,
    /// The next tokens that llama.cpp finds likeliest in our GGUF export
    Gguf,
    /// Texts and masks of 14 families' chat templates against transformers' apply_chat_template
    Templates,
    /// Tiny models of every family against the numbers of Hugging Face's classes, which lie beside the checkout
    Families,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let wants = |part: Part| args.only.is_empty() || args.only.contains(&part);
    let mut failures = Vec::new();
    if wants(Part::Templates) {
        failures.extend(templates::compare()?);
    }
    if wants(Part::Families) {
        failures.extend(families()?);
    }
    // Templates and families need no program.
    let needs_program = |part: &Part| !matches!(part, Part::Templates | Part::Families);
    if args.only.is_empty() || args.only.iter().any(needs_program) {
        failures.extend(with_program(args, wants)?);
    }
    let count = failures.len();
    ensure!(
        failures.is_empty(),
        "{count} comparisons failed:\n{}",
        failures.join("\n")
    );
    Ok(())
}

fn with_program(args: &Args, wants: impl Fn(Part) -> bool) -> Result<Vec<String>> {
    let planish = args.planish.clone().map_or_else(build_planish, Ok)?;
    let tiny: Vec<PathBuf> = TINY_MODELS.iter().map(|model| repo::root().join(model)).collect();
    let smollm2 = if args.tiny_only {
        None
    } else {
        Some(pull_smollm2(&planish)?)
    };
    let mut failures = Vec::new();
    if wants(Part::Models) {
        let all = || tiny.iter().chain(&smollm2).cloned().collect();
        let models = if args.model.is_empty() {
            all()
        } else {
            args.model.clone()
        };
        failures.extend(models::compare(&planish, &models)?);
    }
    if wants(Part::Adapters) {
        failures.extend(adapters::compare(&planish, &tiny)?);
    }
    if wants(Part::Training) {
        let trained = [Some(&tiny[0]), smollm2.as_ref()];
        let models: Vec<PathBuf> = trained.into_iter().flatten().cloned().collect();
        failures.extend(training::compare(&planish, &models)?);
    }
    if wants(Part::Gguf) {
        match &smollm2 {
            Some(model) => failures.extend(gguf::compare(&planish, model)?),
            None => println!("gguf: left out, because it wants SmolLM2-135M"),
        }
    }
    Ok(failures)
}

/// A test of planish-nn, since gradients cannot be seen from outside: it prints a row per model and way of computing.
fn families() -> Result<Option<String>> {
    let test = [
        "test",
        "--package",
        "planish-nn",
        "--test",
        "it",
        "families::",
        "--",
        "--nocapture",
    ];
    let status = Command::new("cargo").args(test).current_dir(repo::root()).status()?;
    Ok((!status.success()).then(|| "families: a model differs from its golden".to_owned()))
}

fn pull_smollm2(planish: &Path) -> Result<PathBuf> {
    let printed = output(Command::new(planish).args(["pull", "smollm2-135m", "--dtype", "f32"]))?;
    let folder = printed.lines().last().context("`planish pull` printed no folder")?;
    Ok(PathBuf::from(folder))
}

/// `[tokens, vocab_size]`, row after row.
fn planish_logits(planish: &Path, model: &Path, adapter: Option<&Path>, tokens: &[u32]) -> Result<Vec<f32>> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("logits.safetensors");
    let tokens = tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new(planish);
    command.args(["logits", "--backend", "cpu", "--tokens", &tokens]);
    command.arg("--model").arg(model).arg("--out").arg(&file);
    if let Some(adapter) = adapter {
        command.arg("--adapter").arg(adapter);
    }
    output(&mut command)?;
    Ok(TensorStore::open(&file)?.require("logits")?.to_f32()?)
}

/// The largest difference, as a share of the largest of the expected numbers.
fn relative_difference(found: &[f32], expect: &[f32]) -> Result<f64> {
    let (found_len, len) = (found.len(), expect.len());
    ensure!(found_len == len, "{found_len} logits, expected {len}");
    let pairs = found.iter().zip(expect);
    let difference = pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    let largest = expect.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
    // A number that is none must not pass for small.
    ensure!(found.iter().all(|v| v.is_finite()), "a logit is not finite");
    Ok(difference / largest)
}

/// A Python with mlx-lm.
pub(crate) fn mlx_lm_python() -> Result<PathBuf> {
    virtual_environment("venv", &MLX_LM)
}

/// A Python with PyTorch, transformers and PEFT.
pub(crate) fn peft_python() -> Result<PathBuf> {
    virtual_environment("venv-peft", &PEFT)
}

/// A Python with transformers and no more: its tokenizers and templates need no PyTorch.
fn transformers_python() -> Result<PathBuf> {
    virtual_environment("venv-transformers", &["transformers==5.24.0", "jinja2==3.1.6"])
}

/// The Python of an environment with these packages, made on first use.
fn virtual_environment(name: &str, packages: &[&str]) -> Result<PathBuf> {
    let folder = work_folder().join(name);
    let python = folder.join("bin/python");
    let complete = folder.join(".complete");
    if std::fs::read_to_string(&complete).is_ok_and(|found| found == packages.join(" ")) {
        return Ok(python);
    }
    println!("making a virtual environment with {}", packages.join(", "));
    output(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder))?;
    let mut install = Command::new(&python);
    output(install.args(["-m", "pip", "install", "--quiet"]).args(packages))?;
    std::fs::write(complete, packages.join(" "))?;
    Ok(python)
}

fn work_folder() -> PathBuf {
    target_folder().join("parity")
}

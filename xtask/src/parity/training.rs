//! Training in mlx-lm's name: the same weights, the same adapter to begin with and the same batches must give mlx-lm's
//! losses to 1e-4 relative and its adapters to 1e-3 after 50 iterations.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use planish_tensors::TensorStore;
use serde_json::Value;

use super::work_folder;
use crate::program::output;
use crate::repo;

const ITERATIONS: usize = 50;
const MAX_SEQ_LENGTH: &str = "128";
/// mlx-lm's default. At ten times as much, with its scale of 20, the tiny model's losses jump about, and rounding grows tenfold
/// every few updates: 3e-7 apart after 16 of them, 4e-3 after 50. That measures the run and not the arithmetic.
const LEARNING_RATE: &str = "1e-5";
const LOSS_LIMIT: f64 = 1e-4;
const ADAPTER_LIMIT: f64 = 1e-3;

/// One way to train.
struct Case {
    name: &'static str,
    accumulation: usize,
    mask_prompt: bool,
    optimizer: &'static str,
}

const CASES: [Case; 3] = [
    Case {
        name: "adam",
        accumulation: 1,
        mask_prompt: false,
        optimizer: "adam",
    },
    Case {
        name: "adam, prompt masked, 5 batches an update",
        accumulation: 5,
        mask_prompt: true,
        optimizer: "adam",
    },
    Case {
        name: "adamw",
        accumulation: 1,
        mask_prompt: true,
        optimizer: "adamw",
    },
];

/// Trains with both programs, prints what was found, and returns what failed. The first model takes all cases.
pub(super) fn compare(planish: &Path, models: &[PathBuf]) -> Result<Vec<String>> {
    let python = super::mlx_lm_python()?;
    let mut failures = Vec::new();
    for (model_index, model) in models.iter().enumerate() {
        println!("{}", model.display());
        let (cases, layers) = if model_index == 0 {
            (&CASES[..], "4")
        } else {
            (&CASES[..1], "16")
        };
        for (index, case) in cases.iter().enumerate() {
            let name = model.file_name().context("a model is a folder")?;
            let folder = work_folder().join("training").join(name).join(index.to_string());
            fresh(&folder)?;
            with_mlx_lm(&python, model, &folder, case, layers)?;
            with_planish(planish, model, &folder, case, layers)?;
            let (loss, at) = worst_loss(&folder, case)?;
            let (adapter, moved) = adapter_distance(&folder)?;
            let finding = format!(
                "training ({}): {ITERATIONS} iterations, losses within {loss:.1e} (worst at update {at}), adapters within \
                 {adapter:.1e} after moving by {moved:.1e}",
                case.name
            );
            // Written so that a figure that is no number fails.
            if loss <= LOSS_LIMIT && adapter <= ADAPTER_LIMIT {
                println!("  {finding}");
            } else {
                println!("  FAILED {finding}");
                failures.push(format!("{}: {finding}", model.display()));
            }
        }
    }
    Ok(failures)
}

fn with_mlx_lm(python: &Path, model: &Path, folder: &Path, case: &Case, layers: &str) -> Result<()> {
    let scripts = repo::root().join("xtask/parity");
    let mut command = Command::new(python);
    command.arg(scripts.join("mlx_lm_training.py")).arg(model);
    command.arg(scripts.join("conversations.jsonl")).arg(folder);
    command.args(["--layers", layers, "--iters", &ITERATIONS.to_string()]);
    command.args([
        "--accumulation",
        &case.accumulation.to_string(),
        "--optimizer",
        case.optimizer,
    ]);
    command.args(["--max-seq-length", MAX_SEQ_LENGTH, "--learning-rate", LEARNING_RATE]);
    if case.mask_prompt {
        command.arg("--mask-prompt");
    }
    output(&mut command).map(drop)
}

fn with_planish(planish: &Path, model: &Path, folder: &Path, case: &Case, layers: &str) -> Result<()> {
    let data = folder.join("data");
    std::fs::create_dir(&data)?;
    std::fs::copy(
        repo::root().join("xtask/parity/conversations.jsonl"),
        data.join("train.jsonl"),
    )?;
    let mut command = Command::new(planish);
    command
        .args(["train", "--compat", "mlx-lm", "--backend", "cpu", "--model"])
        .arg(model);
    command.arg("--data").arg(data).arg("--out").arg(folder.join("planish"));
    let path = |name: &str| folder.join(name).display().to_string();
    let settings = [
        format!("train.batch_order={}", path("order.json")),
        format!("lora.start={}", path("start")),
        format!("lora.layers={layers}"),
        format!("train.steps={}", ITERATIONS / case.accumulation),
        format!("train.accumulation={}", case.accumulation),
        format!("train.max_seq_length={MAX_SEQ_LENGTH}"),
        format!("optimizer.learning_rate={LEARNING_RATE}"),
        format!("optimizer.name={}", case.optimizer),
        format!("data.mask_prompt={}", case.mask_prompt),
        "logging.report_every=1".to_owned(),
        "logging.samples=0".to_owned(),
    ];
    for setting in settings {
        command.args(["--set", &setting]);
    }
    output(&mut command).map(drop)
}

/// The largest relative difference of losses, and the update it belongs to.
fn worst_loss(folder: &Path, case: &Case) -> Result<(f64, usize)> {
    let reference: Value = serde_json::from_slice(&std::fs::read(folder.join("training.json"))?)?;
    let reference: Vec<f64> = numbers(&reference["losses"]);
    let metrics = std::fs::read_to_string(folder.join("planish/metrics.jsonl"))?;
    let lines: Vec<Value> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let found: Vec<f64> = lines
        .iter()
        .filter(|line| line["kind"] == "train")
        .filter_map(|line| line["loss"].as_f64())
        .collect();
    let expect: Vec<f64> = reference
        .chunks(case.accumulation)
        .map(|of_update| of_update.iter().sum::<f64>() / of_update.len() as f64)
        .collect();
    ensure!(
        found.len() == expect.len(),
        "{} updates, mlx-lm has {}",
        found.len(),
        expect.len()
    );
    let differences = found
        .iter()
        .zip(&expect)
        .map(|(found, expect)| (found / expect - 1.0).abs());
    let worst = differences.enumerate().max_by(|one, other| one.1.total_cmp(&other.1));
    worst
        .map(|(at, difference)| (difference, at + 1))
        .context("no update was reported")
}

/// `‖ours − theirs‖ / ‖theirs‖` over all tensors together, and how far theirs went from where they began.
fn adapter_distance(folder: &Path) -> Result<(f64, f64)> {
    let open = |name: PathBuf| TensorStore::open(&name);
    let ours = open(folder.join("planish/adapters.safetensors"))?;
    let theirs = open(folder.join("final/adapters.safetensors"))?;
    let start = open(folder.join("start/adapters.safetensors"))?;
    let (mut off, mut moved, mut size) = (0.0, 0.0, 0.0);
    ensure!(ours.names().eq(theirs.names()), "the adapters have other tensors");
    for name in theirs.names() {
        let (a, b) = (ours.require(name)?.to_f32()?, theirs.require(name)?.to_f32()?);
        let begun = start.require(name)?.to_f32()?;
        for ((a, b), begun) in a.iter().zip(&b).zip(&begun) {
            off += f64::from(a - b).powi(2);
            moved += f64::from(b - begun).powi(2);
            size += f64::from(*b).powi(2);
        }
    }
    ensure!(moved > 0.0, "mlx-lm trained nothing");
    Ok(((off / size).sqrt(), (moved / size).sqrt()))
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_f64)
        .collect()
}

fn fresh(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(std::fs::create_dir_all(folder)?),
    }
}

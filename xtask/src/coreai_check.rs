//! `cargo xtask coreai-check`: assets of planish-export judged by Apple's own runtime, from PyPI.
//!
//! For random models of every family and every weight format: export with our own check, let Apple's loader verify and
//! save it again, run it in a child process, and compare with `planish logits` on the same stored weights. Apple's f32
//! twin must agree to 1e-4 of the largest logit and decode the same text; half floats within a bound. Every release of
//! the runtime must give the same.

mod models;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use planish_tensors::TensorStore;
use serde_json::Value;

use crate::program::{build_planish, output};
use crate::repo;

/// Releases of Apple's runtime; the first judges everything, the others one model of each family.
const RELEASES: [&str; 3] = ["1.0.0b3", "1.0.0b2", "1.0.0b1"];
const FORMATS: [&str; 4] = ["fp16", "int8", "int4", "lut4"];
/// Prompt and continuation of the f32 comparison, in tokens.
const PROMPT: usize = 9;
const TOKENS: usize = 40;
/// Half floats on Apple's Linux runtime take long.
const HALF_TOKENS: usize = 4;
/// Largest logit error as a share of the largest logit.
const EXACT: f32 = 1e-4;
const HALF: f32 = 0.05;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Random models per family
    #[arg(long, default_value_t = 6)]
    random: u64,
    /// Judge this model instead, in f32 only
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Its adapter
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// Continue for this many tokens
    #[arg(long, default_value_t = TOKENS)]
    tokens: usize,
    /// A program that is built already
    #[arg(long, value_name = "FILE")]
    planish: Option<PathBuf>,
    /// The example `export_coreai` of planish-export, built already
    #[arg(long, value_name = "FILE")]
    exporter: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let exporter = args.exporter.clone().map_or_else(build_exporter, Ok)?;
    let judge = Judge {
        planish: args.planish.clone().map_or_else(build_planish, Ok)?,
        exporter,
        pythons: RELEASES
            .iter()
            .map(|release| virtual_environment(release))
            .collect::<Result<_>>()?,
        work: work_folder()?,
        tokens: args.tokens,
    };
    if let Some(model) = &args.model {
        return judge.case(model, args.adapter.as_deref(), "fp16", &Extent::TwinOnly);
    }
    let mut failures = Vec::new();
    for (name, config) in models::all(args.random) {
        let model = judge.work.join(&name);
        models::write(&model, &config)?;
        let is_first = name.ends_with("-0");
        for format in FORMATS {
            let extent = match (is_first, format) {
                (true, "fp16") => Extent::EveryRelease,
                (true, _) => Extent::TwinAndHalf,
                (false, _) => Extent::TwinOnly,
            };
            if let Err(error) = judge.case(&model, None, format, &extent) {
                println!("  FAILED {error:#}");
                failures.push(format!("{name} {format}: {error:#}"));
            }
        }
    }
    ensure!(
        failures.is_empty(),
        "{} cases failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    println!("all cases passed");
    Ok(())
}

/// How much of a case is judged.
enum Extent {
    /// The f32 twin by the newest release.
    TwinOnly,
    /// And half floats.
    TwinAndHalf,
    /// And half floats by every release.
    EveryRelease,
}

struct Judge {
    planish: PathBuf,
    exporter: PathBuf,
    /// One interpreter for each of [`RELEASES`].
    pythons: Vec<PathBuf>,
    work: PathBuf,
    tokens: usize,
}

/// What Apple's runtime made of an asset.
struct Verdict {
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

impl Judge {
    fn case(&self, model: &Path, adapter: Option<&Path>, format: &str, extent: &Extent) -> Result<()> {
        let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = self.work.join(format!("{name}-{format}-case"));
        std::fs::create_dir_all(&folder)?;
        let (asset, stored) = (folder.join("out.aimodel"), folder.join("stored"));
        let mut export = Command::new(&self.exporter);
        export
            .arg(model)
            .arg(&asset)
            .args([format, "check", "--stored"])
            .arg(&stored);
        export.args(adapter.map(|_| "--adapter")).args(adapter);
        output(&mut export)?;
        let vocabulary = models::vocabulary(model)?;
        let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 2_654_435 + 1) % vocabulary).collect();
        let twin = self.verdict(0, &asset, &folder, &prompt, &["--twin"])?;
        let all: Vec<u32> = prompt.iter().chain(&twin.tokens).copied().collect();
        let expected = self.expected(&stored, &folder, &all[..all.len() - 1])?;
        let error = share(&twin.logits, &expected)?;
        println!(
            "{name} {format}: f32 twin {error:.1e} of the largest logit, {} tokens",
            twin.tokens.len()
        );
        ensure!(error <= EXACT, "the twin differs by {error:.1e}");
        let rows: Vec<&[f32]> = expected.chunks(vocabulary as usize).collect();
        let greedy: Vec<u32> = rows[PROMPT - 1..].iter().map(|row| argmax(row)).collect();
        ensure!(
            greedy == twin.tokens,
            "the text differs: {greedy:?} and {:?}",
            twin.tokens
        );
        if matches!(extent, Extent::TwinOnly) {
            return Ok(());
        }
        let count = HALF_TOKENS.to_string();
        let half = self.verdict(0, &asset, &folder, &prompt, &["--tokens", &count])?;
        let positions = PROMPT + HALF_TOKENS - 1;
        let error = share(&half.logits, &expected[..positions * vocabulary as usize])?;
        println!("  half floats: {error:.1e}");
        ensure!(error <= HALF, "half floats differ by {error:.1e}");
        if matches!(extent, Extent::EveryRelease) {
            for (index, release) in RELEASES.iter().enumerate().skip(1) {
                // They round half floats differently, but must give the same in f32: the newest one's twin is theirs too.
                let other = self.verdict(index, &asset, &folder, &prompt, &["--tokens", &count])?;
                let rounding = share(&other.logits, &half.logits)?;
                let other = self.verdict(index, &folder.join("judge/twin.aimodel"), &folder, &prompt, &[])?;
                let error = share(&other.logits, &twin.logits)?;
                println!(
                    "  {release} against {}: {error:.1e}, in half floats {rounding:.1e}",
                    RELEASES[0]
                );
                ensure!(rounding <= HALF && error <= EXACT, "{release} differs by {error:.1e}");
            }
        }
        Ok(())
    }

    fn verdict(&self, release: usize, asset: &Path, folder: &Path, prompt: &[u32], more: &[&str]) -> Result<Verdict> {
        let out = folder.join("judge");
        let mut command = Command::new(&self.pythons[release]);
        command
            .arg(repo::root().join("xtask/coreai/judge.py"))
            .arg(asset)
            .arg(&out);
        command
            .args(["--prompt", &joined(prompt), "--tokens", &self.tokens.to_string()])
            .args(more);
        let printed = output(&mut command)?;
        let answer = printed
            .lines()
            .find_map(|line| serde_json::from_str::<Value>(line).ok());
        let answer = answer.context("the judge gave no answer")?;
        let bytes = std::fs::read(out.join("logits.f32"))?;
        let logits = bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok(Verdict {
            tokens: serde_json::from_value(answer["tokens"].clone())?,
            logits: logits.collect(),
        })
    }

    /// f32 logits of `planish logits`, `[tokens, v]`.
    fn expected(&self, model: &Path, folder: &Path, ids: &[u32]) -> Result<Vec<f32>> {
        let out = folder.join("logits.safetensors");
        let mut command = Command::new(&self.planish);
        command.args(["logits", "--backend", "cpu", "--tokens", &joined(ids), "--model"]);
        output(command.arg(model).arg("--out").arg(&out))?;
        Ok(TensorStore::open(&out)?.require("logits")?.to_f32()?)
    }
}

fn joined(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// Largest difference as a share of the largest expected number.
fn share(found: &[f32], expected: &[f32]) -> Result<f32> {
    ensure!(
        found.len() == expected.len(),
        "{} logits, expected {}",
        found.len(),
        expected.len()
    );
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let pairs = found.iter().zip(expected);
    // A NaN must not look small.
    let worst = pairs.fold(0f32, |m, (a, b)| if (a - b).abs() <= m { m } else { (a - b).abs() });
    ensure!(worst.is_finite(), "a logit is not finite");
    Ok(worst / largest)
}

fn argmax(row: &[f32]) -> u32 {
    let larger = |best: usize, at: usize| if row[at] > row[best] { at } else { best };
    (0..row.len()).fold(0, larger) as u32
}

fn virtual_environment(release: &str) -> Result<PathBuf> {
    let folder = repo::root().join(format!("target/coreai-venv-{release}"));
    let python = folder.join("bin/python");
    if !python.is_file() {
        output(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    }
    let package = format!("coreai-core=={release}");
    output(Command::new(&python).args(["-m", "pip", "install", "--quiet", &package, "numpy>=2.3"]))?;
    Ok(python)
}

/// The exporter as a program of its own: unlike `planish` it needs no MLX.
fn build_exporter() -> Result<PathBuf> {
    let mut build = repo::command(&["cargo", "build", "--release", "-p", "planish-export"]);
    let printed = output(build.args(["--example", "export_coreai", "--message-format=json"]))?;
    let artifacts = printed
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut programs = artifacts.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    programs.next_back().context("cargo named no executable")
}

fn work_folder() -> Result<PathBuf> {
    let folder = repo::root().join("target/coreai-check");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

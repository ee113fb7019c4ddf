//! `cargo xtask coreml-check`: packages of planish-export judged by Apple's coremltools and an interpreter that is not ours.
//!
//! The judges are scripts in `shared/tools/coreml` beside the checkout; where they are absent the command says so and
//! ends well. For both golden models, and for random configurations of every family: export in every layout, lint, load
//! with coremltools, compare logits and cache in f32 and fp16 arithmetic, and the same with compressed weights; then break good packages and see each mutant
//! noticed. With `--model` and `--adapter` a real model is judged instead (`trained`).

mod trained;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::program::build_planish;
use crate::repo;

/// What the virtual environment holds.
const PACKAGES: [&str; 3] = ["coremltools==9.0", "numpy==2.4.6", "protobuf==7.36.2"];
/// Compressed weights.
const FORMATS: [&str; 4] = ["int8", "int4", "lut6", "lut4"];
/// Layouts as the exporter and as the judge call them: name, layout, cache, judge's name.
const LAYOUTS: [(&str, &str, &str, &str); 3] = [
    ("state.mlpackage", "monolith", "state", "monolith"),
    ("host.mlpackage", "monolith", "host", "host"),
    ("anemll", "anemll", "state", "anemll"),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Random configurations beside the golden models
    #[arg(long, default_value_t = 6)]
    random: u64,
    /// Leave out the mutation test
    #[arg(long)]
    no_mutants: bool,
    /// Judge this model in every layout instead: 32 decoded tokens against `planish logits`
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Its adapter
    #[arg(long, value_name = "DIR", requires = "model")]
    adapter: Option<PathBuf>,
    /// A program that is built already
    #[arg(long, value_name = "FILE", requires = "model")]
    planish: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let tools = repo::root().join("../shared/tools/coreml");
    if !tools.join("oracle.py").is_file() {
        println!(
            "skipped: {} is absent; it holds the judges of this check",
            tools.display()
        );
        return Ok(());
    }
    if let Some(model) = &args.model {
        let judge = Judge {
            python: virtual_environment()?,
            tools,
            exporter: PathBuf::new(),
            work: work_folder("coreml-trained")?,
        };
        let trained = trained::Trained {
            model,
            adapter: args.adapter.as_deref(),
            planish: &args.planish.clone().map_or_else(build_planish, Ok)?,
        };
        return trained.run(&judge);
    }
    let judge = Judge {
        python: virtual_environment()?,
        tools,
        exporter: build_exporter()?,
        work: work_folder("coreml-check")?,
    };
    judge.tool("blob_golden.py", &["--out", &judge.path("blob")])?;
    judge.tool(
        "make_golden.py",
        &["build", "--out", &judge.path("golden"), "--no-packages"],
    )?;
    let mut models = vec!["llama-tiny".to_owned(), "qwen3-tiny".to_owned()];
    for seed in 0..args.random {
        models.push(judge.random_model(seed)?);
    }
    let mut failures = Vec::new();
    for model in &models {
        println!("{model}");
        if let Err(error) = judge.model(model, !args.no_mutants && model.ends_with("tiny")) {
            println!("  FAILED {error:#}");
            failures.push(format!("{model}: {error:#}"));
        }
    }
    ensure!(
        failures.is_empty(),
        "{} models failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    println!("{} models passed", models.len());
    Ok(())
}

struct Judge {
    python: PathBuf,
    tools: PathBuf,
    exporter: PathBuf,
    work: PathBuf,
}

impl Judge {
    fn model(&self, name: &str, mutants: bool) -> Result<()> {
        let model = self.work.join("golden").join(name);
        for (file, layout, cache, judged_as) in LAYOUTS {
            let out = self.export(&model, file, layout, cache, "fp16")?;
            self.compare(&model, &out, judged_as)?;
            if mutants && layout == "monolith" {
                let printed = self.tool("mutate.py", &[&text(&out), "--out", &self.path("mutants")])?;
                println!("  {cache}: {}", printed.lines().last().unwrap_or_default());
            }
        }
        for format in FORMATS {
            println!("  {format}");
            self.compressed(&model, format)?;
        }
        Ok(())
    }

    /// Every layout with one format, against the numpy forward pass over the weights that the package holds.
    fn compressed(&self, model: &Path, format: &str) -> Result<()> {
        let reference = model.join(format!("reference-{format}"));
        for (file, layout, cache, judged_as) in LAYOUTS {
            let out = self.export(model, &format!("{format}-{file}"), layout, cache, format)?;
            if cache == "state" && layout == "monolith" {
                output(
                    Command::new(&self.python)
                        .arg(repo::root().join("xtask/coreml/stored_reference.py"))
                        .args([self.tools.as_path(), model, &out, &reference]),
                )?;
            }
            self.compare(&reference, &out, judged_as)?;
        }
        Ok(())
    }

    fn export(&self, model: &Path, file: &str, layout: &str, cache: &str, format: &str) -> Result<PathBuf> {
        let golden: Value = serde_json::from_slice(&std::fs::read(model.join("golden.json"))?)?;
        let number = |key: &str| golden[key].to_string();
        let chunks = if layout == "anemll" {
            number("num_chunks")
        } else {
            "-".into()
        };
        let out = model.join(file);
        let mut export = Command::new(&self.exporter);
        export.arg(model).arg(&out).args([layout, cache, format]);
        export.args([
            number("context_length"),
            number("batch_size"),
            chunks,
            number("split_lm_head"),
        ]);
        output(export.arg("check"))?;
        Ok(out)
    }

    /// Lint, coremltools' loader, logits and cache in both precisions.
    fn compare(&self, golden: &Path, out: &Path, judged_as: &str) -> Result<()> {
        for package in packages(out)? {
            self.tool("validate.py", &[&text(&package)])?;
        }
        for precision in ["f32", "f16"] {
            let (golden, out) = (text(golden), text(out));
            let arguments = [
                "check",
                "--golden",
                &golden,
                "--package",
                &out,
                "--layout",
                judged_as,
                "--prec",
                precision,
            ];
            print!("  {}", self.tool("make_golden.py", &arguments)?);
        }
        Ok(())
    }

    /// A configuration that no fixed list holds; the same seed gives the same one.
    fn random_model(&self, seed: u64) -> Result<String> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut pick = |choices: &[u64]| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            choices[(state >> 33) as usize % choices.len()]
        };
        let family = ["llama", "qwen2", "qwen3"][pick(&[0, 1, 2]) as usize];
        let (kv, layers, vocab) = (pick(&[1, 2, 3]), pick(&[1, 2, 3, 5]), pick(&[97, 128, 250]));
        let scaling = [
            Value::Null,
            json!({ "type": "linear", "factor": 4.0 }),
            json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32 }),
        ][pick(&[0, 1, 2]) as usize]
            .clone();
        let parts = if vocab == 97 { 1 } else { pick(&[1, 2]) };
        let config = json!({
            "model_type": family, "hidden_size": pick(&[48, 80, 128]), "intermediate_size": pick(&[40, 96]),
            "num_hidden_layers": layers, "num_attention_heads": kv * pick(&[1, 2, 3, 7]), "num_key_value_heads": kv,
            "head_dim": pick(&[8, 24, 32, 64]), "vocab_size": vocab, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
            "rope_scaling": scaling, "tie_word_embeddings": pick(&[0, 1]) == 1,
            "attention_bias": family != "qwen2" && pick(&[0, 1]) == 1,
            "golden": { "context_length": pick(&[16, 37, 64]), "batch_size": pick(&[1, 4, 12]), "split_lm_head": parts,
                        "num_chunks": 1 + pick(&[0, 1, 2]) % layers },
        });
        let name = format!("random-{seed}");
        let path = self.work.join(format!("{name}.json"));
        std::fs::write(&path, config.to_string())?;
        let seed = seed.to_string();
        let out = self.path("golden");
        self.tool(
            "make_golden.py",
            &[
                "build",
                "--out",
                &out,
                "--config",
                &text(&path),
                "--no-packages",
                "--seed",
                &seed,
            ],
        )?;
        Ok(name)
    }

    fn tool(&self, script: &str, arguments: &[&str]) -> Result<String> {
        output(Command::new(&self.python).arg(self.tools.join(script)).args(arguments))
    }

    fn path(&self, name: &str) -> String {
        text(&self.work.join(name))
    }
}

/// The package itself, or those of a folder.
fn packages(out: &Path) -> Result<Vec<PathBuf>> {
    if out.join("Manifest.json").is_file() {
        return Ok(vec![out.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(out)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "mlpackage") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn virtual_environment() -> Result<PathBuf> {
    let folder = repo::root().join("target/coreml-venv");
    let python = folder.join("bin/python");
    if !python.is_file() {
        output(Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    }
    output(
        Command::new(&python)
            .args(["-m", "pip", "install", "--quiet"])
            .args(PACKAGES),
    )?;
    Ok(python)
}

/// The exporter as a program of its own: unlike `planish` it needs no MLX.
fn build_exporter() -> Result<PathBuf> {
    let mut build = Command::new("cargo");
    build.current_dir(repo::root());
    build.args([
        "build",
        "--release",
        "-p",
        "planish-export",
        "--example",
        "export_model",
        "--message-format=json",
    ]);
    let printed = output(&mut build)?;
    let artifacts = printed
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let mut programs = artifacts.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    let program = programs.next_back();
    program.context("cargo named no executable")
}

fn work_folder(name: &str) -> Result<PathBuf> {
    let folder = repo::root().join("target").join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Standard output of a command that must succeed; what it printed otherwise.
fn output(command: &mut Command) -> Result<String> {
    let result = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let printed = String::from_utf8_lossy(&result.stdout).into_owned();
    let errors = String::from_utf8_lossy(&result.stderr);
    ensure!(result.status.success(), "{command:?} failed:\n{printed}{errors}");
    Ok(printed)
}

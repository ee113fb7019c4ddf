//! Adapters between planish, mlx-lm and PEFT: whoever made one, the others load it and give the same logits.
//!
//! mlx-lm makes LoRA and DoRA adapters of every tiny model, PEFT makes LoRA, rsLoRA and DoRA ones; planish trains LoRA and
//! DoRA ones of the model that has a tokenizer. Each is carried into the other layout by `planish adapter convert`. Then
//! mlx-lm loads those in its layout, PEFT those in its own, and both must give planish's logits.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use planish_checkpoint::adapter::{Adapter, ReadOptions};
use planish_tensors::TensorStore;
use serde_json::{Value, json};

use super::{mlx_lm_python, peft_python, planish_logits, relative_difference, work_folder};
use crate::program::output;
use crate::repo;

const LIMIT: f64 = 1e-3;
/// Any tokens will do; every tiny model has more than 64.
const TOKENS: [u32; 12] = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 50, 61];

/// Compares all, prints what was found, and returns what failed.
pub(super) fn compare(planish: &Path, models: &[PathBuf]) -> Result<Vec<String>> {
    let folder = work_folder().join("adapters");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let mlx_lm = Peer::new("mlx-lm", mlx_lm_python()?, "mlx_lm_adapters.py", &folder);
    let peft = Peer::new("peft", peft_python()?, "peft_adapters.py", &folder);

    let mut cases = Vec::new();
    for (peer, methods) in [(&mlx_lm, &["lora", "dora"][..]), (&peft, &["lora", "rslora", "dora"])] {
        let made: Vec<Case> = models
            .iter()
            .flat_map(|model| {
                methods
                    .iter()
                    .map(|method| Case::new(&folder, peer.name, method, model))
            })
            .collect();
        peer.run(
            "make",
            made.iter().enumerate().map(|(seed, case)| case.make(seed)).collect(),
        )?;
        cases.extend(made);
    }
    for method in ["lora", "dora"] {
        let case = Case::new(&folder, "planish", method, &models[0]);
        train(planish, &case, method)?;
        cases.push(case);
    }
    for case in &cases {
        case.convert(planish)?;
    }
    for peer in [&mlx_lm, &peft] {
        let jobs = cases.iter().map(|case| case.load(peer.name)).collect::<Result<_>>()?;
        peer.run("load", jobs)?;
    }
    report(planish, &cases)
}

/// An adapter: who made it, how, and for which model.
struct Case {
    maker: &'static str,
    method: String,
    model: PathBuf,
    folder: PathBuf,
}

impl Case {
    fn new(folder: &Path, maker: &'static str, method: &str, model: &Path) -> Self {
        let name = model.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self {
            maker,
            method: method.to_string(),
            model: model.to_path_buf(),
            folder: folder.join(format!("{maker}-{method}-{name}")),
        }
    }

    /// The adapter in a layout, made or converted.
    fn layout(&self, layout: &str) -> PathBuf {
        self.folder.join(layout)
    }

    /// In which layout it was made.
    fn home(&self) -> &'static str {
        if self.maker == "peft" { "peft" } else { "mlx-lm" }
    }

    fn logits_of(&self, peer: &str) -> PathBuf {
        self.folder.join(format!("{peer}.safetensors"))
    }

    fn make(&self, seed: usize) -> Value {
        json!({"make": self.method, "model": self.model, "out": self.layout(self.home()), "seed": seed})
    }

    fn load(&self, peer: &str) -> Result<Value> {
        let (adapter, _) = Adapter::read(&self.layout(peer), &ReadOptions::default())?;
        let modules = adapter.modules().len();
        let (load, out) = (self.layout(peer), self.logits_of(peer));
        Ok(json!({"load": load, "model": self.model, "tokens": TOKENS, "out": out, "modules": modules}))
    }

    fn convert(&self, planish: &Path) -> Result<()> {
        let other = if self.home() == "peft" { "mlx-lm" } else { "peft" };
        let mut command = Command::new(planish);
        command
            .args(["adapter", "convert"])
            .arg(self.layout(self.home()))
            .arg(self.layout(other));
        command.args(["--to", other, "--model"]).arg(&self.model);
        output(&mut command).map(drop)
    }
}

/// A few updates on a few rows: enough for an adapter that shows.
fn train(planish: &Path, case: &Case, method: &str) -> Result<()> {
    let mut command = Command::new(planish);
    command.args(["train", "--backend", "cpu", "--model"]).arg(&case.model);
    command.arg("--data").arg(repo::root().join("xtask/parity/rows"));
    command.arg("--out").arg(case.layout("mlx-lm"));
    let method = format!("lora.method={method}");
    for setting in [
        "train.steps=6",
        "optimizer.learning_rate=5e-3",
        "schedule.warmup_steps=0",
        &method,
    ] {
        command.args(["--set", setting]);
    }
    output(&mut command).map(drop)
}

fn report(planish: &Path, cases: &[Case]) -> Result<Vec<String>> {
    let mut failures = Vec::new();
    for case in cases {
        let name = format!(
            "{} of {}, {}",
            case.method,
            case.maker,
            case.model.file_name().unwrap_or_default().display()
        );
        let mut found = Vec::new();
        for layout in ["mlx-lm", "peft"] {
            let ours = planish_logits(planish, &case.model, Some(&case.layout(layout)), &TOKENS)?;
            for peer in ["mlx-lm", "peft"] {
                let theirs = TensorStore::open(&case.logits_of(peer))?.require("logits")?.to_f32()?;
                let difference = relative_difference(&ours, &theirs).with_context(|| name.clone())?;
                found.push(difference);
            }
            if layout == case.home() {
                let base = planish_logits(planish, &case.model, None, &TOKENS)?;
                let shows = relative_difference(&ours, &base)?;
                if shows < 10.0 * LIMIT {
                    failures.push(format!("{name}: the adapter moves the logits by {shows:.1e} only"));
                }
            }
        }
        let worst = found.iter().copied().fold(0.0, f64::max);
        let against = |at: usize| found[at].max(found[at + 2]);
        println!(
            "  {name}: {:.1e} from mlx-lm, {:.1e} from PEFT, of the largest logit",
            against(0),
            against(1)
        );
        if worst > LIMIT {
            failures.push(format!("{name}: logits differ by {worst:.1e}"));
        }
    }
    Ok(failures)
}

/// A library in its Python.
struct Peer {
    name: &'static str,
    python: PathBuf,
    script: PathBuf,
    folder: PathBuf,
}

impl Peer {
    fn new(name: &'static str, python: PathBuf, script: &str, folder: &Path) -> Self {
        let script = repo::root().join("xtask/parity").join(script);
        Self {
            name,
            python,
            script,
            folder: folder.to_path_buf(),
        }
    }

    /// All jobs in one process: the libraries take long to load.
    fn run(&self, what: &str, jobs: Vec<Value>) -> Result<()> {
        let file = self.folder.join(format!("{}-{what}.json", self.name));
        std::fs::write(&file, Value::from(jobs).to_string())?;
        println!("{} {}s adapters", self.name, what);
        output(Command::new(&self.python).arg(&self.script).arg(&file)).map(drop)
    }
}

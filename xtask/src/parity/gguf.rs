//! SmolLM2 with an adapter merged in, exported as GGUF, in llama.cpp: it must cut the prompts into the same tokens and find
//! the same five next tokens likeliest as `planish logits`.
//!
//! llama.cpp comes as the prebuilt library of the npm package node-llama-cpp, installed without running its scripts.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::{mlx_lm_python, planish_logits, work_folder};
use crate::program::output;
use crate::repo;

const VERSION: &str = "3.22.1";
const TOP: usize = 5;
/// Logits nearer than this, of some 20, may change places: two programs add up in different orders.
const TIE: f32 = 0.02;
/// The same for block types, whose inputs llama.cpp rounds to 8 bits.
const TIE_OF_BLOCKS: f32 = 0.25;
/// Types of the weights, and whether what the model says after rounding them is asked from the file, imported again.
const TYPES: [(&str, bool); 5] = [
    ("f32", false),
    ("f16", false),
    ("bf16", false),
    ("q8_0", true),
    ("q4_0", true),
];

/// Compares, prints what was found, and returns what failed.
pub(super) fn compare(planish: &Path, model: &Path) -> Result<Vec<String>> {
    let folder = work_folder().join("gguf");
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    let adapter = folder.join("adapter");
    train(planish, model, &adapter)?;
    let prompts = prompts()?;
    let expected = prompts
        .iter()
        .zip(tokens(model, &prompts)?)
        .map(|(prompt, tokens)| Expected::compute(planish, model, &adapter, prompt, tokens))
        .collect::<Result<Vec<_>>>()?;
    let node = Node::install()?;
    let mut failures = Vec::new();
    for (kind, is_blocks) in TYPES {
        let file = folder.join(format!("{kind}.gguf"));
        let mut export = Command::new(planish);
        export.args(["export", "gguf", "--type", kind, "--model"]).arg(model);
        output(export.arg("--adapter").arg(&adapter).arg("--out").arg(&file))?;
        let found = node.top(&file, &prompts)?;
        let result = if is_blocks {
            let of_file = Expected::of_file(planish, &file, &expected)?;
            report(kind, &of_file, &found, TIE_OF_BLOCKS)
        } else {
            report(kind, &expected, &found, TIE)
        };
        std::fs::remove_file(&file)?;
        match result {
            Ok(same) if same < expected.len() => {
                failures.push(format!(
                    "gguf {kind}: {same} of {} prompts have the same top {TOP}",
                    expected.len()
                ));
            }
            Ok(_) => {}
            Err(error) => failures.push(format!("gguf {kind}: {error:#}")),
        }
    }
    Ok(failures)
}

/// What planish says about a prompt.
struct Expected {
    tokens: Vec<u32>,
    /// After the last token, for every token.
    logits: Vec<f32>,
}

/// What llama.cpp says.
struct Found {
    tokens: Vec<u32>,
    top: Vec<(u32, f32)>,
}

impl Expected {
    fn compute(planish: &Path, model: &Path, adapter: &Path, prompt: &str, tokens: Vec<u32>) -> Result<Self> {
        let all = planish_logits(planish, model, Some(adapter), &tokens).with_context(|| prompt.to_string())?;
        let vocab_size = all.len() / tokens.len();
        let logits = all[all.len() - vocab_size..].to_vec();
        let base = planish_logits(planish, model, None, &tokens)?;
        let moved = super::relative_difference(&logits, &base[base.len() - vocab_size..])?;
        ensure!(moved > 0.01, "the adapter moves the logits by {moved:.1e} only");
        Ok(Self { tokens, logits })
    }

    /// The same prompts to the model that a file holds.
    fn of_file(planish: &Path, file: &Path, prompts: &[Self]) -> Result<Vec<Self>> {
        let imported = file.with_extension("imported");
        let mut import = Command::new(planish);
        import.arg("import").arg(file).args(["--dtype", "f32", "--out"]);
        output(import.arg(&imported))?;
        let last = |tokens: &Vec<u32>| -> Result<Self> {
            let all = planish_logits(planish, &imported, None, tokens)?;
            let vocab_size = all.len() / tokens.len();
            Ok(Self {
                tokens: tokens.clone(),
                logits: all[all.len() - vocab_size..].to_vec(),
            })
        };
        let found = prompts.iter().map(|prompt| last(&prompt.tokens)).collect();
        std::fs::remove_dir_all(&imported)?;
        found
    }

    fn top(&self) -> Vec<(u32, f32)> {
        let mut all: Vec<(u32, f32)> = (0..).zip(self.logits.iter().copied()).collect();
        all.sort_by(|a, b| b.1.total_cmp(&a.1));
        all.truncate(TOP);
        all
    }

    /// Whether `found` may be called the same five: in the same order, but for places that a tie may change.
    fn agrees(&self, found: &[(u32, f32)], tie: f32) -> bool {
        let near = |(ours, theirs): (&(u32, f32), &(u32, f32))| {
            let logit = self.logits.get(theirs.0 as usize);
            ours.0 == theirs.0 || logit.is_some_and(|logit| (logit - ours.1).abs() <= tie)
        };
        found.len() == TOP && self.top().iter().zip(found).all(near)
    }
}

/// Prints a line a type; gives the number of prompts that agree.
fn report(kind: &str, expected: &[Expected], found: &[Found], tie: f32) -> Result<usize> {
    ensure!(found.len() == expected.len(), "{} answers", found.len());
    let (mut same, mut identical, mut largest) = (0, 0, 0.0f32);
    for (ours, theirs) in expected.iter().zip(found) {
        ensure!(
            ours.tokens == theirs.tokens,
            "tokens {:?}, expected {:?}",
            theirs.tokens,
            ours.tokens
        );
        same += usize::from(ours.agrees(&theirs.top, tie));
        let ids = |top: &[(u32, f32)]| top.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        identical += usize::from(ids(&ours.top()) == ids(&theirs.top));
        for (id, logit) in &theirs.top {
            let ours = ours
                .logits
                .get(*id as usize)
                .context("a token outside the vocabulary")?;
            largest = largest.max((ours - logit).abs());
        }
    }
    let total = expected.len();
    println!(
        "  gguf {kind}: same top {TOP} for {same} of {total} prompts ({identical} in the same order), logits within {largest:.1e}"
    );
    Ok(same)
}

fn prompts() -> Result<Vec<String>> {
    let text = std::fs::read_to_string(repo::root().join("xtask/parity/prompts.txt"))?;
    Ok(text.lines().map(str::to_string).collect())
}

/// The prompts in tokens, by the tokenizers library that the model was made with.
fn tokens(model: &Path, prompts: &[String]) -> Result<Vec<Vec<u32>>> {
    const SCRIPT: &str = "import json, sys; from tokenizers import Tokenizer; \
        t = Tokenizer.from_file(sys.argv[1]); print(json.dumps([t.encode(p).ids for p in json.loads(sys.argv[2])]))";
    let mut command = Command::new(mlx_lm_python()?);
    command.args(["-c", SCRIPT]).arg(model.join("tokenizer.json"));
    let printed = output(command.arg(json!(prompts).to_string()))?;
    Ok(serde_json::from_str(&printed)?)
}

fn train(planish: &Path, model: &Path, out: &Path) -> Result<()> {
    let mut command = Command::new(planish);
    command
        .args(["train", "--backend", "cpu", "--model"])
        .arg(model)
        .arg("--out")
        .arg(out);
    command.arg("--data").arg(repo::root().join("xtask/parity/rows"));
    for setting in [
        "train.steps=4",
        "train.batch_size=2",
        "optimizer.learning_rate=1e-3",
        "schedule.warmup_steps=0",
    ] {
        command.args(["--set", setting]);
    }
    println!("gguf: training an adapter for {}", model.display());
    output(&mut command).map(drop)
}

/// llama.cpp in Node.
struct Node {
    folder: PathBuf,
}

impl Node {
    fn install() -> Result<Self> {
        let folder = work_folder().join("node");
        let complete = folder.join(".complete");
        let mut packages = vec![format!("node-llama-cpp@{VERSION}")];
        let mut options = vec!["install", "--ignore-scripts", "--no-audit", "--no-fund"];
        if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            // The libraries are optional dependencies, those for NVIDIA and Vulkan among them: 600 MB that nobody needs.
            packages.push(format!("@node-llama-cpp/linux-x64@{VERSION}"));
            options.push("--omit=optional");
        }
        let wanted = packages.join(" ");
        if std::fs::read_to_string(&complete).is_ok_and(|found| found == wanted) {
            return Ok(Self { folder });
        }
        println!("installing {wanted}");
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("package.json"), r#"{"private": true, "type": "module"}"#)?;
        output(Command::new("npm").args(options).args(packages).current_dir(&folder))?;
        std::fs::write(complete, wanted)?;
        Ok(Self { folder })
    }

    fn top(&self, file: &Path, prompts: &[String]) -> Result<Vec<Found>> {
        // Node looks for packages beside the script.
        let script = self.folder.join("llama_cpp_top.mjs");
        std::fs::copy(repo::root().join("xtask/parity/llama_cpp_top.mjs"), &script)?;
        let texts = self.folder.join("prompts.json");
        std::fs::write(&texts, json!(prompts).to_string())?;
        let printed = output(
            Command::new("node")
                .arg(&script)
                .arg(file)
                .arg(&texts)
                .arg(TOP.to_string()),
        )?;
        let answers: Vec<Value> = serde_json::from_str(printed.trim())?;
        answers
            .iter()
            .map(|answer| Found::read(answer).context("llama_cpp_top.mjs printed another form"))
            .collect()
    }
}

impl Found {
    fn read(answer: &Value) -> Option<Self> {
        let id = |value: &Value| u32::try_from(value.as_u64()?).ok();
        let tokens = answer["tokens"].as_array()?.iter().map(id).collect::<Option<_>>()?;
        let pair = |pair: &Value| Some((id(&pair[0])?, pair[1].as_f64()? as f32));
        let top = answer["top"].as_array()?.iter().map(pair).collect::<Option<_>>()?;
        Some(Self { tokens, top })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_may_change_places_and_nothing_else_may() {
        let expected = Expected {
            tokens: vec![1],
            logits: vec![9.0, 8.0, 7.0, 6.0, 5.0, 4.99, 1.0],
        };
        let found = |ids: [u32; 5]| ids.map(|id| (id, 0.0));
        assert!(expected.agrees(&found([0, 1, 2, 3, 4]), TIE));
        assert!(expected.agrees(&found([0, 1, 2, 3, 5]), TIE));
        assert!(!expected.agrees(&found([0, 1, 2, 3, 6]), TIE));
        assert!(!expected.agrees(&found([1, 0, 2, 3, 4]), TIE));
        assert!(!expected.agrees(&found([0, 1, 2, 3, 99]), TIE));
        assert!(!expected.agrees(&[], TIE));
    }
}

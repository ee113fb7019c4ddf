//! Runs that are told to end, that diverge, or that could never have been meant.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_checkpoint::adapter::Method;
use planish_tensors::{HostTensor, TensorStore};

use crate::adapters::write_adapter;
use crate::run::{Ran, planish, text, tiny_model};
use crate::train_command::data_folder;

/// `train` on the tiny model with a few settings.
fn train(dir: &Path, out: &Path, settings: &[&str]) -> Ran {
    let (model, data) = (tiny_model(), dir.join("data"));
    let args = [
        "train",
        "--model",
        text(model),
        "--data",
        text(&data),
        "--out",
        text(out),
    ];
    let settings = settings.iter().flat_map(|setting| ["--set", setting]);
    planish(&args.into_iter().chain(settings).collect::<Vec<_>>())
}

fn world() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    data_folder(dir.path());
    let out = dir.path().join("out");
    (dir, out)
}

#[cfg(unix)]
mod signals {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// Starts `train` with these arguments.
    fn start(args: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_planish"))
            .arg("train")
            .args(args)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Waits until the run has reported a step after `step`, and sends a signal; gives the exit code and the messages.
    fn end(mut child: Child, out: &Path, step: u64, signal: &str) -> (Option<i32>, String) {
        let deadline = Instant::now() + Duration::from_secs(180);
        while last_step(out) <= step {
            assert!(Instant::now() < deadline, "the run did not get beyond step {step}");
            assert!(child.try_wait().unwrap().is_none(), "the run ended by itself");
            std::thread::sleep(Duration::from_millis(50));
        }
        let sent = Command::new("kill")
            .args([signal, &child.id().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
        let ended = child.wait_with_output().unwrap();
        (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
    }

    fn last_step(out: &Path) -> u64 {
        let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
        let lines = text
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let steps = lines
            .filter(|line| line["kind"] == "train")
            .filter_map(|line| line["step"].as_u64());
        steps.max().unwrap_or(0)
    }

    /// Every signal that asks a run to end, in turn: each time a checkpoint, and the command that goes on, which needs
    /// nothing but the folder.
    #[test]
    fn cli_signals_end_a_run_with_a_checkpoint_and_the_command_that_goes_on() {
        let (dir, out) = world();
        let (model, data) = (tiny_model(), dir.path().join("data"));
        let first = ["--model", text(model), "--data", text(&data), "--out", text(&out)];
        let settings = ["--set", "train.steps=100000", "--set", "logging.report_every=1"];
        let more = ["--set", "logging.samples=0"];
        let mut child = start(&[&first[..], &settings, &more].concat());
        let mut step = 0;
        for (signal, code) in [("-TERM", 143), ("-HUP", 129), ("-INT", 130)] {
            let (ended, said) = end(child, &out, step, signal);
            assert_eq!(ended, Some(code), "{said}");
            let command = format!("go on with: planish train --resume --out {}", out.display());
            assert!(said.trim_end().ends_with(&command), "{said}");
            step = last_step(&out);
            assert!(out.join(format!("checkpoints/step-{step:07}/state.json")).exists());
            child = start(&["--resume", "--out", text(&out)]);
        }
        let (ended, said) = end(child, &out, step, "-TERM");
        assert_eq!(ended, Some(143), "{said}");
        assert!(said.contains(&format!("resuming at step {step}")), "{said}");
    }
}

#[test]
fn cli_what_cannot_be_meant_is_refused_and_leaves_nothing() {
    let (dir, out) = world();
    for (setting, word) in [
        ("optimizer.learning_rate=1e30", "at most 1000"),
        ("backend.memory_limit=0", "above 0"),
        ("lora.rank=100000", "at most"),
    ] {
        let ran = train(dir.path(), &out, &["train.steps=1", setting]);
        assert!(ran.code == Some(1) || ran.code == Some(2), "{setting}: {:?}", ran.code);
        let key = setting.split_once('=').unwrap().0;
        assert!(
            ran.stderr.contains(key) && ran.stderr.contains(word),
            "{setting}: {}",
            ran.stderr
        );
        assert!(!out.exists(), "{setting}");
    }
}

#[test]
fn cli_training_that_made_the_model_worse_says_which_adapter_is_kept() {
    let (dir, out) = world();
    let ran = train(
        dir.path(),
        &out,
        &["train.steps=4", "optimizer.learning_rate=100", "logging.samples=0"],
    );
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let warning = "every evaluation was worse than the untrained model; the adapter kept is that of step 4";
    assert!(ran.stderr.contains(warning), "{}", ran.stderr);
    let page = dir.path().join("page.html");
    planish(&["report", text(&out), "--out", text(&page)]).success();
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("at update 0: every later evaluation was worse"), "{page}");
}

/// An adapter with a NaN, and one that is finite and makes the model overflow: commands fail, and say which adapter and why.
#[test]
fn cli_adapter_of_a_diverged_run_is_named() {
    let (dir, _) = world();
    let (adapter, huge) = (dir.path().join("diverged"), dir.path().join("huge"));
    write_adapter(&huge, Method::Lora, 1e30);
    write_adapter(&adapter, Method::Lora, 1e-3);
    let file = adapter.join("adapters.safetensors");
    let mut tensors: BTreeMap<String, HostTensor> = {
        let store = TensorStore::open(&file).unwrap();
        store
            .iter()
            .map(|view| (view.name.to_owned(), view.to_host()))
            .collect()
    };
    let first = tensors.values_mut().next().unwrap();
    first.bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    planish_tensors::write(&file, &tensors, &BTreeMap::new()).unwrap();
    let (model, valid) = (tiny_model(), dir.path().join("data/valid.jsonl"));
    let out = dir.path().join("left");
    let check = |adapter: &Path, command: &[&str], word: &str| {
        let words = if command[0] == "export" { 2 } else { 1 };
        let with = ["--model", text(model), "--adapter", text(adapter)];
        let ran = planish(&[&command[..words], &with, &command[words..]].concat());
        assert_eq!(ran.code, Some(1), "{command:?}: {}", ran.stderr);
        let is_named = ran.stderr.contains(text(adapter)) && ran.stderr.contains(word);
        assert!(is_named, "{command:?}: {}", ran.stderr);
        assert!(!out.exists(), "{command:?}");
    };
    let (eval, generate) = (
        ["eval", "--data", text(&valid)],
        ["generate", "--prompt", "hi", "--max-tokens", "4"],
    );
    check(&huge, &eval, "not finite");
    check(&huge, &generate, "not finite");
    check(&adapter, &eval, "diverged");
    check(&adapter, &generate, "diverged");
    for command in [&["fuse"][..], &["export", "safetensors"], &["export", "gguf"]] {
        check(&adapter, &[command, &["--out", text(&out)]].concat(), "diverged");
    }
}

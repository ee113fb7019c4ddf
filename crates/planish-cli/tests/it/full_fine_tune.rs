//! A full fine-tune is a model folder like any other, and an adapter of its base.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::adapters::{difference, logits};
use crate::run::{planish, text, tiny_model};

const STEPS: usize = 10;

fn data(dir: &Path) -> PathBuf {
    let data = dir.join("data");
    std::fs::create_dir(&data).unwrap();
    let row = |i: usize| {
        serde_json::json!({"messages": [
            {"role": "user", "content": format!("What is {i}?")},
            {"role": "assistant", "content": format!("It is {i}, and so on.")},
        ]})
    };
    let rows: String = (0..16).map(|i| format!("{}\n", row(i))).collect();
    std::fs::write(data.join("train.jsonl"), rows).unwrap();
    data
}

fn command(data: &Path, out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_planish"));
    let model = tiny_model();
    command.args([
        "train",
        "--model",
        text(model),
        "--data",
        text(data),
        "--out",
        text(out),
    ]);
    let settings = [
        "lora.method=full",
        &format!("train.steps={STEPS}"),
        "checkpoint.every=2",
        "optimizer.learning_rate=1e-3",
        "logging.samples=0",
    ];
    for setting in settings {
        command.args(["--set", setting]);
    }
    command
}

/// Kills a run as soon as it has a checkpoint.
fn kill_after_a_checkpoint(data: &Path, out: &Path) {
    let mut child = command(data, out).stderr(Stdio::null()).spawn().unwrap();
    let (began, manifest) = (Instant::now(), out.join("checkpoints/step-0000002/manifest.json"));
    while !manifest.exists() && child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_secs(300), "no checkpoint");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn cli_full_fine_tune_is_a_model_and_an_adapter_of_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, run, data) = (tiny_model(), dir.path().join("run"), data(dir.path()));
    kill_after_a_checkpoint(&data, &run);
    crate::run::run(command(&data, &run).arg("--resume")).success();

    let trained = logits(&run, None);
    assert!(difference(&trained, &logits(base, None)) > 0.01, "it learnt nothing");
    let last = run.join(format!("checkpoints/step-{STEPS:07}"));
    assert_eq!(trained, logits(&last, None));
    assert_eq!(trained, logits(base, Some(&run)));
    assert_eq!(trained, logits(base, Some(&last)));

    let evaluate = |args: &[&str]| {
        let rows = data.join("train.jsonl");
        planish(&[&["eval", "--data", text(&rows), "--json"], args].concat()).success()
    };
    assert_eq!(
        evaluate(&["--model", text(&run)]),
        evaluate(&["--model", text(base), "--adapter", text(&run)])
    );
    let say = |args: &[&str]| {
        let prompt = ["generate", "--prompt", "What is 3?", "--max-tokens", "8"];
        planish(&[&prompt, args].concat()).success()
    };
    assert_eq!(
        say(&["--model", text(&run)]),
        say(&["--model", text(base), "--adapter", text(&run)])
    );
    exports_are_the_trained_model(dir.path(), &run, &trained);
}

/// Of the run alone and of the run over its base, in every format.
fn exports_are_the_trained_model(dir: &Path, run: &Path, trained: &[f32]) {
    let base = tiny_model();
    let ways: [&[&str]; 2] = [
        &["--model", text(run)],
        &["--model", text(base), "--adapter", text(run)],
    ];
    let export = |way: &[&str], name: &str, command: &[&str]| {
        let out = dir.join(name);
        planish(&[command, way, &["--out", text(&out)]].concat()).success();
        out
    };
    let mut packages = Vec::new();
    for (i, way) in ways.into_iter().enumerate() {
        let out = export(way, &format!("{i}"), &["export", "safetensors"]);
        assert_eq!(logits(&out, None), trained);
        let gguf = export(way, &format!("{i}.gguf"), &["export", "gguf", "--type", "f32"]);
        let back = dir.join(format!("back{i}"));
        planish(&["import", text(&gguf), "--out", text(&back), "--dtype", "f32"]).success();
        assert!(difference(&logits(&back, None), trained) < 1e-5);
        let package = export(way, &format!("{i}.mlpackage"), &["export", "coreml", "--context", "32"]);
        packages.push(std::fs::read(package.join("Data/com.apple.CoreML/weights/weight.bin")).unwrap());
    }
    assert!(packages[0] == packages[1], "the packages' weights differ");
    let fused = export(ways[1], "fused", &["fuse"]);
    assert_eq!(logits(&fused, None), trained);
}

//! `train` on the tiny model, and what becomes of its results.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::run::{planish, text, tiny_model};

/// A folder with six short conversations to learn and two to validate on.
pub(crate) fn data_folder(dir: &Path) -> PathBuf {
    let data = dir.join("data");
    std::fs::create_dir(&data).unwrap();
    let rows = |from: usize, to: usize| -> String {
        (from..to)
            .map(|i| {
                let turn = |role: &str, content: String| serde_json::json!({"role": role, "content": content});
                let messages = [
                    turn("user", format!("What is {i}?")),
                    turn("assistant", format!("It is {i}, my dear.")),
                ];
                format!("{}\n", serde_json::json!({"messages": messages}))
            })
            .collect()
    };
    std::fs::write(data.join("train.jsonl"), rows(0, 6)).unwrap();
    std::fs::write(data.join("valid.jsonl"), rows(6, 8)).unwrap();
    data
}

fn metrics(out: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == kind).collect()
}

#[test]
fn cli_train_learns_and_its_adapter_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data, out) = (tiny_model(), data_folder(dir.path()), dir.path().join("out"));
    let args = [
        "train",
        "--model",
        text(model),
        "--data",
        text(&data),
        "--out",
        text(&out),
    ];
    let settings = [
        "--set",
        "train.steps=12",
        "--set",
        "optimizer.learning_rate=2e-3",
        "--set",
        "model.kernels=composed", // as `eval` computes
        "--set",
        "logging.report_every=4",
    ];
    let ran = planish(&[&args[..], &settings].concat());
    assert_eq!(ran.stdout, format!("{}\n", out.display()), "{}", ran.stderr);
    assert_eq!(ran.code, Some(0));

    let reports = metrics(&out, "train");
    let losses: Vec<f64> = reports.iter().map(|line| line["loss"].as_f64().unwrap()).collect();
    assert_eq!(losses.len(), 3);
    assert!(losses[2] < 0.95 * losses[0], "{losses:?}");
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.contains("learning_rate = 0.002"), "{config}");

    let loss = |adapter: &[&str]| {
        let valid = data.join("valid.jsonl");
        let args = ["eval", "--model", text(model), "--data", text(&valid), "--json"];
        let document: Value = serde_json::from_str(&planish(&[&args[..], adapter].concat()).success()).unwrap();
        document["loss"].as_f64().unwrap()
    };
    let (base, tuned) = (loss(&[]), loss(&["--adapter", text(&out)]));
    assert!(tuned < base, "{tuned} {base}");
    let best = metrics(&out, "end")[0]["best_val_loss"].as_f64().unwrap();
    assert!((best - tuned).abs() < 1e-4, "eval {tuned}, training {best}");

    let shown: Value = serde_json::from_str(&planish(&["adapter", "show", text(&out), "--json"]).success()).unwrap();
    assert_eq!((&shown["rank"], &shown["scale"]), (&8.into(), &2.0.into()));
    assert_eq!(shown["modules"].as_array().unwrap().len(), 4 * 7);

    let peft = dir.path().join("peft");
    planish(&["adapter", "convert", text(&out), text(&peft), "--to", "peft"]).success();
    let through_peft = loss(&["--adapter", text(&peft)]);
    assert!((through_peft - tuned).abs() < 1e-6, "{through_peft} {tuned}");
}

#[test]
fn cli_train_refuses_a_filled_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data_folder(dir.path()), dir.path().join("out"));
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("precious"), "x").unwrap();
    let ran = planish(&[
        "train",
        "--model",
        text(tiny_model()),
        "--data",
        text(&data),
        "--out",
        text(&out),
    ]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains(text(&out)), "{}", ran.stderr);
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 1);
}

#[test]
fn cli_print_config_gives_every_default_and_the_changes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.toml");
    std::fs::write(&file, "[lora]\nrank = 4\n[train]\nseed = 7\n").unwrap();
    let args = [
        "train",
        "--config",
        text(&file),
        "--set",
        "lora.rank=16",
        "--backend",
        "cpu",
        "--print-config",
    ];
    let printed = planish(&args).success();
    for line in ["rank = 16", "seed = 7", "device = \"cpu\"", "learning_rate = 0.0001"] {
        assert!(printed.lines().any(|printed| printed == line), "{line} in {printed}");
    }
    // What is printed is a configuration file.
    std::fs::write(&file, &printed).unwrap();
    assert_eq!(
        planish(&["train", "--config", text(&file), "--print-config"]).success(),
        printed
    );
}

#[test]
fn cli_mistake_in_a_setting_is_wrong_usage_and_in_a_file_a_failure() {
    let ran = planish(&["train", "--set", "lora.rnak=8"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("nearest is `lora.rank`"), "{}", ran.stderr);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.toml");
    std::fs::write(&file, "[lora]\nrnak = 8\n").unwrap();
    let ran = planish(&["train", "--config", text(&file)]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("run.toml:2"), "{}", ran.stderr);
}

#[test]
fn cli_missing_data_prints_hint() {
    let ran = planish(&["train", "--model", text(tiny_model()), "--out", "x"]);
    assert_eq!(ran.code, Some(2));
    assert_eq!(
        ran.stderr,
        "error: --data is missing\nhint: give it, or data.path in the configuration file\n"
    );
}

#[test]
fn cli_broken_row_is_named_with_its_line_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (data_folder(dir.path()), dir.path().join("out"));
    std::fs::write(data.join("train.jsonl"), "{\"text\": \"fine\"}\n{\"text\": 3}\n").unwrap();
    let ran = planish(&[
        "train",
        "--model",
        text(tiny_model()),
        "--data",
        text(&data),
        "--out",
        text(&out),
    ]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("train.jsonl:2"), "{}", ran.stderr);
    assert!(!out.exists());
}

#[test]
fn cli_data_show_marks_what_is_trained() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_folder(dir.path());
    let shown = planish(&[
        "data",
        "show",
        text(&data),
        "--model",
        text(tiny_model()),
        "--rows",
        "1",
    ])
    .success();
    assert!(
        shown.contains("What is 0?") && shown.contains("[It is 0, my dear.<|im_end|>]"),
        "{shown}"
    );
}

#[test]
fn cli_data_show_sums_up_and_fails_where_rows_are_faulty() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_folder(dir.path());
    let rows = "{\"conversations\": [{\"from\": \"human\", \"value\": \"Hi\"}, {\"from\": \"gpt\", \"value\": \"Yes.\"}]}\n{\"text\": 3}\n";
    std::fs::write(data.join("train.jsonl"), rows).unwrap();
    std::fs::write(data.join("more.jsonl"), "{}\n").unwrap();
    let ran = planish(&["data", "show", text(&data), "--model", text(tiny_model())]);
    assert_eq!(ran.code, Some(1));
    let summary = "2 rows of format chat in the layout of ShareGPT";
    assert!(
        ran.stderr.contains(summary) && ran.stderr.contains("more.jsonl: not a split"),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stderr.contains("error: 1 of 2 rows are faulty; the first: "),
        "{}",
        ran.stderr
    );
    assert!(
        ran.stdout.starts_with("line 1  chat") && ran.stdout.contains("train.jsonl:2:10: text:"),
        "{}",
        ran.stdout
    );
}

#[test]
fn cli_resume_at_4_equals_straight_8_and_a_finished_run_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (tiny_model(), data_folder(dir.path()));
    let train = |out: &Path, more: &[&str]| {
        let args = [
            "train",
            "--model",
            text(model),
            "--data",
            text(&data),
            "--out",
            text(out),
        ];
        let settings = [
            "--set",
            "train.steps=8",
            "--set",
            "checkpoint.every=4",
            "--set",
            "logging.report_every=2",
        ];
        planish(&[&args[..], &settings, more].concat())
    };
    let (straight, resumed) = (dir.path().join("straight"), dir.path().join("resumed"));
    train(&straight, &[]).success();
    // With nothing there, --resume starts from step 0.
    train(&resumed, &["--resume"]).success();
    let checkpoints = resumed.join("checkpoints");
    std::fs::remove_dir_all(checkpoints.join("step-0000008")).unwrap();
    train(&resumed, &["--resume"]).success();
    let adapter = |out: &Path| std::fs::read(out.join("adapters.safetensors")).unwrap();
    assert_eq!(adapter(&straight), adapter(&resumed));
    let losses = |out: &Path| -> Vec<Value> { metrics(out, "train").iter().map(|line| line["loss"].clone()).collect() };
    assert_eq!(losses(&straight), losses(&resumed));

    let before = std::fs::read(resumed.join("metrics.jsonl")).unwrap();
    train(&resumed, &["--resume"]).success();
    assert_eq!(std::fs::read(resumed.join("metrics.jsonl")).unwrap(), before);
}

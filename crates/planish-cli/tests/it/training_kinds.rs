//! Recipes, compatibility and reports on the command line.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::run::{planish, text, tiny_model};

fn write_rows(dir: &Path, file: &str, rows: impl Iterator<Item = Value>) {
    std::fs::create_dir_all(dir).unwrap();
    let text: String = rows.map(|row| format!("{row}\n")).collect();
    std::fs::write(dir.join(file), text).unwrap();
}

fn chats(dir: &Path) -> PathBuf {
    let data = dir.join("data");
    let row = |i: usize| {
        serde_json::json!({"messages": [
            {"role": "user", "content": format!("What is {i}?")},
            {"role": "assistant", "content": format!("It is <b>{i}</b> & so on.")},
        ]})
    };
    write_rows(&data, "train.jsonl", (0..8).map(row));
    write_rows(&data, "valid.jsonl", (8..10).map(row));
    data
}

fn pairs(dir: &Path) -> PathBuf {
    let data = dir.join("pairs");
    let row = |i: usize| serde_json::json!({"prompt": format!("May I have {i}?"), "chosen": "Yes, with pleasure.", "rejected": "No, never."});
    write_rows(&data, "train.jsonl", (0..12).map(row));
    write_rows(&data, "valid.jsonl", (12..18).map(row));
    data
}

fn lines(out: &Path, kind: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["kind"] == kind).collect()
}

fn train(data: &Path, out: &Path, settings: &[&str]) -> crate::run::Ran {
    let model = tiny_model();
    let mut args = vec![
        "train",
        "--model",
        text(model),
        "--data",
        text(data),
        "--out",
        text(out),
    ];
    for setting in settings {
        if setting.starts_with("--") {
            args.extend(setting.split(' '));
        } else {
            args.extend(["--set", setting]);
        }
    }
    planish(&args)
}

#[test]
fn cli_train_with_default_kernels_trains_every_method_and_says_what_computes_it() {
    let dir = tempfile::tempdir().unwrap();
    let data = chats(dir.path());
    for method in ["lora", "dora", "full"] {
        let out = dir.path().join(method);
        let ran = train(&data, &out, &[&format!("lora.method={method}"), "train.steps=2"]);
        assert_eq!(ran.code, Some(0), "{method}: {}", ran.stderr);
        for words in ["computing with ", "attention × ", "linear layer × ", "loss: "] {
            assert!(ran.stderr.contains(words), "{method}: no {words:?} in {}", ran.stderr);
        }
    }
}

#[test]
fn cli_train_dpo_reports_margins_and_refuses_chats() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (pairs(dir.path()), dir.path().join("out"));
    let ran = train(
        &data,
        &out,
        &["loss.name=dpo", "train.steps=12", "optimizer.learning_rate=2e-3"],
    );
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("margin"), "{}", ran.stderr);
    let evals = lines(&out, "eval");
    assert_eq!(evals[0]["reward_margin"], 0.0);
    assert!(
        evals.last().unwrap()["reward_margin"].as_f64().unwrap() > 0.05,
        "{evals:?}"
    );
    let refused = train(&data, &dir.path().join("other"), &[]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("dpo"), "{}", refused.stderr);
}

#[test]
fn cli_compat_takes_the_peers_defaults_and_trains_its_padding_token() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out, native) = (chats(dir.path()), dir.path().join("out"), dir.path().join("native"));
    std::fs::remove_file(data.join("valid.jsonl")).unwrap();
    let few = [
        "train.steps=2",
        "lora.layers=2",
        "logging.report_every=1",
        "logging.samples=0",
    ];
    let ran = train(&data, &out, &[&["--compat mlx-lm"], &few[..]].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    for line in [
        "compat = \"mlx-lm\"",
        "name = \"adam\"",
        "scale = 20.0",
        "learning_rate = 0.00001",
    ] {
        assert!(config.contains(line), "{line} in {config}");
    }
    // The same tokens trained natively: the peer has one more in each of the 4 padded rows of a batch.
    train(
        &data,
        &native,
        &[&["data.train_prompt=true", "lora.layers=2"], &few[..]].concat(),
    )
    .success();
    let tokens = |out: &Path| lines(out, "train")[1]["tokens"].as_u64().unwrap();
    assert_eq!(tokens(&out), tokens(&native) + 8);
}

#[test]
fn cli_skipped_rows_are_listed_and_kept_within_limits() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (chats(dir.path()), dir.path().join("out"));
    let good = std::fs::read_to_string(data.join("train.jsonl")).unwrap();
    std::fs::write(
        data.join("train.jsonl"),
        format!("{}{{\"messages\": 3}}\n", good.repeat(4)),
    )
    .unwrap();
    let ran = train(&data, &out, &["data.errors=skip", "train.steps=1"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let skipped = std::fs::read_to_string(out.join("data_skipped.jsonl")).unwrap();
    let row: Value = serde_json::from_str(skipped.trim()).unwrap();
    assert_eq!((&row["line"], &row["field"]), (&33.into(), &"messages".into()));
}

#[test]
fn cli_fields_of_other_names_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (data, out) = (dir.path().join("data"), dir.path().join("out"));
    let row = |i: usize| serde_json::json!({"question": format!("What is {i}?"), "answer": "It is."});
    write_rows(&data, "train.jsonl", (0..4).map(row));
    let refused = train(&data, &out, &["train.steps=1"]);
    assert!(refused.stderr.contains("data.text_feature"), "{}", refused.stderr);
    let names = [
        "data.prompt_feature=question",
        "data.completion_feature=answer",
        "train.steps=1",
    ];
    train(&data, &out, &names).success();
}

#[test]
fn cli_report_is_one_page_of_one_run_or_of_several() {
    let dir = tempfile::tempdir().unwrap();
    let data = chats(dir.path());
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    train(&data, &one, &["train.steps=4", "logging.report_every=1"]).success();
    train(&data, &two, &["train.steps=4", "logging.report_every=1", "lora.rank=2"]).success();
    let written = planish(&["report", text(&one)]).success();
    assert_eq!(written.trim(), text(&one.join("report.html")));
    let page = std::fs::read_to_string(one.join("report.html")).unwrap();
    for part in [
        "Training loss",
        "Validation loss",
        "Learning rate",
        "Answers before and after",
        "learning_rate = 0.0001",
    ] {
        assert!(page.contains(part), "{part}");
    }
    assert!(
        page.contains("&lt;b&gt;8&lt;/b&gt; &amp; so on."),
        "answers are text, not markup"
    );
    assert!(
        !page.contains("http") && !page.contains("<script"),
        "it needs nothing else"
    );
    let both = dir.path().join("both.html");
    planish(&["report", text(&one), text(&two), "--out", text(&both)]).success();
    let page = std::fs::read_to_string(&both).unwrap();
    assert!(
        page.contains("What differs") && page.contains("lora.rank") && !page.contains("<th>lora.dropout"),
        "{page}"
    );
    let missing = planish(&["report", text(dir.path())]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.stderr.contains("planish train"), "{}", missing.stderr);
}

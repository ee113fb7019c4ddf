//! What is wrong with a model, a data file or a disk ends in one message that names it, and leaves nothing behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::run::{Ran, copy_of_the_model, planish, run, text, tiny_model};

const ROW: &str = r#"{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}"#;

#[test]
fn cli_not_a_number_in_the_weights_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    poison(&model.join("model.safetensors"), "model.layers.1.mlp.down_proj.weight");
    let ran = trained(dir.path(), &model, ROW);
    refused(dir.path(), &ran, &["model.layers.1.mlp.down_proj.weight", "NaN"]);
}

#[test]
fn cli_truncated_weights_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    let file = model.join("model.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 1000]).unwrap();
    let ran = trained(dir.path(), &model, ROW);
    refused(dir.path(), &ran, &["model.safetensors"]);
}

#[test]
fn cli_weights_that_are_no_safetensors_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    fs::write(model.join("model.safetensors"), b"<!DOCTYPE html><p>Not found</p>").unwrap();
    let ran = trained(dir.path(), &model, ROW);
    refused(dir.path(), &ran, &["model.safetensors"]);
}

#[test]
fn cli_missing_shard_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    let names = tensor_names(&model.join("model.safetensors"));
    fs::rename(
        model.join("model.safetensors"),
        model.join("model-00001-of-00002.safetensors"),
    )
    .unwrap();
    let shard = |i: usize| format!("model-{:05}-of-00002.safetensors", 1 + usize::from(i == 0));
    let map: serde_json::Map<String, Value> = (names.iter().enumerate())
        .map(|(i, name)| (name.clone(), shard(i).into()))
        .collect();
    let index = serde_json::json!({"metadata": {}, "weight_map": map});
    fs::write(model.join("model.safetensors.index.json"), index.to_string()).unwrap();
    let ran = trained(dir.path(), &model, ROW);
    refused(dir.path(), &ran, &["model-00002-of-00002.safetensors"]);
}

#[test]
fn cli_unknown_model_type_is_named_with_what_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    edit_json(&model.join("config.json"), |config| {
        config["model_type"] = "mamba".into()
    });
    let ran = trained(dir.path(), &model, ROW);
    refused(dir.path(), &ran, &["mamba", "llama", "config.json"]);
}

#[test]
fn cli_model_of_another_shape_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy_of_the_model(dir.path());
    edit_json(&model.join("config.json"), |config| {
        config["intermediate_size"] = 77.into()
    });
    let ran = trained(dir.path(), &model, ROW);
    refused(dir.path(), &ran, &["mlp.down_proj.weight", "77"]);
}

#[test]
fn cli_rows_that_cannot_be_trained_are_named_by_line() {
    let no_answer = r#"{"messages": [{"role": "user", "content": "Who?"}]}"#;
    let cases = [
        ("", "no row"),
        ("{\"messages\": [}\n", "train.jsonl:1"),
        (&format!("{ROW}\n{no_answer}\n"), "train.jsonl:2"),
        (&format!("{ROW}\n{{\"sentence\": \"x\"}}\n"), "train.jsonl:2"),
    ];
    for (data, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let ran = trained(dir.path(), tiny_model(), data);
        refused(dir.path(), &ran, &["train.jsonl", expected]);
    }
}

#[test]
fn cli_row_longer_than_the_model_reads_is_cut_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let long = ROW.replace("Me.", &"very ".repeat(20_000));
    let ran = trained(dir.path(), tiny_model(), &format!("{ROW}\n{long}\n"));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for word in ["train.jsonl", "1 rows were cut", "tokens lost"] {
        assert!(ran.stderr.contains(word), "{word} not in: {}", ran.stderr);
    }
}

/// On a file system of 48 kB of its own, where the adapter of the tiny model does not fit.
#[test]
fn cli_full_disk_leaves_no_part_of_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_folder(dir.path(), ROW);
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let script = r#"mount -t tmpfs -o size=48k tmpfs "$1" || { echo skip; exit 0; }
"$2" train --model "$3" --data "$4" --out "$1/out" --set train.steps=1; code=$?
find "$1" -name '*.safetensors*' -o -name '.*' -type f; exit $code"#;
    let ran = run(Command::new("unshare")
        .args(["--mount", "--map-root-user", "sh", "-c", script, "sh"])
        .args([&disk, Path::new(env!("CARGO_BIN_EXE_planish")), tiny_model(), &data]));
    if ran.stdout.contains("skip") || ran.stderr.contains("unshare") {
        eprintln!("skipped: file systems cannot be mounted here");
        return;
    }
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    assert!(ran.stderr.contains("No space left"), "{}", ran.stderr);
    assert_eq!(ran.stdout, "", "left on the disk");
}

/// One training step of `model` on one file of rows, in `dir`.
fn trained(dir: &Path, model: &Path, rows: &str) -> Ran {
    let data = data_folder(dir, rows);
    let out = dir.join("out");
    let args = [
        "train",
        "--model",
        text(model),
        "--data",
        text(&data),
        "--out",
        text(&out),
    ];
    planish(&[&args[..], &["--set", "train.steps=1"]].concat())
}

/// One message with these words, exit code 1, and no folder of results.
fn refused(dir: &Path, ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for word in words {
        assert!(ran.stderr.contains(word), "{word} not in: {}", ran.stderr);
    }
    assert_eq!(ran.stderr.matches("error").count(), 1, "{}", ran.stderr);
    assert_eq!(ran.stdout, "");
    assert!(!dir.join("out").exists(), "something was written: {}", ran.stderr);
}

fn data_folder(dir: &Path, rows: &str) -> PathBuf {
    let data = dir.join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("train.jsonl"), rows).unwrap();
    data
}

fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    edit(&mut value);
    fs::write(file, value.to_string()).unwrap();
}

fn header(bytes: &[u8]) -> (Value, usize) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&bytes[8..8 + length]).unwrap(), 8 + length)
}

fn tensor_names(file: &Path) -> Vec<String> {
    let (header, _) = header(&fs::read(file).unwrap());
    let names = header.as_object().unwrap().keys();
    names.filter(|name| *name != "__metadata__").cloned().collect()
}

/// Fills one tensor with ones in every bit: NaN in each floating-point type.
fn poison(file: &Path, tensor: &str) {
    let mut bytes = fs::read(file).unwrap();
    let (header, start) = header(&bytes);
    let offset = |i: usize| start + header[tensor]["data_offsets"][i].as_u64().unwrap() as usize;
    bytes[offset(0)..offset(1)].fill(0xff);
    fs::write(file, bytes).unwrap();
}

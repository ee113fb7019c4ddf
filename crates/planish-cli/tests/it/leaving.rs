//! `fuse` and `export`: what leaves the program says what base and adapter say.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use planish_checkpoint::adapter::Method;
use planish_core::model_config::ModelConfig;
use planish_tensors::{self as tensors, Dtype, HostTensor, TensorStore};
use serde_json::Value;

use crate::adapters::{difference, logits, with_adapter, write_quantized};
use crate::run::{copy_of_the_model, planish, text, tiny_model};

#[test]
fn cli_fuse_says_what_base_and_adapter_say() {
    for method in [Method::Lora, Method::Dora] {
        let (dir, adapter) = with_adapter(method, 1e-3);
        let out = dir.path().join("fused");
        let model = tiny_model();
        let args = [
            "fuse",
            "--model",
            text(model),
            "--adapter",
            text(&adapter),
            "--out",
            text(&out),
        ];
        let ran = planish(&args);
        assert!(ran.stderr.contains("logits on 8 prompts"), "{}", ran.stderr);
        assert_eq!(ran.success(), format!("{}\n", out.display()));
        let (expect, base) = (logits(model, Some(&adapter)), logits(model, None));
        let fused = logits(&out, None);
        assert!(
            difference(&fused, &expect) < 1e-4,
            "{method:?}: {}",
            difference(&fused, &expect)
        );
        assert!(difference(&base, &expect) > 1e-2, "the adapter does nothing");
        let report: Value = serde_json::from_slice(&std::fs::read(out.join("fuse_report.json")).unwrap()).unwrap();
        assert!(report["logits"]["mean_kl"].as_f64().unwrap() < 1e-6, "{report}");
        assert_eq!(report["modules"].as_array().unwrap().len(), 4 * 7);
        // The folder is taken: said before any work.
        let again = planish(&args);
        assert_eq!(again.code, Some(1));
        assert!(again.stderr.contains("not empty"), "{}", again.stderr);
    }
}

#[test]
fn cli_fuse_refuses_to_lose_the_update_and_says_how_not_to() {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-3);
    let (model, out) = (dir.path().join("4bit"), dir.path().join("fused"));
    write_quantized(&model, 4);
    let fuse = |more: &[&str]| {
        let args = [
            "fuse",
            "--model",
            text(&model),
            "--adapter",
            text(&adapter),
            "--out",
            text(&out),
        ];
        planish(&[&args[..], more].concat())
    };
    let ran = fuse(&["--bits", "4"]);
    assert_eq!(ran.code, Some(1));
    for word in ["quantising loses the update", "--dequantize", "--accept-loss", "cosine"] {
        assert!(ran.stderr.contains(word), "{word} in {}", ran.stderr);
    }
    assert!(!out.exists());
    let dry = fuse(&["--bits", "4", "--dry-run"]);
    assert!(dry.stderr.contains("fail") && !out.exists(), "{}", dry.stderr);

    // The way out: floats, which say what base and adapter say.
    fuse(&[]).success();
    let expect = logits(&model, Some(&adapter));
    let dequantised = difference(&logits(&out, None), &expect);
    assert!(dequantised < 1e-3, "{dequantised}");
    std::fs::remove_dir_all(&out).unwrap();
    fuse(&["--bits", "4", "--accept-loss"]).success();
    let quantised = difference(&logits(&out, None), &expect);
    assert!(quantised > 10.0 * dequantised, "{quantised} {dequantised}");
}

/// An update far below the precision of bf16: a bf16 base becomes an f32 model that keeps it, and bf16 must be asked for twice.
#[test]
fn cli_fuse_keeps_an_update_that_bf16_would_round_away() {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-5);
    let (base, model) = (tiny_model(), dir.path().join("bf16"));
    planish(&[
        "export",
        "safetensors",
        "--model",
        text(base),
        "--out",
        text(&model),
        "--dtype",
        "bf16",
    ])
    .success();
    for command in [&["fuse"][..], &["export", "safetensors"]] {
        let out = dir.path().join("fused");
        let write = |more: &[&str]| {
            let args = [
                "--model",
                text(&model),
                "--adapter",
                text(&adapter),
                "--out",
                text(&out),
            ];
            planish(&[command, &args, more].concat())
        };
        let refused = write(&["--dtype", "bf16"]);
        let says_how = ["rounding to BF16 loses the update", "--dtype f32", "--accept-loss"];
        assert!(
            says_how.iter().all(|word| refused.stderr.contains(word)),
            "{}",
            refused.stderr
        );
        assert!(refused.code == Some(1) && !out.exists());

        let kept = write(&[]);
        assert!(
            kept.code == Some(0) && kept.stderr.contains("stored as F32"),
            "{}",
            kept.stderr
        );
        assert!(!kept.stderr.contains("fail"), "{}", kept.stderr);
        let dtype = TensorStore::open(&out)
            .unwrap()
            .require("model.norm.weight")
            .unwrap()
            .dtype;
        assert_eq!(dtype, Dtype::F32);
        std::fs::remove_dir_all(&out).unwrap();
        write(&["--dtype", "bf16", "--accept-loss"]).success();
        std::fs::remove_dir_all(&out).unwrap();
    }
}

#[test]
fn cli_quantised_base_answers_as_its_dequantised_export() {
    for bits in [4, 8] {
        let dir = tempfile::tempdir().unwrap();
        let (model, out) = (dir.path().join("q"), dir.path().join("float"));
        write_quantized(&model, bits);
        planish(&["export", "safetensors", "--model", text(&model), "--out", text(&out)]).success();
        assert!(
            !std::fs::read_to_string(out.join("config.json"))
                .unwrap()
                .contains("quantization")
        );
        let (packed, float) = (logits(&model, None), logits(&out, None));
        assert!(
            difference(&packed, &float) < 1e-3,
            "{bits} bits: {}",
            difference(&packed, &float)
        );
        let exact = logits(tiny_model(), None);
        assert!(difference(&packed, &exact) > 1e-3, "{bits} bits change nothing");
    }
}

#[test]
fn cli_export_safetensors_merges_and_rounds_once() {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-3);
    let (model, out) = (tiny_model(), dir.path().join("out"));
    let export = |more: &[&str]| {
        let args = ["export", "safetensors", "--model", text(model), "--out", text(&out)];
        planish(&[&args[..], more].concat())
    };
    let with = [
        "--adapter",
        text(&adapter),
        "--dtype",
        "bf16",
        "--max-shard-bytes",
        "500000",
    ];
    assert_eq!(export(&with).success(), format!("{}\n", out.display()));
    let store = TensorStore::open(&out).unwrap();
    assert!(store.iter().all(|view| view.dtype == Dtype::BF16) && store.files().count() > 2);
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ] {
        assert!(out.join(name).exists(), "{name}");
    }
    assert!(
        std::fs::read_to_string(out.join("config.json"))
            .unwrap()
            .contains("\"bfloat16\"")
    );
    let (rounded, expect) = (logits(&out, None), logits(model, Some(&adapter)));
    let error = difference(&rounded, &expect);
    assert!(error > 1e-6 && error < 0.3, "{error}");
    drop(store);
    std::fs::remove_dir_all(&out).unwrap();
    export(&["--adapter", text(&adapter)]).success();
    assert!(difference(&logits(&out, None), &expect) < 1e-4);
}

/// Each type survives the way out and back to the precision that it has, with tokenizer and template.
#[test]
fn cli_export_gguf_comes_back_as_it_left() {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-3);
    let model = tiny_model();
    let expect = logits(model, Some(&adapter));
    let largest = expect.iter().map(|v| v.abs()).fold(0.0, f32::max);
    let mut sizes = Vec::new();
    for (kind, limit) in [
        ("f32", 1e-5),
        ("f16", 1e-3),
        ("bf16", 2e-2),
        ("q8_0", 2e-2),
        ("q4_0", 0.4),
    ] {
        let (file, back) = (dir.path().join(kind).with_extension("gguf"), dir.path().join(kind));
        let args = [
            "export",
            "gguf",
            "--model",
            text(model),
            "--adapter",
            text(&adapter),
            "--type",
            kind,
        ];
        assert_eq!(
            planish(&[&args[..], &["--out", text(&file)]].concat()).success(),
            format!("{}\n", file.display())
        );
        sizes.push(std::fs::metadata(&file).unwrap().len());
        planish(&["import", text(&file), "--out", text(&back), "--dtype", "f32"]).success();
        let error = difference(&logits(&back, None), &expect) / largest;
        assert!(error < limit, "{kind}: {error}");
        assert_eq!(template(&back), template(model), "{kind}");
    }
    assert!(
        sizes[0] > sizes[1] && sizes[1] == sizes[2] && sizes[2] > sizes[3] && sizes[3] > sizes[4],
        "{sizes:?}"
    );
}

#[test]
fn cli_export_gguf_of_a_quantised_base_is_dequantised_first() {
    let dir = tempfile::tempdir().unwrap();
    let (model, file, back) = (dir.path().join("q"), dir.path().join("m.gguf"), dir.path().join("back"));
    write_quantized(&model, 4);
    planish(&[
        "export",
        "gguf",
        "--model",
        text(&model),
        "--type",
        "f32",
        "--out",
        text(&file),
    ])
    .success();
    planish(&["import", text(&file), "--out", text(&back), "--dtype", "f32"]).success();
    let error = difference(&logits(&back, None), &logits(&model, None));
    assert!(error < 1e-3, "{error}");
}

#[test]
fn cli_export_of_a_broken_shard_leaves_nothing() {
    let (dir, adapter) = with_adapter(Method::Lora, 1e-3);
    let model = copy_of_the_model(dir.path());
    let weights = model.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 100]).unwrap();
    let (folder, file) = (dir.path().join("out"), dir.path().join("out.gguf"));
    let commands = [
        (vec!["export", "safetensors"], folder.as_path()),
        (vec!["export", "gguf"], file.as_path()),
        (vec!["fuse"], folder.as_path()),
    ];
    for (command, out) in commands {
        let args = ["--model", text(&model), "--adapter", text(&adapter), "--out", text(out)];
        let ran = planish(&[&command[..], &args].concat());
        assert_eq!(ran.code, Some(1), "{command:?}");
        assert!(ran.stderr.contains("model.safetensors"), "{}", ran.stderr);
        assert!(!out.exists());
    }
    assert_eq!(
        std::fs::read_dir(dir.path()).unwrap().count(),
        2,
        "something was left behind"
    );
}

fn template(dir: &Path) -> Value {
    let config = std::fs::read(dir.join("tokenizer_config.json")).unwrap();
    serde_json::from_slice::<Value>(&config).unwrap()["chat_template"].clone()
}

/// A model of 180 MB without a thought in it, whose export takes a while.
fn write_large_model(dir: &Path) {
    let model = copy_of_the_model(dir);
    let mut config: Value = serde_json::from_slice(&std::fs::read(model.join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", 1024),
        ("intermediate_size", 2816),
        ("num_attention_heads", 32),
    ] {
        config[key] = value.into();
    }
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::from_file(&model.join("config.json")).unwrap();
    let specs = config.expected_tensors().into_iter();
    let zeros = specs.map(|spec| (spec.name, HostTensor::zeros(Dtype::F32, &spec.shape)));
    tensors::write(&model.join("model.safetensors"), &zeros.collect(), &BTreeMap::new()).unwrap();
}

#[test]
fn cli_export_that_is_told_to_end_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    write_large_model(dir.path());
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    std::fs::create_dir(&out).unwrap();
    let left = || std::fs::read_dir(&out).unwrap().count();
    for (command, file) in [("gguf", "m.gguf"), ("safetensors", "m")] {
        for (signal, code) in [("-TERM", 143), ("-INT", 130), ("-HUP", 129)] {
            let mut child = Command::new(env!("CARGO_BIN_EXE_planish"))
                .args([
                    "export",
                    command,
                    "--model",
                    text(&model),
                    "--out",
                    text(&out.join(file)),
                ])
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            while left() == 0 && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            Command::new("kill")
                .args([signal, &child.id().to_string()])
                .status()
                .unwrap();
            assert_eq!(child.wait().unwrap().code(), Some(code), "{command} {signal}");
            assert_eq!(left(), 0, "{command} {signal}");
        }
    }
}

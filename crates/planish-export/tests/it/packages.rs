//! Every layout, format and family: exported, read back, run, compared.

use std::collections::BTreeMap;

use planish_export::{CacheMode, ExportOptions, ExportReport, Layout, export, weights::WeightFormat};
use planish_tensors::{Dtype, HostTensor, Update, dequantize, quantize};
use proptest::prelude::*;

use crate::support::{LLAMA, contents, golden, random_tensors, write_model, write_tensors};

const LAYOUTS: [(Layout, CacheMode); 3] = [
    (Layout::Monolith, CacheMode::State),
    (Layout::Monolith, CacheMode::Host),
    (Layout::Anemll, CacheMode::State),
];

fn out(folder: &std::path::Path, layout: Layout) -> std::path::PathBuf {
    folder.join(if layout == Layout::Monolith {
        "model.mlpackage"
    } else {
        "model"
    })
}

/// Exports with the check on: it fails when f32 arithmetic on the stored weights is off by 0.5 % of the largest logit.
fn checked(model: &std::path::Path, options: &ExportOptions) -> ExportReport {
    let folder = tempfile::tempdir().unwrap();
    let options = ExportOptions {
        check: true,
        ..options.clone()
    };
    export(model, Update::default(), &out(folder.path(), options.layout), &options).unwrap()
}

#[test]
fn every_layout_of_every_family_computes_the_model() {
    for model in ["llama3-rope", "llama-linear-bias", "mistral-window", "qwen2", "qwen3"] {
        for (layout, cache) in LAYOUTS {
            // The Mistral golden has a window of a few tokens, beyond which its context must not go.
            let options = ExportOptions {
                layout,
                cache,
                prefill: 4,
                ..ExportOptions::default()
            };
            let report = checked(&golden(model), &options);
            let check = report.check.unwrap();
            assert!(
                check.exact.max_error <= 1e-3 * check.exact.max_logit,
                "{model} {layout:?} {cache:?}: {check:?}"
            );
            // Random weights have near ties, which fp16 may turn round.
            assert!(
                check.fp16.top1 >= 0.95 && check.fp16.in_top5 == 1.0,
                "{model} {layout:?} {cache:?}: {check:?}"
            );
        }
    }
}

#[test]
fn every_weight_format_computes_what_it_stores() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), LLAMA, 3);
    let mut errors = Vec::new();
    for (weights, _) in WeightFormat::ALL {
        for (layout, cache) in LAYOUTS {
            let options = ExportOptions {
                layout,
                cache,
                weights,
                prefill: 8,
                ..ExportOptions::default()
            };
            let report = checked(folder.path(), &options);
            let check = report.check.unwrap();
            assert!(
                check.exact.max_error <= 2e-3 * check.exact.max_logit,
                "{weights:?} {layout:?}: {check:?}"
            );
            let compressed = weights != WeightFormat::Fp16;
            assert_eq!(report.layer_errors.is_empty(), !compressed);
            errors.push((weights, check.fp16.kl));
        }
    }
    let kl = |format: WeightFormat| errors.iter().find(|e| e.0 == format).unwrap().1;
    assert!(kl(WeightFormat::Fp16) < kl(WeightFormat::Int8) && kl(WeightFormat::Int8) < kl(WeightFormat::Lut4));
}

#[test]
fn equal_input_gives_equal_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m");
    write_model(&model, LLAMA, 1);
    let options = ExportOptions {
        weights: WeightFormat::Lut6,
        prefill: 8,
        ..ExportOptions::default()
    };
    let write = |name: &str| {
        let path = folder.path().join(name);
        export(&model, Update::default(), &path, &options).unwrap();
        contents(&path)
    };
    assert!(write("a.mlpackage") == write("b.mlpackage"));
}

#[test]
fn compressed_weights_without_text_warn() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("m");
    write_model(&model, LLAMA, 1);
    let warned = |name: &str, weights: WeightFormat, calibration: Vec<u32>| {
        let options = ExportOptions {
            weights,
            calibration,
            ..ExportOptions::default()
        };
        let report = export(&model, Update::default(), &folder.path().join(name), &options).unwrap();
        report.warnings.iter().any(|w| w.contains("--text"))
    };
    assert!(warned("a.mlpackage", WeightFormat::Lut6, Vec::new()));
    assert!(!warned("b.mlpackage", WeightFormat::Fp16, Vec::new()));
    assert!(!warned("c.mlpackage", WeightFormat::Lut6, vec![3; 300]));
}

#[test]
fn anemll_folder_has_what_hosts_look_for() {
    let folder = tempfile::tempdir().unwrap();
    let (model, path) = (folder.path().join("m"), folder.path().join("out"));
    write_model(&model, LLAMA, 1);
    let options = ExportOptions {
        layout: Layout::Anemll,
        weights: WeightFormat::Lut6,
        chunks: Some(2),
        prefill: 8,
        verify_bundle: true,
        ..ExportOptions::default()
    };
    export(&model, Update::default(), &path, &options).unwrap();
    for name in [
        "llama_embeddings.mlpackage",
        "llama_FFN_PF_lut6_chunk_01of02.mlpackage",
        "llama_FFN_PF_lut6_chunk_02of02.mlpackage",
        "llama_lm_head_lut6.mlpackage",
        "config.json",
        "verify/verify.sh",
        "verify/expected.json",
    ] {
        assert!(path.join(name).exists(), "{name}");
    }
    let meta = std::fs::read_to_string(path.join("meta.yaml")).unwrap();
    for line in [
        "num_chunks: 2",
        "lut_ffn: 6",
        "lut_embeddings: none",
        "lut_lmhead: 6",
        "split_lm_head: 8",
        "ffn: llama_FFN_PF_lut6.mlmodelc",
    ] {
        assert!(meta.contains(line), "{line}\n{meta}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn prop_any_configuration_computes_the_model(
        family in 0usize..3, kv in 1usize..4, ratio in 1usize..5, half_head in 2usize..17, hidden in 1usize..9,
        layers in 1usize..4, vocab in 20usize..90, tied: bool, bias: bool, rope in 0usize..3, which in 0usize..3,
        prefill in 1usize..9, context in 9usize..40, seed: u64,
    ) {
        let rope = [
            "null",
            r#"{"type": "linear", "factor": 4.0}"#,
            r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16}"#,
        ][rope];
        let family = ["llama", "qwen2", "qwen3"][family];
        let json = format!(
            r#"{{"model_type": "{family}", "hidden_size": {}, "intermediate_size": 24, "num_hidden_layers": {layers},
            "num_attention_heads": {}, "num_key_value_heads": {kv}, "head_dim": {}, "vocab_size": {vocab},
            "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": {rope}, "tie_word_embeddings": {tied},
            "attention_bias": {}, "max_position_embeddings": 64}}"#,
            hidden * 8, kv * ratio, half_head * 2, bias && family != "qwen2",
        );
        let folder = tempfile::tempdir().unwrap();
        write_model(folder.path(), &json, seed);
        let (layout, cache) = LAYOUTS[which];
        let chunks = (layout == Layout::Anemll).then_some(layers);
        let options = ExportOptions { layout, cache, prefill, context: Some(context), chunks, ..ExportOptions::default() };
        let check = checked(folder.path(), &options).check.unwrap();
        prop_assert!(check.exact.max_error <= 2e-3 * check.exact.max_logit, "{json}: {check:?}");
    }
}

/// A base in 4 bits gives the bytes of the same numbers stored as floats.
#[test]
fn quantised_model_is_exported_as_its_numbers() {
    let config = LLAMA.replace("48", "64").replace("80", "128").replace(": 6,", ": 4,");
    let quantised = config.replacen('{', r#"{"quantization": {"group_size": 64, "bits": 4}, "#, 1);
    let folder = tempfile::tempdir().unwrap();
    let (mut packed, mut plain) = (BTreeMap::new(), BTreeMap::new());
    for (name, tensor) in random_tensors(&config, 3) {
        let ([rows, _], Some(module)) = (tensor.shape.as_slice(), name.strip_suffix(".weight")) else {
            packed.insert(name.clone(), tensor.clone());
            plain.insert(name, tensor);
            continue;
        };
        let affine = quantize(&tensor.to_f32().unwrap(), *rows, 4, 64, Dtype::F32).unwrap();
        let numbers = dequantize(&affine, 4).unwrap();
        packed.insert(format!("{module}.scales"), affine.scales);
        packed.insert(format!("{module}.biases"), affine.biases);
        plain.insert(name.clone(), HostTensor::from_f32(&tensor.shape, &numbers));
        packed.insert(name, affine.weight);
    }
    let weights = |name: &str, config: &str, tensors| {
        let (model, out) = (
            folder.path().join(name),
            folder.path().join(format!("{name}.mlpackage")),
        );
        write_tensors(&model, config, tensors);
        export(&model, Update::default(), &out, &ExportOptions::default()).unwrap();
        std::fs::read(out.join("Data/com.apple.CoreML/weights/weight.bin")).unwrap()
    };
    assert!(weights("packed", &quantised, &packed) == weights("plain", &config, &plain));
}

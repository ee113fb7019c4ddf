//! What import and export refuse, by name, leaving nothing behind.

use std::path::Path;

use planish_hub::gguf::{ExportFormat, Gguf, TensorPlan, Value, check, import, write};
use planish_hub::{Error, Silent};
use planish_tensors::Dtype;
use serde_json::json;

use crate::gguf_goldens::{export, golden, read_json};

type Pairs = Vec<(String, Value)>;
type Tensors = Vec<(TensorPlan, Vec<u8>)>;

/// A golden file with its parts changed by `edit`.
fn edited(name: &str, dir: &Path, edit: impl FnOnce(&mut Pairs, &mut Tensors)) -> Gguf {
    let file = Gguf::open(&golden(name)).unwrap();
    let mut pairs: Pairs = file
        .metadata()
        .iter()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    let part = |t: &planish_hub::gguf::TensorInfo| {
        (
            TensorPlan {
                name: t.name.clone(),
                shape: t.shape.clone(),
                kind: t.kind,
            },
            file.bytes(t).to_vec(),
        )
    };
    let mut tensors: Tensors = file.tensors().iter().map(part).collect();
    edit(&mut pairs, &mut tensors);
    let path = dir.join("edited.gguf");
    let plans: Vec<_> = tensors.iter().map(|(plan, _)| plan.clone()).collect();
    write(&path, &pairs, &plans, |i| Ok(tensors[i].1.clone())).unwrap();
    Gguf::open(&path).unwrap()
}

fn set(pairs: &mut Pairs, key: &str, value: Value) {
    pairs.retain(|(k, _)| k != key);
    pairs.push((key.to_owned(), value));
}

#[test]
fn goldens_pass_the_check() {
    let dir = tempfile::tempdir().unwrap();
    for name in [
        "llama_q4_0.gguf",
        "llama_bias_f32.gguf",
        "qwen2_f16.gguf",
        "qwen3_bf16.gguf",
    ] {
        check(&edited(name, dir.path(), |_, _| {})).unwrap();
    }
}

#[test]
fn err_metadata_that_would_change_the_numbers() {
    let check = |key: &str, value: Value, expect: &str| {
        let dir = tempfile::tempdir().unwrap();
        let error = check(&edited("llama_q4_0.gguf", dir.path(), |pairs, _| {
            set(pairs, key, value)
        }))
        .unwrap_err();
        let message = error.to_string();
        assert!(message.contains(expect) && message.contains("edited.gguf"), "{message}");
    };
    check("general.architecture", Value::from("gemma3"), "\"gemma3\"");
    check("split.count", Value::U16(3), "gguf-split");
    check("llama.expert_count", Value::U32(8), "mixtures of experts");
    check("llama.rope.scaling.type", Value::from("yarn"), "\"yarn\"");
    check("llama.rope.dimension_count", Value::U32(4), "rotating a part");
    check("llama.attention.value_length", Value::U32(4), "values");
    check("llama.attention.sliding_window", Value::U32(64), "whole context");
    check("llama.attention.causal", Value::Bool(false), "causal");
    check("llama.logit_scale", Value::F32(2.0), "llama.logit_scale");
    check("llama.block_count", Value::from("one"), "whole number");
    check(
        "llama.block_count",
        Value::U32(2),
        "\"blk.1.attn_norm.weight\" is missing",
    );
    check(
        "llama.feed_forward_length",
        Value::U32(32),
        "[64, 32], expected [32, 32]",
    );
    check("llama.attention.head_count", Value::U32(0), "head");
    check("llama.rope.freq_base", Value::F32(f32::NAN), "finite");
}

#[test]
fn err_tensors_that_do_not_make_the_model() {
    let check = |edit: fn(&mut Tensors), expect: &str| {
        let dir = tempfile::tempdir().unwrap();
        let error = check(&edited("llama_bias_f32.gguf", dir.path(), |_, tensors| edit(tensors))).unwrap_err();
        assert!(error.to_string().contains(expect), "{error}");
    };
    check(
        |t| t.retain(|(plan, _)| plan.name != "blk.0.attn_v.weight"),
        "\"blk.0.attn_v.weight\" is missing",
    );
    check(
        |t| t.retain(|(plan, _)| plan.name != "token_embd.weight"),
        "\"token_embd.weight\" is missing",
    );
    check(
        |t| t[0].0.name = "blk.0.ffn_gate_inp.weight".into(),
        "has no place in a llama model",
    );
    let odd_factors = |t: &mut Tensors| {
        let factors = t.iter_mut().find(|(plan, _)| plan.name == "rope_freqs.weight").unwrap();
        factors.1[..4].copy_from_slice(&1.5f32.to_le_bytes());
    };
    check(odd_factors, "follow no Llama 3 scaling");
}

#[test]
fn err_weight_that_is_no_number_leaves_no_folder() {
    let dir = tempfile::tempdir().unwrap();
    edited("llama_bias_f32.gguf", dir.path(), |_, tensors| {
        let values = tensors
            .iter_mut()
            .find(|(plan, _)| plan.name == "blk.0.ffn_up.weight")
            .unwrap();
        values.1[4 * 70..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let out = dir.path().join("out");
    let error = import(&dir.path().join("edited.gguf"), &out, Dtype::BF16, &mut Silent).unwrap_err();
    assert!(
        matches!(&error, Error::WeightOutOfRange { tensor, index: 70, .. } if tensor == "blk.0.ffn_up.weight"),
        "{error}"
    );
    let left: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["edited.gguf"]);
}

#[test]
fn err_weight_too_large_for_f16_names_the_way_out() {
    let dir = tempfile::tempdir().unwrap();
    edited("llama_bias_f32.gguf", dir.path(), |_, tensors| {
        let values = tensors
            .iter_mut()
            .find(|(plan, _)| plan.name == "output_norm.weight")
            .unwrap();
        values.1[..4].copy_from_slice(&1e6f32.to_le_bytes());
    });
    let file = dir.path().join("edited.gguf");
    let error = import(&file, &dir.path().join("out"), Dtype::F16, &mut Silent).unwrap_err();
    assert!(error.to_string().contains("use bf16 or f32"), "{error}");
    import(&file, &dir.path().join("out"), Dtype::BF16, &mut Silent).unwrap();
}

#[test]
fn err_output_that_exists() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mine"), b"1").unwrap();
    let error = import(&golden("llama_q4_0.gguf"), dir.path(), Dtype::BF16, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
}

#[test]
fn err_exports_that_gguf_cannot_hold() {
    let check = |name: &str, key: &str, value: serde_json::Value, expect: &str| {
        let dir = tempfile::tempdir().unwrap();
        let (folder, file) = (dir.path().join("model"), dir.path().join("out.gguf"));
        import(&golden(name), &folder, Dtype::F32, &mut Silent).unwrap();
        let mut config = read_json(folder.join("config.json"));
        config[key] = value;
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let error = export(&folder, &file, ExportFormat::F16).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
        assert!(!file.exists());
    };
    let llama = "llama_q4_0.gguf";
    check(
        llama,
        "num_hidden_layers",
        json!(2),
        "model.layers.1.input_layernorm.weight [32]",
    );
    check(llama, "intermediate_size", json!(32), "expected [32, 32]");
    check(llama, "tie_word_embeddings", json!(false), "lm_head.weight [");
    check("qwen2_f16.gguf", "model_type", json!("llama"), "missing");
    let mistral = json!("mistral");
    // The window defaults to 4096 in this family, which the context of 128 never reaches.
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    import(&golden(llama), &folder, Dtype::F32, &mut Silent).unwrap();
    let mut config = read_json(folder.join("config.json"));
    config["model_type"] = mistral;
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    export(&folder, &dir.path().join("a.gguf"), ExportFormat::F16).unwrap();
    config["sliding_window"] = json!(64);
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let error = export(&folder, &dir.path().join("b.gguf"), ExportFormat::F16).unwrap_err();
    assert!(error.to_string().contains("sliding_window"), "{error}");
}

/// The seeds of the fuzz target and everything that it found worth keeping, and each of them with single bytes changed.
#[test]
fn fuzz_corpus_gives_answers_or_errors() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/gguf");
    let mut n = 0;
    for entry in std::fs::read_dir(&corpus).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for at in (0..bytes.len().min(2000)).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 0x81;
            let _ = Gguf::from_bytes(changed, Path::new("changed")).map(|file| check(&file).is_ok());
        }
        let _ = Gguf::from_bytes(bytes, Path::new("corpus")).map(|file| check(&file).is_ok());
        n += 1;
    }
    assert!(n >= 4, "the seeds are missing from {}", corpus.display());
}

//! The f32 pass against mlx-lm: goldens of planish-nn (make_goldens.py there says how they were made).

use planish_checkpoint::fuse::open_merged;
use planish_export::reference::forward;
use planish_tensors::TensorStore;

use crate::support::golden;

/// Both sides compute in f32 in another order; 2e-4 of the largest logit is far above what that gives and far below what
/// any mistake of rotation, norm or heads does.
const TOLERANCE: f32 = 2e-4;

fn check(model: &str, adapter: Option<&str>) {
    let folder = golden(model);
    let (config, source) = open_merged(&folder, adapter.map(|name| folder.join(name)).as_deref(), true).unwrap();
    let golden_dir = adapter.map_or(folder.clone(), |name| folder.join(name)).join("golden");
    let golden = TensorStore::open(&golden_dir.join("golden.safetensors")).unwrap();
    let ids = ids_of(
        &golden,
        &TensorStore::open(&folder.join("golden/golden.safetensors")).unwrap(),
    );
    let sequences: Vec<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    let want = golden.require("logits").unwrap().to_f32().unwrap();
    let got = forward(&config, &source, &sequences, None).unwrap();
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let error = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(
        error <= TOLERANCE * largest,
        "{model} {adapter:?}: {error} of {largest}"
    );
}

fn ids_of(golden: &TensorStore, base: &TensorStore) -> Vec<Vec<u32>> {
    let view = golden.get("tokens").or_else(|| base.get("tokens")).unwrap();
    let length = *view.shape.last().unwrap();
    let flat: Vec<u32> = view
        .bytes
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    flat.chunks(length).map(<[u32]>::to_vec).collect()
}

#[test]
fn golden_llama3_rope() {
    check("llama3-rope", None);
}

#[test]
fn golden_llama_linear_rope_and_biases() {
    check("llama-linear-bias", None);
}

#[test]
fn golden_mistral_sliding_window() {
    check("mistral-window", None);
}

#[test]
fn golden_gemma3() {
    check("gemma3", None);
}

#[test]
fn golden_qwen2() {
    check("qwen2", None);
}

#[test]
fn golden_qwen3() {
    check("qwen3", None);
}

#[test]
fn golden_qwen2_with_merged_lora() {
    check("qwen2", Some("lora"));
}

#[test]
fn golden_qwen2_with_merged_dora() {
    check("qwen2", Some("dora"));
}

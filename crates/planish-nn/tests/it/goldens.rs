//! What mlx-lm computes with the same weights; `goldens/make_goldens.py` made the files.

use planish_checkpoint::adapter::{Adapter, ReadOptions};
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{Kernels, LoadOptions, Model, Sampling, Training};
use planish_tensors::TensorStore;

use crate::gradients::loss_and_gradients;
use crate::{fixture, largest, logits, max_difference, tiny_llama};

/// f32 on two BLAS libraries: rounding of sums in another order. A mistake in the computation shows at 1e-2 and above.
const RELATIVE_TOLERANCE: f32 = 2e-5;

fn check_family(name: &str) {
    let dir = fixture("goldens").join(name);
    let (model, _) = Model::load(&dir, &LoadOptions::with_kernels(Kernels::Composed)).unwrap();
    let golden = TensorStore::open(&dir.join("golden/golden.safetensors")).unwrap();
    let tokens = integers(&golden, "tokens");
    let expect = golden.require("logits").unwrap().to_f32().unwrap();
    let found = logits(&model, &tokens.chunks(24).collect::<Vec<_>>());
    let difference = max_difference(&found, &expect) / largest(&expect);
    assert!(difference < RELATIVE_TOLERANCE, "{name}: {difference}");

    let options = GenerateOptions {
        max_tokens: 32,
        stop_tokens: vec![],
        sampling: Sampling::default(),
    };
    let greedy: Vec<u32> = generate(&model, &tokens[..24], &options)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(greedy, integers(&golden, "greedy"), "{name}");
}

/// An adapter as mlx-lm writes it, over a plain and over a quantised base.
fn check_adapter(name: &str, kind: &str) {
    let dir = fixture("goldens").join(name);
    let (mut model, _) = Model::load(&dir, &LoadOptions::with_kernels(Kernels::Composed)).unwrap();
    let (adapter, _) = Adapter::read(&dir.join(kind), &ReadOptions::default()).unwrap();
    assert_eq!(model.attach_adapter(&adapter).unwrap().len(), 6);
    let golden = TensorStore::open(&dir.join(kind).join("golden/golden.safetensors")).unwrap();
    let expect = golden.require("logits").unwrap().to_f32().unwrap();
    let found = logits(&model, &integers(&golden, "tokens").chunks(24).collect::<Vec<_>>());
    let difference = max_difference(&found, &expect) / largest(&expect);
    assert!(difference < RELATIVE_TOLERANCE, "{name} {kind}: {difference}");
    check_gradients(&mut model, &golden);
}

/// Gradients of the mean cross-entropy of the first row, as mlx-lm has them.
fn check_gradients(model: &mut Model, golden: &TensorStore) {
    let row = &integers(golden, "tokens")[..24];
    let (_, gradients) = loss_and_gradients(model, row, Training::default());
    for ((name, _), found) in model.trainables().iter().zip(gradients) {
        let expect = golden.require(&format!("grad.{name}")).unwrap().to_f32().unwrap();
        let difference = max_difference(&found, &expect) / largest(&expect);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

pub(crate) fn integers(store: &TensorStore, name: &str) -> Vec<u32> {
    let bytes = store.require(name).unwrap().bytes;
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&word| i32::from_le_bytes(word) as u32)
        .collect()
}

#[test]
fn golden_llama3_rope_logits_and_greedy_tokens() {
    check_family("llama3-rope");
}

#[test]
fn golden_llama_with_biases_and_linear_rope() {
    check_family("llama-linear-bias");
}

#[test]
fn golden_mistral_with_a_window() {
    check_family("mistral-window");
}

#[test]
fn golden_qwen2() {
    check_family("qwen2");
}

#[test]
fn golden_qwen3() {
    check_family("qwen3");
}

#[test]
fn golden_gemma3() {
    check_family("gemma3");
    check_adapter("gemma3", "lora");
}

#[test]
fn golden_mlx_lm_lora_adapter() {
    check_adapter("qwen2", "lora");
    check_adapter("llama-affine-4bit", "lora");
}

#[test]
fn golden_mlx_lm_dora_adapter() {
    check_adapter("qwen2", "dora");
    check_adapter("llama-affine-4bit", "dora");
}

/// `reference.json` beside the tiny model holds mlx-lm's numbers for five sentences.
#[test]
fn golden_llama_tiny_logits_and_perplexity() {
    let model = tiny_llama();
    let text = std::fs::read_to_string(fixture("fixtures/tiny-llama-1m/reference.json")).unwrap();
    let reference: serde_json::Value = serde_json::from_str(&text).unwrap();
    let (mut total_nll, mut predicted) = (0.0, 0);
    for prompt in reference["prompts"].as_array().unwrap() {
        let ids: Vec<u32> = prompt["ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap() as u32)
            .collect();
        let found = logits(&model, &[&ids]);
        let rows: Vec<&[f32]> = found.chunks(2048).collect();
        for pair in prompt["last"]["top"].as_array().unwrap() {
            let (token, expect) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            let found = f64::from(rows[rows.len() - 1][token]);
            assert!(
                (found - expect).abs() < 1e-4,
                "token {token}: {found}, expected {expect}"
            );
        }
        let nll: f64 = rows
            .iter()
            .zip(&ids[1..])
            .map(|(row, &next)| nll(row, next as usize))
            .sum();
        let expect = prompt["nll"].as_f64().unwrap();
        assert!((nll - expect).abs() < 1e-5 * expect, "{nll}, expected {expect}");
        total_nll += nll;
        predicted += ids.len() - 1;
    }
    let perplexity = (total_nll / predicted as f64).exp();
    assert!(
        (perplexity / reference["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-5,
        "{perplexity}"
    );
}

fn nll(logits: &[f32], token: usize) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    largest + sum.ln() - f64::from(logits[token])
}

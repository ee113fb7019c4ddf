//! Integration tests: goldens of mlx-lm, and the properties that training relies on.

#![allow(clippy::unwrap_used)] // helpers of tests fail the test that calls them

mod adapters;
mod cache;
mod families;
mod goldens;
mod gradients;
mod kernels;
mod loading;
mod masks;

use std::path::{Path, PathBuf};

use planish_core::model_config::ModelConfig;
use planish_mlx::{Array, Dtype, host};
use planish_nn::{AttentionMask, Kernels, LoadOptions, Model};

/// A trained model of a million parameters.
fn tiny_llama() -> Model {
    Model::load(
        &fixture("fixtures/tiny-llama-1m"),
        &LoadOptions::with_kernels(Kernels::Composed),
    )
    .unwrap()
    .0
}

/// A Qwen3 with random weights: a head of its own, q and k norms, everything that a decoder can have but biases.
fn small_random() -> Model {
    let json = r#"{"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}"#;
    let config = ModelConfig::from_json_str(json, "config.json".as_ref()).unwrap();
    Model::random(&config, Dtype::Float32, 1).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name)
}

/// Logits `[b · s · v]` of equally long rows.
fn logits(model: &Model, rows: &[&[u32]]) -> Vec<f32> {
    logits_masked(model, rows, &AttentionMask::Causal)
}

fn logits_masked(model: &Model, rows: &[&[u32]], mask: &AttentionMask) -> Vec<f32> {
    let ids = model.token_array(rows).unwrap();
    let hidden = model.hidden(&ids, mask, None).unwrap();
    host::to_f32_vec(&model.logits(&hidden).unwrap()).unwrap()
}

fn max_difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter()
        .zip(other)
        .map(|(one, other)| (one - other).abs())
        .fold(0.0, f32::max)
}

fn largest(values: &[f32]) -> f32 {
    values
        .iter()
        .copied()
        .fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Mean cross-entropy of predicting each next token, a scalar.
fn next_token_loss(model: &Model, hidden: &Array, row: &[u32]) -> planish_nn::Result<Array> {
    let logits = model.logits(hidden)?; // [1, s, v]
    let targets: Vec<i32> = row[1..].iter().map(|&token| token as i32).collect();
    let targets = Array::from_slice(&targets, &[1, targets.len() as i32, 1]);
    let predicting = planish_mlx::ops::slice(&logits, &[0, 0, 0], &[1, logits.dim(1) - 1, logits.dim(2)])?;
    let chosen = predicting.take_along_axis(targets, -1)?;
    Ok(predicting.logsumexp_axis(-1, true)?.subtract(chosen)?.mean(None)?)
}

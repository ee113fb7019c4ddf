//! Parts that no family of ours combines: each must be in graph, kernels, bodies and f32 pass alike.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use planish_core::arch::{
    Activation, Attention, FeedForward, Layer, Mixer, Norm, NormKind, QkNorm, QkNormScope, Residual, RopeScaling,
};

use planish_tensors::TensorStore;

use super::*;

const BASE: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 60, "max_position_embeddings": 64,
    "tie_word_embeddings": true}"#;

fn changed(change: impl Fn(&mut ModelConfig)) -> ModelConfig {
    let mut config = ModelConfig::from_json_str(BASE, Path::new("config.json")).unwrap();
    change(&mut config);
    config
}

fn attention(layer: &mut Layer) -> &mut Attention {
    let Mixer::Attention(attention) = &mut layer.mixer;
    attention
}

fn norm(name: &'static str, dims: usize, offset: f32) -> Norm {
    let kind = NormKind::Rms { offset };
    Norm {
        name,
        dims,
        eps: 1e-5,
        kind,
    }
}

/// Random weights of a configuration, in a file.
fn weights(config: &ModelConfig, folder: &Path) -> TensorStore {
    let mut state = 7u64;
    let mut noise = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let mut all = BTreeMap::new();
    for spec in config.expected_tensors() {
        let wide = spec.shape.len() == 2;
        let deviation = if wide { 1.7 / (spec.shape[1] as f32).sqrt() } else { 0.2 };
        let mean = if wide { 0.0 } else { 1.0 };
        let count = spec.shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| mean + deviation * noise()).collect();
        all.insert(spec.name, HostTensor::from_f32(&spec.shape, &values));
    }
    let path = folder.join("model.safetensors");
    tensors::write(&path, &all, &BTreeMap::new()).unwrap();
    TensorStore::open(&path).unwrap()
}

fn check(config: &ModelConfig) -> Result<CoreAiCheck> {
    let folder = tempfile::tempdir().unwrap();
    let source = ModelWeights::from_store(weights(config, folder.path()));
    let options = CoreAiOptions::default();
    let job = Export::new(config, source, &options)?;
    let planned = graph::plan(&config.arch, job.context, &job.formats)?;
    let out = folder.path().join("out.aimodel");
    std::fs::create_dir(&out).unwrap();
    let writer = AssetWriter::create(&out, &planned.program)?;
    fill(&planned.jobs, &job.source, &job.importance, writer)?.1.finish()?;
    job.check(&out, &job.facts("out".into(), &out))
}

#[test]
fn norms_with_an_offset_gelu_and_factors() {
    let config = changed(|config| {
        let arch = &mut config.arch;
        arch.embedding_factor = 5.7;
        arch.head.factor = 0.5;
        arch.head.softcap = Some(3.0);
        arch.norm.kind = NormKind::Rms { offset: 1.0 };
        for layer in &mut arch.layers {
            layer.post_mixer_norm = Some(norm("post_mixer", 32, 1.0));
            layer.post_feed_forward_norm = Some(norm("post_feed_forward", 32, 1.0));
            layer.residual_factor = 0.8;
            let FeedForward::Gated { activation, .. } = &mut layer.feed_forward;
            *activation = Activation::GeluTanh;
            attention(layer).scale = 0.2;
        }
    });
    check(&config).unwrap();
}

#[test]
fn layers_that_differ_in_window_and_rotation() {
    let config = changed(|config| {
        for (layer_idx, layer) in config.arch.layers.iter_mut().enumerate() {
            let attention = attention(layer);
            attention.window = [Some(3), None, Some(6)][layer_idx];
            let rope = attention.rope.as_mut().unwrap();
            rope.theta = [10_000.0, 1e6, 500.0][layer_idx];
            rope.dims = [12, 6, 12][layer_idx];
            if layer_idx == 2 {
                rope.scaling = RopeScaling::Yarn {
                    factor: 4.0,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    truncate: true,
                    attention_factor: 1.1,
                    original_max_position_embeddings: 16,
                };
            }
        }
        attention(&mut config.arch.layers[1]).rope = None;
    });
    check(&config).unwrap();
}

#[test]
fn halves_side_by_side_and_norms_over_all_heads() {
    let config = changed(|config| {
        for layer in &mut config.arch.layers {
            layer.residual = Residual::Parallel;
            layer.pre_feed_forward_norm = None;
            attention(layer).qk_norm = Some(QkNorm {
                scope: QkNormScope::Width,
                query: norm("query_norm", 48, 0.0),
                key: norm("key_norm", 24, 0.0),
            });
        }
    });
    check(&config).unwrap();
}

#[test]
fn err_what_the_graph_does_not_have_is_named() {
    let refusal = |change: fn(&mut Attention)| {
        let config = changed(|config| change(attention(&mut config.arch.layers[1])));
        check(&config).unwrap_err().to_string()
    };
    assert!(refusal(|a| a.softcap = Some(30.0)).contains("a soft cap on attention"));
    let lengths = refusal(|a| {
        a.rope.as_mut().unwrap().scaling = RopeScaling::Dynamic {
            factor: 2.0,
            original_max_position_embeddings: 16,
        };
    });
    assert!(lengths.contains("depends on the length"), "{lengths}");
    assert!(refusal(|a| a.head_dim = 10).contains("different key and value heads"));
}

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{LayerQuantization, ModelConfig, QuantizationMode};
use crate::arch::{Attention, FeedForward, GateUp, Mixer, QkvProjections, Rope, RopeScaling};
use crate::{Error, Result, families};

/// A valid small model with `changes` laid over it; a null removes the key.
fn parse(family: &str, changes: Value) -> Result<ModelConfig> {
    let mut config = json!({
        "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
    });
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
        if value.is_null() {
            config.as_object_mut().unwrap().shift_remove(key);
        }
    }
    ModelConfig::from_json_str(&config.to_string(), Path::new("dir/config.json"))
}

fn check_err(family: &str, changes: Value, expect: &str) {
    let message = parse(family, changes).unwrap_err().to_string();
    assert_eq!(message, format!("dir/config.json: {expect}"));
}

fn attention(config: &ModelConfig, layer_idx: usize) -> &Attention {
    let Mixer::Attention(attention) = &config.arch.layers[layer_idx].mixer;
    attention
}

fn rope(config: &ModelConfig) -> &Rope {
    attention(config, 0).rope.as_ref().unwrap()
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    (0..config.arch.layers.len())
        .map(|layer_idx| attention(config, layer_idx).window)
        .collect()
}

/// Whether query, attention output and gate have biases.
fn biases(config: &ModelConfig) -> [bool; 3] {
    let attention = attention(config, 0);
    let QkvProjections::Separate { query, .. } = &attention.projections;
    let FeedForward::Gated { gate_up, .. } = &config.arch.layers[0].feed_forward;
    let GateUp::Separate { gate, .. } = gate_up;
    [query.has_bias, attention.output.has_bias, gate.has_bias]
}

#[test]
fn defaults_are_those_of_the_family() {
    let llama = parse("llama", json!({})).unwrap();
    assert_eq!(
        (attention(&llama, 0).head_dim, llama.max_position_embeddings),
        (16, 2048)
    );
    assert_eq!((rope(&llama).theta, rope(&llama).dims), (10_000.0, 16));
    assert_eq!(rope(&llama).scaling, RopeScaling::None);
    assert_eq!((windows(&llama), biases(&llama)), (vec![None; 2], [false; 3]));
    assert!(!llama.arch.head.is_tied && attention(&llama, 0).qk_norm.is_none());
    let as_heads = parse("llama", json!({"num_key_value_heads": null})).unwrap();
    assert_eq!(attention(&as_heads, 0).n_kv_heads, 4);

    assert_eq!(windows(&parse("mistral", json!({})).unwrap()), [Some(4096); 2]);

    assert_eq!(biases(&parse("qwen2", json!({})).unwrap()), [true, false, false]);

    let qwen3 = parse("qwen3", json!({})).unwrap();
    assert_eq!((attention(&qwen3, 0).head_dim, biases(&qwen3)), (128, [false; 3]));
    assert!(attention(&qwen3, 0).qk_norm.is_some());
}

#[test]
fn attention_bias_covers_all_four_projections() {
    for family in ["llama", "qwen3"] {
        let config = parse(family, json!({"attention_bias": true})).unwrap();
        assert_eq!(biases(&config), [true, true, false], "{family}");
    }
}

#[test]
fn rope_scaling_in_its_three_spellings() {
    let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let expect = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    };
    for (outer, name) in [
        ("rope_scaling", "rope_type"),
        ("rope_scaling", "type"),
        ("rope_parameters", "rope_type"),
    ] {
        let mut scaling = llama3.clone();
        scaling[name] = json!("llama3");
        assert_eq!(
            rope(&parse("llama", json!({outer: scaling})).unwrap()).scaling,
            expect,
            "{outer}.{name}"
        );
    }
}

#[test]
fn theta_is_read_wherever_it_stands() {
    for changes in [
        json!({"rope_theta": 500_000.0}),
        json!({"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"}}),
        json!({"rope_scaling": {"rope_theta": 500_000.0, "rope_type": "default"}}),
        json!({"rope_scaling": {"rope_theta": 500_000}, "rope_theta": 500_000.0}),
    ] {
        assert_eq!(
            rope(&parse("llama", changes.clone()).unwrap()).theta,
            500_000.0,
            "{changes}"
        );
    }
}

#[test]
fn scaling_beside_default_parameters_counts() {
    let both = json!({"rope_parameters": {"rope_theta": 500_000.0, "rope_type": "default"},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}});
    let config = parse("llama", both).unwrap();
    assert_eq!(rope(&config).theta, 10_000.0); // as transformers takes it
    let RopeScaling::Yarn {
        attention_factor,
        truncate,
        original_max_position_embeddings,
        ..
    } = rope(&config).scaling
    else {
        panic!("{:?}", rope(&config));
    };
    assert_eq!((truncate, original_max_position_embeddings), (true, 64));
    assert!((attention_factor - 1.138_629_4).abs() < 1e-6, "{attention_factor}");
}

#[test]
fn every_kind_of_rope_is_read() {
    let kind = |settings: Value| rope(&parse("llama", json!({"rope_scaling": settings})).unwrap()).clone();
    assert_eq!(
        kind(json!({"type": "linear", "factor": 2})).scaling,
        RopeScaling::Linear { factor: 2.0 }
    );
    let dynamic = RopeScaling::Dynamic {
        factor: 2.0,
        original_max_position_embeddings: 2048,
    };
    assert_eq!(kind(json!({"type": "dynamic", "factor": 2.0})).scaling, dynamic);
    let yarn = kind(json!({"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": false}));
    assert_eq!(yarn.attention_factor(), 1.0);
    let long = kind(
        json!({"type": "su", "short_factor": vec![1.0; 8], "long_factor": vec![2.0; 8],
        "original_max_position_embeddings": 128}),
    );
    assert!((long.attention_factor() - (1.0_f32 + 16_f32.ln() / 128_f32.ln()).sqrt()).abs() < 1e-6);
}

#[test]
fn err_rope() {
    let check = |changes, expect| check_err("llama", changes, expect);
    check(
        json!({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0, "rope_type": "default"}}),
        "`rope_theta`: found 1.0, expected rope_parameters.rope_theta = 2, or no such key",
    );
    check(
        json!({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}),
        "`rope_scaling.rope_type` = \"ntk\" is not supported: planish has default, linear, dynamic, llama3, yarn and longrope",
    );
    check(
        json!({"rope_scaling": {"type": "linear"}}),
        "`rope_scaling.factor`: found nothing, expected a positive number",
    );
    check(
        json!({"rope_scaling": {"factor": 4.0}}),
        "`rope_scaling.rope_type`: found nothing, expected a kind of scaling, such as linear or llama3",
    );
    check(
        json!({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}}),
        "`rope_scaling.type`: found linear, expected rope_type = yarn, or no such key",
    );
    check(
        json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        "`rope_scaling.rope_type`: found linear, expected rope_parameters.rope_type = yarn, or one of the two objects",
    );
    check(
        json!({"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        "`rope_parameters.factor`: found 4.0, expected rope_scaling.factor = 2, or no such key",
    );
    check(
        json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
        "`rope_parameters` = {\"full_attention\":{\"rope_type\":\"default\"}} is not supported: one set of parameters for all layers",
    );
    check(
        json!({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "original_max_position_embeddings": 9}}),
        "`rope_scaling.short_factor`: found 1 numbers, expected 8, one per pair",
    );
    assert!(parse("llama", json!({"rope_theta": 1e-60})).is_err(), "vanishes in f32");
    // Equal factors would divide by zero.
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    check(
        json!({"rope_scaling": llama3}),
        "`rope_scaling.low_freq_factor`: found 4, expected less than high_freq_factor = 4",
    );
}

#[test]
fn err_keys_that_nobody_reads() {
    let unread = "is not supported: planish does not use this key here, and it may change the computation";
    check_err(
        "llama",
        json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 4.0}}),
        &format!("`rope_scaling.beta_fast` = 4.0 {unread}"),
    );
    check_err(
        "llama",
        json!({"rope_parameters": {"rope_type": "default", "factor": 2.0}}),
        &format!("`rope_parameters.factor` = 2.0 {unread}"),
    );
    check_err(
        "llama",
        json!({"quantization": {"group_size": 32, "bits": 4, "lm_head": {"bits": 8, "global_scale": true}}}),
        &format!("`quantization.lm_head.global_scale` = true {unread}"),
    );
}

#[test]
fn sliding_window_of_qwen_needs_its_switch_and_begins_at_a_layer() {
    let of = |changes| windows(&parse("qwen2", changes).unwrap());
    let switched =
        |first: usize| of(json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": first}));
    assert_eq!(of(json!({"sliding_window": 128})), [None; 2]);
    assert_eq!(switched(0), [Some(128); 2]);
    assert_eq!(switched(1), [None, Some(128)]);
    assert_eq!(switched(2), [None; 2]);
}

#[test]
fn layer_types_decide_the_window() {
    let of =
        |types: [&str; 2]| windows(&parse("mistral", json!({"layer_types": types, "sliding_window": 64})).unwrap());
    assert_eq!(of(["full_attention"; 2]), [None; 2]);
    assert_eq!(of(["full_attention", "sliding_attention"]), [None, Some(64)]);
    for changes in [json!(["full_attention"]), json!(["full_attention", "mamba"])] {
        assert!(parse("mistral", json!({"layer_types": changes})).is_err());
    }
    let windowed = json!({"layer_types": ["full_attention", "sliding_attention"]});
    assert!(matches!(parse("llama", windowed), Err(Error::UnsupportedModel { key, .. }) if key == "layer_types"));
}

#[test]
fn token_ids_may_be_one_many_or_none() {
    let eos = |value| parse("llama", json!({"eos_token_id": value})).map(|config| config.eos_token_ids);
    assert_eq!(eos(json!(7)).unwrap(), [7]);
    assert_eq!(eos(json!([7, 9])).unwrap(), [7, 9]);
    assert!(eos(Value::Null).unwrap().is_empty());
    assert!(eos(json!(-1)).is_err());
}

#[test]
fn quantization_defaults_overrides_and_modes() {
    let config = parse(
        "llama",
        json!({"quantization_config": {"group_size": 32, "bits": 4, "a": {"bits": 8}, "b": false, "c": true, "d": {"mode": "mxfp8", "group_size": 32, "bits": 8}}}),
    );
    let quantization = config.unwrap().quantization.unwrap();
    let layer = |group_size, bits, mode| Some(LayerQuantization { group_size, bits, mode });
    assert_eq!(
        quantization.for_module("anything"),
        layer(32, 4, QuantizationMode::Affine)
    );
    assert_eq!(quantization.for_module("a"), layer(32, 8, QuantizationMode::Affine));
    assert_eq!(quantization.for_module("b"), None);
    assert_eq!(quantization.for_module("c"), layer(32, 4, QuantizationMode::Affine));
    assert_eq!(quantization.for_module("d"), layer(32, 8, QuantizationMode::Mxfp8));
}

#[test]
fn err_quantization() {
    check_err(
        "llama",
        json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        "`quantization_config.quant_method` = \"gptq\" is not supported: only MLX's own form is read: convert the model with mlx-lm first",
    );
    check_err(
        "llama",
        json!({"quantization": {"group_size": 64, "bits": 7}}),
        "`quantization.bits`: found 7, expected one of 2, 3, 4, 5, 6, 8 in mode affine",
    );
    check_err(
        "llama",
        json!({"quantization": {"group_size": 64, "bits": 4}}),
        "`quantization`: found group_size 64 for model.layers.0.mlp.down_proj, expected a divisor of its input size 96",
    );
}

#[test]
fn err_computation_that_is_not_ours() {
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("num_local_experts", json!(8)),
        ("partial_rotary_factor", json!(0.5)),
        ("final_logit_softcapping", json!(30.0)),
        ("use_qk_norm", json!(true)),
        ("architectures", json!(["LlamaForSequenceClassification"])),
    ] {
        let error = parse("llama", json!({key: value})).unwrap_err();
        assert!(
            matches!(&error, Error::UnsupportedModel { key: named, .. } if named == key),
            "{error}"
        );
    }
    assert!(matches!(
        parse("mistral", json!({"attention_bias": true})),
        Err(Error::UnsupportedModel { .. })
    ));
}

#[test]
fn neutral_values_of_such_keys_are_accepted() {
    let neutral = json!({"num_local_experts": 0, "partial_rotary_factor": 1, "use_qk_norm": false, "hidden_act": "silu",
        "architectures": ["LlamaForCausalLM"], "no_rope_layers": [1, 1]});
    parse("llama", neutral).unwrap();
}

#[test]
fn err_unknown_family_names_the_nearest() {
    check_err(
        "qwen2_moe",
        json!({}),
        "`model_type` = \"qwen2_moe\" is not supported: planish has gemma, gemma2, gemma3_text, gemma3, granite, llama, ministral, mistral, olmo2, olmo3, qwen2, qwen3, smollm3 (nearest: qwen2)",
    );
}

#[test]
fn err_impossible_numbers() {
    check_err(
        "llama",
        json!({"hidden_size": null}),
        "`hidden_size`: found nothing, expected a positive integer",
    );
    check_err(
        "llama",
        json!({"num_attention_heads": 0}),
        "`num_attention_heads`: found 0, expected an integer from 1 to 16384",
    );
    check_err(
        "llama",
        json!({"num_hidden_layers": 1e9}),
        "`num_hidden_layers`: found 1000000000.0, expected an integer from 1 to 4096",
    );
    check_err(
        "llama",
        json!({"num_key_value_heads": 3}),
        "`num_key_value_heads`: found 3, expected a divisor of num_attention_heads = 4",
    );
    check_err(
        "llama",
        json!({"head_dim": 15}),
        "`head_dim`: found 15, expected an even number (rotary embedding turns pairs)",
    );
    check_err(
        "llama",
        json!({"hidden_size": 66}),
        "`hidden_size`: found 66, expected a multiple of num_attention_heads = 4, or an explicit head_dim",
    );
    check_err(
        "llama",
        json!({"rms_norm_eps": "x"}),
        "`rms_norm_eps`: found \"x\", expected a number above 0, at most 1e0",
    );
}

#[test]
fn err_not_json_has_line_and_column() {
    let error = ModelConfig::from_json_str("{\n  \"a\": }", Path::new("c.json")).unwrap_err();
    assert!(matches!(error, Error::Json { line: 2, column: 8, .. }), "{error}");
    assert!(ModelConfig::from_json_str(&"[".repeat(100_000), Path::new("c.json")).is_err());
}

/// Any JSON value, nested a little.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0_u64..70).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,8}".prop_map(Value::from),
        Just(json!("llama3")),
        Just(json!("affine")),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let key = prop::sample::select(vec![
            "rope_type",
            "factor",
            "rope_theta",
            "bits",
            "group_size",
            "mode",
            "x",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..4)
                .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_string(), v)).collect()),
        ]
    })
}

proptest! {
    #[test]
    fn prop_any_values_under_any_keys_never_panic(
        family in prop::sample::select(families::ALL.map(|family| family.model_type).to_vec()),
        changes in prop::collection::vec((prop::sample::select(KEYS.to_vec()), any_json()), 0..6),
    ) {
        let changes = changes.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
        if let Ok(config) = parse(family, changes) {
            for tensor in config.expected_tensors() {
                prop_assert!(tensor.shape.iter().all(|dims| *dims > 0), "{}", tensor.name);
            }
        }
    }

    #[test]
    fn prop_any_text_never_panics(text in ".{0,200}") {
        let _ = ModelConfig::from_json_str(&text, Path::new("config.json"));
    }
}

const KEYS: [&str; 27] = [
    "architectures",
    "attention_bias",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "max_window_layers",
    "mlp_bias",
    "no_rope_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "quantization",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
    "vocab_size",
];

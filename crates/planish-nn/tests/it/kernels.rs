//! Our own kernels against MLX's operations: values and gradients of whole models.

use planish_core::model_config::ModelConfig;
use planish_core::target_modules::{Blocks, PerModule, TargetModules};
use planish_mlx::{Array, Dtype, host};
use planish_nn::{AttentionMask, Error, Kernels, LoraConfig, LoraMethod, Model, Trainable, Training};

use crate::gradients::loss_and_gradients;
use crate::{largest, max_difference};

const TEXT: [u32; 11] = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9];

/// Random weights: biases, norms of heads or a window, as `extra` says.
fn model(extra: &str, kernels: Kernels) -> Model {
    let json = format!(
        r#"{{{extra}, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}}"#
    );
    let config = ModelConfig::from_json_str(&json, "config.json".as_ref()).unwrap();
    Model::random_with(&config, Dtype::Float32, kernels, 1).unwrap()
}

const FAMILIES: [&str; 6] = [
    r#""model_type": "llama", "tie_word_embeddings": true"#,
    r#""model_type": "mistral", "sliding_window": 4"#,
    r#""model_type": "qwen2""#,
    r#""model_type": "qwen3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}"#,
    r#""model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2"#,
    r#""model_type": "gemma3_text", "sliding_window": 4, "sliding_window_pattern": 2, "attn_logit_softcapping": 2.0"#,
];

/// A second model with the trainables of the first, moved away from their start so that nothing is zero.
fn same_trainables(one: &mut Model, other: &mut Model) {
    let noise = |idx: usize, shape: &[i32]| {
        mlx_rs::random::normal::<f32>(shape, None, 0.1, &mlx_rs::random::key(idx as u64).unwrap()).unwrap()
    };
    let moved: Vec<Array> = one
        .trainables()
        .iter()
        .enumerate()
        .map(|(idx, (_, array))| array.add(noise(idx, array.shape())).unwrap())
        .collect();
    one.set_trainables(&moved).unwrap();
    other.set_trainables(&moved).unwrap();
}

fn hidden(model: &Model, mask: &AttentionMask) -> Vec<f32> {
    let ids = model.token_array(&[&TEXT]).unwrap();
    host::to_f32_vec(&model.hidden_for_training(&ids, mask, Training::default()).unwrap()).unwrap()
}

/// Largest difference relative to the largest number, in hidden states, loss and every gradient.
fn check(expect: &mut Model, found: &mut Model, training: Training<'_>, tolerance: f32) {
    for mask in [
        AttentionMask::Causal,
        AttentionMask::Packed {
            segment_ids: Array::from_slice(&[0_i32, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1], &[1, 11]),
        },
    ] {
        let (one, other) = (hidden(expect, &mask), hidden(found, &mask));
        let off = max_difference(&one, &other) / largest(&one);
        assert!(off < tolerance, "hidden states off by {off}");
    }
    let names: Vec<String> = expect.trainables().into_iter().map(|(name, _)| name).collect();
    let (loss, gradients) = loss_and_gradients(expect, &TEXT, training);
    let (found_loss, found_gradients) = loss_and_gradients(found, &TEXT, training);
    assert!((loss - found_loss).abs() < tolerance * loss, "{loss} {found_loss}");
    for ((name, one), other) in names.iter().zip(&gradients).zip(&found_gradients) {
        let off = max_difference(one, other) / largest(one).max(1e-3);
        assert!(
            largest(one) > 0.0 && off < tolerance,
            "{name}: off by {off} of {}",
            largest(one)
        );
    }
}

#[test]
fn native_f32_equals_composed_in_every_family() {
    for extra in FAMILIES {
        let (mut composed, mut native) = (model(extra, Kernels::Composed), model(extra, Kernels::Native));
        for model in [&mut composed, &mut native] {
            model.attach_lora(&LoraConfig::default(), 3).unwrap();
        }
        same_trainables(&mut composed, &mut native);
        check(&mut composed, &mut native, Training::default(), 2e-5);
        let checkpointing = Training {
            activation_checkpointing: true,
            ..Training::default()
        };
        check(&mut composed, &mut native, checkpointing, 2e-5);
    }
}

#[test]
fn native_bf16_stays_within_the_rounding_of_bf16() {
    for extra in FAMILIES {
        let (mut composed, mut native) = (model(extra, Kernels::Composed), model(extra, Kernels::NativeBf16));
        for model in [&mut composed, &mut native] {
            model.attach_lora(&LoraConfig::default(), 3).unwrap();
        }
        same_trainables(&mut composed, &mut native);
        // bf16 has eight bits; some twenty products lie on the longest path, and errors of the two kinds mix.
        check(&mut composed, &mut native, Training::default(), 4e-2);
    }
}

#[test]
fn native_bf16_runs_what_the_fused_kernel_does_not_do() {
    let extra = FAMILIES[3];
    let config = LoraConfig {
        method: LoraMethod::Dora,
        dropout: 0.3,
        ..LoraConfig::default()
    };
    let (mut composed, mut native) = (model(extra, Kernels::Composed), model(extra, Kernels::NativeBf16));
    for model in [&mut composed, &mut native] {
        model.attach_lora(&config, 3).unwrap();
    }
    same_trainables(&mut composed, &mut native);
    let key = mlx_rs::random::key(9).unwrap();
    let training = Training {
        dropout_key: Some(&key),
        ..Training::default()
    };
    check(&mut composed, &mut native, training, 4e-2);
}

#[test]
fn native_f32_trains_every_weight() {
    let extra = FAMILIES[3];
    let (mut composed, mut native) = (model(extra, Kernels::Composed), model(extra, Kernels::Native));
    for model in [&mut composed, &mut native] {
        model.train(Trainable::Weights).unwrap();
    }
    check(&mut composed, &mut native, Training::default(), 2e-5);
}

#[test]
fn err_training_packed_weights() {
    let mut packed = model(FAMILIES[0], Kernels::NativeBf16);
    assert!(matches!(
        packed.train(Trainable::Weights),
        Err(Error::PackedWeights { .. })
    ));
}

#[test]
fn err_native_kernels_in_another_dtype() {
    let config = model(FAMILIES[0], Kernels::Composed).config().clone();
    let outcome = Model::random_with(&config, Dtype::Bfloat16, Kernels::Native, 1);
    assert!(matches!(outcome, Err(Error::NativeKernels { dtype: Dtype::Bfloat16 })));
}

/// Fused blocks in MLX's operations, as they run where there is no NVIDIA GPU.
fn fused_equals_composed(extra: &str, config: &LoraConfig, training: Training<'_>) {
    let (mut composed, mut base) = (model(extra, Kernels::Composed), model(extra, Kernels::Fused));
    for model in [&mut composed, &mut base] {
        model.attach_lora(config, 3).unwrap();
    }
    same_trainables(&mut composed, &mut base);
    let mut fused = base.joined().unwrap();
    check(&mut composed, &mut fused, training, 2e-5);
}

#[test]
fn fused_blocks_equal_composed_in_every_family() {
    for extra in FAMILIES {
        for activation_checkpointing in [false, true] {
            let training = Training {
                activation_checkpointing,
                ..Training::default()
            };
            fused_equals_composed(extra, &LoraConfig::default(), training);
        }
    }
}

#[test]
fn fused_blocks_take_any_choice_of_modules_ranks_and_variants() {
    let key = mlx_rs::random::key(9).unwrap();
    let training = Training {
        dropout_key: Some(&key),
        ..Training::default()
    };
    let some = |targets: &[&str]| LoraConfig {
        targets: TargetModules::new(targets.iter().copied(), Blocks::All),
        ..LoraConfig::default()
    };
    let ranks = LoraConfig {
        ranks: PerModule::new([("q_proj", 3), ("up_proj", 20), ("down_proj", 5)]),
        alphas: PerModule::new([("v_proj", 5.0), ("gate_proj", 7.0)]),
        ..LoraConfig::default()
    };
    let dora = LoraConfig {
        method: LoraMethod::Dora,
        dropout: 0.3,
        ..LoraConfig::default()
    };
    for config in [
        some(&["q_proj", "v_proj"]),
        some(&["up_proj", "o_proj"]),
        some(&["down_proj"]),
        ranks,
        dora,
    ] {
        fused_equals_composed(FAMILIES[0], &config, training);
    }
}

#[test]
fn plan_says_what_runs_and_what_stands_in_the_way() {
    let of = |kernels, config: &LoraConfig| {
        let mut model = model(FAMILIES[0], kernels);
        model.attach_lora(config, 3).unwrap();
        let lines: Vec<String> = model.plan().unwrap().parts.iter().map(ToString::to_string).collect();
        lines.join("; ")
    };
    let lora = LoraConfig::default();
    let dora = LoraConfig {
        method: LoraMethod::Dora,
        ..LoraConfig::default()
    };
    let cases = [
        (Kernels::NativeBf16, &lora, "attention × 2: native kernel, f32"),
        (
            Kernels::NativeBf16,
            &lora,
            "linear layer × 14: native kernel with its adapter, bf16",
        ),
        (Kernels::NativeBf16, &lora, "loss: one kernel with the head, bf16"),
        (Kernels::NativeBf16, &dora, "the adapter by MLX operations (DoRA)"),
        (Kernels::Fused, &lora, "attention × 2: fused block in compiled updates"),
        (Kernels::Fused, &dora, "attention × 2: MLX operations (DoRA)"),
        (Kernels::Composed, &lora, "linear layer × 14: MLX"),
    ];
    for (kernels, config, line) in cases {
        let plan = of(kernels, config);
        assert!(plan.contains(line), "{kernels:?}: {plan}");
    }
}

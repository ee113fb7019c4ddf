//! Who receives gradients, and whether they are right.

use planish_mlx::transforms::value_and_grad;
use planish_mlx::{Array, Dtype, host};
use planish_nn::{
    AttentionMask, Error, Kernels, LoadOptions, LoraConfig, LoraMethod, LoraScale, Model, Trainable, Training,
};

use crate::{fixture, largest, max_difference, next_token_loss, small_random};

const TEXT: [u32; 8] = [3, 14, 15, 9, 26, 5, 35, 8];

/// Loss of predicting the next tokens of `row`, and its gradients with respect to the trainables, in their order.
pub(crate) fn loss_and_gradients(model: &mut Model, row: &[u32], training: Training<'_>) -> (f32, Vec<Vec<f32>>) {
    let arrays: Vec<Array> = model.trainables().into_iter().map(|(_, array)| array).collect();
    let ids = model.token_array(&[row]).unwrap();
    let everything: Vec<usize> = (0..arrays.len()).collect();
    let (outputs, gradients) = value_and_grad(
        |arrays| {
            model.set_trainables(arrays)?;
            let hidden = model.hidden_for_training(&ids, &AttentionMask::Causal, training)?;
            Ok::<_, Error>(vec![next_token_loss(model, &hidden, row)?])
        },
        &arrays,
        &everything,
    )
    .unwrap();
    model.set_trainables(&arrays).unwrap();
    let gradients = gradients
        .iter()
        .map(|gradient| host::to_f32_vec(gradient).unwrap())
        .collect();
    (outputs[0].item_exact(), gradients)
}

fn loss(model: &mut Model, arrays: &[Array]) -> f32 {
    model.set_trainables(arrays).unwrap();
    let ids = model.token_array(&[&TEXT]).unwrap();
    let hidden = model.hidden(&ids, &AttentionMask::Causal, None).unwrap();
    next_token_loss(model, &hidden, &TEXT).unwrap().item_exact()
}

/// The trainables, with noise so that no factor of a product is zero.
fn noisy(model: &Model) -> Vec<Array> {
    let arrays = model.trainables().into_iter().enumerate();
    let noise = |idx: usize, shape: &[i32]| {
        mlx_rs::random::normal::<f32>(shape, None, 0.1, &mlx_rs::random::key(idx as u64).unwrap()).unwrap()
    };
    arrays
        .map(|(idx, (_, array))| array.add(noise(idx, array.shape())).unwrap())
        .collect()
}

/// Central differences along one random direction an array against the gradients.
fn check_finite_differences(model: &mut Model) {
    let names: Vec<String> = model.trainables().into_iter().map(|(name, _)| name).collect();
    let arrays = noisy(model);
    model.set_trainables(&arrays).unwrap();
    let (_, gradients) = loss_and_gradients(model, &TEXT, Training::default());
    for (idx, gradient) in gradients.iter().enumerate() {
        let norm = gradient.iter().map(|value| value * value).sum::<f32>().sqrt();
        assert!(norm > 0.0, "{}: no gradient", names[idx]);
        let direction: Vec<f32> = gradient.iter().map(|value| value / norm).collect();
        let direction = Array::from_slice(&direction, arrays[idx].shape());
        let step = 0.01;
        let mut moved = |sign: f32| {
            let mut arrays = arrays.clone();
            arrays[idx] = arrays[idx]
                .add(direction.multiply(Array::from_f32(sign * step)).unwrap())
                .unwrap();
            loss(model, &arrays)
        };
        // The five-point rule: its error falls with step⁴, so that the step can be large against the rounding of f32.
        let slope = (8.0 * (moved(1.0) - moved(-1.0)) - (moved(2.0) - moved(-2.0))) / (12.0 * step);
        // Losses near 4 carry errors of 5e-7, so slopes of some 1e-4.
        assert!(
            (slope - norm).abs() < 0.005 * norm + 2e-4,
            "{}: slope {slope}, gradient {norm}",
            names[idx]
        );
    }
    model.set_trainables(&arrays).unwrap();
}

#[test]
fn grad_matches_finite_difference_for_each_family() {
    for family in ["llama3-rope", "llama-linear-bias", "mistral-window", "qwen2", "qwen3"] {
        let dir = fixture("goldens").join(family);
        let (mut model, _) = Model::load(&dir, &LoadOptions::with_kernels(Kernels::Composed)).unwrap();
        let config = LoraConfig {
            rank: 2,
            scale: LoraScale::Fixed(1.0),
            ..LoraConfig::default()
        };
        model.attach_lora(&config, 1).unwrap();
        check_finite_differences(&mut model);
    }
}

#[test]
fn grad_matches_finite_difference_for_all_weights() {
    let (mut model, _) = Model::load(&fixture("goldens/qwen3"), &LoadOptions::with_kernels(Kernels::Composed)).unwrap();
    model.train(Trainable::Weights).unwrap();
    check_finite_differences(&mut model);
}

#[test]
fn only_a_and_b_receive_gradients() {
    let mut model = small_random();
    model.attach_lora(&LoraConfig::default(), 1).unwrap();
    let names: Vec<String> = model.trainables().into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 28);
    assert!(
        names
            .iter()
            .all(|name| name.ends_with(".lora_a") || name.ends_with(".lora_b")),
        "{names:?}"
    );
    // Fresh adapters: B is zero, so A has no influence yet, and B has.
    let (_, gradients) = loss_and_gradients(&mut model, &TEXT, Training::default());
    for (name, gradient) in names.iter().zip(&gradients) {
        assert_eq!(largest(gradient) > 0.0, name.ends_with(".lora_b"), "{name}");
    }
}

#[test]
fn dora_trains_its_magnitude() {
    let mut model = small_random();
    model
        .attach_lora(
            &LoraConfig {
                method: LoraMethod::Dora,
                ..LoraConfig::default()
            },
            1,
        )
        .unwrap();
    let names: Vec<String> = model.trainables().into_iter().map(|(name, _)| name).collect();
    model.set_trainables(&noisy(&model)).unwrap();
    let (_, gradients) = loss_and_gradients(&mut model, &TEXT, Training::default());
    assert_eq!(names.iter().filter(|name| name.ends_with(".m")).count(), 14);
    for (name, gradient) in names.iter().zip(&gradients) {
        assert!(largest(gradient) > 0.0, "{name}");
    }
}

#[test]
fn activation_checkpointing_changes_no_bit() {
    for trainable in [Trainable::Adapters, Trainable::Weights] {
        let mut model = small_random();
        model
            .attach_lora(
                &LoraConfig {
                    dropout: 0.3,
                    ..LoraConfig::default()
                },
                1,
            )
            .unwrap();
        model.train(trainable).unwrap();
        model.set_trainables(&noisy(&model)).unwrap();
        let key = mlx_rs::random::key(9).unwrap();
        let run = |model: &mut Model, activation_checkpointing| {
            let training = Training {
                dropout_key: Some(&key),
                activation_checkpointing,
            };
            loss_and_gradients(model, &TEXT, training)
        };
        let (plain_loss, plain) = run(&mut model, false);
        let (checkpointed_loss, checkpointed) = run(&mut model, true);
        assert_eq!(plain_loss, checkpointed_loss);
        for (plain, checkpointed) in plain.iter().zip(&checkpointed) {
            assert!(
                max_difference(plain, checkpointed) <= 1e-6 * largest(plain),
                "{trainable:?}"
            );
        }
    }
}

#[test]
fn dropout_key_decides_the_pass() {
    let mut model = small_random();
    model
        .attach_lora(
            &LoraConfig {
                dropout: 0.5,
                ..LoraConfig::default()
            },
            1,
        )
        .unwrap();
    model.set_trainables(&noisy(&model)).unwrap();
    let mut run = |seed: Option<u64>| {
        let key = seed.map(|seed| mlx_rs::random::key(seed).unwrap());
        loss_and_gradients(
            &mut model,
            &TEXT,
            Training {
                dropout_key: key.as_ref(),
                ..Training::default()
            },
        )
    };
    assert_eq!(run(Some(1)), run(Some(1)));
    assert_ne!(run(Some(1)).0, run(Some(2)).0);
    assert_ne!(run(Some(1)).0, run(None).0);
}

#[test]
fn adapters_of_a_bf16_model_stay_f32_and_so_do_their_gradients() {
    let config = small_random().config().clone();
    let mut model = Model::random(&config, Dtype::Bfloat16, 1).unwrap();
    model.attach_lora(&LoraConfig::default(), 1).unwrap();
    let arrays: Vec<Array> = model.trainables().into_iter().map(|(_, array)| array).collect();
    assert!(arrays.iter().all(|array| array.dtype() == Dtype::Float32));
    let ids = model.token_array(&[&TEXT]).unwrap();
    let hidden = model.hidden(&ids, &AttentionMask::Causal, None).unwrap();
    assert_eq!(hidden.dtype(), Dtype::Bfloat16, "the adapters promoted the activations");
    let (_, gradients) = value_and_grad(
        |arrays| {
            model.set_trainables(arrays)?;
            let hidden = model.hidden_for_training(&ids, &AttentionMask::Causal, Training::default())?;
            Ok::<_, Error>(vec![hidden.sum(None)?.as_dtype(Dtype::Float32)?])
        },
        &arrays,
        &[0],
    )
    .unwrap();
    assert_eq!(gradients[0].dtype(), Dtype::Float32);
}

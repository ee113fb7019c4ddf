//! Adapters: fresh, stored, and their names.

use std::collections::BTreeMap;

use planish_checkpoint::adapter::Trained;
use planish_core::model_config::ModelConfig;
use planish_core::target_modules::{Blocks, PerModule, TargetModules};
use planish_mlx::{Dtype, host};
use planish_nn::{Error, LoraConfig, LoraMethod, LoraScale, Model, Trainable};
use planish_tensors::{self as tensors, HostTensor, TensorStore};

use crate::{largest, logits, max_difference, small_random, tiny_llama};

const TEXT: [u32; 8] = [3, 14, 15, 9, 26, 5, 35, 8];

/// Gives every `B` some value, so that the adapters do something.
fn disturb(model: &mut Model) {
    let mut arrays = Vec::new();
    for (idx, (name, array)) in model.trainables().into_iter().enumerate() {
        let key = mlx_rs::random::key(idx as u64).unwrap();
        let noise = mlx_rs::random::normal::<f32>(array.shape(), None, 0.05, &key).unwrap();
        arrays.push(if name.ends_with(".lora_b") { noise } else { array });
    }
    model.set_trainables(&arrays).unwrap();
}

#[test]
fn fresh_adapter_leaves_logits_bit_identical() {
    for mut model in [tiny_llama(), small_random()] {
        let before = logits(&model, &[&TEXT]);
        model.attach_lora(&LoraConfig::default(), 1).unwrap();
        assert_eq!(before, logits(&model, &[&TEXT]));
        disturb(&mut model);
        assert_ne!(before, logits(&model, &[&TEXT]));
    }
}

#[test]
fn fresh_dora_equals_the_base_within_rounding() {
    let mut model = small_random();
    let before = logits(&model, &[&TEXT]);
    model
        .attach_lora(
            &LoraConfig {
                method: LoraMethod::Dora,
                ..LoraConfig::default()
            },
            1,
        )
        .unwrap();
    let after = logits(&model, &[&TEXT]);
    assert!(max_difference(&before, &after) < 1e-6 * largest(&before));
}

fn random_of(family: &str, dtype: Dtype) -> Model {
    let json = format!(
        r#"{{"model_type": "{family}", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}}"#
    );
    let config = ModelConfig::from_json_str(&json, "config.json".as_ref()).unwrap();
    Model::random(&config, dtype, 1).unwrap()
}

#[test]
fn joined_model_equals_its_original_and_leaves_it_as_it_was() {
    for family in ["llama", "qwen2", "qwen3"] {
        let mut model = random_of(family, Dtype::Bfloat16);
        model.attach_lora(&LoraConfig::default(), 1).unwrap();
        disturb(&mut model);
        let before = logits(&model, &[&TEXT]);
        let joined = model.joined().unwrap();
        assert_eq!(before, logits(&model, &[&TEXT]), "{family}: views hold what was there");
        let after = logits(&joined, &[&TEXT]);
        // Another product, rounded to 8 bits.
        assert!(max_difference(&before, &after) < 2e-2 * largest(&before), "{family}");
    }
}

#[test]
fn initial_a_depends_on_seed_and_path_only() {
    let (mut all, mut few, mut reseeded) = (small_random(), small_random(), small_random());
    all.attach_lora(&LoraConfig::default(), 7).unwrap();
    let targets = TargetModules::new(["v_proj"], Blocks::from_count(1).unwrap());
    let config = LoraConfig {
        targets,
        ..LoraConfig::default()
    };
    assert_eq!(
        few.attach_lora(&config, 7).unwrap(),
        ["model.layers.1.self_attn.v_proj"]
    );
    reseeded.attach_lora(&config, 8).unwrap();

    let values_in = |model: &Model, layer_idx: usize| {
        let name = format!("model.layers.{layer_idx}.self_attn.v_proj.lora_a");
        let (_, array) = model
            .trainables()
            .into_iter()
            .find(|(found, _)| *found == name)
            .unwrap();
        assert_eq!(array.shape(), &[32, 8]);
        host::to_f32_vec(&array).unwrap()
    };
    let values = |model: &Model| values_in(model, 1);
    assert_eq!(values(&all), values(&few));
    assert_ne!(values(&few), values(&reseeded));
    assert_ne!(values_in(&all, 0), values_in(&all, 1));
    let bound = 1.0 / 32f32.sqrt();
    assert!(values(&all).iter().all(|value| value.abs() <= bound));
    assert!(largest(&values(&all)) > 0.9 * bound);
}

#[test]
fn trainables_are_sorted_and_come_back_in_place() {
    // 12 layers: as texts, "layers.10" would come before "layers.2".
    let json = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 12,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}"#;
    let config = planish_core::model_config::ModelConfig::from_json_str(json, "config.json".as_ref()).unwrap();
    let mut model = Model::random(&config, planish_mlx::Dtype::Float32, 0).unwrap();
    model
        .attach_lora(
            &LoraConfig {
                rank: 2,
                ..LoraConfig::default()
            },
            1,
        )
        .unwrap();
    disturb(&mut model);
    let trainables = model.trainables();
    assert_eq!(trainables.len(), 12 * 7 * 2);
    let layers: Vec<usize> = trainables
        .iter()
        .map(|(name, _)| name.split('.').nth(2).unwrap().parse().unwrap())
        .collect();
    assert!(layers.is_sorted(), "{layers:?}");
    let names = trainables.iter().map(|(name, _)| name);
    assert!(
        names
            .clone()
            .zip(names.skip(1))
            .all(|(one, other)| one.len() != other.len() || one < other)
    );
    let before = logits(&model, &[&TEXT]);
    let arrays: Vec<_> = trainables.iter().map(|(_, array)| array.clone()).collect();
    model.set_trainables(&arrays).unwrap();
    assert_eq!(before, logits(&model, &[&TEXT]));
    for ((name, array), (again, other)) in trainables.iter().zip(model.trainables()) {
        assert_eq!(*name, again);
        assert!(array.eq_exact(&other).unwrap(), "{name}");
    }
    assert!(matches!(
        model.set_trainables(&arrays[1..]),
        Err(Error::TrainableCount {
            expected: 168,
            found: 167
        })
    ));
}

#[test]
fn stored_tensors_give_the_same_logits() {
    for method in [LoraMethod::Lora, LoraMethod::Dora] {
        let mut model = small_random();
        let config = LoraConfig {
            method,
            scale: LoraScale::Fixed(3.0),
            ..LoraConfig::default()
        };
        model.attach_lora(&config, 1).unwrap();
        disturb(&mut model);
        let expect = logits(&model, &[&TEXT]);
        let tensors = model.adapter_tensors().unwrap();
        assert_eq!(model.detach_adapters(), 14);
        assert_ne!(expect, logits(&model, &[&TEXT]));
        assert_eq!(model.attach_tensors(&tensors, 3.0, 0.0).unwrap().len(), 14);
        assert_eq!(expect, logits(&model, &[&TEXT]), "{method:?}");
        assert_eq!(model.adapter_tensors().unwrap(), tensors);
    }
}

#[test]
fn stored_whole_weights_take_the_place_of_the_models_own() {
    let mut trained = small_random();
    trained.train(Trainable::Weights).unwrap();
    let mut tensors = BTreeMap::new();
    for (name, array) in trained.trainables() {
        let array = array.add(planish_mlx::Array::from_f32(0.01)).unwrap();
        let shape: Vec<usize> = array.shape().iter().map(|&dim| dim as usize).collect();
        tensors.insert(name, HostTensor::from_f32(&shape, &host::to_f32_vec(&array).unwrap()));
    }
    let stored = |tensors: &BTreeMap<String, HostTensor>| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        tensors::write(&path, tensors, &BTreeMap::new()).unwrap();
        Trained::Whole(TensorStore::open(&path).unwrap())
    };
    let arrays: Vec<_> = trained.trainables().into_iter().collect();
    let moved: Vec<_> = arrays
        .iter()
        .map(|(_, a)| a.add(planish_mlx::Array::from_f32(0.01)).unwrap())
        .collect();
    trained.set_trainables(&moved).unwrap();
    let mut model = small_random();
    assert_ne!(logits(&trained, &[&TEXT]), logits(&model, &[&TEXT]));
    model.attach(&stored(&tensors)).unwrap();
    assert_eq!(logits(&trained, &[&TEXT]), logits(&model, &[&TEXT]));

    tensors.insert("model.nrm.weight".into(), HostTensor::from_f32(&[1], &[0.0]));
    let error = model.attach(&stored(&tensors)).unwrap_err();
    assert!(error.to_string().contains("model.norm.weight"), "{error}");
}

#[test]
fn scale_settings_agree_on_the_factor() {
    let logits_with = |scale, rank| {
        let mut model = small_random();
        model
            .attach_lora(
                &LoraConfig {
                    scale,
                    rank,
                    ..LoraConfig::default()
                },
                1,
            )
            .unwrap();
        disturb(&mut model);
        logits(&model, &[&TEXT])
    };
    assert_eq!(
        logits_with(LoraScale::Alpha(8.0), 4),
        logits_with(LoraScale::Fixed(2.0), 4)
    );
    assert_eq!(
        logits_with(LoraScale::RankStabilised(8.0), 4),
        logits_with(LoraScale::Fixed(4.0), 4)
    );
}

#[test]
fn single_modules_have_their_own_rank() {
    let mut model = small_random();
    let ranks = PerModule::new([("down_proj", 3)]);
    model
        .attach_lora(
            &LoraConfig {
                ranks,
                ..LoraConfig::default()
            },
            1,
        )
        .unwrap();
    for (name, tensor) in model.adapter_tensors().unwrap() {
        let rank = if name.contains("down_proj") { 3 } else { 8 };
        assert!(tensor.shape.contains(&rank), "{name} {:?}", tensor.shape);
    }
}

#[test]
fn err_settings_and_tensors_that_do_not_fit() {
    let mut model = small_random();
    let refused = |model: &mut Model, config: LoraConfig| model.attach_lora(&config, 1).unwrap_err();
    let error = refused(
        &mut model,
        LoraConfig {
            rank: 0,
            ..LoraConfig::default()
        },
    );
    assert!(matches!(error, Error::ZeroRank { .. }), "{error}");
    let error = refused(
        &mut model,
        LoraConfig {
            dropout: 1.0,
            ..LoraConfig::default()
        },
    );
    assert!(matches!(error, Error::DropoutRange { .. }), "{error}");
    let targets = TargetModules::new(["qproj"], Blocks::All);
    let error = refused(
        &mut model,
        LoraConfig {
            targets,
            ..LoraConfig::default()
        },
    );
    assert!(error.to_string().contains("q_proj"), "{error}");
    assert!(
        model.trainables().is_empty(),
        "a refused configuration left adapters behind"
    );

    model.attach_lora(&LoraConfig::default(), 1).unwrap();
    let good = model.adapter_tensors().unwrap();
    assert!(matches!(
        refused(&mut model, LoraConfig::default()),
        Error::AdaptersAttached
    ));
    model.detach_adapters();

    let name = "model.layers.0.self_attn.q_proj.lora_b".to_owned();
    let mut tensors = good.clone();
    let renamed = tensors.remove(&name).unwrap();
    let error = model.attach_tensors(&tensors, 1.0, 0.0).unwrap_err();
    assert!(
        matches!(error, Error::IncompleteAdapter { part: "lora_b", .. }),
        "{error}"
    );
    tensors.insert("model.layers.0.self_attn.q_prj.lora_b".into(), renamed);
    let error = model.attach_tensors(&tensors, 1.0, 0.0).unwrap_err();
    assert!(error.to_string().contains("self_attn.q_proj"), "{error}");

    let mut tensors = good.clone();
    tensors.insert(name.clone(), HostTensor::from_f32(&[8, 2], &[0.0; 16]));
    let error = model.attach_tensors(&tensors, 1.0, 0.0).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");

    let mut tensors = good;
    tensors.insert(name, HostTensor::from_f32(&[8, 64], &[f32::NAN; 512]));
    let error = model.attach_tensors(&tensors, 1.0, 0.0).unwrap_err();
    assert!(
        error.to_string().contains("NaN") && error.to_string().contains("q_proj.lora_b"),
        "{error}"
    );
    assert_eq!(model.detach_adapters(), 0);
}

#[test]
fn all_weights_train_when_asked() {
    let mut model = small_random();
    model.train(Trainable::Weights).unwrap();
    let mut names: Vec<String> = model
        .config()
        .expected_tensors()
        .into_iter()
        .map(|spec| spec.name)
        .collect();
    names.sort();
    assert_eq!(
        model.trainables().into_iter().map(|(name, _)| name).collect::<Vec<_>>(),
        names
    );
}

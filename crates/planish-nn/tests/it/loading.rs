//! Strict loading: nothing missing, nothing left over, nothing broken.

use std::collections::BTreeMap;
use std::path::Path;

use planish_core::model_config::ModelConfig;
use planish_mlx::{Array, Dtype};
use planish_nn::{Error, Kernels, LoadOptions, Model};
use planish_tensors::{self as tensors, Dtype as FileDtype, HostTensor, TensorStore};

use crate::{fixture, largest, logits, max_difference};

/// A copy of a small model with changed tensors.
fn altered(change: impl FnOnce(&mut BTreeMap<String, HostTensor>)) -> tempfile::TempDir {
    let source = fixture("goldens/qwen2");
    let store = TensorStore::open(&source.join("model.safetensors")).unwrap();
    let mut weights: BTreeMap<_, _> = store
        .iter()
        .map(|view| (view.name.to_owned(), view.to_host()))
        .collect();
    change(&mut weights);
    let dir = tempfile::tempdir().unwrap();
    tensors::write(&dir.path().join("model.safetensors"), &weights, &BTreeMap::new()).unwrap();
    std::fs::copy(source.join("config.json"), dir.path().join("config.json")).unwrap();
    dir
}

fn load(dir: &Path) -> Result<Model, Error> {
    Model::load(dir, &LoadOptions::with_kernels(Kernels::Composed)).map(|(model, _)| model)
}

fn message(change: impl FnOnce(&mut BTreeMap<String, HostTensor>)) -> String {
    load(altered(change).path()).unwrap_err().to_string()
}

#[test]
fn err_names_the_missing_unexpected_misshaped_and_nan_tensor() {
    let text = message(|weights| drop(weights.remove("model.norm.weight")));
    assert!(text.contains("missing") && text.contains("model.norm.weight"), "{text}");

    let text = message(|weights| drop(weights.insert("model.extra".into(), HostTensor::from_f32(&[1], &[0.0]))));
    assert!(text.contains("unexpected") && text.contains("model.extra"), "{text}");

    let text =
        message(|weights| drop(weights.insert("model.norm.weight".into(), HostTensor::from_f32(&[2], &[1.0; 2]))));
    assert!(text.contains("shape") && text.contains("model.norm.weight"), "{text}");

    let text = message(|weights| {
        let mut values = vec![1.0; 32];
        values[5] = f32::NAN;
        weights.insert("model.norm.weight".into(), HostTensor::from_f32(&[32], &values));
    });
    assert!(
        text.contains("NaN") && text.contains("model.norm.weight") && text.contains('5'),
        "{text}"
    );
}

#[test]
fn redundant_tensors_are_ignored_and_reported() {
    let angles = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let dir = altered(|weights| {
        weights.insert("lm_head.weight".into(), weights["model.embed_tokens.weight"].clone());
        weights.insert(angles.into(), HostTensor::from_f32(&[4], &[1.0; 4]));
    });
    let (_, report) = Model::load(dir.path(), &LoadOptions::with_kernels(Kernels::Composed)).unwrap();
    assert_eq!(report.ignored.count, 2);

    let text = message(|weights| {
        let mut head = weights["model.embed_tokens.weight"].clone();
        head.bytes[0] ^= 1;
        weights.insert("lm_head.weight".into(), head);
    });
    assert!(text.contains("lm_head.weight is not the embedding"), "{text}");
}

#[test]
fn every_tensor_changes_the_logits() {
    let tokens: [u32; 6] = [3, 14, 15, 9, 26, 5];
    let before = logits(&load(altered(|_| ()).path()).unwrap(), &[&tokens]);
    let store = TensorStore::open(&fixture("goldens/qwen2/model.safetensors")).unwrap();
    for name in store.names() {
        let dir = altered(|weights| {
            let tensor = &weights[name];
            let values: Vec<f32> = tensor
                .to_f32()
                .unwrap()
                .into_iter()
                .map(|value| value * 1.1 + 0.01)
                .collect();
            let changed = HostTensor::from_f32(&tensor.shape, &values);
            weights.insert(name.to_owned(), changed);
        });
        let after = logits(&load(dir.path()).unwrap(), &[&tokens]);
        // Softmax does not feel one number added to every key of a head.
        let is_key_bias = name.ends_with("k_proj.bias");
        assert!(
            is_key_bias || max_difference(&before, &after) > 1e-4,
            "{name} has no influence"
        );
    }
}

#[test]
fn dtype_can_be_chosen() {
    let dir = altered(|_| ());
    let with = |dtype| {
        let options = LoadOptions {
            dtype: Some(dtype),
            ..LoadOptions::default()
        };
        Model::load(dir.path(), &options).map(|(model, _)| model)
    };
    let (full, half) = (with(Dtype::Float32).unwrap(), with(Dtype::Bfloat16).unwrap());
    assert_eq!(half.dtype(), Dtype::Bfloat16);
    let (full, half) = (logits(&full, &[&[3, 14]]), logits(&half, &[&[3, 14]]));
    let difference = max_difference(&full, &half) / largest(&full);
    assert!(difference > 1e-5 && difference < 5e-2, "{difference}");
    assert!(matches!(
        with(Dtype::Int32),
        Err(Error::ComputeDtype { dtype: Dtype::Int32 })
    ));
}

#[test]
fn quantised_base_gives_the_logits_of_its_dequantised_weights() {
    for bits in [4, 8] {
        let dir = fixture(&format!("goldens/llama-affine-{bits}bit"));
        let golden = TensorStore::open(&dir.join("golden/golden.safetensors")).unwrap();
        let tokens: Vec<u32> = golden
            .require("tokens")
            .unwrap()
            .bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|&w| i32::from_le_bytes(w) as u32)
            .collect();
        let expect = golden.require("logits").unwrap().to_f32().unwrap();
        let found = logits(&load(&dir).unwrap(), &tokens.chunks(24).collect::<Vec<_>>());
        assert!(max_difference(&found, &expect) < 2e-5 * largest(&expect), "{bits} bits");
    }
}

/// The folder that the child process loads.
const MODEL: &str = "PLANISH_TEST_MODEL";
/// Where Linux says what a process takes.
const STATUS: &str = "/proc/self/status";

/// A model is copied out of its files tensor by tensor, and what was copied leaves the memory: 100 MB on disk take little
/// more than 100 MB, not twice as much.
#[test]
#[allow(clippy::print_stdout)] // A test that does not run says so.
fn weights_are_in_memory_once() {
    if !Path::new(STATUS).exists() {
        println!("skipped: no {STATUS} tells what a process takes here");
        return;
    }
    let json = r#"{"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8, "vocab_size": 64, "tie_word_embeddings": true}"#;
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), json).unwrap();
    let specs = ModelConfig::from_json_str(json, "config.json".as_ref())
        .unwrap()
        .expected_tensors();
    let zeros = |shape: &[usize]| HostTensor::zeros(FileDtype::F32, shape);
    let weights: BTreeMap<_, _> = specs.into_iter().map(|spec| (spec.name, zeros(&spec.shape))).collect();
    let file = dir.path().join("model.safetensors");
    tensors::write(&file, &weights, &BTreeMap::new()).unwrap();
    let file_bytes = std::fs::metadata(&file).unwrap().len() as f64;

    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["loading::child_loads_a_model", "--exact", "--nocapture"])
        .env(MODEL, dir.path())
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&child.stdout);
    let (_, grown) = printed.split_once("grown by ").expect(&printed);
    let ratio = grown.split_whitespace().next().unwrap().parse::<f64>().unwrap() / file_bytes;
    // The arrays, the largest tensor once more (4 %), and what MLX and the allocator take; 2 with the map.
    assert!((0.9..1.3).contains(&ratio), "{ratio} of {file_bytes} B");
}

/// Says by how much the peak of this process's memory grows when the model is loaded: nothing unless a test starts it.
#[test]
#[allow(clippy::print_stdout)] // The test that starts it reads it.
fn child_loads_a_model() {
    let Some(dir) = std::env::var_os(MODEL) else { return };
    Array::from_f32(1.0).eval().unwrap();
    let before = peak_resident_bytes();
    let model = load(Path::new(&dir)).unwrap();
    println!("grown by {} B", peak_resident_bytes() - before);
    drop(model);
}

fn peak_resident_bytes() -> usize {
    let status = std::fs::read_to_string(STATUS).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

//! A made-up adapter for the tiny model, and the model in other forms.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_checkpoint::adapter::{Adapter, BaseModel, Method};
use planish_tensors::{self as tensors, Dtype, HostTensor, TensorStore, quantize};
use serde_json::{Value, json};

use crate::run::{planish, text, tiny_model};

/// Writes an adapter of every linear layer in a block, with updates of about `rms` a weight.
pub(crate) fn write_adapter(dir: &Path, method: Method, rms: f32) {
    let base = BaseModel::open(tiny_model()).unwrap();
    let store = TensorStore::open(tiny_model()).unwrap();
    let mut adapter = Adapter::new(method, 4, 2.0, 0.0);
    let mut numbers = numbers();
    for (module, shape) in base.modules.iter().filter(|(_, module)| !module.is_embedding) {
        let (input, output) = (shape.input_dims, shape.output_dims);
        let mut tensor = |leaf: &str, shape: &[usize], scale: f32| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| numbers() * scale).collect();
            let name = format!("{module}.{leaf}");
            adapter.tensors.insert(name, HostTensor::from_f32(shape, &values));
        };
        tensor("lora_a", &[input, 4], 1.0);
        // scale 2, four products, numbers of rms 0.58: 2 · 2 · 0.58² = 1.3.
        tensor("lora_b", &[4, output], rms / 1.3);
        if method == Method::Dora {
            let weight = store.require(&format!("{module}.weight")).unwrap().to_f32().unwrap();
            let norm = |row: &[f32]| row.iter().map(|v| v * v).sum::<f32>().sqrt() * 1.05;
            let norms: Vec<f32> = weight.chunks_exact(input).map(norm).collect();
            let name = format!("{module}.m");
            adapter.tensors.insert(name, HostTensor::from_f32(&[output], &norms));
        }
    }
    adapter.fill_keys();
    std::fs::create_dir_all(dir).unwrap();
    adapter.write_mlx_lm(dir).unwrap();
}

/// The tiny model with its matrices in MLX's affine form.
pub(crate) fn write_quantized(dir: &Path, bits: usize) {
    std::fs::create_dir_all(dir).unwrap();
    let mut stored = BTreeMap::new();
    for view in TensorStore::open(tiny_model()).unwrap().iter() {
        let Some(module) = view.name.strip_suffix(".weight").filter(|_| view.shape.len() == 2) else {
            stored.insert(view.name.to_string(), view.to_host());
            continue;
        };
        let packed = quantize(&view.to_f32().unwrap(), view.shape[0], bits, 32, Dtype::F32).unwrap();
        stored.insert(format!("{module}.weight"), packed.weight);
        stored.insert(format!("{module}.scales"), packed.scales);
        stored.insert(format!("{module}.biases"), packed.biases);
    }
    tensors::write(&dir.join("model.safetensors"), &stored, &BTreeMap::new()).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(tiny_model().join("config.json")).unwrap()).unwrap();
    config["quantization"] = json!({"group_size": 32, "bits": bits});
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(tiny_model().join(name), dir.join(name)).unwrap();
    }
}

/// What `planish logits` writes for a fixed row of tokens.
pub(crate) fn logits(model: &Path, adapter: Option<&Path>) -> Vec<f32> {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("logits.safetensors");
    let tokens = "1,5,77,300,2,1999,42,8";
    let mut args = vec![
        "logits",
        "--model",
        text(model),
        "--tokens",
        tokens,
        "--out",
        text(&out),
    ];
    if let Some(adapter) = adapter {
        args.extend(["--adapter", text(adapter)]);
    }
    planish(&args).success();
    TensorStore::open(&out)
        .unwrap()
        .require("logits")
        .unwrap()
        .to_f32()
        .unwrap()
}

/// Largest difference of two rows of numbers.
pub(crate) fn difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// A temporary folder with an adapter in it.
pub(crate) fn with_adapter(method: Method, rms: f32) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let adapter = dir.path().join("adapter");
    write_adapter(&adapter, method, rms);
    (dir, adapter)
}

/// Numbers from -1 to 1, the same every time.
fn numbers() -> impl FnMut() -> f32 {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

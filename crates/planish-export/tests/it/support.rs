//! Tiny models with random weights, and the goldens of planish-nn that mlx-lm computed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use planish_core::model_config::ModelConfig;
use planish_tensors::{self as tensors, HostTensor, LoadRules, ModelWeights};
pub(crate) use planish_testkit::golden;

/// Reproducible noise, nearly normal, of standard deviation 1.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }

    fn uniform(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }
}

/// Writes a model folder with random weights of ordinary size.
pub(crate) fn write_model(folder: &Path, config_json: &str, seed: u64) {
    let tensors = random_tensors(config_json, seed);
    write_tensors(folder, config_json, &tensors);
}

pub(crate) fn write_tensors(folder: &Path, config_json: &str, tensors: &BTreeMap<String, HostTensor>) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("config.json"), config_json).unwrap();
    tensors::write(&folder.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
}

pub(crate) fn random_tensors(config_json: &str, seed: u64) -> BTreeMap<String, HostTensor> {
    let config = ModelConfig::from_json_str(config_json, Path::new("config.json")).unwrap();
    let mut noise = Noise::new(seed);
    let specs = config.expected_tensors().into_iter();
    let tensor = |spec: planish_core::model_config::TensorSpec| {
        let count: usize = spec.shape.iter().product();
        let (mean, deviation) = if spec.name.ends_with("norm.weight") {
            (1.0, 0.1)
        } else if spec.name.ends_with("bias") || spec.name.contains("embed") {
            (0.0, 0.3)
        } else {
            (0.0, 1.0 / (spec.shape[1] as f32).sqrt())
        };
        let values: Vec<f32> = (0..count).map(|_| mean + deviation * noise.next()).collect();
        (spec.name, HostTensor::from_f32(&spec.shape, &values))
    };
    specs.map(tensor).collect()
}

/// All bytes of a folder by relative path.
pub(crate) fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut out = BTreeMap::new();
    let mut open = vec![folder.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                out.insert(path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    out
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    for (path, bytes) in contents(from) {
        let target = to.join(path);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::write(target, bytes).unwrap();
    }
}

pub(crate) fn open(model: &Path) -> (ModelConfig, ModelWeights) {
    let config = ModelConfig::from_file(&model.join("config.json")).unwrap();
    let (weights, _) = ModelWeights::open(model, &config, &LoadRules::default()).unwrap();
    (config, weights)
}

pub(crate) const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 48, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": true, "max_position_embeddings": 128}"#;

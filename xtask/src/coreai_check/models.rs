//! Random models of every family: configurations that no fixed list holds, weights of ordinary size.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use planish_core::model_config::ModelConfig;
use planish_tensors::{self as tensors, HostTensor};
use serde_json::{Value, json};

/// Name and configuration of each model; the same number gives the same ones.
pub(super) fn all(per_family: u64) -> Vec<(String, Value)> {
    // The text model inside another one is refused.
    let families = planish_core::families::ALL
        .iter()
        .map(|family| family.model_type)
        .filter(|name| *name != "gemma3");
    let of_family =
        |family: &'static str| (0..per_family).map(move |seed| (format!("{family}-{seed}"), config(family, seed)));
    families.flat_map(of_family).collect()
}

/// A linear congruential generator.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.next() as usize % choices.len()].clone()
    }

    /// Nearly normal, of standard deviation 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.next() as f32 / (1u64 << 31) as f32).sum::<f32>() - 6.0
    }
}

fn config(family: &str, seed: u64) -> Value {
    let mut random = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ family.len() as u64);
    let kv = random.pick(&[1, 2, 3]);
    let scaling = random.pick(&[
        Value::Null,
        json!({ "type": "linear", "factor": 4.0 }),
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16 }),
    ]);
    let mut config = json!({
        "model_type": family, "hidden_size": random.pick(&[48, 64, 96]), "intermediate_size": random.pick(&[40, 96, 128]),
        "num_hidden_layers": random.pick(&[1, 2, 3]), "num_attention_heads": kv * random.pick(&[1, 2, 4]),
        "num_key_value_heads": kv, "head_dim": random.pick(&[8, 16, 24]), "vocab_size": random.pick(&[96, 130, 250]),
        "rms_norm_eps": random.pick(&[1e-6, 1e-5]), "tie_word_embeddings": random.pick(&[true, false]),
        "max_position_embeddings": 128,
    });
    match family {
        "llama" => {
            config["rope_theta"] = random.pick(&[10_000.0, 500_000.0]).into();
            config["rope_scaling"] = scaling;
            config["attention_bias"] = random.pick(&[true, false]).into();
            config["mlp_bias"] = random.pick(&[true, false]).into();
        }
        "mistral" => config["sliding_window"] = random.pick(&[json!(4), json!(11), Value::Null]),
        // Capped attention is refused.
        "gemma2" => {
            config["attn_logit_softcapping"] = Value::Null;
            config["query_pre_attn_scalar"] = 16.into();
            config["sliding_window"] = random.pick(&[4, 7]).into();
        }
        "gemma3_text" => {
            config["sliding_window"] = random.pick(&[4, 7]).into();
            config["sliding_window_pattern"] = random.pick(&[1, 2, 6]).into();
            config["query_pre_attn_scalar"] = random.pick(&[16, 24]).into();
            config["final_logit_softcapping"] = random.pick(&[json!(30.0), Value::Null]);
        }
        _ => {}
    }
    config
}

/// Writes a model folder with random weights.
pub(super) fn write(folder: &Path, config: &Value) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(folder.join("config.json"), config.to_string())?;
    let parsed = ModelConfig::from_file(&folder.join("config.json"))?;
    let mut random = Random(parsed.arch.vocab_size as u64);
    let mut all = BTreeMap::new();
    for spec in parsed.expected_tensors() {
        let (mean, deviation) = match &spec.shape[..] {
            [_, columns] => (0.0, 1.0 / (*columns as f32).sqrt()),
            _ if spec.name.ends_with("norm.weight") => (1.0, 0.1),
            _ => (0.0, 0.3),
        };
        let values: Vec<f32> = (0..spec.shape.iter().product())
            .map(|_| mean + deviation * random.normal())
            .collect();
        all.insert(spec.name, HostTensor::from_f32(&spec.shape, &values));
    }
    tensors::write(&folder.join("model.safetensors"), &all, &BTreeMap::new())?;
    Ok(())
}

/// Number of tokens of a model.
pub(super) fn vocabulary(model: &Path) -> Result<u32> {
    let config = ModelConfig::from_file(&model.join("config.json"))?;
    Ok(config.arch.vocab_size as u32)
}

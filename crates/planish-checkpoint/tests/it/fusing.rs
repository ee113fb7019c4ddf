use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use planish_checkpoint::Error;
use planish_checkpoint::adapter::{Adapter, Method};
use planish_checkpoint::fuse::{
    FuseOptions, FuseTarget, LogitsCheck, Retention, Verdict, export_safetensors, fuse, fuse_checked, open_merged,
};
use planish_core::model_config::ModelConfig;
use planish_tensors::{self as tensors, Affine, Dtype, HostTensor, LoadRules, TensorStore, dequantize, quantize};
use serde_json::{Value, json};

/// Normally distributed numbers, the same for the same seed.
fn normal(count: usize, rms: f32, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) as f64 / (1u64 << 53) as f64
    };
    let mut next = || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    (0..count).map(|_| (next() * f64::from(rms)) as f32).collect()
}

/// A-7: what 4 bits leave of an update of rank 8. At 1e-3 on weights of 0.02 it is a third of the direction; MLX itself
/// gives 0.30 there (and 0.23 for an update of full rank, which is not what adapters make).
#[test]
fn four_bits_lose_a_small_update() {
    let check = |delta_rms: f32, expect: std::ops::Range<f64>| {
        let packed = quantize(&normal(512 * 512, 0.02, 1), 512, 4, 64, Dtype::F32).unwrap();
        let base = dequantize(&packed, 4).unwrap();
        let (left, right) = (normal(512 * 8, 1.0, 2), normal(8 * 512, delta_rms / 8f32.sqrt(), 3));
        let delta = |i: usize| {
            (0..8)
                .map(|k| left[i / 512 * 8 + k] * right[k * 512 + i % 512])
                .sum::<f32>()
        };
        let fused: Vec<f32> = base.iter().enumerate().map(|(i, weight)| weight + delta(i)).collect();
        let stored = dequantize(&quantize(&fused, 512, 4, 64, Dtype::F32).unwrap(), 4).unwrap();
        let retention = Retention::measure(&base, &fused, &stored).unwrap();
        assert!(
            (retention.delta_rms / f64::from(delta_rms) - 1.0).abs() < 0.05,
            "{}",
            retention.delta_rms
        );
        assert!(
            expect.contains(&retention.cosine),
            "{} at {delta_rms}",
            retention.cosine
        );
    };
    check(1e-3, 0.25..0.37);
    check(3e-3, 0.80..0.92);
}

const SMALL: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu"}"#;

/// Bits and groups for a quantised model, or an element type.
#[derive(Clone, Copy)]
enum Weights {
    Float(Dtype),
    Quantized(usize),
}

fn write_model(dir: &Path, weights: Weights) {
    fs::create_dir_all(dir).unwrap();
    let mut config: Value = serde_json::from_str(SMALL).unwrap();
    let plain = ModelConfig::from_json_str(&config.to_string(), Path::new("config.json")).unwrap();
    let mut tensors = BTreeMap::new();
    for (seed, spec) in plain.expected_tensors().into_iter().enumerate() {
        let values = normal(spec.shape.iter().product(), 0.02, seed as u64);
        match weights {
            Weights::Quantized(bits) if spec.shape.len() == 2 => {
                let packed = quantize(&values, spec.shape[0], bits, 32, Dtype::BF16).unwrap();
                let module = spec.name.strip_suffix(".weight").unwrap();
                tensors.insert(format!("{module}.weight"), packed.weight);
                tensors.insert(format!("{module}.scales"), packed.scales);
                tensors.insert(format!("{module}.biases"), packed.biases);
            }
            Weights::Quantized(_) => {
                tensors.insert(
                    spec.name,
                    HostTensor::from_f32_as(Dtype::BF16, &spec.shape, &values).unwrap(),
                );
            }
            Weights::Float(dtype) => {
                tensors.insert(spec.name, HostTensor::from_f32_as(dtype, &spec.shape, &values).unwrap());
            }
        }
    }
    if let Weights::Quantized(bits) = weights {
        config["quantization"] = json!({"group_size": 32, "bits": bits});
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    tensors::write(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
}

const UP: &str = "model.layers.1.mlp.up_proj";

fn write_adapter(dir: &Path, rms: f32) {
    let mut adapter = Adapter::new(Method::Lora, 4, 2.0, 0.0);
    for (i, (module, input, output)) in [
        (UP, 64, 128),
        ("model.layers.0.self_attn.q_proj", 64, 64),
        ("lm_head", 64, 96),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 1000 + 2 * i as u64;
        let a = HostTensor::from_f32(&[input, 4], &normal(input * 4, 1.0, seed));
        // The update 2·a·b has the rms 4·rms(b).
        let b = HostTensor::from_f32(&[4, output], &normal(output * 4, rms / 4.0, seed + 1));
        adapter.tensors.insert(format!("{module}.lora_a"), a);
        adapter.tensors.insert(format!("{module}.lora_b"), b);
    }
    adapter.fill_keys();
    adapter.write_mlx_lm(dir).unwrap();
}

struct Case {
    dir: tempfile::TempDir,
}

impl Case {
    fn new(weights: Weights, rms: f32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_model(&dir.path().join("model"), weights);
        write_adapter(&dir.path().join("adapter"), rms);
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn fuse(&self, options: &FuseOptions) -> Result<planish_checkpoint::fuse::FuseReport, Error> {
        fuse(&self.path("model"), &self.path("adapter"), &self.path("out"), options)
    }

    /// The output, after checking it against its own configuration as any model is.
    fn output(&self) -> (TensorStore, Value) {
        let config_path = self.path("out").join("config.json");
        let config = ModelConfig::from_file(&config_path).unwrap();
        let store = TensorStore::open(&self.path("out")).unwrap();
        store
            .check(&config.expected_tensors(), &LoadRules::default())
            .into_result(&config_path)
            .unwrap();
        (store, serde_json::from_slice(&fs::read(config_path).unwrap()).unwrap())
    }
}

#[test]
fn float_fuse_adds_the_update_and_copies_the_rest() {
    let case = Case::new(Weights::Float(Dtype::F32), 1e-3);
    let report = case
        .fuse(&FuseOptions {
            max_shard_bytes: Some(100_000),
            ..FuseOptions::default()
        })
        .unwrap();
    assert!(report.written && report.files.len() > 1);
    assert!(
        report.modules.iter().all(|module| module.verdict == Verdict::Pass) && report.modules.len() == 3,
        "{report}"
    );
    let (out, config) = case.output();
    assert_eq!(
        config,
        serde_json::from_slice::<Value>(&fs::read(case.path("model/config.json")).unwrap()).unwrap()
    );
    let base = TensorStore::open(&case.path("model")).unwrap();
    let (adapter, _) = Adapter::read(&case.path("adapter"), &Default::default()).unwrap();
    for view in base.iter() {
        let module = view.name.strip_suffix(".weight").unwrap();
        let Some(a) = adapter.tensors.get(&format!("{module}.lora_a")) else {
            assert_eq!(out.require(view.name).unwrap().bytes, view.bytes, "{}", view.name);
            continue;
        };
        let (a, b) = (
            a.to_f32().unwrap(),
            adapter.tensors[&format!("{module}.lora_b")].to_f32().unwrap(),
        );
        let (input, output) = (view.shape[1], view.shape[0]);
        let (weight, fused) = (
            view.to_f32().unwrap(),
            out.require(view.name).unwrap().to_f32().unwrap(),
        );
        for (o, i) in (0..output).flat_map(|o| (0..input).map(move |i| (o, i))) {
            let delta: f64 = (0..4)
                .map(|k| f64::from(a[i * 4 + k]) * f64::from(b[k * output + o]))
                .sum();
            let expect = f64::from(weight[o * input + i]) + 2.0 * delta;
            assert!(
                (f64::from(fused[o * input + i]) - expect).abs() < 1e-8,
                "{module} {o} {i}"
            );
        }
    }
    assert!(case.path("out/tokenizer.json").exists() && case.path("out/fuse_report.json").exists());
    assert!(
        fs::read_to_string(case.path("out").join(tensors::INDEX_FILE))
            .unwrap()
            .contains("lora")
            .eq(&false)
    );
}

/// A-8.
#[test]
fn zero_update_is_refused_or_leaves_the_bytes_of_the_base() {
    let case = Case::new(Weights::Float(Dtype::BF16), 0.0);
    let error = case.fuse(&FuseOptions::default()).unwrap_err();
    assert!(
        matches!(&error, Error::AdapterRefused { refusal, .. } if refusal.id() == "empty-adapter"),
        "{error}"
    );
    assert!(!case.path("out").exists());
    let report = case
        .fuse(&FuseOptions {
            force: true,
            ..FuseOptions::default()
        })
        .unwrap();
    assert!(report.modules.iter().all(|module| module.verdict == Verdict::NoChange));
    let base = TensorStore::open(&case.path("model")).unwrap();
    for view in case.output().0.iter() {
        assert_eq!(view.bytes, base.require(view.name).unwrap().bytes, "{}", view.name);
    }
}

#[test]
fn quantised_base_is_dequantised_by_default() {
    let case = Case::new(Weights::Quantized(4), 2e-3);
    let report = case.fuse(&FuseOptions::default()).unwrap();
    assert!(
        report
            .modules
            .iter()
            .all(|module| module.stored_as == "BF16" && module.verdict == Verdict::Pass),
        "{report}"
    );
    let (out, config) = case.output();
    assert_eq!(config.get("quantization"), None);
    // A module without an adapter is the base's, dequantised.
    let base = TensorStore::open(&case.path("model")).unwrap();
    let name = "model.layers.0.mlp.down_proj";
    let part = |leaf: &str| base.require(&format!("{name}.{leaf}")).unwrap().to_host();
    let packed = Affine {
        weight: part("weight"),
        scales: part("scales"),
        biases: part("biases"),
    };
    let expect = dequantize(&packed, 4).unwrap();
    let expect = HostTensor::from_f32_as(Dtype::BF16, &[64, 128], &expect).unwrap();
    assert_eq!(out.require(&format!("{name}.weight")).unwrap().to_host(), expect);
}

#[test]
fn quantising_again_is_refused_when_it_loses_the_update() {
    let case = Case::new(Weights::Quantized(4), 5e-4);
    let options = FuseOptions {
        target: FuseTarget::Quantized { bits: None },
        ..FuseOptions::default()
    };
    let error = case.fuse(&options).unwrap_err();
    assert!(matches!(&error, Error::FuseLoss { failed: 3, of: 3, .. }), "{error}");
    assert_eq!(
        fs::read_dir(case.dir.path()).unwrap().count(),
        2,
        "something was left behind"
    );

    let dry = case
        .fuse(&FuseOptions {
            dry_run: true,
            ..options
        })
        .unwrap();
    assert!(!dry.written && !case.path("out").exists());
    let report = case
        .fuse(&FuseOptions {
            accept_loss: true,
            ..options
        })
        .unwrap();
    assert_eq!(report.modules, dry.modules);
    assert!(report.to_string().contains("fail"), "{report}");
    case.output();
}

#[test]
fn eight_bits_for_the_adapted_modules_keep_the_update() {
    let case = Case::new(Weights::Quantized(4), 2e-3);
    let target = FuseTarget::Quantized { bits: Some(8) };
    let report = case
        .fuse(&FuseOptions {
            target,
            ..FuseOptions::default()
        })
        .unwrap();
    assert!(
        report.modules.iter().all(|module| module.verdict == Verdict::Pass),
        "{report}"
    );
    let (out, config) = case.output();
    assert_eq!(config["quantization"][UP], json!({"group_size": 32, "bits": 8}));
    assert_eq!(out.require(&format!("{UP}.weight")).unwrap().shape, [128, 16]);
    let base = TensorStore::open(&case.path("model")).unwrap();
    for leaf in ["weight", "scales", "biases"] {
        let name = format!("model.layers.0.mlp.down_proj.{leaf}");
        assert_eq!(out.require(&name).unwrap().bytes, base.require(&name).unwrap().bytes);
    }
}

#[test]
fn err_float_base_cannot_be_quantised_again() {
    let case = Case::new(Weights::Float(Dtype::F32), 1e-3);
    let options = FuseOptions {
        target: FuseTarget::Quantized { bits: Some(4) },
        ..FuseOptions::default()
    };
    assert!(matches!(
        case.fuse(&options),
        Err(Error::Tensors(planish_tensors::Error::Quantization { .. }))
    ));
}

#[test]
fn export_without_an_adapter_changes_the_type_alone() {
    let case = Case::new(Weights::Float(Dtype::BF16), 1e-3);
    let options = FuseOptions {
        dtype: Some(Dtype::F32),
        ..FuseOptions::default()
    };
    let report = export_safetensors(&case.path("model"), None, &case.path("out"), &options).unwrap();
    assert!(report.written && report.modules.is_empty());
    let (out, config) = case.output();
    assert_eq!(config["torch_dtype"], "float32");
    let base = TensorStore::open(&case.path("model")).unwrap();
    assert_eq!(out.iter().count(), base.iter().count());
    for view in out.iter() {
        assert_eq!(view.dtype, Dtype::F32, "{}", view.name);
        let expect = base.require(view.name).unwrap().to_f32().unwrap();
        assert_eq!(view.to_f32().unwrap(), expect, "{}", view.name);
    }
}

/// Merged in f32, rounded once: not the base's bf16 plus a rounded update.
#[test]
fn export_merges_before_it_rounds() {
    let case = Case::new(Weights::Quantized(4), 2e-3);
    let options = FuseOptions {
        dtype: Some(Dtype::F16),
        ..FuseOptions::default()
    };
    let (model, adapter) = (case.path("model"), case.path("adapter"));
    export_safetensors(&model, Some(&adapter), &case.path("out"), &options).unwrap();
    let (config, merged) = open_merged(&model, Some(&adapter), false).unwrap();
    assert_eq!(config.quantization, None);
    let (out, _) = case.output();
    assert_eq!(merged.names().count(), out.iter().count());
    for name in merged.names() {
        let shape = merged.shape(name).unwrap();
        let expect = HostTensor::from_f32_as(Dtype::F16, shape, &merged.all(name).unwrap()).unwrap();
        assert_eq!(out.require(name).unwrap().to_host(), expect, "{name}");
    }
    let up = format!("{UP}.weight");
    assert_ne!(merged.all(&up).unwrap(), merged.base(&up).unwrap());
}

#[test]
fn err_number_too_large_for_f16() {
    let case = Case::new(Weights::Float(Dtype::F32), 1e-3);
    let file = case.path("model/model.safetensors");
    let mut tensors: BTreeMap<String, HostTensor> = TensorStore::open(&file)
        .unwrap()
        .iter()
        .map(|view| (view.name.to_string(), view.to_host()))
        .collect();
    let mut norm = vec![1.0; 64];
    norm[3] = 1e6;
    tensors.insert("model.norm.weight".into(), HostTensor::from_f32(&[64], &norm));
    tensors::write(&file, &tensors, &BTreeMap::new()).unwrap();
    let options = FuseOptions {
        dtype: Some(Dtype::F16),
        ..FuseOptions::default()
    };
    let error = export_safetensors(&case.path("model"), None, &case.path("out"), &options).unwrap_err();
    assert!(
        matches!(&error, Error::Tensors(planish_tensors::Error::TooLarge { name, index: 3, .. }) if name == "model.norm.weight"),
        "{error}"
    );
    assert!(!case.path("out").exists());
}

#[test]
fn fused_model_that_answers_differently_is_refused() {
    let case = Case::new(Weights::Float(Dtype::F32), 1e-3);
    let run = |accept_loss: bool, fused: [f32; 2]| {
        let options = FuseOptions {
            accept_loss,
            ..FuseOptions::default()
        };
        fuse_checked(
            &case.path("model"),
            &case.path("adapter"),
            &case.path("out"),
            &options,
            |dir| {
                assert!(dir.join("config.json").exists() && dir.join("model.safetensors").exists());
                Ok::<_, Error>(Some(LogitsCheck::compare(&[vec![0.0, 1.0]], &[fused.to_vec()], 2)))
            },
        )
    };
    let error = run(false, [1.0, 0.0]).unwrap_err();
    assert!(
        matches!(&error, Error::FusedLogits { check, .. } if check.max_abs == 1.0),
        "{error}"
    );
    assert!(!case.path("out").exists());
    assert!(
        run(true, [1.0, 0.0])
            .unwrap()
            .to_string()
            .contains("largest difference 1.00e0")
    );
    fs::remove_dir_all(case.path("out")).unwrap();
    run(false, [0.0, 1.0]).unwrap();
    let report: Value = serde_json::from_slice(&fs::read(case.path("out/fuse_report.json")).unwrap()).unwrap();
    assert_eq!(report["logits"]["top1"], 1.0);
}

//! Core AI: families, formats, adapters and mutants through our own check; logits against mlx-lm.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use coreai_asset::{
    Asset, AssetWriter,
    interpreter::{Arithmetic, Machine, Understanding, Value},
    program::{Block, OpCode, Operation, Parameter, Payload, Program},
};
use planish_export::{CoreAiOptions, CoreAiReport, Error, check_coreai, export_coreai, weights::WeightFormat};
use planish_tensors::{HostTensor, LowRank, TensorStore, Update};

use crate::support::{LLAMA, Noise, contents, golden, write_model};

fn checked(weights: WeightFormat) -> CoreAiOptions {
    CoreAiOptions {
        weights,
        check: true,
        end_tokens: vec!["<|im_end|>".into(), "<|endoftext|>".into()],
        ..CoreAiOptions::default()
    }
}

fn exported(config: &str, seed: u64, weights: WeightFormat) -> CoreAiReport {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model, config, seed);
    let out = folder.path().join("out.aimodel");
    export_coreai(&model, Update::default(), &out, &checked(weights)).unwrap()
}

const MISTRAL: &str = r#"{"model_type": "mistral", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 60, "sliding_window": 5,
    "max_position_embeddings": 64}"#;
const QWEN2: &str = r#"{"model_type": "qwen2", "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 50, "tie_word_embeddings": false,
    "max_position_embeddings": 64}"#;
const QWEN3: &str = r#"{"model_type": "qwen3", "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 70, "tie_word_embeddings": true,
    "max_position_embeddings": 64}"#;
const LLAMA3_ROPE: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, "attention_bias": true, "mlp_bias": true,
    "max_position_embeddings": 64, "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}"#;
const LINEAR_ROPE: &str = r#"{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
    "rope_scaling": {"type": "linear", "factor": 4.0}}"#;

const GEMMA3: &str = r#"{"model_type": "gemma3_text", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64, "sliding_window": 5,
    "sliding_window_pattern": 2, "query_pre_attn_scalar": 24, "max_position_embeddings": 64}"#;

#[test]
fn every_family_agrees_with_the_f32_pass() {
    for (seed, config) in [LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA3, LLAMA3_ROPE, LINEAR_ROPE]
        .into_iter()
        .enumerate()
    {
        let fp16 = exported(config, seed as u64, WeightFormat::Fp16).check.unwrap().fp16;
        assert!(fp16.max_error < 0.05 * fp16.max_logit, "{config}: {fp16:?}");
    }
}

#[test]
fn every_format_agrees_with_the_weights_it_stores() {
    for (seed, config) in [LLAMA, MISTRAL].into_iter().enumerate() {
        // The check itself compares with the stored weights; these bounds are those of noise, which compresses worst.
        let formats = [
            (WeightFormat::Int8, 0.01),
            (WeightFormat::Int4, 0.12),
            (WeightFormat::Lut4, 0.12),
        ];
        for (format, bound) in formats {
            let report = exported(config, 10 + seed as u64, format);
            let worst = report
                .layer_errors
                .iter()
                .map(|layer| layer.relative_error)
                .fold(0.0, f64::max);
            assert!(worst < bound && worst > 0.0, "{format:?}: {worst}");
        }
    }
}

#[test]
fn golden_logits_of_mlx_lm() {
    for name in [
        "llama3-rope",
        "llama-linear-bias",
        "mistral-window",
        "qwen2",
        "qwen3",
        "gemma3",
    ] {
        let model = golden(name);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.aimodel");
        export_coreai(&model, Update::default(), &out, &CoreAiOptions::default()).unwrap();
        let stored = TensorStore::open(&model.join("golden/golden.safetensors")).unwrap();
        let tokens = stored.require("tokens").unwrap();
        let length = *tokens.shape.last().unwrap();
        let ids = tokens.bytes.chunks_exact(4).take(length);
        let ids: Vec<i64> = ids
            .map(|b| i64::from(u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
            .collect();
        let want = stored.require("logits").unwrap().to_f32().unwrap();
        let got = logits(&out, &ids);
        let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
        let error = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
        // The asset's weights are rounded to fp16, the golden's are not; on the rounded ones the check allows 1e-4.
        assert!(error < 1e-2 * largest, "{name}: {error} of {largest}");
    }
}

/// Logits of a text in one call, f32 arithmetic.
fn logits(asset: &Path, ids: &[i64]) -> Vec<f32> {
    let machine = Machine::open(asset)
        .unwrap()
        .with(Arithmetic::F32, Understanding::Kernels);
    let mut states = machine.new_states("main", ids.len()).unwrap();
    let row = |values: Vec<i64>| Value::ints(&[1, values.len()], values).unwrap();
    let inputs: BTreeMap<String, Value> = [
        ("input_ids".to_owned(), row(ids.to_vec())),
        ("position_ids".to_owned(), row((0..ids.len() as i64).collect())),
    ]
    .into();
    match machine.run("main", &inputs, &mut states).unwrap().remove("logits") {
        Some(Value::Float(logits)) => logits.iter().copied().collect(),
        other => panic!("{other:?}"),
    }
}

fn adapter() -> Update {
    let matrix = |rows, columns, seed| {
        let mut noise = Noise::new(seed);
        let values: Vec<f32> = (0..rows * columns).map(|_| 0.3 * noise.next()).collect();
        HostTensor::from_f32(&[rows, columns], &values)
    };
    let low_rank = LowRank::linear(&matrix(48, 4, 1), &matrix(4, 48, 2), 2.0, None).unwrap();
    Update {
        low_rank: BTreeMap::from([("model.layers.1.self_attn.o_proj.weight".into(), low_rank)]),
        whole: None,
    }
}

#[test]
fn an_adapter_is_merged_on_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model, LLAMA, 3);
    let out = folder.path().join("out.aimodel");
    let options = checked(WeightFormat::Fp16);
    export_coreai(&model, adapter(), &out, &options).unwrap();
    // The same asset is not that of the base.
    let error = check_coreai(&model, Update::default(), &out, &options).unwrap_err();
    assert!(matches!(error, Error::CheckFailed { .. }), "{error}");
}

#[test]
fn equal_input_gives_equal_bytes_and_a_tied_head_is_stored_once() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model, LLAMA, 4);
    let write = |name: &str| {
        let out = folder.path().join(name);
        export_coreai(&model, Update::default(), &out, &checked(WeightFormat::Int4)).unwrap();
        contents(&out)
    };
    assert!(write("a.aimodel") == write("b.aimodel"));
    let asset = Asset::open(&folder.path().join("a.aimodel")).unwrap();
    let tall = asset.program().weights.iter().filter(|w| w.bytes == 96 * 48);
    assert_eq!(
        tall.map(|w| w.name.as_str()).collect::<Vec<_>>(),
        ["model.embed_tokens.weight"]
    );
}

fn bundle(folder: &Path) -> (PathBuf, PathBuf) {
    let (model, out) = (folder.join("model"), folder.join("talker"));
    write_model(&model, QWEN3, 6);
    fs::write(model.join("tokenizer.json"), "{}").unwrap();
    let config = r#"{"eos_token": "<|endoftext|>", "additional_special_tokens": [{"content": "<|x|>"}]}"#;
    fs::write(model.join("tokenizer_config.json"), config).unwrap();
    fs::write(model.join("chat_template.jinja"), "{{ messages }}").unwrap();
    export_coreai(&model, Update::default(), &out, &checked(WeightFormat::Fp16)).unwrap();
    (model, out)
}

#[test]
fn a_bundle_has_what_apples_engines_read() {
    let folder = tempfile::tempdir().unwrap();
    let (_, out) = bundle(folder.path());
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(out.join(name)).unwrap()).unwrap()
    };
    let metadata = read("metadata.json");
    assert_eq!(metadata["metadata_version"], "0.2");
    assert_eq!(metadata["assets"]["main"], "talker.aimodel");
    assert_eq!(metadata["language"]["max_context_length"], 64);
    let config = read("tokenizer/tokenizer_config.json");
    assert_eq!(config["eos_token"], "<|im_end|>");
    let expected = serde_json::json!([{"content": "<|x|>"}, "<|endoftext|>"]);
    assert_eq!(config["additional_special_tokens"], expected);
    assert_eq!(config["chat_template"], "{{ messages }}");
    assert!(out.join("tokenizer/tokenizer.json").is_file() && out.join("talker.aimodel/main.hash").is_file());
}

#[test]
fn err_a_bundle_that_ends_at_another_token() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = bundle(folder.path());
    let path = out.join("tokenizer/tokenizer_config.json");
    let written = fs::read_to_string(&path).unwrap();
    for (from, to) in [("<|im_end|>", "<|im_start|>"), ("<|endoftext|>", "<|other|>")] {
        fs::write(&path, written.replace(from, to)).unwrap();
        let error = check_coreai(&model, Update::default(), &out, &checked(WeightFormat::Fp16)).unwrap_err();
        assert!(error.to_string().contains("a host will"), "{error}");
    }
}

#[test]
fn err_what_cannot_be_had_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model, LLAMA, 7);
    let out = folder.path().join("out.aimodel");
    let refused = |options: CoreAiOptions| {
        let error = export_coreai(&model, Update::default(), &out, &options).unwrap_err();
        assert!(!out.exists());
        error.to_string()
    };
    let lut6 = refused(checked(WeightFormat::Lut6));
    assert!(lut6.contains("tables of 64 entries"), "{lut6}");
    let context = refused(CoreAiOptions {
        context: Some(129),
        ..CoreAiOptions::default()
    });
    assert!(context.contains("use 1 to 128"), "{context}");
    fs::create_dir(&out).unwrap();
    let exists = export_coreai(&model, Update::default(), &out, &CoreAiOptions::default()).unwrap_err();
    assert!(matches!(exists, Error::OutputExists { .. }));
}

/// Writes a changed program with the weights of the original.
fn rewrite(original: &Path, target: &Path, change: impl Fn(&mut Program)) {
    let asset = Asset::open(original).unwrap();
    let mut program = asset.program().clone();
    change(&mut program);
    assert!(&program != asset.program(), "the mutant is the original");
    fs::create_dir_all(target).unwrap();
    let mut writer = AssetWriter::create(target, &program).unwrap();
    for (index, weight) in program.weights.iter().enumerate() {
        writer.next_weight().unwrap();
        writer.write(&asset.weight(index, 0..weight.bytes).unwrap()).unwrap();
    }
    writer.finish().unwrap();
}

/// Every operation of every graph, those of decompositions too.
fn each_operation(program: &mut Program, change: &mut dyn FnMut(&str, &mut Operation)) {
    fn walk(name: &str, block: &mut Block, change: &mut dyn FnMut(&str, &mut Operation)) {
        for operation in &mut block.operations {
            change(name, operation);
            if let Some(region) = &mut operation.region {
                walk(name, region, change);
            }
        }
    }
    for graph in &mut program.graphs {
        let name = graph.composite.as_ref().map_or("main".to_owned(), |c| c.name.clone());
        walk(&name, &mut graph.block, change);
    }
}

fn declare(program: &mut Program, composite: &str, key: &str, value: Parameter) {
    for declared in program
        .graphs
        .iter_mut()
        .filter_map(|g| g.composite.as_mut())
        .filter(|c| c.name == composite)
    {
        for (found, held) in &mut declared.attributes {
            if found == key {
                *held = value;
            }
        }
    }
}

/// Replaces the data of inline constants of a graph that are equal to `from`.
fn replace_constant(program: &mut Program, composite: &str, from: &[u8], to: &[u8]) {
    each_operation(program, &mut |name, operation| {
        if let Payload::Inline { data, .. } = &mut operation.payload
            && name == composite
            && data == from
        {
            *data = to.to_vec();
        }
    });
}

/// What makes a mutant of a good program.
type Change = fn(&mut Program);

#[test]
fn mutants_of_a_program_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    write_model(&model, LLAMA, 8);
    let original = folder.path().join("out.aimodel");
    let options = checked(WeightFormat::Fp16);
    export_coreai(&model, Update::default(), &original, &options).unwrap();
    check_coreai(&model, Update::default(), &original, &options).unwrap();
    let mutants: [(&str, Change); 12] = [
        ("declared epsilon", |p| {
            declare(p, "rms_norm", "eps", Parameter::Float(1e-3))
        }),
        ("epsilon of the body", |p| {
            replace_constant(p, "rms_norm", &1e-5f32.to_le_bytes(), &1e-3f32.to_le_bytes());
        }),
        ("declared rope base", |p| {
            declare(p, "rope", "base", Parameter::Float(20_000.0))
        }),
        ("frequencies of the body", |p| {
            each_operation(p, &mut |name, operation| {
                if let ("rope", Payload::Inline { data, .. }) = (name, &mut operation.payload)
                    && data.len() == 16
                {
                    data[4..8].copy_from_slice(&0.2f32.to_le_bytes());
                }
            });
        }),
        ("swapped states", |p| {
            for port in p
                .graphs
                .iter_mut()
                .flat_map(|g| g.inputs.iter_mut().chain(&mut g.outputs))
            {
                port.name = match port.name.as_str() {
                    "keyCache" => "valueCache".into(),
                    "valueCache" => "keyCache".into(),
                    other => other.into(),
                };
            }
        }),
        ("declared causality", |p| {
            declare(p, "scaled_dot_product_attention", "is_causal", Parameter::Bool(false));
        }),
        ("no mask in the body", |p| {
            let masked = half::f16::from_f32(-1e4).to_le_bytes();
            replace_constant(p, "scaled_dot_product_attention", &masked, &[0, 0]);
        }),
        ("declared window", |p| {
            declare(p, "scaled_dot_product_attention", "window_size", Parameter::Int(3));
        }),
        ("queries grouped the other way", |p| {
            // [kv, group, t, hd] from [1, h, t, hd]: the fixed part of the new shape is (2, 3).
            let pair = |a: i32, b: i32| [a.to_le_bytes(), b.to_le_bytes()].concat();
            replace_constant(p, "scaled_dot_product_attention", &pair(2, 3), &pair(3, 2));
        }),
        ("stub of silu's decomposition", |p| stub(p, OpCode::Silu)),
        ("stub of softmax's decomposition", |p| stub(p, OpCode::Softmax)),
        ("a cache row that is not written", |p| {
            let at = |row: i32| [row, 0, 0].map(i32::to_le_bytes).concat();
            replace_constant(p, "main", &at(2), &at(1));
        }),
    ];
    for (name, change) in mutants {
        let target = folder.path().join("mutant.aimodel");
        rewrite(&original, &target, change);
        let result = check_coreai(&model, Update::default(), &target, &options);
        let error = result.err().unwrap_or_else(|| panic!("{name} was not noticed"));
        assert!(
            matches!(error, Error::CheckFailed { .. } | Error::Asset(_)),
            "{name}: {error}"
        );
        fs::remove_dir_all(&target).unwrap();
    }
    fs::write(original.join("main.hash"), [0; 32]).unwrap();
    let error = check_coreai(&model, Update::default(), &original, &options).unwrap_err();
    assert!(error.to_string().contains("SHA-256"), "{error}");
}

/// A decomposition that hands its operand back.
fn stub(program: &mut Program, code: OpCode) {
    each_operation(program, &mut |_, operation| {
        if operation.code == code
            && let Some(region) = &mut operation.region
            && let Some(last) = region.operations.last_mut()
        {
            last.operands = vec![0];
        }
    });
}

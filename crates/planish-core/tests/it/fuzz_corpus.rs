//! The seeds of the fuzz targets, and every input that once broke one, on stable Rust.

use std::fs;
use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let inputs: Vec<_> = fs::read_dir(&dir).unwrap().collect();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    for entry in inputs {
        run(&fs::read(entry.unwrap().path()).unwrap());
    }
}

#[test]
fn corpus_run_toml() {
    replay("run_toml", planish_core::fuzzing::run_toml);
}

#[test]
fn corpus_model_config() {
    replay("model_config", planish_core::fuzzing::model_config);
}

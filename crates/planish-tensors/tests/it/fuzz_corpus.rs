//! The seeds of the fuzz targets, and every input that once broke one, on stable Rust.

use std::fs;
use std::path::Path;

fn replay(target: &str, run: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let mut inputs = 0;
    for entry in fs::read_dir(&dir).unwrap() {
        run(&fs::read(entry.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0, "{} is empty", dir.display());
}

#[test]
fn corpus_safetensors() {
    replay("safetensors", planish_tensors::fuzzing::safetensors);
}

#[test]
fn corpus_safetensors_index() {
    replay("safetensors_index", planish_tensors::fuzzing::safetensors_index);
}

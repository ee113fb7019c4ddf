//! The seeds of the fuzz targets, and every input that once broke one, on stable Rust.

use std::path::Path;

use metal_check::catalogue::{Owner, entry};
use metal_check::classify::classify;
use metal_check::{macho, metallib};

fn replay(target: &str, run: impl Fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    let inputs: Vec<_> = std::fs::read_dir(&dir).unwrap().collect();
    assert!(!inputs.is_empty(), "{} is empty", dir.display());
    for entry in inputs {
        run(&std::fs::read(entry.unwrap().path()).unwrap());
    }
}

#[test]
fn corpus_classify() {
    replay("classify", |log| {
        let answer = classify(log);
        assert!(entry(&answer.code).is_some(), "{}", answer.code);
        assert!(answer.code != "UNKNOWN" || answer.owner == Owner::None);
    });
}

#[test]
fn corpus_macho() {
    replay("macho", |file| {
        if let Ok(image) = macho::parse(file) {
            let _ = (image.foreign_libraries().len(), image.relative_rpaths().len());
        }
    });
}

#[test]
fn corpus_metallib() {
    replay("metallib", |file| {
        let _ = metallib::parse_header(file, file.len() as u64);
        if let Ok(functions) = metallib::parse_functions(file) {
            let _ = metallib::summarize(&functions);
        }
    });
}

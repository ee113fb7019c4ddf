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
fn corpus_adapter_config() {
    replay("adapter_config", planish_checkpoint::adapter::fuzzing::adapter_config);
}

#[test]
fn corpus_checkpoint_state() {
    replay(
        "checkpoint_state",
        planish_checkpoint::run_state::fuzzing::checkpoint_state,
    );
}

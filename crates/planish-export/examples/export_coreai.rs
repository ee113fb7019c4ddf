//! Writes a model folder as a Core AI asset or bundle, without MLX: the exporter of `cargo xtask coreai-check`.
//!
//! `export_coreai MODEL OUT [fp16|int8|int4|lut4] [check] [--adapter DIR] [--stored DIR]`; the last one gets the weights that
//! the asset holds as a model folder.

#![allow(clippy::print_stdout)] // A program.

use std::path::Path;

use planish_checkpoint::fuse::read_update;
use planish_export::{CoreAiOptions, export_coreai, write_stored};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, out, rest @ ..] = &arguments[..] else {
        return Err("usage: export_coreai MODEL OUT [FORMAT] [check] [--adapter DIR] [--stored DIR]".into());
    };
    let model = Path::new(model);
    let after = |flag: &str| {
        let at = rest.iter().position(|word| word == flag)?;
        rest.get(at + 1).map(Path::new)
    };
    let adapter = || read_update(model, after("--adapter"), true);
    let options = CoreAiOptions {
        weights: rest
            .first()
            .map_or(Ok(CoreAiOptions::default().weights), |name| name.parse())?,
        check: rest.iter().any(|word| word == "check"),
        ..CoreAiOptions::default()
    };
    let start = std::time::Instant::now();
    let report = export_coreai(model, adapter()?, Path::new(out), &options)?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{}", serde_json::to_string_pretty(&report)?);
    println!("{seconds:.2} s, {:.2} GB/s", report.bytes as f64 / seconds / 1e9);
    match after("--stored") {
        Some(target) => Ok(write_stored(model, adapter()?, target, &options)?),
        None => Ok(()),
    }
}

//! Exports a model folder with default settings: `cargo run -p planish-export --example export_model -- MODEL OUT [LAYOUT CACHE WEIGHTS CONTEXT PREFILL CHUNKS PARTS]`.

#![allow(clippy::print_stdout)] // A program: its output is its purpose.

use planish_export::{CacheMode, ExportOptions, Layout, export};
use planish_tensors::Update;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize| args.get(i).map(String::as_str).filter(|v| *v != "-");
    let options = ExportOptions {
        layout: if arg(2) == Some("anemll") {
            Layout::Anemll
        } else {
            Layout::Monolith
        },
        cache: if arg(3) == Some("host") {
            CacheMode::Host
        } else {
            CacheMode::State
        },
        weights: arg(4).unwrap_or("fp16").parse()?,
        context: arg(5).map(str::parse).transpose()?,
        prefill: arg(6).unwrap_or("64").parse()?,
        chunks: arg(7).map(str::parse).transpose()?,
        head_parts: arg(8).map(str::parse).transpose()?,
        check: arg(9) == Some("check"),
        calibration: arg(10)
            .map(|ids| ids.split(',').map(str::parse).collect())
            .transpose()?
            .unwrap_or_default(),
        ..ExportOptions::default()
    };
    let start = std::time::Instant::now();
    let report = export(args[0].as_ref(), Update::default(), args[1].as_ref(), &options)?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} bytes in {seconds:.2} s, {:.2} GB/s",
        report.bytes,
        report.bytes as f64 / seconds / 1e9
    );
    for package in &report.packages {
        println!("{package:?}");
    }
    for error in report.layer_errors.iter().take(8) {
        println!("{error:?}");
    }
    println!("{:#?}", report.check);
    for warning in &report.warnings {
        println!("warning: {warning}");
    }
    Ok(())
}

use std::path::PathBuf;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use planish_checkpoint::fuse::open_merged;
use planish_core::units::format_bytes;
use planish_hub::gguf::{ExportFormat, export_gguf};

use crate::model_path::require_model;
use crate::output::{self, WorkBar};

/// Write a GGUF file for llama.cpp, with tokenizer and chat template
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model in the Hugging Face layout; MLX's quantised weights are dequantised
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter, in mlx-lm's or PEFT's layout; it is merged in f32, before rounding
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The file to write; an existing one is replaced when the new one is whole
    #[arg(long, value_name = "FILE.gguf")]
    out: PathBuf,
    /// Form of the matrices; norms and biases are always f32. q4_0 keeps embedding and head in q8_0
    #[arg(long = "type", value_name = "TYPE", default_value = "bf16", value_parser = format_parser())]
    format: ExportFormat,
    /// Go on although the adapter changes nothing, or was made for another model
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model)?;
    let (config, weights) = open_merged(&args.model, args.adapter.as_deref(), args.force)?;
    let mut bar = WorkBar::new();
    let report = export_gguf(&args.model, &config, &weights, &args.out, args.format, &mut bar)?;
    for note in &report.notes {
        output::note(note);
    }
    let size = format_bytes(report.bytes);
    output::note(&format!("{} tensors as {}, {size}", report.n_tensors, args.format));
    output::line(&report.file.display().to_string())
}

fn format_parser() -> impl TypedValueParser<Value = ExportFormat> {
    let words = ExportFormat::ALL.map(ExportFormat::name);
    // Only those words arrive here.
    PossibleValuesParser::new(words).map(|word| word.parse().unwrap_or(ExportFormat::Bf16))
}

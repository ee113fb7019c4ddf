use std::path::PathBuf;

use anyhow::Result;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use planish_checkpoint::fuse::{FuseOptions, export_safetensors};
use planish_tensors::Dtype;

use crate::model_path::require_model;
use crate::output;

/// Write a Hugging Face folder: safetensors with their index, tokenizer, configuration
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model in the Hugging Face layout; MLX's quantised weights are dequantised
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter, in mlx-lm's or PEFT's layout; it is merged in f32, before rounding
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Folder to write; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Element type of all weights [default: that of the model, or f32 where that would lose the update]
    #[arg(long, value_name = "TYPE", value_parser = dtype_parser())]
    dtype: Option<Dtype>,
    /// Largest shard in bytes
    #[arg(long, value_name = "BYTES", default_value_t = planish_tensors::DEFAULT_SHARD_BYTES)]
    max_shard_bytes: u64,
    /// Write the model although rounding loses much of the update
    #[arg(long)]
    accept_loss: bool,
    /// Go on although the adapter changes nothing, or was made for another model
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model)?;
    let options = FuseOptions {
        dtype: args.dtype,
        max_shard_bytes: Some(args.max_shard_bytes),
        accept_loss: args.accept_loss,
        force: args.force,
        ..FuseOptions::default()
    };
    let report = export_safetensors(&args.model, args.adapter.as_deref(), &args.out, &options)?;
    if args.adapter.is_some() {
        output::note(&report.to_string());
    }
    output::line(&args.out.display().to_string())
}

/// The words for floats, and the type that each means.
pub(super) fn dtype_parser() -> impl TypedValueParser<Value = Dtype> {
    PossibleValuesParser::new(["f32", "f16", "bf16"]).map(|word| match word.as_str() {
        "f32" => Dtype::F32,
        "f16" => Dtype::F16,
        _ => Dtype::BF16,
    })
}

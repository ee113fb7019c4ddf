use std::path::PathBuf;

use anyhow::Result;
use planish_checkpoint::fuse::{FuseOptions, FuseReport, FuseTarget, fuse, fuse_checked};
use planish_core::run_config::BackendDevice;
use planish_tensors::Dtype;

use super::export_safetensors::dtype_parser;
use crate::failure::usage;
use crate::fused_logits::FusedLogits;
use crate::model_path::require_model;
use crate::{model, output};

/// Fold an adapter into its model
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the base model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of the adapter
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder to write; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Store adapted layers of a quantised model as floats; the default
    #[arg(long, conflicts_with = "bits")]
    dequantize: bool,
    /// Quantise adapted layers of a quantised model again, to this many bits
    #[arg(long, value_name = "N")]
    bits: Option<usize>,
    /// Element type of all floats [default: that of the model, or f32 where that would lose the update]
    #[arg(long, value_name = "TYPE", conflicts_with = "bits", value_parser = dtype_parser())]
    dtype: Option<Dtype>,
    /// Report what would be left of the update, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Compare logits on this text, instead of eight of our own; up to eight times
    #[arg(long = "prompt", value_name = "TEXT")]
    prompts: Vec<String>,
    /// Do not compare the logits of the fused model with those of base and adapter
    #[arg(long, conflicts_with = "prompts")]
    no_check: bool,
    /// Write the model although it loses much of the update
    #[arg(long)]
    accept_loss: bool,
    /// Go on although the adapter changes nothing, or was made for another model
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model)?;
    let target = match args.bits {
        Some(bits) => FuseTarget::Quantized { bits: Some(bits) },
        None => FuseTarget::Float,
    };
    let options = FuseOptions {
        target,
        dry_run: args.dry_run,
        accept_loss: args.accept_loss,
        dtype: args.dtype,
        force: args.force,
        ..FuseOptions::default()
    };
    let report = if args.no_check || args.dry_run {
        fuse(&args.model, &args.adapter, &args.out, &options)?
    } else {
        fuse_with_logits(args, &options)?
    };
    output::note(&report.to_string());
    if report.written {
        output::line(&args.out.display().to_string())
    } else {
        Ok(())
    }
}

/// Runs base and adapter when everything else is in order, then the fused model, one at a time in memory.
fn fuse_with_logits(args: &Args, options: &FuseOptions) -> Result<FuseReport> {
    if args.prompts.len() > 8 {
        return Err(usage(format!("{} prompts, at most 8 are compared", args.prompts.len())));
    }
    fuse_checked(&args.model, &args.adapter, &args.out, options, |fused| {
        model::select_device(BackendDevice::Auto)?;
        let expected = FusedLogits::of_adapter(&args.model, &args.adapter, args.force, &args.prompts)?;
        Ok::<_, anyhow::Error>(Some(expected.compare(fused)?))
    })
}

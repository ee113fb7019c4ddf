use std::path::PathBuf;

use anyhow::Result;
use planish_checkpoint::fuse::{FuseOptions, FuseTarget, fuse};

use crate::output;

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
    /// Report what would be left of the update, and write nothing
    #[arg(long)]
    dry_run: bool,
    /// Write the model although quantising loses much of the update
    #[arg(long)]
    accept_loss: bool,
    /// Go on although the adapter changes nothing, or was made for another model
    #[arg(long)]
    force: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let target = match args.bits {
        Some(bits) => FuseTarget::Quantized { bits: Some(bits) },
        None => FuseTarget::Float,
    };
    let options = FuseOptions {
        target,
        dry_run: args.dry_run,
        accept_loss: args.accept_loss,
        force: args.force,
        ..FuseOptions::default()
    };
    let report = fuse(&args.model, &args.adapter, &args.out, &options)?;
    output::note(&report.to_string());
    if report.written {
        output::line(&args.out.display().to_string())
    } else {
        Ok(())
    }
}

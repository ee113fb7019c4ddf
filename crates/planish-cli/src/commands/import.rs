use std::path::PathBuf;

use anyhow::Result;
use planish_core::units::format_bytes;
use planish_hub::gguf;
use planish_tensors::Dtype;

use super::export_safetensors::dtype_parser;
use crate::output::{self, WorkBar};

/// Convert a GGUF file into a Hugging Face folder
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The GGUF file
    file: PathBuf,
    /// Folder to write; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How to store the weights
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = dtype_parser())]
    dtype: Dtype,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let report = gguf::import(&args.file, &args.out, args.dtype, &mut WorkBar::new())?;
    let types: Vec<String> = report
        .source_types
        .iter()
        .map(|(kind, n)| format!("{n} {}", kind.name()))
        .collect();
    output::note(&format!(
        "{} tensors ({}), {:.1} million parameters, stored as {} in {}",
        report.n_tensors,
        types.join(", "),
        report.n_parameters as f64 / 1e6,
        report.dtype,
        format_bytes(report.n_parameters * report.dtype.size() as u64),
    ));
    output::line(&report.folder.display().to_string())
}

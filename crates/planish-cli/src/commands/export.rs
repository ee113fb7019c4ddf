use anyhow::Result;

use super::{export_coreml, export_gguf, export_safetensors};

/// Write a model for other runtimes
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    target: Target,
}

#[derive(clap::Subcommand)]
enum Target {
    Safetensors(export_safetensors::Args),
    Gguf(export_gguf::Args),
    Coreml(Box<export_coreml::Args>),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.target {
        Target::Safetensors(args) => export_safetensors::run(args),
        Target::Gguf(args) => export_gguf::run(args),
        Target::Coreml(args) => export_coreml::run(args),
    }
}

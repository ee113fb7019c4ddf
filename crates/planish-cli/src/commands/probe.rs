use anyhow::Result;
use planish_backend::child_main;

/// Probe one device; this program calls itself so
#[derive(clap::Args)]
pub(crate) struct Args {
    /// cpu, metal or cuda; the file to write; the seed
    arguments: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    Ok(child_main(&args.arguments)?)
}

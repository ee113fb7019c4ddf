//! The commands and their arguments, nothing else.

use clap::{Parser, Subcommand};

use crate::commands::{adapter, completions, data, eval, export, fuse, generate, import, logits, pull, train};

/// Fine-tune language models with Apple's MLX
#[derive(Parser)]
#[command(name = "planish", version, max_term_width = 120, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    Pull(pull::Args),
    Import(import::Args),
    Train(train::Args),
    Eval(eval::Args),
    Generate(generate::Args),
    Logits(logits::Args),
    Fuse(fuse::Args),
    Export(export::Args),
    Adapter(adapter::Args),
    Data(data::Args),
    Completions(completions::Args),
}

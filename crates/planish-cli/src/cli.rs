//! The commands and their arguments, nothing else.

use clap::{Parser, Subcommand};

use crate::commands::{
    adapter, bench, completions, data, doctor, eval, export, fuse, generate, import, logits, probe, pull, report, train,
};

/// Fine-tune language models with Apple's MLX
#[derive(Parser)]
#[command(name = "planish", version, max_term_width = 120, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// Check the device again instead of trusting the remembered verdict
    #[arg(long, global = true)]
    pub(crate) no_probe_cache: bool,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    Doctor(doctor::Args),
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
    Bench(bench::Args),
    Report(report::Args),
    Completions(completions::Args),
    #[command(name = planish_backend::PROBE_COMMAND, hide = true)]
    Probe(probe::Args),
    #[command(name = doctor::STEP_COMMAND, hide = true)]
    Step(doctor::StepArgs),
}

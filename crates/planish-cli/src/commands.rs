//! One file a command: its arguments, then what it does with the libraries.

pub(crate) mod adapter;
pub(crate) mod bench;
pub(crate) mod completions;
pub(crate) mod data;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod export;
mod export_coreai;
mod export_coreml;
mod export_gguf;
mod export_safetensors;
pub(crate) mod fuse;
pub(crate) mod generate;
pub(crate) mod import;
pub(crate) mod logits;
pub(crate) mod probe;
pub(crate) mod pull;
pub(crate) mod report;
pub(crate) mod train;

use crate::cli::Command;
use crate::signals::remove_unfinished_when_told_to_end;

pub(crate) fn run(command: Command) -> anyhow::Result<()> {
    use Command::{Adapter, Export, Fuse, Import};
    // What else writes large files ends in its own way.
    if matches!(command, Adapter(_) | Export(_) | Fuse(_) | Import(_)) {
        remove_unfinished_when_told_to_end()?;
    }
    match command {
        Command::Doctor(args) => doctor::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Logits(args) => logits::run(&args),
        Command::Fuse(args) => fuse::run(&args),
        Command::Export(args) => export::run(&args),
        Command::Adapter(args) => adapter::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Completions(args) => completions::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Step(args) => doctor::run_step(&args),
    }
}

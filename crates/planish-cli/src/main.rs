//! `planish`: arguments in, results and exit codes out. What the commands do is in the library crates.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A program: its output is its purpose.

mod cli;
mod commands;
mod data;
mod device;
mod failure;
#[cfg(test)]
mod flags;
mod fused_logits;
mod kernels;
mod model;
mod model_path;
mod output;
mod report;
mod signals;
mod train_view;

use std::process::ExitCode;

use clap::Parser;

#[allow(unsafe_code)]
fn main() -> ExitCode {
    // SAFETY: the program has started no thread; those of libraries, if there are any, wait for their first work.
    unsafe { planish_mlx::memory::bound_command_buffers() };
    let cli = cli::Cli::parse();
    if cli.no_probe_cache {
        device::ignore_remembered_verdicts();
    }
    planish_mlx::memory::keep_freed_memory();
    match commands::run(cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::report(&error),
    }
}

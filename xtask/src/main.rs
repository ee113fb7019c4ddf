//! The chores of this repository, in Rust. `cargo xtask check` is the whole loop; CI calls the same command.

#![allow(clippy::print_stdout, clippy::print_stderr)] // A program: its output is its purpose.

mod bench;
mod check;
mod configuration_page;
mod coreai_check;
mod coreml_check;
mod crash_test;
mod fuzz_smoke;
mod link_check;
mod metal_check;
mod mlx;
mod parity;
mod program;
mod repo;
mod size;
mod source;
mod tidy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about, long_about = None)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything that must pass before a commit, cheapest first, and stop at the first failure
    Check(check::Args),
    /// Check what the compiler does not: layering, file hygiene, the list of crates
    Tidy,
    /// Write the pages under docs/ that are generated
    Docs,
    /// Fetch or list the prebuilt MLX
    #[command(subcommand)]
    Mlx(mlx::Command),
    /// Find out which MLX works on this machine, and why not
    MetalCheck(metal_check::Args),
    /// Compile and link the program for macOS from Linux, and check what came out
    LinkCheck(link_check::Args),
    /// Judge planish-export's packages with coremltools and the tools beside the checkout
    CoremlCheck(coreml_check::Args),
    /// Judge planish-export's assets with Apple's Core AI runtime from PyPI
    CoreaiCheck(coreai_check::Args),
    /// Compare planish's speed with what people would use instead, alternately on the same work
    Bench(bench::Args),
    /// Count lines, tests, long functions, and public items that nobody outside their crate uses
    Size(size::Args),
    /// Compare planish with mlx-lm, PEFT and llama.cpp: logits, adapters, GGUF
    Parity(parity::Args),
    /// Run each fuzz target on its corpus and a few seconds beyond
    FuzzSmoke(fuzz_smoke::Args),
    /// Kill a run with SIGKILL at random moments, resume it each time, and compare the end bit by bit
    CrashTest(crash_test::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line a cause; a backtrace would say nothing about the repository.
            eprintln!("error: {error}");
            error.chain().skip(1).for_each(|cause| eprintln!("  because: {cause}"));
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Check(args) => check::run(&args),
        Command::Tidy => tidy::run(),
        Command::Docs => configuration_page::write().and_then(|()| metal_check::write_page()),
        // Its exit status carries the answer.
        Command::MetalCheck(args) => std::process::exit(metal_check::main(&args).into()),
        Command::LinkCheck(args) => link_check::run(&args),
        Command::Mlx(command) => mlx::run(&command),
        Command::CoremlCheck(args) => coreml_check::run(&args),
        Command::CoreaiCheck(args) => coreai_check::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Size(args) => size::run(&args),
        Command::Parity(args) => parity::run(&args),
        Command::FuzzSmoke(args) => fuzz_smoke::run(&args),
        Command::CrashTest(args) => crash_test::run(&args),
    }
}

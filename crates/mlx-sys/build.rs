//! Finds Apple's prebuilt MLX, compiles mlx-c against it and generates the bindings.
//!
//! `MLX_PREFIX` (a directory with `include/` and `lib/`) → the unpacked wheel in the cache → fetch. See ARCHITECTURE.md.

#[path = "build/bindings.rs"]
mod bindings;
#[path = "build/blas.rs"]
mod blas;
#[path = "build/mlx_c.rs"]
mod mlx_c;
#[path = "build/prefix.rs"]
mod prefix;
#[path = "build/target.rs"]
mod target;

use std::error::Error;
use std::process::ExitCode;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Cargo shows what a failed build script wrote to stderr, and `cargo::error` lines first of all.
            for line in error.to_string().lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<()> {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-changed=shim");
    println!("cargo::rerun-if-changed=upstream/Cargo.lock");
    let target = target::Target::from_cargo()?;
    let mlx = prefix::locate(&target)?;
    let sources = mlx_c::locate_sources()?;
    mlx_c::compile(&target, &mlx, &sources)?;
    mlx.link()?;
    bindings::generate(&target, &sources)?;
    println!(
        "cargo::metadata=include={}",
        std::env::join_paths([mlx.include(), sources])?.display()
    );
    println!("cargo::metadata=version={}", wheel_fetch::mlx::VERSION);
    Ok(())
}

//! The `planish` program that the long proofs run, and the commands around it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::repo;

/// Builds `planish` as a user would run it.
pub(crate) fn build_planish() -> Result<PathBuf> {
    let status = repo::command(&["cargo", "build", "--release", "-p", "planish-cli"]).status()?;
    ensure!(status.success(), "planish does not build");
    Ok(target_folder().join("release/planish"))
}

/// Where cargo puts what it builds.
pub(crate) fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo::root().join("target"), PathBuf::from)
}

/// What a command prints; its own messages go to the terminal only when it fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let line = format!("{command:?}");
    let output = command.output().with_context(|| format!("cannot start {line}"))?;
    if !output.status.success() {
        bail!("{line} failed:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{line} printed something that is not UTF-8"))
}

use std::path::PathBuf;

use anyhow::{Context, Result};
use planish_core::fs::write_atomic;

use crate::output;
use crate::report::{Run, page};

/// Write a page about one run, or about several side by side: curves, configuration, data, answers
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Output folders of `planish train`
    #[arg(required = true, value_name = "OUT")]
    runs: Vec<PathBuf>,
    /// File to write; report.html in the first folder where it is not given
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let runs: Vec<Run> = args.runs.iter().map(|dir| Run::read(dir)).collect::<Result<_>>()?;
    let file = args.out.clone().unwrap_or_else(|| args.runs[0].join("report.html"));
    write_atomic(&file, page(&runs).as_bytes()).with_context(|| format!("cannot write {}", file.display()))?;
    output::line(&file.display().to_string())
}

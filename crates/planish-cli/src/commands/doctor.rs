mod deploy;
mod findings;
mod screen;
mod step;

use anyhow::Result;

use crate::output;
use findings::Findings;

pub(crate) use step::{STEP_COMMAND, StepArgs, run_step};

/// Say what can train here, on what, how fast, and what is missing
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print one JSON document
    #[arg(long)]
    json: bool,
    /// Compare a training step's loss and gradients on the GPU with the processor's, too
    #[arg(long)]
    deep: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let findings = Findings::gather(args.deep)?;
    if args.json {
        return output::line(&findings.to_json().to_string());
    }
    output::line(screen::render(&findings).trim_end())
}

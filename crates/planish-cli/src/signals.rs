//! What happens when the process is told to end.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// From here on Ctrl-C, SIGTERM and SIGHUP remove what is unfinished and end the process with 128 + the signal's number.
pub(crate) fn remove_unfinished_when_told_to_end() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot listen for signals")?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            planish_core::fs::remove_unfinished();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

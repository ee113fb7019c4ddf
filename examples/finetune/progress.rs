//! What the run shows while it goes on: events in, a progress bar out.

use indicatif::{ProgressBar, ProgressStyle};
use planish_core::units::format_bytes;
use planish_hub::Event as HubEvent;
use planish_train::{Event, Observer};

/// Draws the bar and remembers the losses.
pub(crate) struct Progress {
    bar: ProgressBar,
    /// The loss of every step.
    pub(crate) losses: Vec<f64>,
}

impl Progress {
    pub(crate) fn new() -> Self {
        Self {
            bar: ProgressBar::no_length(),
            losses: Vec::new(),
        }
    }
}

impl Observer for Progress {
    fn on_event(&mut self, event: &Event) {
        match event {
            Event::Started(plan) => {
                println!(
                    "training {} of {} numbers, {} steps",
                    plan.trainable, plan.total, plan.total_steps
                );
                self.bar.set_length(plan.total_steps as u64);
                if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta}") {
                    self.bar.set_style(style);
                }
            }
            Event::Report(report) => {
                self.losses.push(report.loss);
                let figures = format!(
                    "loss {:.3} · {:.0} tokens/s · {} at most",
                    report.loss,
                    report.tokens_per_second,
                    format_bytes(report.memory.peak_bytes)
                );
                // Where nobody sees a bar, a line now and then takes its place.
                if self.bar.is_hidden() && report.position.step.is_multiple_of(10) {
                    println!("step {}: {figures}", report.position.step);
                }
                self.bar.set_position(report.position.step as u64);
                self.bar.set_message(figures);
            }
            Event::Evaluated(eval) => {
                let (step, loss) = (eval.position.step, eval.loss);
                self.bar
                    .suspend(|| println!("step {step}: loss {loss:.3} on the questions kept back"));
            }
            Event::Finished(summary) => {
                self.bar.finish();
                println!("{} trained tokens in {:.0} s", summary.tokens, summary.elapsed_seconds);
            }
            _ => {}
        }
    }
}

/// A line for each thing that is downloaded, unpacked, checked or converted.
pub(crate) fn show_download(event: HubEvent<'_>) {
    if let HubEvent::Began {
        stage,
        item,
        total_bytes,
    } = event
    {
        let size = total_bytes
            .map(|bytes| format!(" ({})", format_bytes(bytes)))
            .unwrap_or_default();
        println!("{stage:?}: {item}{size}");
    }
}

//! Results on stdout, messages and progress on stderr.

use std::io::{IsTerminal, Write};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};
use planish_core::units::format_bytes;
use planish_hub::{Event, Progress, Stage};

/// A line of the result.
pub(crate) fn line(text: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}")?;
    Ok(())
}

/// A message beside the result. When nobody listens any more, that is no reason to stop.
pub(crate) fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", visible(text));
}

/// A text in which nothing can act on a terminal: control characters other than line ends and tabs, and marks that turn
/// the direction of writing round, are written as escapes.
pub(crate) fn visible(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' | '\t' => out.push(character),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => {
                out.extend(character.escape_unicode())
            }
            control if control.is_control() => out.push_str(&match u32::from(control) {
                code @ ..=0xff => format!("\\x{code:02x}"),
                code => format!("\\u{{{code:x}}}"),
            }),
            other => out.push(other),
        }
    }
    out
}

/// Shows downloads and conversions: a bar on a terminal, a line a stage elsewhere.
pub(crate) struct WorkBar {
    is_terminal: bool,
    bar: Option<ProgressBar>,
}

impl WorkBar {
    pub(crate) fn new() -> Self {
        Self {
            is_terminal: std::io::stderr().is_terminal(),
            bar: None,
        }
    }
}

impl Progress for WorkBar {
    fn report(&mut self, event: Event<'_>) {
        match event {
            Event::Began {
                stage,
                item,
                total_bytes,
            } if self.is_terminal => {
                self.bar = Some(bar(total_bytes).with_message(format!("{} {item}", verb(stage))));
            }
            Event::Began {
                stage,
                item,
                total_bytes,
            } => {
                let size = total_bytes
                    .map(|bytes| format!(" ({})", format_bytes(bytes)))
                    .unwrap_or_default();
                note(&format!("{} {item}{size}", verb(stage)));
            }
            Event::Advanced { done_bytes } => self.bar.iter().for_each(|bar| bar.set_position(done_bytes)),
            Event::Ended => self.bar.take().iter().for_each(ProgressBar::finish_and_clear),
            _ => {}
        }
    }
}

impl Drop for WorkBar {
    fn drop(&mut self) {
        self.bar.take().iter().for_each(ProgressBar::finish_and_clear);
    }
}

fn verb(stage: Stage) -> &'static str {
    match stage {
        Stage::Download => "downloading",
        Stage::Unpack => "unpacking",
        Stage::Check => "checking",
        Stage::Convert => "converting",
        _ => "working on",
    }
}

fn bar(total_bytes: Option<u64>) -> ProgressBar {
    let (bar, template) = match total_bytes {
        Some(total) => (
            ProgressBar::new(total),
            "{msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {eta}",
        ),
        None => (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}"),
    };
    bar.enable_steady_tick(std::time::Duration::from_millis(120));
    // A template that is wrong falls back to indicatif's own: a progress bar is no reason to fail.
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_escaped() {
        let text = "a\tb\n\u{1b}[2J \u{7}\u{9b}5m \u{202e}turned";
        assert_eq!(visible(text), "a\tb\n\\x1b[2J \\x07\\x9b5m \\u{202e}turned");
    }
}

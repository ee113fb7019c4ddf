//! Commands that somebody runs and what came of them: the only door through which facts come in.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};

/// A command to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Stable name within a run, such as `sw_vers` or `build 0.33.0/prebuilt/metal/dt14.0`; recordings are found by it.
    pub label: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// The whole environment of the command, or `None` to pass the caller's on.
    pub env: Option<BTreeMap<String, String>>,
    /// Text for its standard input.
    pub stdin: Option<String>,
    /// Working directory.
    pub directory: Option<String>,
    /// Limit in milliseconds; then the whole process group is ended.
    pub timeout_ms: u64,
    /// File that gets both streams, with a time before each line. Without it they come back in the outcome.
    pub log: Option<String>,
    /// File that the command itself writes and whose text is wanted.
    pub report: Option<String>,
}

/// What came of a command.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Exit status, unless a signal ended it or it never started.
    pub exit: Option<i32>,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// Ended by us for lack of time.
    pub timed_out: bool,
    /// Why it did not start, as the system says.
    pub not_started: Option<String>,
    /// Standard output, or both streams in the order of arrival where the command writes a log.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Text of [`Spec::report`] after the command.
    pub report: Option<String>,
    /// Duration in milliseconds.
    pub wall_ms: u64,
}

impl Outcome {
    /// Exit status 0.
    pub fn is_success(&self) -> bool {
        self.exit == Some(0) && !self.timed_out
    }

    /// Trimmed standard output of a successful command, unless empty.
    pub fn answer(&self) -> Option<&str> {
        Some(self.stdout.trim()).filter(|text| self.is_success() && !text.is_empty())
    }

    /// Both streams, and how it ended if it ended badly, as a log to classify.
    pub fn log(&self) -> String {
        let mut log = format!("{}\n{}\n", self.stdout.trim_end(), self.stderr.trim_end());
        if self.timed_out {
            // The signal was ours and says nothing about the program.
        } else if let Some(signal) = self.signal {
            log.push_str(&format!("process ended by signal: {signal}\n"));
        } else if let Some(status) = self.exit.filter(|status| *status != 0) {
            log.push_str(&format!("process ended with exit status: {status}\n"));
        }
        log
    }
}

/// Runs commands: for real, or out of a recording.
pub trait Runner {
    /// Runs one command to its end or its time limit.
    fn run(&mut self, spec: &Spec) -> Outcome;
}

/// One line of a recording.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recorded {
    /// [`Spec::label`].
    pub label: String,
    /// What came of it.
    pub outcome: Outcome,
}

/// Answers from a recording; a command that is not in it is remembered as unexpected and never starts.
#[derive(Debug, Default)]
pub struct Replay {
    recorded: BTreeMap<String, VecDeque<Outcome>>,
    /// Labels of the commands that the recording does not hold.
    pub unexpected: Vec<String>,
}

impl Replay {
    /// Reads a recording: JSON lines of [`Recorded`].
    ///
    /// # Errors
    /// [`crate::Error::Record`] naming the line.
    pub fn parse(text: &str) -> Result<Self, crate::Error> {
        let mut replay = Self::default();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let bad = |error: serde_json::Error| crate::Error::Record {
                origin: format!("recording, line {}", index + 1),
                what: error.to_string(),
            };
            let Recorded { label, outcome } = serde_json::from_str(line).map_err(bad)?;
            replay.recorded.entry(label).or_default().push_back(outcome);
        }
        Ok(replay)
    }
}

impl Runner for Replay {
    fn run(&mut self, spec: &Spec) -> Outcome {
        match self.recorded.get_mut(&spec.label).and_then(VecDeque::pop_front) {
            Some(outcome) => outcome,
            None => {
                self.unexpected.push(spec.label.clone());
                Outcome {
                    not_started: Some(format!("`{}` is not in the recording", spec.label)),
                    ..Outcome::default()
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_answers_in_order_and_refuses_the_rest() {
        let line = |exit: i32| {
            serde_json::to_string(&Recorded {
                label: "a".into(),
                outcome: Outcome {
                    exit: Some(exit),
                    ..Outcome::default()
                },
            })
            .unwrap()
        };
        let mut replay = Replay::parse(&format!("{}\n{}\n", line(1), line(0))).unwrap();
        let spec = Spec {
            label: "a".into(),
            ..Spec::default()
        };
        assert_eq!(
            [replay.run(&spec).exit, replay.run(&spec).exit, replay.run(&spec).exit],
            [Some(1), Some(0), None]
        );
        assert_eq!(replay.unexpected, ["a"]);
    }

    #[test]
    fn err_broken_recording_names_its_line() {
        assert!(Replay::parse("\n{oops").unwrap_err().to_string().contains("line 2"));
    }
}

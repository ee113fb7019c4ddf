//! Errors as the user sees them, and the exit code each kind ends with.
//!
//! A library's message is one line of what was wrong, then lines with the way out; the latter are shown as hints.

use std::fmt;
use std::process::ExitCode;

use clap::CommandFactory;
use planish_checkpoint::Error as Checkpoint;
use planish_checkpoint::adapter::Refusal;

use crate::output;

/// Wrong usage that clap cannot see; exit code 2.
#[derive(Debug)]
struct Usage(String);

/// A signal stopped the work, and what was done is safe; exit code 128 and the number of the signal.
#[derive(Debug)]
pub(crate) struct Interrupted {
    pub(crate) message: String,
    pub(crate) signal: i32,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Usage {}
impl std::error::Error for Interrupted {}

/// An error for arguments that do not fit together.
pub(crate) fn usage(message: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Usage(message.into()))
}

/// Prints the error, its causes and hints, and gives the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if is_closed_pipe(error) {
        // The reader of our output has seen enough.
        return ExitCode::SUCCESS;
    }
    if let Some(interrupted) = error.downcast_ref::<Interrupted>() {
        eprintln!("{interrupted}");
        return exit_code(interrupted.signal);
    }
    eprint!("{}", output::visible(&describe(error, command_has("force"))));
    ExitCode::from(if is_usage(error) { 2 } else { 1 })
}

/// What a shell says of a program that a signal ended.
fn exit_code(signal: i32) -> ExitCode {
    ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe)
}

fn is_usage(error: &anyhow::Error) -> bool {
    use planish_core::Error as Core;
    match error.downcast_ref::<Core>() {
        // A file with the same mistake is bad input, not wrong usage.
        Some(
            Core::RunSyntax { origin, .. }
            | Core::RunUnknownKey { origin, .. }
            | Core::RunValue { origin, .. }
            | Core::RunConflict { origin, .. },
        ) => origin.starts_with("--"),
        _ => error.is::<Usage>(),
    }
}

/// `error: …`, `  because: …` for every cause that says something new, `hint: …` for every way out.
fn describe(error: &anyhow::Error, has_force: bool) -> String {
    let mut text = String::new();
    let mut hints = Vec::new();
    let mut said = String::new();
    for cause in error.chain() {
        let message = cause.to_string();
        let mut lines = message.lines().map(str::trim_end).filter(|line| !line.is_empty());
        let Some(first) = lines.next() else { continue };
        // Wrapping errors often repeat the message of what they wrap.
        if said.contains(first) {
            continue;
        }
        let label = if said.is_empty() { "error" } else { "  because" };
        text.push_str(&format!("{label}: {first}\n"));
        said.push_str(&message);
        hints.extend(lines.map(str::to_string));
    }
    hints.extend(
        error
            .chain()
            .find_map(refusal)
            .and_then(|refusal| way_past(refusal, has_force)),
    );
    for (i, hint) in hints.iter().enumerate() {
        let label = if i == 0 { "hint:" } else { "     " };
        text.push_str(&format!("{label} {hint}\n"));
    }
    text
}

/// Whether the command that runs takes a flag.
fn command_has(flag: &str) -> bool {
    let mut command = crate::cli::Cli::command();
    for word in std::env::args().skip(1) {
        match command.find_subcommand(&word).cloned() {
            Some(sub) => command = sub,
            None if word.starts_with('-') => {}
            None => break,
        }
    }
    command.get_arguments().any(|arg| arg.get_long() == Some(flag))
}

/// Why an adapter was refused, if that is the cause.
fn refusal<'e>(cause: &'e (dyn std::error::Error + 'static)) -> Option<&'e Refusal> {
    let checkpoint = match cause.downcast_ref() {
        Some(planish_train::Error::Checkpoint(inner)) => Some(inner),
        _ => cause.downcast_ref(),
    };
    match checkpoint? {
        Checkpoint::AdapterRefused { refusal, .. } => Some(refusal),
        _ => None,
    }
}

/// What gets past a refusal, by a flag that exists: the library knows no flags.
fn way_past(refusal: &Refusal, has_force: bool) -> Option<String> {
    match refusal {
        Refusal::UnsupportedPeftOption { .. } if !has_force => Some(
            "or write a copy without the option, if it changes nothing here: planish adapter convert --force".into(),
        ),
        Refusal::UnsupportedPeftOption { .. } | Refusal::BaseMismatch { .. } if has_force => {
            Some("or pass --force, if that changes nothing here".into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn message_causes_and_hints_each_have_their_line() {
        let error = Err::<(), _>(anyhow::anyhow!("disk full\nfree some space\nor use another disk"))
            .context("cannot save")
            .unwrap_err();
        assert_eq!(
            describe(&error, false),
            "error: cannot save\n  because: disk full\nhint: free some space\n      or use another disk\n"
        );
    }

    #[test]
    fn cause_that_the_message_repeats_is_left_out() {
        let error = Err::<(), _>(anyhow::anyhow!("no such file"))
            .context("a.json: no such file")
            .unwrap_err();
        assert_eq!(describe(&error, false), "error: a.json: no such file\n");
    }

    #[test]
    fn way_past_a_refusal_is_one_that_the_command_has() {
        let path = "adapter".into();
        let refusal = Box::new(Refusal::UnsupportedPeftOption {
            key: "use_new_thing".into(),
            value: "true".into(),
        });
        let error = anyhow::Error::new(Checkpoint::AdapterRefused { path, refusal });
        let last_line = |has_force| describe(&error, has_force).lines().last().unwrap().to_owned();
        assert!(last_line(true).contains("pass --force"));
        assert!(last_line(false).ends_with("planish adapter convert --force"));
    }

    #[test]
    fn configuration_error_is_usage_only_on_the_command_line() {
        let core = |origin: &str| {
            let error = planish_core::Error::RunUnknownKey {
                origin: origin.into(),
                key: "a".into(),
                nearest: None,
            };
            is_usage(&anyhow::Error::new(error))
        };
        assert!(core("--set a=1"));
        assert!(!core("run.toml:3"));
        assert!(is_usage(&usage("x")));
        assert!(!is_usage(&anyhow::anyhow!("x")));
    }
}

//! `cargo xtask check`: every step that must pass, cheapest first.

use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::{repo, tidy};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run one step alone
    #[arg(long, value_name = "STEP", value_parser = step_names())]
    only: Option<String>,
    /// Print the steps and their commands, and run none
    #[arg(long)]
    list: bool,
}

/// One step: a name for `--only`, and what it runs.
struct Step {
    name: &'static str,
    action: Action,
}

enum Action {
    Tidy,
    /// A command at the root, with extra environment variables.
    Command(&'static [&'static str], &'static [(&'static str, &'static str)]),
    /// A command for a manifest outside the workspace; skipped aloud while that does not exist.
    /// It shares the workspace's target directory.
    Outside(&'static str, &'static [&'static str]),
}

const DOWNSTREAM: &str = "tests/downstream/Cargo.toml";

const STEPS: &[Step] = &[
    Step {
        name: "format",
        action: Action::Command(&["cargo", "fmt", "--all", "--check"], &[]),
    },
    Step {
        name: "tidy",
        action: Action::Tidy,
    },
    Step {
        name: "lints",
        action: Action::Command(
            &[
                "cargo",
                "clippy",
                "--locked",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
            &[],
        ),
    },
    Step {
        name: "tests",
        action: Action::Command(
            &[
                "cargo",
                "test",
                "--locked",
                "--workspace",
                "--lib",
                "--bins",
                "--tests",
                "--examples",
            ],
            &[],
        ),
    },
    Step {
        name: "doctests",
        action: Action::Command(&["cargo", "test", "--locked", "--workspace", "--doc"], &[]),
    },
    Step {
        name: "docs",
        action: Action::Command(
            &["cargo", "doc", "--locked", "--workspace", "--no-deps", "--lib"],
            &[("RUSTDOCFLAGS", "-D warnings")],
        ),
    },
    Step {
        name: "downstream",
        action: Action::Outside(DOWNSTREAM, &["cargo", "run", "--locked", "--manifest-path", DOWNSTREAM]),
    },
];

fn step_names() -> Vec<&'static str> {
    STEPS.iter().map(|step| step.name).collect()
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    for step in STEPS
        .iter()
        .filter(|step| args.only.as_deref().is_none_or(|name| name == step.name))
    {
        if args.list {
            println!("{:<11} {}", step.name, step.action.as_typed());
            continue;
        }
        step.run()?;
    }
    if !args.list {
        println!("check: all passed in {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}

impl Step {
    fn run(&self) -> Result<()> {
        println!("check: {} …", self.name);
        let start = Instant::now();
        self.action.run().with_context(|| {
            format!(
                "step `{0}` failed; to run it again: cargo xtask check --only {0}  (that is: {1})",
                self.name,
                self.action.as_typed()
            )
        })?;
        println!("check: {} passed in {:.1} s", self.name, start.elapsed().as_secs_f64());
        Ok(())
    }
}

impl Action {
    fn run(&self) -> Result<()> {
        let (words, env): (&[&str], &[(&str, &str)]) = match self {
            Self::Tidy => return tidy::run(),
            Self::Outside(manifest, _) if !repo::root().join(manifest).exists() => {
                println!("check: skipped, there is no {manifest}");
                return Ok(());
            }
            Self::Outside(_, words) => (words, &[]),
            Self::Command(words, env) => (words, env),
        };
        let target_dir = repo::root().join("target");
        let status = repo::command(words)
            .env(
                "CARGO_TARGET_DIR",
                std::env::var_os("CARGO_TARGET_DIR").unwrap_or(target_dir.into()),
            )
            .envs(env.iter().copied())
            .status()
            .context("cannot start it")?;
        if !status.success() {
            bail!("it ended with {status}");
        }
        Ok(())
    }

    fn as_typed(&self) -> String {
        match self {
            Self::Tidy => "cargo xtask tidy".into(),
            Self::Outside(_, words) => words.join(" "),
            Self::Command(words, env) => {
                let env: String = env.iter().map(|(name, value)| format!("{name}=\"{value}\" ")).collect();
                env + &words.join(" ")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn err_failing_step_names_the_command_to_run_again() {
        let step = Step {
            name: "tests",
            action: Action::Command(&["git", "no-such-command"], &[("A", "b c")]),
        };
        let message = format!("{:#}", step.run().unwrap_err());
        assert!(message.contains("cargo xtask check --only tests"), "{message}");
        assert!(message.contains("A=\"b c\" git no-such-command"), "{message}");
    }

    #[test]
    fn step_names_are_distinct() {
        let mut names = step_names();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), STEPS.len());
    }
}

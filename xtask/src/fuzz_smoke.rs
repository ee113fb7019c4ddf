//! `cargo xtask fuzz-smoke`: each fuzz target compiles, replays its corpus and looks on for a few seconds.

use anyhow::{Context, Result, bail};

use crate::repo;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Seconds per target
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// Run only this target
    #[arg(long, value_name = "TARGET")]
    only: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let targets = targets()?;
    let chosen: Vec<&String> = targets
        .iter()
        .filter(|target| args.only.as_ref().is_none_or(|only| only == *target))
        .collect();
    if chosen.is_empty() {
        bail!("no such target; there are: {}", targets.join(", "));
    }
    for target in chosen {
        println!("fuzz-smoke: {target} …");
        smoke(target, args.seconds)?;
    }
    Ok(())
}

/// One target. What it finds is kept beside the corpus of the repository, not in it.
fn smoke(target: &str, seconds: u32) -> Result<()> {
    let found = tempfile::tempdir()?;
    let (found, corpus) = (found.path().display().to_string(), format!("fuzz/corpus/{target}"));
    let limit = format!("-max_total_time={seconds}");
    let words = [
        "cargo", "+nightly", "fuzz", "run", target, &found, &corpus, "--", &limit,
    ];
    // The proxy of rustup picks the toolchain, so not the cargo that runs us.
    let status = std::process::Command::new(words[0])
        .args(&words[1..])
        .current_dir(repo::root())
        .env_remove("RUSTUP_TOOLCHAIN")
        .status()
        .context("cannot start cargo")?;
    if !status.success() {
        bail!(
            "{target} failed; to run it again: {} (needs nightly Rust and cargo-fuzz: cargo install cargo-fuzz)",
            words[..5].join(" ")
        );
    }
    Ok(())
}

/// The names of the targets, which are those of their files.
fn targets() -> Result<Vec<String>> {
    let names = repo::files()?.into_iter().filter_map(|path| {
        let name = path.strip_prefix("fuzz/fuzz_targets/")?.strip_suffix(".rs")?;
        Some(name.to_owned())
    });
    Ok(names.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_corpus_and_an_entry_in_the_manifest() {
        let manifest = std::fs::read_to_string(repo::root().join("fuzz/Cargo.toml")).unwrap();
        for target in targets().unwrap() {
            assert!(repo::root().join("fuzz/corpus").join(&target).is_dir(), "{target}");
            assert!(
                manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")),
                "{target}"
            );
        }
    }
}

//! Chat templates in the manner of 14 families against transformers' own `apply_chat_template`. The comparison itself is
//! `parity_transformers_chat_templates` in planish-data, since chores do not reach that crate.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{transformers_python, work_folder};
use crate::program::output;
use crate::repo;

/// Compares, prints what was found, and returns what failed.
pub(super) fn compare() -> Result<Vec<String>> {
    let folder = work_folder().join("templates");
    std::fs::create_dir_all(&folder)?;
    let crate_folder = repo::root().join("crates/planish-data/tests/it/fixtures");
    let families = crate_folder.join("families");
    let mut templates: Vec<PathBuf> = std::fs::read_dir(&families)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    templates.retain(|path| path.extension().is_some_and(|end| end == "jinja"));
    templates.sort();
    ensure!(templates.len() >= 12, "{} holds too few templates", families.display());
    let mut python = Command::new(transformers_python()?);
    python.current_dir(&folder).arg(families.join("reference.py"));
    python.arg(crate_folder.join("tiny/tokenizer.json")).args(&templates);
    std::fs::write(folder.join("reference.json"), output(&mut python)?)?;
    let mut test = Command::new("cargo");
    test.current_dir(repo::root())
        .env("PLANISH_TEMPLATE_REFERENCE", &folder);
    test.args([
        "test",
        "--quiet",
        "-p",
        "planish-data",
        "--test",
        "it",
        "parity_transformers",
        "--",
        "--ignored",
        "--nocapture",
    ]);
    let passed = test.status().context("cannot run cargo")?.success();
    Ok(if passed {
        Vec::new()
    } else {
        vec!["templates: see above".into()]
    })
}

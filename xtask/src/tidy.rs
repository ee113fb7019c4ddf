//! `cargo xtask tidy`: rules that the compiler does not check.

mod files;
mod layers;
mod sources;

use anyhow::{Context, Result, bail};

use crate::{configuration_page, metal_check, repo};

/// One broken rule.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// File (with line where there is one) or crate.
    place: String,
    message: String,
    /// Only reported, does not fail.
    is_advice: bool,
}

impl Finding {
    fn error(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            place: place.into(),
            message: message.into(),
            is_advice: false,
        }
    }

    fn advice(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            is_advice: true,
            ..Self::error(place, message)
        }
    }
}

pub(crate) fn run() -> Result<()> {
    let mut findings = file_findings()?;
    let pages = [
        (configuration_page::PATH, configuration_page::is_current()),
        (metal_check::PAGE, metal_check::is_page_current()),
    ];
    let stale = pages.into_iter().filter(|(_, is_current)| !is_current);
    findings.extend(stale.map(|(path, _)| Finding::error(path, "is out of date: run cargo xtask docs")));
    findings.extend(crate_findings()?);
    for finding in &findings {
        let kind = if finding.is_advice { "advice" } else { "error" };
        println!("tidy: {kind}: {}: {}", finding.place, finding.message);
    }
    match findings.iter().filter(|finding| !finding.is_advice).count() {
        0 => Ok(()),
        n => bail!("{n} rule(s) broken"),
    }
}

fn file_findings() -> Result<Vec<Finding>> {
    let root = repo::root();
    let mut findings = Vec::new();
    for path in repo::files()? {
        let bytes = std::fs::read(root.join(&path)).with_context(|| format!("cannot read {path}"))?;
        findings.extend(files::check_name(&path));
        if let Ok(text) = String::from_utf8(bytes) {
            findings.extend(files::check_text(&path, &text));
            findings.extend(sources::check(&path, &text));
        }
    }
    Ok(findings)
}

fn crate_findings() -> Result<Vec<Finding>> {
    let metadata = repo::output_of(&[
        "cargo",
        "metadata",
        "--locked",
        "--format-version",
        "1",
        "--all-features",
    ])?;
    let graph = layers::Graph::from_metadata(&metadata)?;
    let page = std::fs::read_to_string(repo::root().join(layers::PAGE)).unwrap_or_default();
    Ok(layers::check(&graph, &layers::Map::read(&page)))
}

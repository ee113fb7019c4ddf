//! The generated parts of docs/metal.md.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};
use metal_check::candidate::{self, Scope};
use metal_check::catalogue;
use metal_check::history;
use metal_check::wheel;

const MARKS: [&str; 3] = ["status", "wheels", "failures"];

/// Where the page is, relative to the root.
pub(crate) const PATH: &str = "docs/metal.md";

pub(super) fn write(root: &Path) -> Result<()> {
    planish_core::fs::write_atomic(&root.join(PATH), rendered(root)?.as_bytes())?;
    Ok(())
}

pub(super) fn is_current(root: &Path) -> bool {
    std::fs::read_to_string(root.join(PATH)).is_ok_and(|page| rendered(root).is_ok_and(|new| new == page))
}

/// The page with what stands between `<!-- generated: X -->` and `<!-- end: X -->` replaced for each part.
fn rendered(root: &Path) -> Result<String> {
    let path = root.join(PATH);
    let mut page = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let recorded = std::fs::read_to_string(root.join("docs/metal-history.jsonl")).unwrap_or_default();
    for (mark, text) in MARKS.iter().zip([status(&recorded), wheels(), failures()]) {
        page = replace(&page, mark, &text)?;
    }
    Ok(page)
}

fn replace(page: &str, mark: &str, text: &str) -> Result<String> {
    let (open, close) = (format!("<!-- generated: {mark} -->\n"), format!("<!-- end: {mark} -->"));
    let from = page
        .find(&open)
        .with_context(|| format!("docs/metal.md has no `{}`", open.trim()))?
        + open.len();
    let to = page[from..]
        .find(&close)
        .with_context(|| format!("docs/metal.md has no `{close}`"))?
        + from;
    Ok(format!("{}{text}{}", &page[..from], &page[to..]))
}

/// What `--record` wrote, newest line of each candidate and machine; candidates that nobody recorded are listed as such.
fn status(recorded: &str) -> String {
    let mut text = String::from("| candidate | machine | verdict | code | when |\n|---|---|---|---|---|\n");
    let (entries, _) = history::parse(recorded);
    let newest = |entry: &history::Entry| {
        !entries.iter().any(|other| {
            other.candidate == entry.candidate
                && other.os == entry.os
                && other.chip == entry.chip
                && other.time > entry.time
        })
    };
    for entry in entries.iter().filter(|entry| newest(entry)) {
        let _ = writeln!(
            text,
            "| `{}` | {} · {} · Xcode {} | {} | {} | {} |",
            entry.candidate,
            entry.os,
            entry.chip,
            entry.xcode,
            entry.verdict.word(),
            entry.code,
            entry.time
        );
    }
    let mac = candidate::candidates(&Scope {
        is_mac: true,
        ..Scope::default()
    });
    for candidate in mac
        .iter()
        .map(ToString::to_string)
        .filter(|id| entries.iter().all(|entry| entry.candidate != *id))
    {
        let _ = writeln!(text, "| `{candidate}` | any Mac | not yet recorded | | |");
    }
    text
}

fn wheels() -> String {
    let mut text = format!(
        "| wheel of MLX {} | runs on macOS | mlx.metallib |\n|---|---|---|\n",
        wheel::MLX_VERSION
    );
    for wheel in wheel::WHEELS {
        let _ = writeln!(
            text,
            "| `{}` | {} and later | {:.0} MB |",
            wheel.tag,
            wheel.minos,
            wheel.metallib_bytes as f64 / 1e6
        );
    }
    text
}

fn failures() -> String {
    let mut text = String::from("| code | phase | what it means | what to do today |\n|---|---|---|---|\n");
    for entry in catalogue::entries() {
        let threads: Vec<String> = entry
            .links
            .iter()
            .map(|link| format!("[{}]({link})", short(link)))
            .collect();
        let threads = if threads.is_empty() {
            String::new()
        } else {
            format!(" ({})", threads.join(", "))
        };
        let _ = writeln!(
            text,
            "| `{}` | {} | {}{threads} | {} |",
            entry.code,
            entry.phase.word(),
            cell(&entry.cause),
            cell(&entry.remedy)
        );
    }
    text
}

fn short(link: &str) -> String {
    let parts: Vec<&str> = link.trim_start_matches("https://github.com/").split('/').collect();
    match parts.as_slice() {
        [_, name, _, number] => format!("{name}#{number}"),
        parts => parts.join("/"),
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

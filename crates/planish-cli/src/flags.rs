//! Every flag that a message or a page names exists, with the command that it is named with.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use clap::CommandFactory;

use crate::cli::Cli;

/// Flags of other programs that our texts name, and whose they are.
const FOREIGN: &[(&str, &str)] = &[
    ("--allow-unsupported", "cargo xtask metal-check"),
    ("--bench", "cargo bench"),
    ("--candidate", "cargo xtask metal-check"),
    ("--classify", "cargo xtask metal-check"),
    ("--example", "cargo run"),
    ("--features", "cargo"),
    ("--full", "cargo xtask metal-check"),
    ("--install", "xcode-select"),
    ("--length", "cargo xtask bench"),
    ("--list", "cargo xtask metal-check"),
    ("--locked", "cargo"),
    ("--mask-prompt", "mlx_lm.lora"),
    ("--merge", "gguf-split"),
    ("--no-deps", "pip"),
    ("--offline", "cargo xtask metal-check"),
    ("--only", "cargo xtask"),
    ("--path", "cargo install"),
    ("--peers", "cargo xtask bench"),
    ("--preflight", "cargo xtask metal-check"),
    ("--quick", "cargo xtask metal-check"),
    ("--record", "cargo xtask metal-check"),
    ("--release", "cargo"),
    ("--replay", "cargo xtask metal-check"),
    ("--target", "cargo"),
    ("--user", "pip"),
    ("--work", "cargo xtask"),
];
/// Their texts are about pip, Xcode and `cargo xtask metal-check`.
const OTHER_PROGRAMS: [&str; 3] = ["metal-check", "mlx-sys", "wheel-fetch"];

/// Flags by command, such as `adapter convert`; the program's own under "".
type Tree = BTreeMap<String, BTreeSet<String>>;

fn tree() -> Tree {
    let mut root = Cli::command();
    root.build();
    let mut tree = Tree::new();
    add(&root, "", &mut tree);
    tree
}

fn add(command: &clap::Command, path: &str, tree: &mut Tree) {
    let longs = command.get_arguments().filter_map(clap::Arg::get_long);
    tree.insert(path.to_owned(), longs.map(|long| format!("--{long}")).collect());
    for sub in command.get_subcommands() {
        add(sub, format!("{path} {}", sub.get_name()).trim(), tree);
    }
}

/// The flags of a line, each with where it stands.
fn flags(line: &str) -> impl Iterator<Item = (usize, &str)> {
    line.match_indices("--").filter_map(|(at, _)| {
        let rest = &line[at..];
        let end = rest.find(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'));
        let flag = &rest[..end.unwrap_or(rest.len())];
        let is_inside = line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '-');
        // `--ink: #333` and `var(--ink)` are style sheets.
        let is_style = line[..at].ends_with("var(") || rest[flag.len()..].starts_with(':');
        let is_flag = flag[2..].starts_with(|c: char| c.is_ascii_lowercase());
        (is_flag && !is_inside && !is_style).then_some((at, flag.trim_end_matches('-')))
    })
}

/// The command whose line it is, by the words after the last `planish` before the flag.
fn command_of<'t>(before: &str, tree: &'t Tree) -> Option<&'t str> {
    let said = before.rsplit_once("planish ")?.1;
    if said.contains(['`', '"', ';', '|']) {
        return None; // the command has ended
    }
    let words: Vec<&str> = said.split_whitespace().collect();
    let longest = (1..=words.len().min(2)).rev().map(|n| words[..n].join(" "));
    longest
        .filter_map(|path| tree.get_key_value(&path))
        .map(|(path, _)| path.as_str())
        .next()
}

/// The flag of a line that does not exist, if any.
fn missing(line: &str, tree: &Tree) -> Option<String> {
    flags(line).find_map(|(at, flag)| {
        let exists = match command_of(&line[..at], tree) {
            Some(command) => tree[command].contains(flag),
            None => tree.values().any(|flags| flags.contains(flag)) || FOREIGN.iter().any(|(known, _)| *known == flag),
        };
        (!exists).then(|| flag.to_owned())
    })
}

/// Sources of the crates and pages, with the lines that a reader sees.
fn texts(root: &Path) -> Vec<(PathBuf, Vec<String>)> {
    let mut texts = Vec::new();
    let mut open = vec![root.join("crates"), root.join("docs"), root.join("README.md")];
    while let Some(path) = open.pop() {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            let is_skipped =
                OTHER_PROGRAMS.contains(&name.as_str()) || ["tests", "examples", "target"].contains(&&*name);
            if !is_skipped {
                open.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            }
        } else if name.ends_with(".rs") || name.ends_with(".md") {
            let text = std::fs::read_to_string(&path).unwrap();
            let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
            let is_comment = |line: &&str| name.ends_with(".rs") && line.trim_start().starts_with("//");
            texts.push((
                path,
                lines.filter(|line| !is_comment(line)).map(str::to_owned).collect(),
            ));
        }
    }
    texts
}

#[test]
fn every_flag_that_is_named_exists() {
    let (root, tree) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), tree());
    let mut found = Vec::new();
    for (path, lines) in texts(&root) {
        // This file names flags of others.
        if path.ends_with("planish-cli/src/flags.rs") {
            continue;
        }
        let missing = lines.iter().filter_map(|line| Some((missing(line, &tree)?, line)));
        found.extend(missing.map(|(flag, line)| format!("{}: {flag}: {}", path.display(), line.trim())));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn flag_counts_for_the_command_it_is_named_with() {
    let tree = tree();
    assert_eq!(missing("use `planish fuse --dequantize` first", &tree), None);
    assert_eq!(missing("`planish bench --force`", &tree).as_deref(), Some("--force"));
    assert_eq!(missing("`planish bench`, then --force", &tree), None);
    assert_eq!(
        missing("or pass --trust-shapes", &tree).as_deref(),
        Some("--trust-shapes")
    );
    assert_eq!(missing("a--b, |---|, --", &tree), None);
}

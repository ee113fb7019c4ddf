//! Rules about single files.

use super::Finding;

/// Longer files (their tests not counted) are mentioned: they often hold more than one idea.
const LONG_FILE_LINES: usize = 600;

/// Crates whose sources may print. Everything else under `crates/` is a library.
const PRINTING_CRATES: &[&str] = &["planish-cli"];

/// Registries and paths of one machine. Each in two pieces, so that this file obeys its own rule.
const REGISTRY_HOSTS: &[[&str; 2]] = &[
    ["pypi", ".org"],
    ["python", "hosted.org"],
    // The bare name is what people call the registry.
    ["index.", "crates.io"],
    ["static.", "crates.io"],
    ["npm", "js.org"],
    ["npm", "js.com"],
    ["deb.debian", ".org"],
    ["proxy.golang", ".org"],
];
const MACHINE_PATHS: &[[&str; 2]] = &[
    ["/work", "/main"],
    ["/work", "/shared"],
    ["/root", "/"],
    ["/home", "/"],
    ["/Users", "/"],
];

/// Files whose content is a machine's record, not ours to word.
fn is_record(path: &str) -> bool {
    path.ends_with("Cargo.lock") || path.contains("/fixtures/") || path.contains("/goldens/")
}

/// A name says what a file is, never how the work went.
pub(super) fn check_name(path: &str) -> Option<Finding> {
    let name = path.rsplit('/').next().unwrap_or(path);
    let stem = name.strip_suffix(".md")?.to_uppercase();
    let is_diary = ["STATUS", "SUMMARY", "COMPLETE", "PROGRESS", "FIXES", "TODO"]
        .iter()
        .any(|word| stem.contains(word));
    is_diary.then(|| Finding::error(path, "a status file: put it in CHANGELOG.md, docs/log.md, or nowhere"))
}

pub(super) fn check_text(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !is_record(path) {
        findings.extend(forbidden_words(path, text));
    }
    if is_library_source(path) {
        findings.extend(printing(path, text));
    }
    let n_lines = text
        .lines()
        .take_while(|line| !line.starts_with("#[cfg(test)]"))
        .count();
    if path.ends_with(".rs") && n_lines > LONG_FILE_LINES {
        findings.push(Finding::advice(path, format!("{n_lines} lines: is it one idea?")));
    }
    findings
}

fn forbidden_words(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        for host in REGISTRY_HOSTS.iter().map(|parts| parts.concat()) {
            if line.contains(&host) {
                findings.push(Finding::error(
                    format!("{path}:{number}"),
                    format!("names the registry host {host}: name the registry instead"),
                ));
            }
        }
        for prefix in MACHINE_PATHS.iter().map(|parts| parts.concat()) {
            if line
                .split(&prefix)
                .skip(1)
                .any(|rest| !prefix.ends_with('/') || rest.starts_with(|c: char| c.is_ascii_alphanumeric()))
            {
                findings.push(Finding::error(
                    format!("{path}:{number}"),
                    format!("a path of one machine ({prefix}…): make it relative"),
                ));
            }
        }
    }
    findings
}

fn is_library_source(path: &str) -> bool {
    let Some((krate, inner)) = path.strip_prefix("crates/").and_then(|rest| rest.split_once('/')) else {
        return false;
    };
    inner.starts_with("src/") && inner.ends_with(".rs") && !PRINTING_CRATES.contains(&krate)
}

/// Clippy refuses printing too; this rule also sees an `allow`.
fn printing(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let code = line.trim_start();
        if code.starts_with("#[cfg(test)]") {
            break;
        }
        if code.starts_with("//") {
            continue;
        }
        if ["println!(", "print!(", "eprintln!(", "eprint!("]
            .iter()
            .any(|print| code.contains(print))
        {
            findings.push(Finding::error(
                format!("{path}:{number}"),
                "a library prints: return data or emit an event",
            ));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(path: &str, text: &str) -> Vec<String> {
        check_text(path, text)
            .into_iter()
            .map(|finding| finding.place)
            .collect()
    }

    #[test]
    fn registry_hosts_are_found_by_line() {
        let text = format!("fine\nsee {}/simple\n", REGISTRY_HOSTS[0].concat());
        assert_eq!(places("docs/a.md", &text), ["docs/a.md:2"]);
        assert!(places("Cargo.lock", &text).is_empty());
    }

    #[test]
    fn machine_paths_are_found_and_prose_is_not() {
        let path = MACHINE_PATHS[3].concat();
        assert_eq!(places("a.rs", &format!("\"{path}someone/x\"")), ["a.rs:1"]);
        assert!(places("a.rs", &format!("the {path} directory")).is_empty());
    }

    #[test]
    fn library_must_not_print_outside_tests() {
        let text = "fn f() {\n    println!(\"x\");\n}\n// println!(\n#[cfg(test)]\nmod tests { fn f() { println!(\"y\"); } }\n";
        assert_eq!(
            places("crates/planish-core/src/a.rs", text),
            ["crates/planish-core/src/a.rs:2"]
        );
        assert!(places("crates/planish-cli/src/a.rs", text).is_empty());
        assert!(places("crates/planish-core/build.rs", text).is_empty());
    }

    #[test]
    fn long_file_is_advice_only() {
        let findings = check_text("a.rs", &"x\n".repeat(LONG_FILE_LINES + 1));
        assert_eq!(findings.len(), 1);
        assert!(findings[0].is_advice);
    }

    #[test]
    fn status_files_are_refused() {
        assert!(check_name("docs/IMPLEMENTATION_STATUS.md").is_some());
        assert!(check_name("docs/design.md").is_none());
        assert!(check_name("src/status.rs").is_none());
    }
}

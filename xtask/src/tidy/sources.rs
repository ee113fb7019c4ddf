//! Rules about the code of the crates: where a word may stand.

use super::Finding;
use crate::{size::MAX_FUNCTION_LINES, source::Source};

/// A word, the places that may say it (beginnings of paths), and why nobody else may.
struct Rule {
    word: &'static str,
    places: &'static [&'static str],
    reason: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        word: "unsafe",
        places: &[
            "crates/mlx-sys/",
            "crates/planish-mlx/",
            "crates/planish-kernels/",
            // Map a file into memory.
            MAPPINGS[0],
            MAPPINGS[1],
            // Sets a variable that MLX reads, before the first thread starts.
            "crates/planish-cli/src/main.rs",
        ],
        reason: "unsafe belongs to the bindings, the vector code and what maps files",
    },
    Rule {
        word: "Mmap",
        places: MAPPINGS,
        reason: "files are mapped by the readers of tensors and of GGUF",
    },
    Rule {
        word: "safetensors::",
        places: &["crates/planish-tensors/"],
        reason: "tensor files are read and written by planish-tensors",
    },
    Rule {
        word: "File::create",
        places: PARTIAL_WRITES,
        reason: IN_PLACE,
    },
    Rule {
        word: "fs::write",
        places: PARTIAL_WRITES,
        reason: IN_PLACE,
    },
    Rule {
        word: "OpenOptions::new",
        places: PARTIAL_WRITES,
        reason: IN_PLACE,
    },
];

const MAPPINGS: &[&str] = &["crates/planish-tensors/src/store.rs", "crates/planish-hub/src/gguf/"];
const IN_PLACE: &str = "nothing is written in place: use planish_core::fs";

/// Where a file may be opened for writing without the atomic helper.
const PARTIAL_WRITES: &[&str] = &[
    "crates/planish-core/src/fs.rs", // the helper
    // Inside a folder that gets its name when it is whole.
    "crates/coreml-mil/",
    "crates/coreai-asset/",
    "crates/planish-export/",
    "crates/planish-hub/src/manifest.rs",
    "crates/planish-hub/src/gguf/import.rs",
    "crates/wheel-fetch/",
    // Logs that only grow, and a lock.
    "crates/planish-train/src/metrics.rs",
    "crates/planish-train/src/tensorboard.rs",
    "crates/planish-train/src/run_dir.rs",
    "crates/planish-checkpoint/src/run_state/lock.rs",
    // Output of a child process, in a temporary folder.
    "crates/planish-backend/src/child.rs",
    "crates/planish-backend/src/probe.rs",
    // Chores leave reports, nothing that a run needs.
    "xtask/",
];

pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    if !path.ends_with(".rs") || !path.contains("/src/") || path.starts_with("tests/") {
        return Vec::new();
    }
    let source = Source::read(text);
    let mut findings = Vec::new();
    for (number, line) in source.product_lines() {
        let broken = RULES.iter().filter(|rule| rule.is_broken(path, line));
        findings.extend(broken.map(|rule| {
            let place = format!("{path}:{}", number + 1);
            Finding::error(place, format!("`{}`: {}", rule.word, rule.reason))
        }));
    }
    let functions = source.functions().into_iter();
    let long = functions.filter(|function| function.lines.len() > MAX_FUNCTION_LINES);
    findings.extend(long.map(|function| {
        let place = format!("{path}:{}", function.lines.start + 1);
        let (name, n) = (function.name, function.lines.len());
        Finding::advice(place, format!("{name} has {n} lines, more than {MAX_FUNCTION_LINES}"))
    }));
    findings
}

impl Rule {
    fn is_broken(&self, path: &str, line: &str) -> bool {
        // Not a part of a longer name, such as AtomicFile::create or fs::write_atomic.
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        let is_said = line.match_indices(self.word).any(|(at, word)| {
            let after = &line[at + word.len()..];
            !line[..at].ends_with(is_word) && (word.ends_with(':') || !after.starts_with(is_word))
        });
        is_said && !self.places.iter().any(|place| path.starts_with(place))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(path: &str, text: &str) -> Vec<String> {
        check(path, text).into_iter().map(|finding| finding.place).collect()
    }

    #[test]
    fn words_are_refused_outside_their_places_and_their_tests() {
        let text = "// unsafe\nfn f() { unsafe { \"Mmap\" } }\n#[cfg(test)]\nmod tests { unsafe fn g() {} }\n";
        assert_eq!(
            places("crates/planish-data/src/a.rs", text),
            ["crates/planish-data/src/a.rs:2"]
        );
        assert!(places("crates/planish-mlx/src/a.rs", text).is_empty());
        assert!(places("crates/planish-data/tests/it/a.rs", text).is_empty());
    }

    #[test]
    fn writing_in_place_is_refused_and_the_helper_is_not() {
        let text =
            "fn f() {\n std::fs::write(a, b);\n AtomicFile::create(a); fs::write_atomic(a);\n File::create(a);\n}\n";
        assert_eq!(
            places("crates/planish-data/src/a.rs", text),
            ["crates/planish-data/src/a.rs:2", "crates/planish-data/src/a.rs:4"]
        );
    }

    #[test]
    fn long_function_is_refused() {
        let text = format!("fn long() {{\n{}}}\n", "x;\n".repeat(MAX_FUNCTION_LINES - 1));
        assert_eq!(places("crates/a/src/a.rs", &text).len(), 1);
        assert!(places("crates/a/src/a.rs", &text.replacen("x;\n", "", 1)).is_empty());
    }
}

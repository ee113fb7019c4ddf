//! Lines that say how far a build came: consequences of a failure, successes, and errors nobody understands.

use super::incident::Find;
use super::lines::{Kind, Sorted};
use crate::catalogue::{self, Phase, Strength};
use regex::{Regex, RegexSet};
use std::sync::LazyLock;

/// What a consequence line says about the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cascade {
    /// Something failed before; which phase is not said.
    Unclear,
    /// The failing target shows the phase.
    Hints(Phase),
}

/// A consequence: `make` telling which target failed, cargo telling which build script did, an exit status.
pub(super) fn cascade(line: &str) -> Option<Cascade> {
    let hinted = HINTED_CASCADES.iter().find(|(pattern, _)| pattern.is_match(line));
    hinted
        .map(|(_, phase)| Cascade::Hints(*phase))
        .or_else(|| CASCADES.is_match(line).then_some(Cascade::Unclear))
}

/// Ninja prints the failed target before its output, so this line opens an incident.
pub(super) fn opens_target(line: &str) -> bool {
    line.trim_start().starts_with("FAILED: ")
}

/// Whether a build script's own panic reports what failed below it.
pub(super) fn is_build_script_panic(line: &str) -> bool {
    BUILD_SCRIPT_PANIC.is_match(line)
}

/// The furthest phase that such a line shows to have succeeded.
pub(super) fn success(line: &str) -> Option<Phase> {
    SUCCESSES
        .iter()
        .find(|(pattern, _)| pattern.is_match(line))
        .map(|(_, phase)| *phase)
}

/// A new attempt at what failed before.
pub(super) fn is_retry(line: &str) -> bool {
    RETRY.is_match(line)
}

/// The head of a diagnostic that may go on in later lines.
pub(super) fn opens_diagnostic(line: &str) -> bool {
    DIAGNOSTIC.is_match(line)
}

/// Error lines of no known form, and rustc headlines.
pub(super) fn bare_errors(sorted: &Sorted) -> Vec<Find> {
    let table = catalogue::entries();
    let bare = |code: &str, index: usize| {
        let rank = table.iter().position(|entry| entry.code == code)?;
        Some(Find {
            entry: &table[rank],
            rank,
            rule: None,
            first: index,
            last: index,
            strength: Strength::Phase,
            phase_only: true,
        })
    };
    let mut finds = Vec::new();
    for (index, kind) in sorted.kinds.iter().enumerate() {
        let line = &sorted.unified[index];
        match kind {
            Kind::RustError => finds.extend(bare("RUST_COMPILE", index)),
            Kind::Plain if BARE_ERROR.is_match(line) && cascade(line).is_none() => finds.extend(bare("UNKNOWN", index)),
            _ => {}
        }
    }
    finds
}

static BARE_ERROR: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r"(?i)(?:^|[\s:\]])(?:fatal |internal )?error:|^\s*fatal: |\bfailed with\b|^\s*traceback \(most recent|^\s*(?:FAIL|FAILURE|FAILED)\b[: ]|\bcommand failed\b|\berror \d+\b.*$",
    )
});

static DIAGNOSTIC: LazyLock<Regex> = LazyLock::new(|| {
    regex(
        r"(?i)\berror\b|\bfatal\b|exception|terminating|failed|not loaded|unable to|cannot |can not|assertion|panicked",
    )
});

static BUILD_SCRIPT_PANIC: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?i)\bpanicked at .*(?:build\.rs|/(?:cmake|cc|bindgen|pkg-config)-\d)"));

static RETRY: LazyLock<Regex> =
    LazyLock::new(|| regex(r"(?i)\bretry(?:ing)?\b|\battempt \d+|\btrying again\b|^\s*cloning into|tries remaining"));

static HINTED_CASCADES: LazyLock<Vec<(Regex, Phase)>> = LazyLock::new(|| {
    [
        (r"(?i)^\s*FAILED: .*\.(?:air|metallib)\b", Phase::Shader),
        (r"(?i)\*\*\* \[[^\]]*\.(?:air|metallib)\] error", Phase::Shader),
        (r"(?i)^\s*FAILED: .*\.(?:o|obj|a|pch)\b", Phase::Compile),
        (
            r"(?i)\*\*\* \[[^\]]*\.(?:o|obj|a|c|cc|cpp|m|mm)\] error",
            Phase::Compile,
        ),
        (r"(?i)\*\*\* \[[^\]]*\.(?:dylib|so|bundle)\] error", Phase::Link),
        (r"(?i)configuring incomplete", Phase::Configure),
        (r"(?i)^\s*error: could not compile ", Phase::Rust),
        (
            r#"(?i)process didn.t exit successfully: "?\S*/(?:debug|release)/(?:deps/|examples/)?[\w-]+("|\s|$)"#,
            Phase::Run,
        ),
        (r"(?i)\bsignal: ?\d+, SIG|\babort trap|segmentation fault", Phase::Run),
    ]
    .iter()
    .map(|(pattern, phase)| (regex(pattern), *phase))
    .collect()
});

static CASCADES: LazyLock<RegexSet> = LazyLock::new(|| {
    set(&[
        r"(?i)^\s*g?make(?:\[\d+\])?: \*\*\*",
        r"(?i)ninja: build stopped",
        r"(?i)^\s*(?:FAILED: |BUILD FAILED|\*\* BUILD FAILED \*\*)",
        r"(?i)failed to run custom build command",
        r"(?i)process didn.t exit successfully",
        r"(?i)^\s*caused by:\s*$",
        r"(?i)build script failed, must exit now|command did not execute successfully",
        r"(?i)\bpanicked at .*(?:build\.rs|/(?:cmake|cc|bindgen|pkg-config)-\d)",
        r"(?i)\bbuild failed, waiting for other jobs",
        r"(?i)process completed with exit code [1-9]|exited with (?:code|status) [1-9]|exit (?:status|code):? ?[1-9]\d*\b|command .* returned non-zero exit status",
        r"(?i)^\s*error: (?:build failed|test failed|command failed|subprocess-exited-with-error|failed to build|failed building wheel|metadata-generation-failed)",
        r"(?i)see also .*cmake(?:output|error)\.log|cmakeconfigurelog",
        r"(?i)^\s*\d+ (?:errors?|warnings? and \d+ errors?) generated",
        r"(?i)^\s*error: (?:recipe|task) .* (?:failed|exit)",
        r"(?i)^\s*traceback \(most recent",
    ])
});

static SUCCESSES: LazyLock<Vec<(Regex, Phase)>> = LazyLock::new(|| {
    [
        (r"(?i)had to git clone more than once|head is now at|receiving objects: 100%|resolving deltas: 100%|download(?:ed|ing)?:? .*\b(?:complete|100%)|\[download 100% complete\]|successfully (?:cloned|downloaded)|^\s*saved \S+\.whl|submodule path .*checked out|^\s*downloaded \d+ crates", Phase::Fetch),
        (r"(?i)-- configuring done|-- generating done|-- build files have been written", Phase::Configure),
        (r"(?i)^\s*finished [`\x22]?(?:release|dev|debug|test|bench|optimized|profile)|\*\* build succeeded|^\s*build succeeded|successfully (?:built|installed)\b|build completed successfully|^\s*(?:installed|installing) (?:package|executable)|\[100%\] built target (?:mlx|mlxc|all)\b", Phase::Link),
        (r"(?i)^\s*test result: ok\.|^=+ \d+ passed[^f]*=*$|all (?:tests|checks) passed|\bexit (?:code|status):? ?0\b|^\s*verdict: works", Phase::Run),
    ]
    .iter()
    .map(|(pattern, phase)| (regex(pattern), *phase))
    .collect()
});

/// Constants of this file; a test compiles each of them.
fn regex(pattern: &str) -> Regex {
    #[allow(clippy::expect_used)] // fixed text, compiled by every test of this module
    Regex::new(pattern).expect("a pattern of this file")
}

fn set(patterns: &[&str]) -> RegexSet {
    #[allow(clippy::expect_used)] // as above
    RegexSet::new(patterns).expect("patterns of this file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failing_target_hints_at_the_phase() {
        assert_eq!(
            cascade("make[2]: *** [a/steel.air] Error 1"),
            Some(Cascade::Hints(Phase::Shader))
        );
        assert_eq!(
            cascade("FAILED: CMakeFiles/x.dir/a.cpp.o"),
            Some(Cascade::Hints(Phase::Compile))
        );
        assert_eq!(cascade("make: *** [all] Error 2"), Some(Cascade::Unclear));
        assert_eq!(cascade("a.cpp:1:1: error: x"), None);
    }

    #[test]
    fn successes_reach_a_phase() {
        assert_eq!(success("-- Configuring done (6.5s)"), Some(Phase::Configure));
        assert_eq!(
            success("    Finished `release` profile [optimized] target(s) in 1m"),
            Some(Phase::Link)
        );
        assert_eq!(success("Finished reading"), None);
    }
}

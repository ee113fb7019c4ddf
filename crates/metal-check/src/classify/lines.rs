//! Which lines of a log can prove anything.

use super::markers::{self, Cascade};
use crate::catalogue::Phase;
use crate::text::{Line, unify_quotes};
use regex::{Regex, RegexSet};
use std::sync::LazyLock;

/// What a line may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// May prove a failure.
    Plain,
    /// A compiler's note: supports a diagnostic, proves nothing alone.
    Note,
    /// The headline of a rustc error: its words are the program's, not a tool's.
    RustError,
    /// Warning, quoted source, progress, hint: never evidence.
    Mute,
}

impl Kind {
    pub(super) fn is_live(self) -> bool {
        matches!(self, Kind::Plain | Kind::Note)
    }
}

/// A cleaned log with the kind of each line.
pub(super) struct Sorted {
    pub(super) lines: Vec<Line>,
    /// Same length as `lines`: text with one kind of quotation mark.
    pub(super) unified: Vec<String>,
    /// Same length as `lines`.
    pub(super) kinds: Vec<Kind>,
    /// Same length as `lines`: which are consequences of a failure.
    pub(super) cascades: Vec<Option<Cascade>>,
    /// Same length as `lines`: which phase a line shows to have succeeded.
    pub(super) successes: Vec<Option<Phase>>,
}

impl Sorted {
    /// The lines that may prove something, with their index.
    pub(super) fn live(&self) -> impl Iterator<Item = (usize, &str)> {
        self.unified
            .iter()
            .enumerate()
            .filter(|(index, _)| self.kinds[*index].is_live())
            .map(|(index, line)| (index, line.as_str()))
    }

    /// All live lines as one text without white space, so that a wrapped diagnostic is whole.
    pub(super) fn joined(&self) -> Joined {
        self.joined_between(0, self.lines.len())
    }

    /// The same for a range of lines.
    pub(super) fn joined_between(&self, from: usize, to: usize) -> Joined {
        let mut joined = Joined {
            text: String::new(),
            starts: Vec::new(),
        };
        for (index, line) in self.live().filter(|(index, _)| (from..to).contains(index)) {
            joined.starts.push((joined.text.len(), index));
            joined.text.push_str(&squeeze(line));
        }
        joined
    }
}

/// Text without white space, and which line each byte came from.
pub(super) struct Joined {
    pub(super) text: String,
    starts: Vec<(usize, usize)>,
}

impl Joined {
    /// First and last line of every match.
    pub(super) fn search(&self, pattern: &Regex) -> Vec<(usize, usize)> {
        pattern
            .find_iter(&self.text)
            .filter(|found| !found.is_empty())
            .map(|found| (self.line_of(found.start()), self.line_of(found.end() - 1)))
            .collect()
    }

    fn line_of(&self, offset: usize) -> usize {
        let after = self.starts.partition_point(|(start, _)| *start <= offset);
        self.starts.get(after.saturating_sub(1)).map_or(0, |(_, index)| *index)
    }
}

/// The text without white space.
pub(super) fn squeeze(line: &str) -> String {
    line.chars().filter(|character| !character.is_whitespace()).collect()
}

/// Sorts the lines of a cleaned log.
pub(super) fn sort(lines: Vec<Line>) -> Sorted {
    let unified: Vec<String> = lines.iter().map(|line| unify_quotes(&line.text)).collect();
    let mut kinds: Vec<Kind> = unified.iter().map(|line| own_kind(line)).collect();
    mute_cmake_warnings(&unified, &mut kinds);
    mute_rust_diagnostics(&unified, &mut kinds);
    mute_quoted_source(&unified, &mut kinds);
    let cascades = unified.iter().map(|line| markers::cascade(line)).collect();
    let successes = unified.iter().map(|line| markers::success(line)).collect();
    Sorted {
        lines,
        unified,
        kinds,
        cascades,
        successes,
    }
}

/// What a line says about itself, without its neighbours.
fn own_kind(line: &str) -> Kind {
    if PATTERNS.note.is_match(line) {
        Kind::Note
    } else if PATTERNS.mute.is_match(line) {
        Kind::Mute
    } else {
        Kind::Plain
    }
}

/// A CMake warning goes on over blank and indented lines until text at the margin.
fn mute_cmake_warnings(lines: &[String], kinds: &mut [Kind]) {
    let mut inside = false;
    for (index, line) in lines.iter().enumerate() {
        if PATTERNS.cmake_warning.is_match(line) {
            inside = true;
        } else if !(line.trim().is_empty() || line.starts_with("  ")) {
            // A line of another job may stand inside the block: it ends at any other line of CMake or a second margin.
            inside &= PATTERNS.other_job.is_match(line);
            continue;
        }
        if inside {
            kinds[index] = Kind::Mute;
        }
    }
}

/// A rustc diagnostic is a headline with ` --> file:line` below; what it quotes is source, not evidence.
fn mute_rust_diagnostics(lines: &[String], kinds: &mut [Kind]) {
    let mut inside = false;
    for index in 0..lines.len() {
        let line = &lines[index];
        let located = lines[index + 1..]
            .iter()
            .take(3)
            .any(|next| PATTERNS.rust_arrow.is_match(next));
        if let Some(headline) = PATTERNS
            .rust_headline
            .captures(line)
            .filter(|_| located || line.trim_start().starts_with("error[E"))
        {
            inside = true;
            kinds[index] = if &headline[1] == "error" {
                Kind::RustError
            } else {
                Kind::Mute
            };
        } else if line.trim().is_empty() {
            inside = false;
        } else if inside && PATTERNS.rust_body.is_match(line) {
            kinds[index] = Kind::Mute;
        }
    }
}

/// The source line above a caret, the line below a Python frame, and anything behind a line-number gutter.
fn mute_quoted_source(lines: &[String], kinds: &mut [Kind]) {
    for index in 0..lines.len() {
        let caret_below = lines.get(index + 1).is_some_and(|next| PATTERNS.caret.is_match(next));
        if PATTERNS.gutter.is_match(&lines[index])
            || PATTERNS.caret.is_match(&lines[index])
            || (caret_below && !PATTERNS.diagnostic.is_match(&lines[index]))
        {
            kinds[index] = Kind::Mute;
        }
        if index > 0 && PATTERNS.python_frame.is_match(&lines[index - 1]) && lines[index].starts_with("    ") {
            kinds[index] = Kind::Mute;
        }
    }
}

struct Patterns {
    note: Regex,
    mute: RegexSet,
    cmake_warning: Regex,
    other_job: Regex,
    rust_headline: Regex,
    rust_arrow: Regex,
    rust_body: Regex,
    caret: Regex,
    gutter: Regex,
    diagnostic: Regex,
    python_frame: Regex,
}

static PATTERNS: LazyLock<Patterns> = LazyLock::new(|| {
    Patterns {
        note: regex(r"^(?:\S+:\d+:\d+: |\s*)note: |: note: "),
        mute: set(&[
            // Warnings of compilers, linkers, CMake, cargo, pip and loggers.
            r"(?i)(?:^|[\s:])warning: ",
            r"(?i)^\s*cmake (?:deprecation )?warning",
            r"(?i)^\s*(?:\[[^\]]*\b(?:warn|warning|info|debug|trace|notice)\b\s*\]|(?:warn|info|debug|trace|notice)\b\s*[:\]|-]?\s)",
            r"^\s*\S+ +(?:INFO|DEBUG|TRACE)\s",
            r"(?i)^\s*\d{4}-\d\d-\d\d.{0,40}\b(?:WARN|WARNING|INFO|DEBUG|TRACE)\b",
            // Hints, comments, shell traces, conditions: they mention a failure without having it.
            r"(?i)^\s*(?:hint|help|tip|remark|example|see also|docs?)\s*[:>]",
            r"^\s*(?://|# |/\*|<!--|\+ |\$ |% )",
            r"(?i)\b(?:if (?:you|it|this) (?:see|get|fails|says|prints|reports)|in case of|would (?:fail|print|say)|used to (?:fail|say)|works around|workaround for|see issue)\b",
            r"(?i)^\s*(?:echo|printf)\b",
            // Reports of tests and checks that are fine, and values compared by a failed test.
            r"(?i)\.\.\.\s*(?:ok|passed|yes|done|ignored|skipped)\b\s*$",
            r"(?i)^\s*test \S+ \.\.\. ",
            r"^\s*(?:left|right|expected|actual): ",
            // Progress.
            r"^\s*-- (?:Looking for|Performing Test|Check for|Checking|Found|Could NOT find|Detecting|The \w+ compiler|Building (?:with|MLX)|Configuring done|Generating done|Build files|Downloading|Using|Metal|Accelerate|Build type|Version|Determining|Try )",
            r"^\s*-- [^:]*(?:not found|- Failed|- failed|- no)\s*$",
            r"^\s*\[\s*\d+(?:/\d+|%)\] (?:Building|Compiling|Linking|Generating|Creating|Performing|No |Completed|Built|Running|Copying|Installing|Scanning|Re-)",
            r"^\s*(?:make|gmake)(?:\[\d+\])?: (?:Entering|Leaving|Nothing|Warning)",
            r"^\s*(?:Compiling|Downloading|Downloaded|Checking|Fresh|Updating|Locking|Adding|Blocking|Dirty|Documenting|Installing|Installed|Replacing|Packaging|Unpacking|Vendoring|Removing|Ignored|Scanning) ",
            r"^\s*cargo:{1,2}[a-z]",
            r"^\s*(?:remote: |Receiving objects:|Resolving deltas:|Cloning into|Submodule path|HEAD is now)",
            r"^\s*(?:libtool: compile:|/\S+/(?:clang|clang\+\+|c\+\+|g\+\+|cc|ccache|metal|xcrun)\s+-)",
            r"^\s*(?:clang|clang\+\+|c\+\+|g\+\+|cc|gcc|ar|ranlib|xcrun)\s+-",
        ]),
        cmake_warning: regex(r"(?i)^\s*cmake (?:deprecation )?warning"),
        other_job: regex(
            r"^\s*\[\s*\d+(?:/\d+|%)\]|^make(?:\[\d+\])?: (?:Entering|Leaving)|^\s*(?:Compiling|Building|Checking|Fresh|Downloaded) ",
        ),
        rust_headline: regex(r"^\s*(error|warning)(?:\[[\w:]+\])?: "),
        rust_arrow: regex(r"^\s*-->\s+\S"),
        rust_body: regex(r"^\s*(?:\d+\s*)?\||^\s*(?:-->|:::|=|\.\.\.)|^\s+\S|^(?:help|note): "),
        caret: regex(r"^\s*(?:\|\s*)?[\^~][\^~\s]*$"),
        gutter: regex(r"^\s*\d+\s*\|"),
        diagnostic: regex(r"(?i)\berror\b|\bfatal\b|exception"),
        python_frame: regex(r#"^\s*File "[^"]*", line \d+"#),
    }
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

    fn kinds(log: &str) -> Vec<Kind> {
        sort(crate::text::clean(log.as_bytes())).kinds
    }

    #[test]
    fn warnings_hints_and_progress_are_mute() {
        for line in [
            "foo.h:1:2: warning: library not found",
            "ld: warning: object built for newer version",
            "-- Looking for metal - not found",
            "[ 12%] Building CXX object error.cpp.o",
            "hint: if xcrun says unable to find utility",
            "test load::library_not_found ... ok",
            "+ echo error: no",
        ] {
            assert_eq!(kinds(line), [Kind::Mute], "{line}");
        }
    }

    #[test]
    fn errors_and_loader_lines_are_plain() {
        for line in [
            "xcrun: error: x",
            "dyld[1]: Library not loaded: y",
            "MLX error: z",
            "[ 12%] error: w",
            "FAILED: a.air",
        ] {
            assert_eq!(kinds(line), [Kind::Plain], "{line}");
        }
    }

    #[test]
    fn cmake_warning_is_mute_to_its_end() {
        let log = "CMake Warning at a:1 (message):\n  NAX kernels\n\n  more\n-- done\nCMake Error at b:2 (message):\n  text\n";
        assert_eq!(kinds(log)[..4], [Kind::Mute; 4]);
        assert_eq!(kinds(log)[5..], [Kind::Plain; 2]);
    }

    #[test]
    fn quoted_source_is_mute() {
        let log =
            "error[E0308]: mismatched\n --> src/a.rs:1:1\n  |\n1 | \"unable to find utility\"\n  | ^^^\n\nerror: x\n";
        assert_eq!(
            kinds(log),
            [
                Kind::RustError,
                Kind::Mute,
                Kind::Mute,
                Kind::Mute,
                Kind::Mute,
                Kind::Plain,
                Kind::Plain
            ]
        );
        assert_eq!(
            kinds("a.h:1:1: error: e\n  throw \"library not found\";\n  ^~~~\n")[1],
            Kind::Mute
        );
        assert_eq!(
            kinds("  File \"a.py\", line 3, in f\n    raise X(\"no\")\nX: no\n"),
            [Kind::Plain, Kind::Mute, Kind::Plain]
        );
    }

    #[test]
    fn a_match_over_a_wrap_names_both_lines() {
        let sorted = sort(crate::text::clean(b"a\nunable to find util\nity \"metal\"\nb\n"));
        let found = sorted.joined().search(&Regex::new("findutility\"metal").unwrap());
        assert_eq!(found, [(1, 2)]);
    }
}

//! Shortens a long log without losing what a diagnosis needs.

use regex::Regex;
use std::sync::LazyLock;

/// Lines kept at the beginning.
pub(crate) const HEAD_LINES: usize = 200;
/// Lines kept at the end.
pub(crate) const TAIL_LINES: usize = 2000;
/// Lines kept on either side of an error line: a diagnosis was once lost because the notes below the headline were cut.
pub(crate) const CONTEXT_LINES: usize = 10;

/// The first and last lines and every error line with its surroundings; `… N lines left out …` stands for the rest.
///
/// ```
/// let log: String = (0..5000).map(|n| if n == 2500 { "error: here\n".to_owned() } else { format!("{n}\n") }).collect();
/// let short = metal_check::excerpt::shorten(&log);
/// assert!(short.lines().count() < 2300 && short.contains("error: here\n2501\n"));
/// ```
pub fn shorten(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let mut keep = vec![false; lines.len()];
    for (index, line) in lines.iter().enumerate() {
        if index < HEAD_LINES || index + TAIL_LINES >= lines.len() {
            keep[index] = true;
        } else if ERROR.as_ref().is_some_and(|error| error.is_match(line)) {
            let to = (index + CONTEXT_LINES + 1).min(lines.len());
            keep[index.saturating_sub(CONTEXT_LINES)..to].fill(true);
        }
    }
    let mut out = String::new();
    let mut skipped = 0;
    for (line, keep) in lines.iter().zip(&keep) {
        if !keep {
            skipped += 1;
            continue;
        }
        if skipped > 0 {
            out.push_str(&format!("… {skipped} lines left out …\n"));
            skipped = 0;
        }
        out.push_str(line);
        out.push('\n');
    }
    out
}

static ERROR: LazyLock<Option<Regex>> = LazyLock::new(|| {
    Regex::new(r"(?i)\b(error|fatal|failed|exception|panicked|abort|undefined|terminating|assertion|not loaded)\b").ok()
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_logs_stay_whole() {
        assert_eq!(shorten("a\nb\n"), "a\nb\n");
    }
}

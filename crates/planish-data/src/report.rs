//! What reading a file showed: everything that `planish data show` and the start of a run print.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{RowError, RowErrorKind};
use crate::format::Format;
use crate::layout::Layout;
use crate::mask::Straddling;

/// Counts and findings from reading one file. Nothing here is an error; [`warnings`](Self::warnings) puts the remarkable
/// part into words.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DataReport {
    /// The file.
    pub path: PathBuf,
    /// The format of its rows.
    pub format: Format,
    /// SHA-256 of the file.
    pub data_hash: String,
    /// Lines that hold something.
    pub rows: usize,
    /// Lines that hold nothing.
    pub blank_lines: usize,
    /// Lines that end as on Windows.
    pub crlf_lines: usize,
    /// Lines that begin with a byte-order mark, which was passed over.
    pub byte_order_marks: usize,
    /// Rows that were left out because they are faulty.
    pub skipped: Vec<RowError>,
    /// Rows of each layout.
    pub layouts: BTreeMap<Layout, usize>,
    /// Rows that say themselves that their answer is bad (`"label": false`), left out.
    pub bad_answers: usize,
    /// What was remarkable in rows that are used, one sentence each, with its rows.
    pub remarks: Vec<Remark>,
    /// Examples to train.
    pub examples: usize,
    /// Their tokens, context included.
    pub tokens: usize,
    /// Their trained tokens.
    pub targets: usize,
    /// Trained tokens before the length limit.
    pub targets_before_limit: usize,
    /// Rows without a trained token, left out.
    pub zero_target_lines: Vec<usize>,
    /// Rows left out because they are too long.
    pub dropped_lines: Vec<usize>,
    /// Examples that were cut.
    pub truncated_rows: usize,
    /// Tokens cut off.
    pub tokens_lost: usize,
    /// Trained tokens cut off.
    pub targets_lost: usize,
    /// Texts that were cut into several examples.
    pub split_rows: usize,
    /// Chats of which every turn became an example.
    pub unrolled_rows: usize,
    /// Rows without distrust fields among rows that have them.
    pub neutral_rows: usize,
    /// Rows have distrust fields.
    pub has_provenance: bool,
    /// Rows whose tokens an earlier row has too.
    pub duplicates: usize,
    /// Some of them: the earlier line and the later.
    pub duplicate_lines: Vec<(usize, usize)>,
    /// Tokens across borders of trained text.
    pub straddling: Straddling,
    /// The end of a turn is not an end of text.
    pub end_of_turn_warning: Option<String>,
    /// Text rows have no end, because the model names none.
    pub no_end_of_text: Option<String>,
    /// Lengths of the examples in tokens.
    pub lengths: LengthStats,
}

/// Something that holds for some rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// What it is.
    pub text: String,
    /// How many rows.
    pub rows: usize,
    /// The line of the first.
    pub first_line: usize,
}

/// How a list of lengths is distributed.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LengthStats {
    /// The shortest.
    pub min: usize,
    /// Half are no longer.
    pub median: usize,
    /// Nine of ten are no longer.
    pub p90: usize,
    /// 99 of 100 are no longer.
    pub p99: usize,
    /// The longest.
    pub max: usize,
    /// The mean.
    pub mean: f64,
    /// Counts by power of two: `(upper bound, examples up to it and above the bound before)`.
    pub histogram: Vec<(usize, usize)>,
}

const MAX_LISTED_PAIRS: usize = 100;

impl DataReport {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.into(),
            format: Format::Text,
            data_hash: String::new(),
            rows: 0,
            blank_lines: 0,
            crlf_lines: 0,
            byte_order_marks: 0,
            skipped: Vec::new(),
            layouts: BTreeMap::new(),
            bad_answers: 0,
            remarks: Vec::new(),
            examples: 0,
            tokens: 0,
            targets: 0,
            targets_before_limit: 0,
            zero_target_lines: Vec::new(),
            dropped_lines: Vec::new(),
            truncated_rows: 0,
            tokens_lost: 0,
            targets_lost: 0,
            split_rows: 0,
            unrolled_rows: 0,
            neutral_rows: 0,
            has_provenance: false,
            duplicates: 0,
            duplicate_lines: Vec::new(),
            straddling: Straddling::default(),
            end_of_turn_warning: None,
            no_end_of_text: None,
            lengths: LengthStats::default(),
        }
    }

    /// Skipped rows by sort of fault.
    pub fn skipped_by_kind(&self) -> BTreeMap<RowErrorKind, usize> {
        let mut counts = BTreeMap::new();
        for error in &self.skipped {
            *counts.entry(error.kind).or_default() += 1;
        }
        counts
    }

    /// Writes the skipped rows as JSON lines (`line`, `column`, `field`, `kind`, `message`, `path`).
    pub fn write_skipped(&self, out: &mut dyn Write) -> io::Result<()> {
        for error in &self.skipped {
            let row = serde_json::json!({
                "path": error.path.display().to_string(),
                "line": error.line,
                "column": error.column,
                "field": error.field,
                "kind": error.kind.to_string(),
                "message": error.message,
            });
            writeln!(out, "{row}")?;
        }
        Ok(())
    }

    /// What a user should know before training, one sentence each.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        let mut say = |remarkable: bool, text: String| {
            if remarkable {
                out.push(text);
            }
        };
        say(
            !self.skipped.is_empty(),
            format!(
                "{} of {} rows are faulty and were left out ({})",
                self.skipped.len(),
                self.rows,
                kinds(&self.skipped_by_kind())
            ),
        );
        say(
            self.blank_lines > 0,
            format!("{} blank lines were passed over", self.blank_lines),
        );
        say(
            self.byte_order_marks > 0,
            format!(
                "byte-order marks at the head of {} lines were passed over",
                self.byte_order_marks
            ),
        );
        say(
            self.crlf_lines > 0,
            format!("{} lines end with carriage return and line feed", self.crlf_lines),
        );
        say(
            self.bad_answers > 0,
            format!(
                "{} rows have label = false and were left out: their answers are not to be learnt",
                self.bad_answers
            ),
        );
        for Remark { text, rows, first_line } in &self.remarks {
            say(true, format!("{rows} rows: {text} (first: line {first_line})"));
        }
        say(
            self.unrolled_rows > 0,
            format!(
                "{} rows were unrolled into one example per turn: the chat template writes earlier turns in another way than it wrote them",
                self.unrolled_rows
            ),
        );
        say(
            !self.zero_target_lines.is_empty(),
            format!(
                "{} rows have no token to train and were left out (lines {})",
                self.zero_target_lines.len(),
                some(&self.zero_target_lines)
            ),
        );
        say(
            !self.dropped_lines.is_empty(),
            format!(
                "{} rows are too long and were left out (lines {})",
                self.dropped_lines.len(),
                some(&self.dropped_lines)
            ),
        );
        say(
            self.truncated_rows > 0,
            format!(
                "{} rows were cut: {} tokens lost, {:.2} % of the trained ones",
                self.truncated_rows,
                self.tokens_lost,
                100.0 * self.share_of_targets_lost()
            ),
        );
        say(
            self.duplicates > 0,
            format!(
                "{} rows repeat an earlier one (lines {:?})",
                self.duplicates,
                self.duplicate_lines.first().copied().unwrap_or_default()
            ),
        );
        say(
            self.neutral_rows > 0 && self.has_provenance,
            format!(
                "{} rows have no distrust fields and get the neutral weight 1",
                self.neutral_rows
            ),
        );
        out.extend(self.end_of_turn_warning.clone());
        out.extend(self.no_end_of_text.clone());
        out
    }

    /// Trained tokens that the length limit cut off, as a share of all.
    pub fn share_of_targets_lost(&self) -> f64 {
        if self.targets_before_limit == 0 {
            0.0
        } else {
            self.targets_lost as f64 / self.targets_before_limit as f64
        }
    }

    pub(crate) fn duplicate(&mut self, earlier: usize, later: usize) {
        self.duplicates += 1;
        if self.duplicate_lines.len() < MAX_LISTED_PAIRS {
            self.duplicate_lines.push((earlier, later));
        }
    }
}

impl LengthStats {
    /// Statistics of some lengths; all zero for none.
    pub fn of(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut sorted: Vec<usize> = lengths.into_iter().collect();
        sorted.sort_unstable();
        let Some(&max) = sorted.last() else {
            return Self::default();
        };
        let at = |share: f64| sorted[((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len()) - 1];
        let mut histogram = Vec::new();
        let (mut bound, mut before) = (1, 0);
        while before < sorted.len() {
            let upto = sorted.partition_point(|length| *length <= bound);
            histogram.push((bound, upto - before));
            (before, bound) = (upto, bound.saturating_mul(2));
        }
        let first = histogram.iter().position(|(_, count)| *count > 0).unwrap_or(0);
        Self {
            min: sorted[0],
            median: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max,
            mean: sorted.iter().sum::<usize>() as f64 / sorted.len() as f64,
            histogram: histogram.split_off(first),
        }
    }
}

impl Straddling {
    pub(crate) fn add(&mut self, other: &Self) {
        self.start_split += other.start_split;
        self.start_kept += other.start_kept;
        self.end += other.end;
    }
}

fn kinds(counts: &BTreeMap<RowErrorKind, usize>) -> String {
    counts
        .iter()
        .map(|(kind, count)| format!("{kind}: {count}"))
        .collect::<Vec<_>>()
        .join(", ")
}

fn some(lines: &[usize]) -> String {
    let mut text = lines
        .iter()
        .take(8)
        .map(usize::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    if lines.len() > 8 {
        text.push_str(", …");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_summed_up() {
        let stats = LengthStats::of([3, 1, 4, 1, 5, 9, 2, 6, 5, 35]);
        assert_eq!(
            (stats.min, stats.median, stats.p90, stats.p99, stats.max),
            (1, 4, 9, 35, 35)
        );
        assert_eq!(
            stats.histogram,
            [(1, 2), (2, 1), (4, 2), (8, 3), (16, 1), (32, 0), (64, 1)]
        );
        assert!((stats.mean - 7.1).abs() < 1e-12);
        assert_eq!(LengthStats::of([]), LengthStats::default());
    }
}

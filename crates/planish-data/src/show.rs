//! Rows as training sees them, for looking at.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use crate::dataset::{Dataset, Side};
use crate::error::{Result, RowError};
use crate::format::Format;
use crate::limit::count_targets;
use crate::mask::{Masker, Sample, Straddling};
use crate::options::{DataOptions, OnRowError};
use crate::prepare::first_rows;
use crate::provenance::Provenance;
use crate::report::DataReport;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// One example, rendered and marked.
#[derive(Debug, Clone, PartialEq)]
pub struct Shown {
    /// The line of its row.
    pub line: usize,
    /// The type of its row.
    pub format: Format,
    /// The side of a preference pair.
    pub side: Option<Side>,
    /// The rendered text.
    pub text: String,
    /// The whole text in order, cut where the kind of its tokens changes.
    pub spans: Vec<ShownSpan>,
    /// Token ids, those beyond the length limit included.
    pub ids: Vec<u32>,
    /// Which of them are trained, before the limit.
    pub trained: Vec<bool>,
    /// Tokens within the limit; the others are cut off, or stand in the next piece of a split text.
    pub n_kept: usize,
    /// Trained tokens that are predicted.
    pub n_targets: usize,
    /// The last token ends a text.
    pub ends_with_eos: bool,
    /// Tokens across borders of trained text.
    pub straddling: Straddling,
    /// Its distrust fields.
    pub provenance: Option<Provenance>,
    /// Bytes of the text that are control tokens inside a message.
    pub foreign: Vec<Range<usize>>,
}

/// A piece of the text, all of one kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownSpan {
    /// Its bytes.
    pub bytes: Range<usize>,
    /// What becomes of it.
    pub kind: ShownKind,
}

/// What becomes of a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShownKind {
    /// Read, not trained.
    Context,
    /// Trained.
    Trained,
    /// Beyond the length limit.
    BeyondLimit,
}

/// What reading the whole of a file shows; faulty rows are in [`DataReport::skipped`], however many there are.
pub fn survey(
    path: &Path,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &DataOptions,
) -> Result<DataReport> {
    let options = DataOptions {
        errors: OnRowError::Count,
        ..options.clone()
    };
    Ok(Dataset::load(path, tokenizer, template, &options)?.1)
}

/// The first `rows` rows of a file as training sees them; a faulty row is shown as its error.
pub fn show(
    path: &Path,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &DataOptions,
    rows: usize,
) -> Result<Vec<std::result::Result<Shown, RowError>>> {
    let masker = Masker {
        tokenizer,
        template,
        options,
    };
    let mut all = Vec::new();
    for row in first_rows(path, &masker, rows)? {
        match row {
            Err(error) => all.push(Err(error)),
            Ok(row) => all.extend(row.samples.as_slice().iter().enumerate().map(|(index, sample)| {
                let side = (row.format == Format::Preference).then_some([Side::Chosen, Side::Rejected][index.min(1)]);
                Ok(shown(
                    row.line,
                    row.format,
                    side,
                    sample,
                    row.provenance.clone(),
                    &masker,
                ))
            })),
        }
    }
    Ok(all)
}

fn shown(
    line: usize,
    format: Format,
    side: Option<Side>,
    sample: &Sample,
    provenance: Option<Provenance>,
    masker: &Masker,
) -> Shown {
    let n_kept = sample.ids.len().min(masker.options.max_seq_length);
    Shown {
        line,
        format,
        side,
        spans: spans(sample, n_kept),
        text: sample.text.clone(),
        n_targets: count_targets(&sample.trained),
        ends_with_eos: sample.ids.last().is_some_and(|id| masker.tokenizer.is_eos(*id)),
        ids: sample.ids.clone(),
        trained: sample.trained.clone(),
        n_kept,
        straddling: sample.straddling,
        provenance,
        foreign: sample.foreign.clone(),
    }
}

/// Covers the text from start to end; bytes that no token stands for go with the token before them.
fn spans(sample: &Sample, n_kept: usize) -> Vec<ShownSpan> {
    let mut spans: Vec<ShownSpan> = Vec::new();
    for (index, range) in sample.ranges.iter().enumerate().filter(|(_, range)| !range.is_empty()) {
        let kind = match (index < n_kept, sample.trained[index]) {
            (false, _) => ShownKind::BeyondLimit,
            (true, true) => ShownKind::Trained,
            (true, false) => ShownKind::Context,
        };
        let start = spans.last().map_or(0, |span| span.bytes.end);
        let end = range.end.max(start);
        match spans.last_mut() {
            Some(last) if last.kind == kind => last.bytes.end = end,
            // Several tokens may share one character: the first decides.
            Some(_) if end == start => {}
            Some(last) => {
                last.bytes.end = last.bytes.end.max(range.start.min(end));
                let start = last.bytes.end;
                spans.push(ShownSpan {
                    bytes: start..end,
                    kind,
                });
            }
            None => spans.push(ShownSpan { bytes: 0..end, kind }),
        }
    }
    if let Some(last) = spans.last_mut() {
        last.bytes.end = sample.text.len();
    }
    spans
}

/// How authority is spread over a data set's rows, with the mix that the algorithm's author aims at: a quarter to three
/// tenths of low authority, as much or a little more in the middle, the rest high.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SourceMix {
    /// Rows with distrust fields.
    pub rows: usize,
    /// Rows below 0.3.
    pub low: usize,
    /// Rows from 0.3 to 0.7.
    pub middle: usize,
    /// Rows above 0.7.
    pub high: usize,
    /// Rows of each source type; those without a label under "".
    pub by_source_type: BTreeMap<String, usize>,
}

impl SourceMix {
    /// Counts the rows of a data set.
    pub fn of(data: &Dataset) -> Self {
        let mut mix = Self::default();
        for provenance in data.row_provenance().flatten() {
            mix.rows += 1;
            match provenance.auth_weight {
                weight if weight < 0.3 => mix.low += 1,
                weight if weight > 0.7 => mix.high += 1,
                _ => mix.middle += 1,
            }
            *mix.by_source_type
                .entry(provenance.source_type.clone().unwrap_or_default())
                .or_default() += 1;
        }
        mix
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_cover_text_that_no_token_stands_for() {
        // A tokenizer that drops blanks: " a b ", then two tokens of one character.
        let sample = Sample {
            text: " a b 🙂 ".into(),
            ids: vec![0; 4],
            ranges: vec![1..2, 3..4, 5..9, 5..9],
            trained: vec![false, true, true, false],
            ..Sample::default()
        };
        let kinds = |n_kept| -> Vec<(Range<usize>, ShownKind)> {
            spans(&sample, n_kept)
                .into_iter()
                .map(|span| (span.bytes, span.kind))
                .collect()
        };
        assert_eq!(kinds(4), [(0..3, ShownKind::Context), (3..10, ShownKind::Trained)]);
        assert_eq!(
            kinds(2),
            [
                (0..3, ShownKind::Context),
                (3..5, ShownKind::Trained),
                (5..10, ShownKind::BeyondLimit)
            ]
        );
    }
}

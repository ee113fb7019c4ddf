//! Rows put together into a data set: everything that depends on more than one row.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::dataset::{Dataset, Example, Side};
use crate::error::{Error, Fault, Result, RowError, RowErrorKind};
use crate::format::Format;
use crate::limit::{Limited, Piece, count_targets, limit};
use crate::lines::{Line, Lines};
use crate::mask::{EndOfTurn, Masker, Sample, Samples};
use crate::notes::Note;
use crate::options::{DataOptions, MissingProvenance, OnRowError, Overlong, Train};
use crate::prepare::{Row, located, row_of};
use crate::provenance::Provenance;
use crate::report::{DataReport, LengthStats, Remark};
use crate::store::TokenStore;

/// Reads a file row by row, and counts what it meets.
pub(crate) fn load(path: &Path, masker: &Masker) -> Result<(Dataset, DataReport)> {
    let mut lines = Lines::open(path, masker.options.max_line_bytes).map_err(|error| Error::io(path, error))?;
    let mut loader = Loader::new(path, masker);
    loop {
        let block = next_block(&mut lines).map_err(|error| Error::io(path, error))?;
        if block.is_empty() {
            break;
        }
        let prepared: Vec<Prepared> = block.par_iter().map(|line| prepare(line, masker)).collect();
        for (line, row) in block.iter().zip(prepared) {
            loader.add(line, row)?;
        }
    }
    loader.finish(lines)
}

/// Rows that are prepared together, on all cores.
const BLOCK_LINES: usize = 256;
const BLOCK_BYTES: usize = 8 << 20;

fn next_block(lines: &mut Lines) -> std::io::Result<Vec<Line>> {
    let mut block = Vec::new();
    let mut bytes = 0;
    while block.len() < BLOCK_LINES && bytes < BLOCK_BYTES {
        let Some(line) = lines.next_line()? else { break };
        bytes += line.bytes.len();
        block.push(line);
    }
    Ok(block)
}

/// What one line gives after the length limit.
enum Prepared {
    Blank,
    Row(Box<PreparedRow>),
    Bad(RowError),
}

/// A row that is ready to be kept: everything that takes time has been done.
struct PreparedRow {
    row: Row,
    /// Of the rendered ids, before any cut.
    hash: u128,
    pieces: Vec<(Limited, Option<Side>)>,
}

fn prepare(line: &Line, masker: &Masker) -> Prepared {
    let prepared =
        row_of(line, masker).and_then(|row| row.map(|row| prepare_row(line, row, masker.options)).transpose());
    match prepared {
        Ok(None) => Prepared::Blank,
        Ok(Some(row)) => Prepared::Row(Box::new(row)),
        Err(error) => Prepared::Bad(error),
    }
}

fn prepare_row(line: &Line, row: Row, options: &DataOptions) -> Result<PreparedRow, RowError> {
    let pieces = limited(&row.samples, row.format, options).map_err(|fault| located(line, "", 1, fault))?;
    Ok(PreparedRow {
        hash: hash_ids(row.samples.as_slice()),
        pieces,
        row,
    })
}

fn limited(samples: &Samples, format: Format, options: &DataOptions) -> Result<Vec<(Limited, Option<Side>)>, Fault> {
    let compat = matches!(options.train, Train::MlxLm { .. });
    let default = if format == Format::Text && !compat {
        Overlong::Split
    } else {
        Overlong::Truncate
    };
    let rule = match options.overlong.unwrap_or(default) {
        Overlong::Split if format != Format::Text => Overlong::Truncate,
        rule => rule,
    };
    let one = |sample: &Sample| limit(sample, options.max_seq_length, rule);
    match samples {
        Samples::Pair(pair) => {
            let sides = [
                (one(&pair[0])?, Some(Side::Chosen)),
                (one(&pair[1])?, Some(Side::Rejected)),
            ];
            let dropped = sides.iter().any(|(limited, _)| *limited == Limited::Dropped);
            // Half a pair is of no use.
            Ok(if dropped {
                vec![(Limited::Dropped, None)]
            } else {
                sides.into()
            })
        }
        _ => samples
            .as_slice()
            .iter()
            .map(|sample| Ok((one(sample)?, None)))
            .collect(),
    }
}

fn hash_ids(samples: &[Sample]) -> u128 {
    let mut digest = Sha256::new();
    for sample in samples {
        digest.update((sample.ids.len() as u64).to_le_bytes());
        let bytes: Vec<u8> = sample.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        digest.update(bytes);
    }
    let bytes: [u8; 32] = digest.finalize().into();
    u128::from_le_bytes(std::array::from_fn(|index| bytes[index]))
}

/// Puts prepared rows together in file order; everything that depends on more than one row is decided here.
struct Loader<'a> {
    path: &'a Path,
    options: &'a DataOptions,
    masker: &'a Masker<'a>,
    report: DataReport,
    errors: Vec<RowError>,
    first: Option<FirstRow>,
    any_tools: bool,
    all_tools: bool,
    examples: Vec<Example>,
    provenance: Vec<Option<Provenance>>,
    store: TokenStore,
    digest: Sha256,
    row_hashes: HashMap<u128, usize>,
    /// Remarks with the number of their rows and the first line.
    notes: BTreeMap<Note, (usize, usize)>,
    end_of_turn: EndOfTurn,
}

/// What the first good row fixes for all.
struct FirstRow {
    line: usize,
    format: Format,
    has_provenance: bool,
    scoring: Vec<(crate::Scoring, usize)>,
}

const MAX_ERRORS: usize = 20;
const MAX_SKIPPED_PERCENT: usize = 5;
const MAX_LISTED: usize = 1000;

impl<'a> Loader<'a> {
    fn new(path: &'a Path, masker: &'a Masker<'a>) -> Self {
        Self {
            path,
            options: masker.options,
            masker,
            report: DataReport::new(path),
            errors: Vec::new(),
            first: None,
            any_tools: false,
            all_tools: true,
            examples: Vec::new(),
            provenance: Vec::new(),
            store: TokenStore::new(masker.options.memory_limit_bytes),
            digest: Sha256::new(),
            row_hashes: HashMap::new(),
            notes: BTreeMap::new(),
            end_of_turn: EndOfTurn::NotRendered,
        }
    }

    fn add(&mut self, line: &Line, row: Prepared) -> Result<()> {
        match row {
            Prepared::Blank => self.report.blank_lines += 1,
            Prepared::Bad(error) => {
                self.report.rows += 1;
                self.bad(error)?;
            }
            Prepared::Row(row) => {
                self.report.rows += 1;
                match self.check_against_first(line.number, &row.row) {
                    Ok(()) => self.keep(line.number, *row)?,
                    Err(error) => self.bad(error)?,
                }
            }
        }
        Ok(())
    }

    fn bad(&mut self, error: RowError) -> Result<()> {
        let error = self.with_path(error);
        // What holds for the whole file is said once, and skipping rows would not help.
        let whole_file = match error.kind {
            RowErrorKind::MixedFormat | RowErrorKind::NoTemplate => true,
            RowErrorKind::Encoding => error.line == 1 && self.options.errors == OnRowError::Stop,
            _ => false,
        };
        if self.options.errors != OnRowError::Stop && !whole_file {
            self.report.skipped.push(error);
            return Ok(());
        }
        self.errors.push(error);
        if whole_file || self.errors.len() == MAX_ERRORS {
            return Err(Error::Rows(std::mem::take(&mut self.errors)));
        }
        Ok(())
    }

    fn with_path(&self, error: RowError) -> RowError {
        RowError {
            path: self.path.into(),
            ..error
        }
    }

    fn check_against_first(&mut self, line: usize, row: &Row) -> Result<(), RowError> {
        let has_provenance = row.provenance.is_some();
        let error = |kind, message: String, fix: &str| RowError {
            path: PathBuf::new(),
            line,
            column: 1,
            field: String::new(),
            kind,
            message,
            fix: fix.into(),
        };
        let Some(first) = &mut self.first else {
            self.first = Some(FirstRow {
                line,
                format: row.format,
                has_provenance,
                scoring: row
                    .provenance
                    .iter()
                    .map(|provenance| (provenance.scoring, line))
                    .collect(),
            });
            return Ok(());
        };
        if family(first.format) != family(row.format) {
            return Err(error(
                RowErrorKind::MixedFormat,
                format!(
                    "this row is of type {}, line {} is of type {}",
                    row.format, first.line, first.format
                ),
                "keep rows of one type in a file",
            ));
        }
        let neutral = self.options.missing_provenance == MissingProvenance::Neutral;
        if first.has_provenance != has_provenance && !neutral {
            let (with, without) = if has_provenance {
                (line, first.line)
            } else {
                (first.line, line)
            };
            return Err(error(
                RowErrorKind::MissingField,
                format!("line {with} has auth_weight and prov_entropy, line {without} has not"),
                "give them in every row or in none, or set data.missing = \"neutral\"",
            ));
        }
        if let Some(provenance) = &row.provenance {
            let other = first
                .scoring
                .iter()
                .find(|(scoring, _)| !scoring.mixes_with(provenance.scoring));
            if let Some((scoring, at)) = other.filter(|_| !self.options.allow_mixed_scoring) {
                return Err(error(
                    RowErrorKind::Value,
                    format!(
                        "scoring is {:?} here and {scoring:?} in line {at}: their entropies have different scales",
                        provenance.scoring
                    ),
                    "score all rows in one way, or set data.allow_mixed_scoring = true",
                ));
            }
            if !first.scoring.iter().any(|(scoring, _)| *scoring == provenance.scoring) {
                first.scoring.push((provenance.scoring, line));
            }
        }
        Ok(())
    }

    fn keep(&mut self, line: usize, prepared: PreparedRow) -> Result<()> {
        let PreparedRow { row, hash, pieces } = prepared;
        let samples = row.samples.as_slice();
        let row_index = self.provenance.len();
        self.any_tools |= row.format == Format::Tools;
        self.all_tools &= row.format == Format::Tools;
        for sample in samples {
            self.report.targets_before_limit += count_targets(&sample.trained);
            self.report.straddling.add(&sample.straddling);
            if self.end_of_turn == EndOfTurn::NotRendered {
                self.end_of_turn = sample.end_of_turn;
            }
        }
        self.report.unrolled_rows += usize::from(matches!(row.samples, Samples::Unrolled(_)) && !row.is_bad_answer);
        if row.provenance.is_none() && self.options.missing_provenance == MissingProvenance::Neutral {
            self.report.neutral_rows += 1;
        }
        *self.report.layouts.entry(row.layout).or_default() += 1;
        self.report.bad_answers += usize::from(row.is_bad_answer);
        for note in row.notes {
            self.notes.entry(note).or_insert((0, line)).0 += 1;
        }
        match self.row_hashes.get(&hash).filter(|_| !row.is_bad_answer) {
            Some(earlier) => self.report.duplicate(*earlier, line),
            None if row.is_bad_answer => {}
            None => {
                self.row_hashes.insert(hash, line);
            }
        }
        let prompt_tokens = samples.first().map_or(0, |sample| sample.prompt_tokens);
        let before = self.examples.len();
        let pieces = self.account(line, pieces);
        let is_pair = pieces.first().is_some_and(|(_, side)| side.is_some());
        // mlx-lm keeps rows that train nothing, and they take a place in its batches.
        let keep_all = matches!(self.options.train, Train::MlxLm { .. });
        let trains = |piece: &Piece| count_targets(&piece.trained) > 0 || (keep_all && !piece.ids.is_empty());
        let usable = if is_pair {
            pieces.iter().all(|(piece, _)| trains(piece))
        } else {
            true
        };
        for (piece, side) in pieces.into_iter().filter(|(piece, _)| usable && trains(piece)) {
            let example = Example {
                line,
                row: row_index,
                n_tokens: piece.ids.len(),
                n_targets: count_targets(&piece.trained),
                side,
                margin: row.margin,
                n_fields: row.n_fields,
                prompt_tokens,
                at: 0,
            };
            self.push(example, &piece)?;
        }
        if self.examples.len() == before && !row.is_bad_answer && self.report.dropped_lines.last() != Some(&line) {
            self.report.zero_target_lines.push(line);
        }
        self.provenance.push(row.provenance);
        Ok(())
    }

    /// Books what the length limit did, and gives the pieces that are left.
    fn account(&mut self, line: usize, samples: Vec<(Limited, Option<Side>)>) -> Vec<(Piece, Option<Side>)> {
        let mut pieces = Vec::new();
        for (limited, side) in samples {
            match limited {
                Limited::Whole(piece) => pieces.push((piece, side)),
                Limited::Truncated {
                    piece,
                    tokens_lost,
                    targets_lost,
                } => {
                    self.report.truncated_rows += 1;
                    self.report.tokens_lost += tokens_lost;
                    self.report.targets_lost += targets_lost;
                    pieces.push((piece, side));
                }
                Limited::Split(parts) => {
                    self.report.split_rows += 1;
                    pieces.extend(parts.into_iter().map(|piece| (piece, side)));
                }
                Limited::Dropped => self.report.dropped_lines.push(line),
            }
        }
        pieces
    }

    fn push(&mut self, example: Example, piece: &Piece) -> Result<()> {
        let mut bytes = Vec::with_capacity(5 * piece.ids.len());
        for (id, trained) in piece.ids.iter().zip(&piece.trained) {
            bytes.extend_from_slice(&id.to_le_bytes());
            bytes.push(u8::from(*trained));
        }
        self.digest.update((piece.ids.len() as u64).to_le_bytes());
        self.digest.update(bytes);
        let stored = self.store.push(&piece.ids, &piece.trained);
        let at = stored.map_err(|error| Error::io(self.path, error))?;
        self.examples.push(Example { at, ..example });
        Ok(())
    }

    fn finish(mut self, lines: Lines) -> Result<(Dataset, DataReport)> {
        if !self.errors.is_empty() {
            return Err(Error::Rows(self.errors));
        }
        if self.report.rows == 0 {
            return Err(Error::Empty { path: self.path.into() });
        }
        self.check_skipped()?;
        if self.examples.is_empty() && self.options.errors != OnRowError::Count {
            let mut lines = std::mem::take(&mut self.report.zero_target_lines);
            lines.append(&mut self.report.dropped_lines);
            lines.truncate(MAX_LISTED);
            return Err(Error::NothingToTrain {
                path: self.path.into(),
                rows: self.report.rows,
                lines,
            });
        }
        self.store.finish().map_err(|error| Error::io(self.path, error))?;
        let format = self.format();
        self.fill_report(format, &lines);
        let data = Dataset {
            path: self.path.into(),
            format,
            examples: self.examples,
            provenance: self.provenance,
            store: self.store,
            fingerprint: crate::hex(&self.digest.finalize()),
            data_hash: lines.sha256(),
            row_hashes: self.row_hashes,
        };
        let mut report = self.report;
        report.data_hash = data.data_hash.clone();
        Ok((data, report))
    }

    fn check_skipped(&self) -> Result<()> {
        let (skipped, rows) = (self.report.skipped.len(), self.report.rows);
        match self.report.skipped.first() {
            Some(first) if self.options.errors != OnRowError::Count && skipped * 100 > rows * MAX_SKIPPED_PERCENT => {
                Err(Error::TooManySkipped {
                    path: self.path.into(),
                    skipped,
                    rows,
                    limit_percent: MAX_SKIPPED_PERCENT,
                    first: Box::new(first.clone()),
                })
            }
            _ => Ok(()),
        }
    }

    /// Tools are optional in chat rows, so a file of both is a chat file.
    fn format(&self) -> Format {
        match (self.options.format, &self.first) {
            (Some(format), _) => format,
            (None, Some(_)) if self.any_tools && !self.all_tools => Format::Chat,
            (None, Some(first)) => first.format,
            (None, None) => Format::Text,
        }
    }

    fn fill_report(&mut self, format: Format, lines: &Lines) {
        let report = &mut self.report;
        report.format = format;
        report.byte_order_marks = lines.byte_order_marks;
        report.crlf_lines = lines.crlf;
        let remark = |(note, (rows, first_line)): (Note, (usize, usize))| Remark {
            text: note.text,
            rows,
            first_line,
        };
        report.remarks = std::mem::take(&mut self.notes).into_iter().map(remark).collect();
        report.examples = self.examples.len();
        report.tokens = self.examples.iter().map(|example| example.n_tokens).sum();
        report.targets = self.examples.iter().map(|example| example.n_targets).sum();
        report.lengths = LengthStats::of(self.examples.iter().map(|example| example.n_tokens));
        report.has_provenance = self.provenance.iter().any(Option::is_some);
        report.end_of_turn_warning = match self.end_of_turn {
            EndOfTurn::NotRendered => None,
            EndOfTurn::None => Some(
                "the chat template writes no special token after a trained turn: generation will not stop there".into(),
            ),
            EndOfTurn::Token(id) if self.masker.tokenizer.is_named_end(id) => None,
            EndOfTurn::Token(id) => Some(format!(
                "the chat template ends a turn with {:?}, which is not among the model's end-of-text tokens: planish stops there all the same, \
                 and fuse and the exports add {id} to eos_token_id in generation_config.json; other programs that read the base model need that too",
                self.masker.tokenizer.id_to_token(id).unwrap_or_default()
            )),
        };
        let has_end = self.masker.tokenizer.eos().is_some() || self.options.append_eos.is_some();
        report.no_end_of_text = (format == Format::Text && !has_end).then(|| {
            "the model names no end-of-text token, so none is added to text rows and generation will not stop: \
             name one with data.append_eos, such as data.append_eos = \"<|endoftext|>\""
                .into()
        });
    }
}

/// Chat with and without tools is one family: tools are optional in a chat row.
fn family(format: Format) -> Format {
    if format == Format::Tools { Format::Chat } else { format }
}

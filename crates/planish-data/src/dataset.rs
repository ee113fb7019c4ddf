//! A file of rows, read once: checked, rendered, tokenised, counted.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::error::{Error, Fault, Result, RowError, RowErrorKind};
use crate::format::Format;
use crate::limit::{Limited, Piece, count_targets, limit};
use crate::lines::{Line, Lines};
use crate::mask::{EndOfTurn, Masker, Sample, Samples};
use crate::options::{DataOptions, MissingProvenance, OnRowError, Overlong, Train};
use crate::prepare::{Row, located, row_of};
use crate::provenance::Provenance;
use crate::report::{DataReport, LengthStats};
use crate::store::TokenStore;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// The examples of one file, ready to be planned into batches.
///
/// The text is never held as a whole: rows are read in blocks, turned into token ids, and forgotten; token ids beyond
/// [`DataOptions::memory_limit_bytes`] wait in an unnamed temporary file.
///
/// # Errors
/// [`Error::Rows`] names file, line, column and field of up to twenty faulty rows; [`Error::TooManySkipped`],
/// [`Error::Empty`], [`Error::NothingToTrain`], [`Error::NoTemplate`], [`Error::Io`].
///
/// # Example
/// ```
/// use planish_data::{ChatTemplate, DataOptions, Dataset, TemplateOptions, Tokenizer};
/// # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fixtures/tiny").as_ref();
/// # let dir = tempfile::tempdir().unwrap();
/// # let file = dir.path().join("train.jsonl");
/// std::fs::write(&file, r#"{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}"#)?;
/// let tokenizer = Tokenizer::from_dir(model)?;
/// let template = ChatTemplate::from_dir(model, &tokenizer, &TemplateOptions::default())?;
/// let (data, report) = Dataset::load(&file, &tokenizer, template.as_ref(), &DataOptions::default())?;
/// assert_eq!((data.len(), report.rows), (1, 1));
/// let example = data.tokens(0)?;
/// let trained: Vec<u32> = (0..example.ids.len()).filter(|i| example.trained[*i]).map(|i| example.ids[i]).collect();
/// assert_eq!(tokenizer.decode_all(&trained)?, "Yes.<|im_end|>");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Dataset {
    path: PathBuf,
    format: Format,
    examples: Vec<Example>,
    provenance: Vec<Option<Provenance>>,
    store: TokenStore,
    fingerprint: String,
    data_hash: String,
    /// The line and the hash of its rendered ids, for the leak check.
    row_hashes: HashMap<u128, usize>,
}

/// One example: where it came from and how long it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// The line of its row, from 1.
    pub line: usize,
    /// The row it came from, counted from 0; examples of one split text or unrolled chat share it.
    pub row: usize,
    /// Tokens, end of text included.
    pub n_tokens: usize,
    /// Trained tokens that are predicted.
    pub n_targets: usize,
    /// Which side of a preference pair it is.
    pub side: Option<Side>,
    /// The margin that a preference row asks for.
    pub margin: Option<f64>,
    /// Fields in its row; mlx-lm sorts by it.
    pub(crate) n_fields: usize,
    /// Tokens that mlx-lm's mask passes over.
    pub(crate) prompt_tokens: usize,
    at: usize,
}

/// A side of a preference pair; the chosen example comes right before the rejected one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The better answer.
    Chosen,
    /// The worse answer.
    Rejected,
}

/// The tokens of one example.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExampleTokens {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Which of them are trained; the first never is.
    pub trained: Vec<bool>,
}

impl Dataset {
    /// Reads one JSONL file.
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &DataOptions,
    ) -> Result<(Self, DataReport)> {
        if options.max_seq_length < 2 {
            return Err(Error::plan(
                format!(
                    "train.max_seq_length is {}, and an example needs two tokens",
                    options.max_seq_length
                ),
                "raise it",
            ));
        }
        let masker = Masker {
            tokenizer,
            template,
            options,
        };
        let mut lines = Lines::open(path, options.max_line_bytes).map_err(|error| Error::io(path, error))?;
        let mut loader = Loader::new(path, &masker);
        loop {
            let block = next_block(&mut lines).map_err(|error| Error::io(path, error))?;
            if block.is_empty() {
                break;
            }
            let prepared: Vec<Prepared> = block.par_iter().map(|line| prepare(line, &masker)).collect();
            for (line, row) in block.iter().zip(prepared) {
                loader.add(line, row)?;
            }
        }
        loader.finish(lines)
    }

    /// Examples.
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// Whether there is none; a loaded data set never is empty.
    pub fn is_empty(&self) -> bool {
        self.examples.is_empty()
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The format of its rows.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Every example, in file order.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The distrust fields of an example's row; `None` in files without them, and for rows declared neutral.
    pub fn provenance(&self, example: usize) -> Option<&Provenance> {
        self.provenance.get(self.examples.get(example)?.row)?.as_ref()
    }

    /// The distrust fields of every row, one after another.
    pub(crate) fn row_provenance(&self) -> impl Iterator<Item = Option<&Provenance>> {
        self.provenance.iter().map(Option::as_ref)
    }

    /// The tokens of an example.
    pub fn tokens(&self, example: usize) -> Result<ExampleTokens> {
        let Some(info) = self.examples.get(example) else {
            return Err(Error::plan(
                format!("there is no example {example} among {}", self.len()),
                "plan with the data set that is trained",
            ));
        };
        let (ids, trained) = self
            .store
            .get(info.at, info.n_tokens)
            .map_err(|error| Error::io(&self.path, error))?;
        Ok(ExampleTokens { ids, trained })
    }

    /// SHA-256 over the tokens and flags of every example: changes with the data, the tokenizer, the template, the masks
    /// and the length limit.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// SHA-256 of the file.
    pub fn data_hash(&self) -> &str {
        &self.data_hash
    }

    /// Pairs of lines, first of `self` and then of `other`, whose rows render to the same tokens.
    pub fn overlap(&self, other: &Self) -> Vec<(usize, usize)> {
        let mut pairs: Vec<_> = other
            .row_hashes
            .iter()
            .filter_map(|(hash, line)| self.row_hashes.get(hash).map(|mine| (*mine, *line)))
            .collect();
        pairs.sort_unstable();
        pairs
    }
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
    extra_fields: BTreeMap<String, usize>,
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
            extra_fields: BTreeMap::new(),
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
                    Err(error) if error.kind == RowErrorKind::MixedFormat => {
                        self.errors.push(self.with_path(error));
                        return Err(Error::Rows(std::mem::take(&mut self.errors)));
                    }
                    Err(error) => self.bad(error)?,
                }
            }
        }
        Ok(())
    }

    fn bad(&mut self, error: RowError) -> Result<()> {
        let error = self.with_path(error);
        match self.options.errors {
            OnRowError::Skip => self.report.skipped.push(error),
            OnRowError::Stop => {
                // Without a template every row of a rendered format fails alike: say it once, for the file.
                if let (None, RowErrorKind::Template, Some(format)) =
                    (self.masker.template, error.kind, self.format_hint())
                {
                    return Err(Error::NoTemplate {
                        path: self.path.into(),
                        format,
                    });
                }
                // A first line in another encoding says it for the whole file.
                let whole_file = error.line == 1 && error.kind == RowErrorKind::Encoding;
                self.errors.push(error);
                if whole_file || self.errors.len() == MAX_ERRORS {
                    return Err(Error::Rows(std::mem::take(&mut self.errors)));
                }
            }
        }
        Ok(())
    }

    fn format_hint(&self) -> Option<Format> {
        Some(self.options.format.unwrap_or(Format::Chat))
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
                    "score all rows in one way, or give --allow-mixed-scoring",
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
        self.report.unrolled_rows += usize::from(matches!(row.samples, Samples::Unrolled(_)));
        if row.provenance.is_none() && self.options.missing_provenance == MissingProvenance::Neutral {
            self.report.neutral_rows += 1;
        }
        for field in row.extra_fields {
            self.extra_fields.entry(field).or_insert(line);
        }
        match self.row_hashes.get(&hash) {
            Some(earlier) => self.report.duplicate(*earlier, line),
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
        if self.examples.len() == before && self.report.dropped_lines.last() != Some(&line) {
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
        if self.examples.is_empty() {
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
            Some(first) if skipped * 100 > rows * MAX_SKIPPED_PERCENT => Err(Error::TooManySkipped {
                path: self.path.into(),
                skipped,
                rows,
                limit_percent: MAX_SKIPPED_PERCENT,
                first: Box::new(first.clone()),
            }),
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
        report.byte_order_mark = lines.byte_order_mark;
        report.crlf_lines = lines.crlf;
        report.ignored_fields = self.extra_fields.keys().cloned().collect();
        report.examples = self.examples.len();
        report.tokens = self.examples.iter().map(|example| example.n_tokens).sum();
        report.targets = self.examples.iter().map(|example| example.n_targets).sum();
        report.lengths = LengthStats::of(self.examples.iter().map(|example| example.n_tokens));
        report.has_provenance = self.first.as_ref().is_some_and(|first| first.has_provenance);
        report.end_of_turn_warning = match self.end_of_turn {
            EndOfTurn::NotRendered => None,
            EndOfTurn::None => Some(
                "the chat template writes no special token after a trained turn: generation will not stop there".into(),
            ),
            EndOfTurn::Token(id) if self.masker.tokenizer.is_eos(id) => None,
            EndOfTurn::Token(id) => Some(format!(
                "the chat template ends a turn with {:?}, which is not among the model's end-of-text tokens: generation will not stop there",
                self.masker.tokenizer.id_to_token(id).unwrap_or_default()
            )),
        };
    }
}

/// Chat with and without tools is one family: tools are optional in a chat row.
fn family(format: Format) -> Format {
    if format == Format::Tools { Format::Chat } else { format }
}

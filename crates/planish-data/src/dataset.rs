//! A file of rows, read once: checked, rendered, tokenised, counted.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Fault, Result, RowError, RowErrorKind};
use crate::format::Format;
use crate::json;
use crate::limit::{Limited, Piece, count_targets, limit};
use crate::lines::{Line, Lines};
use crate::mask::{EndOfTurn, Masker, Sample, Samples};
use crate::options::{DataOptions, MissingProvenance, OnRowError, Overlong, Train};
use crate::provenance::Provenance;
use crate::record::Record;
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

/// What one line gives, found without looking at any other line.
enum Prepared {
    Blank,
    Row(Box<PreparedRow>),
    Bad(RowError),
}

struct PreparedRow {
    format: Format,
    provenance: Option<Provenance>,
    extra_fields: Vec<String>,
    n_fields: usize,
    /// Of the rendered ids, before any cut.
    hash: u128,
    samples: Vec<(Limited, Option<Side>)>,
    unrolled: bool,
    margin: Option<f64>,
    targets: usize,
    straddling: crate::Straddling,
    end_of_turn: EndOfTurn,
}

fn prepare(line: &Line, masker: &Masker) -> Prepared {
    let text = match std::str::from_utf8(&line.bytes) {
        Ok(text) => text,
        Err(_) if line.too_long => "",
        Err(error) => {
            let before = String::from_utf8_lossy(&line.bytes[..error.valid_up_to()]);
            return Prepared::Bad(located(
                line,
                "",
                before.chars().count() + 1,
                not_utf8(&line.bytes, error.valid_up_to()),
            ));
        }
    };
    if line.too_long {
        return Prepared::Bad(located(line, "", 1, too_long(masker.options.max_line_bytes)));
    }
    if text.trim_ascii().is_empty() {
        return Prepared::Blank;
    }
    match prepare_row(text, line.terminated, masker) {
        Ok(row) => Prepared::Row(Box::new(row)),
        Err(fault) => {
            let column = fault.column.unwrap_or_else(|| json::column_of(text, &fault.at));
            Prepared::Bad(located(line, &fault.field(), column, fault))
        }
    }
}

fn prepare_row(text: &str, terminated: bool, masker: &Masker) -> Result<PreparedRow, Fault> {
    let options = masker.options;
    let object = json::parse_object(text, terminated)?;
    let format = match options.format {
        Some(format) => format,
        None => options.fields.infer(&object)?,
    };
    let record = Record::from_row(&object, format, &options.fields)?;
    let provenance = Provenance::from_row(&object)?;
    let margin = match &record {
        Record::Preference(pair) => pair.margin,
        _ => None,
    };
    let samples = masker.samples(&record)?;
    let parts = samples.as_slice();
    let mut straddling = crate::Straddling::default();
    parts.iter().for_each(|sample| straddling.add(&sample.straddling));
    Ok(PreparedRow {
        format,
        provenance,
        extra_fields: extra_fields(&object, options),
        n_fields: object.len(),
        hash: hash_ids(parts),
        targets: parts.iter().map(|sample| count_targets(&sample.trained)).sum(),
        end_of_turn: parts.last().map_or(EndOfTurn::NotRendered, |sample| sample.end_of_turn),
        unrolled: matches!(samples, Samples::Unrolled(_)),
        straddling,
        margin,
        samples: limited(&samples, format, options)?,
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

fn extra_fields(object: &Map<String, Value>, options: &DataOptions) -> Vec<String> {
    const USED: [&str; 14] = [
        "system",
        "tools",
        "template_kwargs",
        "margin",
        "auth_weight",
        "prov_entropy",
        "source_type",
        "evidence",
        "scoring",
        "scoring_method",
        "year",
        "citation_count",
        "primary_source_count",
        "metadata",
    ];
    let names = options.fields.known();
    object
        .keys()
        .filter(|key| !USED.contains(&key.as_str()) && !names.contains(&key.as_str()))
        .cloned()
        .collect()
}

fn hash_ids(samples: &[Sample]) -> u128 {
    let mut digest = Sha256::new();
    for sample in samples {
        digest.update((sample.ids.len() as u64).to_le_bytes());
        sample.ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
    }
    let bytes: [u8; 32] = digest.finalize().into();
    u128::from_le_bytes(std::array::from_fn(|index| bytes[index]))
}

fn located(line: &Line, field: &str, column: usize, fault: Fault) -> RowError {
    RowError {
        path: PathBuf::new(),
        line: line.number,
        column,
        field: field.into(),
        kind: fault.kind,
        message: fault.message,
        fix: fault.fix,
    }
}

fn not_utf8(bytes: &[u8], at: usize) -> Fault {
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") || bytes.starts_with(b"\0{") {
        return Fault::new(
            RowErrorKind::Encoding,
            "expected UTF-8, found UTF-16",
            "save the file as UTF-8",
        );
    }
    Fault::new(
        RowErrorKind::Encoding,
        format!("expected UTF-8, found the byte 0x{:02x}", bytes[at]),
        "save the file as UTF-8",
    )
}

fn too_long(limit: usize) -> Fault {
    Fault::new(
        RowErrorKind::LineTooLong,
        format!("the line is longer than {limit} bytes"),
        "split the row, or check that rows end with a line break",
    )
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
                match self.check_against_first(line.number, &row) {
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
                self.errors.push(error);
                if self.errors.len() == MAX_ERRORS {
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

    fn check_against_first(&mut self, line: usize, row: &PreparedRow) -> Result<(), RowError> {
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

    fn keep(&mut self, line: usize, row: PreparedRow) -> Result<()> {
        let row_index = self.provenance.len();
        self.any_tools |= row.format == Format::Tools;
        self.all_tools &= row.format == Format::Tools;
        self.report.targets_before_limit += row.targets;
        self.report.straddling.add(&row.straddling);
        self.report.unrolled_rows += usize::from(row.unrolled);
        if row.provenance.is_none() && self.options.missing_provenance == MissingProvenance::Neutral {
            self.report.neutral_rows += 1;
        }
        for field in row.extra_fields {
            self.extra_fields.entry(field).or_insert(line);
        }
        match self.row_hashes.get(&row.hash) {
            Some(earlier) => self.report.duplicate(*earlier, line),
            None => {
                self.row_hashes.insert(row.hash, line);
            }
        }
        if self.end_of_turn == EndOfTurn::NotRendered {
            self.end_of_turn = row.end_of_turn;
        }
        let before = self.examples.len();
        let pieces = self.account(line, row.samples);
        let is_pair = pieces.first().is_some_and(|(_, side)| side.is_some());
        let trains = |piece: &Piece| count_targets(&piece.trained) > 0;
        let usable = if is_pair {
            pieces.iter().all(|(piece, _)| trains(piece))
        } else {
            true
        };
        for (piece, side) in pieces.into_iter().filter(|(piece, _)| usable && trains(piece)) {
            self.push(line, row_index, row.n_fields, row.margin, &piece, side)?;
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

    fn push(
        &mut self,
        line: usize,
        row: usize,
        n_fields: usize,
        margin: Option<f64>,
        piece: &Piece,
        side: Option<Side>,
    ) -> Result<()> {
        self.digest.update((piece.ids.len() as u64).to_le_bytes());
        for (id, trained) in piece.ids.iter().zip(&piece.trained) {
            self.digest.update(id.to_le_bytes());
            self.digest.update([u8::from(*trained)]);
        }
        let at = self
            .store
            .push(&piece.ids, &piece.trained)
            .map_err(|error| Error::io(self.path, error))?;
        self.examples.push(Example {
            line,
            row,
            n_tokens: piece.ids.len(),
            n_targets: count_targets(&piece.trained),
            side,
            margin,
            n_fields,
            at,
        });
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

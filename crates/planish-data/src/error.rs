//! What can go wrong, with the place where it did.

use std::fmt;
use std::path::{Path, PathBuf};

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong between a file of rows and a batch.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Rows that cannot be used, in file order; at most twenty.
    #[error("{}", list(.0))]
    Rows(Vec<RowError>),
    /// Rows were to be skipped, but there are too many of them to go on.
    #[error("{}: {skipped} of {rows} rows would be skipped, more than {limit_percent} %; the first: {first}", path.display())]
    TooManySkipped {
        /// The file.
        path: PathBuf,
        /// Rows that were skipped.
        skipped: usize,
        /// Rows that were read.
        rows: usize,
        /// The share that is tolerated, in percent.
        limit_percent: usize,
        /// The first of them.
        first: Box<RowError>,
    },
    /// A data directory without a training split.
    #[error("{}: no train.jsonl in this directory. Fix: put the training rows there, one JSON object a line", dir.display())]
    NoTrainingFile {
        /// The directory.
        dir: PathBuf,
    },
    /// Two files claim to be the validation split.
    #[error("{}: both {first} and {second} hold validation rows. Fix: keep one of them", dir.display())]
    TwoValidationFiles {
        /// The directory.
        dir: PathBuf,
        /// One of them.
        first: String,
        /// Another.
        second: String,
    },
    /// A file without a single row.
    #[error("{}: the file holds no row. Fix: write one JSON object a line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// No row has a token to train.
    #[error("{}: none of the {rows} rows has a token to train (lines {}). Fix: raise train.max_seq_length, or check which turns are masked", path.display(), first_lines(lines))]
    NothingToTrain {
        /// The file.
        path: PathBuf,
        /// Rows that were read.
        rows: usize,
        /// Their lines.
        lines: Vec<usize>,
    },
    /// Rows of one split are also in another, and the run is strict.
    #[error("{overlapping} rows of {} are also in {} (lines {a} and {b}, for one). Fix: remove them, or set data.strict = false", left.display(), right.display(), a = .first.0, b = .first.1)]
    Leak {
        /// The split in which they were seen first.
        left: PathBuf,
        /// The split in which they were seen again.
        right: PathBuf,
        /// How many.
        overlapping: usize,
        /// A pair of lines.
        first: (usize, usize),
    },
    /// A tokenizer folder that cannot be used.
    #[error("{}: {reason}. Fix: {fix}", path.display())]
    Tokenizer {
        /// The file at fault.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        fix: &'static str,
    },
    /// A chat template that does not compile or does not render.
    #[error("{origin}:{line}: {reason}")]
    Template {
        /// Where the template came from.
        origin: String,
        /// The line of the template, from 1; 0 when it is not known.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A named template was asked for that the model does not have.
    #[error("no chat template is called {name:?}; there are: {known}")]
    UnknownTemplateName {
        /// The name.
        name: String,
        /// Those that exist.
        known: String,
    },
    /// A token id that this tokenizer does not know.
    #[error("token id {id} cannot be decoded: {reason}")]
    Decode {
        /// The id.
        id: u32,
        /// What the tokenizer said.
        reason: String,
    },
    /// Plan settings that contradict one another or the data.
    #[error("{what}. Fix: {fix}")]
    Plan {
        /// What is wrong.
        what: String,
        /// What to do.
        fix: String,
    },
    /// A window that the plan does not have.
    #[error("epoch {epoch} has {windows} windows, window {index} was asked for")]
    NoSuchWindow {
        /// The epoch.
        epoch: u64,
        /// The window.
        index: usize,
        /// How many there are.
        windows: usize,
    },
}

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(crate) fn plan(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::Plan {
            what: what.into(),
            fix: fix.into(),
        }
    }
}

/// One row that cannot be used: where, what is wrong, and what to do.
///
/// Printed as `train.jsonl:17:9: messages[2].content: expected string, found null. Fix: …`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}:{line}:{column}: {}{message}. Fix: {fix}", path.display(), prefix(field))]
pub struct RowError {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// The field at fault (`messages[2].content`), empty for the row as a whole.
    pub field: String,
    /// What sort of fault it is, for counting.
    pub kind: RowErrorKind,
    /// Found against expected.
    pub message: String,
    /// One way out.
    pub fix: String,
}

/// Sorts of faults in a row, as they are counted when rows are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum RowErrorKind {
    /// Bytes that are not UTF-8, or text in another encoding.
    Encoding,
    /// Not JSON.
    Json,
    /// The file ends in the middle of a row.
    CutOff,
    /// A `\u` escape that is half of a surrogate pair.
    LoneSurrogate,
    /// Objects or lists within one another more than 127 deep.
    TooDeep,
    /// A number that no 64-bit float holds, or `NaN`.
    NonFinite,
    /// The same key twice in one object.
    DuplicateKey,
    /// A line above the size limit.
    LineTooLong,
    /// Valid JSON that is not an object.
    NotAnObject,
    /// The row has the fields of no format, or of several.
    UnknownFormat,
    /// The row is of another type than the rows before it.
    MixedFormat,
    /// A required field is absent.
    MissingField,
    /// A field has another type than required.
    WrongType,
    /// A text, a list of messages or an answer is empty.
    Empty,
    /// A role that chat templates do not know.
    UnknownRole,
    /// A number out of its range, or values that contradict one another.
    Value,
    /// A field that nothing reads or writes, while the run is strict.
    Unused,
    /// A chat without a turn to train.
    NoAssistantTurn,
    /// The row must be rendered, and the model has no chat template.
    NoTemplate,
    /// The chat template refused the row.
    Template,
    /// Rendering a shorter conversation is not a prefix of rendering a longer one.
    PrefixViolation,
    /// A row above the length limit while `overlong = "error"`.
    OverLong,
    /// A token that the model has no embedding for.
    OutsideVocabulary,
    /// The rendered row begins with two beginning-of-text tokens.
    DoubleBos,
    /// The tokenizer refused the text.
    Tokenizer,
}

impl fmt::Display for RowErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Encoding => "encoding",
            Self::Json => "json",
            Self::CutOff => "cut-off",
            Self::LoneSurrogate => "lone-surrogate",
            Self::TooDeep => "too-deep",
            Self::NonFinite => "non-finite",
            Self::DuplicateKey => "duplicate-key",
            Self::LineTooLong => "line-too-long",
            Self::NotAnObject => "not-an-object",
            Self::UnknownFormat => "unknown-format",
            Self::MixedFormat => "mixed-format",
            Self::MissingField => "missing-field",
            Self::WrongType => "wrong-type",
            Self::Empty => "empty",
            Self::UnknownRole => "unknown-role",
            Self::Value => "value",
            Self::Unused => "unused",
            Self::NoAssistantTurn => "no-assistant-turn",
            Self::NoTemplate => "no-template",
            Self::Template => "template",
            Self::PrefixViolation => "prefix-violation",
            Self::OverLong => "over-long",
            Self::OutsideVocabulary => "outside-vocabulary",
            Self::DoubleBos => "double-bos",
            Self::Tokenizer => "tokenizer",
        })
    }
}

fn prefix(field: &str) -> String {
    if field.is_empty() {
        String::new()
    } else {
        format!("{field}: ")
    }
}

fn list(rows: &[RowError]) -> String {
    rows.iter().map(RowError::to_string).collect::<Vec<_>>().join("\n")
}

fn first_lines(lines: &[usize]) -> String {
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

/// A step from a value to one inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// A fault in a row before its file, line and column are known.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) at: Vec<Step>,
    pub(crate) kind: RowErrorKind,
    pub(crate) message: String,
    pub(crate) fix: String,
    /// The column when it is known without looking the field up.
    pub(crate) column: Option<usize>,
}

impl Fault {
    pub(crate) fn new(kind: RowErrorKind, message: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            at: Vec::new(),
            kind,
            message: message.into(),
            fix: fix.into(),
            column: None,
        }
    }

    /// Puts `key` in front of the path: called on the way out of nested checks.
    pub(crate) fn under(mut self, key: &str) -> Self {
        self.at.insert(0, Step::Key(key.to_string()));
        self
    }

    pub(crate) fn under_index(mut self, index: usize) -> Self {
        self.at.insert(0, Step::Index(index));
        self
    }

    /// The path as people write it: `messages[2].content`.
    pub(crate) fn field(&self) -> String {
        let mut text = String::new();
        for step in &self.at {
            match step {
                Step::Key(key) if text.is_empty() => text.push_str(key),
                Step::Key(key) => {
                    text.push('.');
                    text.push_str(key);
                }
                Step::Index(index) => text.push_str(&format!("[{index}]")),
            }
        }
        text
    }
}

//! A data directory: training, validation and test rows, and whether they keep apart.

use std::path::{Path, PathBuf};

use crate::dataset::Dataset;
use crate::error::{Error, Result};
use crate::options::DataOptions;
use crate::report::DataReport;
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// The splits of a data directory.
///
/// `train.jsonl` (or `.csv`, `.tsv`, each perhaps with `.gz`) must be there; `valid.jsonl` (or `validation`, `val`, `eval`, `dev`) and `test.jsonl` may be. A path to a file is its training
/// split. Rows of two splits that render to the same tokens are counted in [`leaks`](Self::leaks), and refused with
/// [`DataOptions::strict`].
///
/// # Errors
/// Those of [`Dataset::load`]; [`Error::NoTrainingFile`], [`Error::TwoValidationFiles`], [`Error::Leak`].
#[derive(Debug)]
pub struct Splits {
    /// The rows to train.
    pub train: Split,
    /// The rows to validate on.
    pub valid: Option<Split>,
    /// The rows to test on.
    pub test: Option<Split>,
    /// Pairs of splits with rows in common.
    pub leaks: Vec<Leak>,
    /// Files of rows in the directory that are no split.
    pub unread: Vec<PathBuf>,
}

/// One file of a data directory.
#[derive(Debug)]
pub struct Split {
    /// Its examples.
    pub data: Dataset,
    /// What reading it showed.
    pub report: DataReport,
}

/// Rows that are in two splits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leak {
    /// One file.
    pub left: PathBuf,
    /// The other.
    pub right: PathBuf,
    /// Lines of both, pairwise.
    pub lines: Vec<(usize, usize)>,
}

impl Splits {
    /// Reads the splits of a directory, or one file as the training split.
    pub fn load(
        path: &Path,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        options: &DataOptions,
    ) -> Result<Self> {
        let load = |file: PathBuf| -> Result<Split> {
            let (data, report) = Dataset::load(&file, tokenizer, template, options)?;
            Ok(Split { data, report })
        };
        if !path.is_dir() {
            return Ok(Self {
                train: load(path.to_path_buf())?,
                valid: None,
                test: None,
                leaks: Vec::new(),
                unread: Vec::new(),
            });
        }
        let files = SplitFiles::find(path)?;
        let train = load(files.train)?;
        let valid = files.valid.map(load).transpose()?;
        let test = files.test.map(load).transpose()?;
        let leaks = leaks(&train, valid.as_ref(), test.as_ref());
        if let Some(leak) = leaks.first().filter(|_| options.strict) {
            return Err(Error::Leak {
                left: leak.left.clone(),
                right: leak.right.clone(),
                overlapping: leak.lines.len(),
                first: leak.lines[0],
            });
        }
        Ok(Self {
            train,
            valid,
            test,
            leaks,
            unread: files.unread,
        })
    }
}

/// The files of a data directory, found but not read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitFiles {
    /// `train.jsonl`.
    pub train: PathBuf,
    /// The validation rows, under one of their usual names.
    pub valid: Option<PathBuf>,
    /// `test.jsonl`.
    pub test: Option<PathBuf>,
    /// Other files of rows.
    pub unread: Vec<PathBuf>,
}

/// Ends of the names of files of rows; the first that is there is read.
const ENDS: [&str; 6] = ["jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "tsv.gz"];
const VALIDATION: [&str; 5] = ["valid", "validation", "val", "eval", "dev"];

impl SplitFiles {
    /// Looks for the splits of a directory.
    pub fn find(dir: &Path) -> Result<Self> {
        let file = |stem: &str| {
            let paths = ENDS.into_iter().map(|end| dir.join(format!("{stem}.{end}")));
            paths.into_iter().find(|path| path.is_file())
        };
        let mut valid = VALIDATION.into_iter().filter_map(file);
        let (first, second) = (valid.next(), valid.next());
        if let (Some(first), Some(second)) = (&first, &second) {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Err(Error::TwoValidationFiles {
                dir: dir.into(),
                first: name(first),
                second: name(second),
            });
        }
        let mut files = Self {
            train: file("train").ok_or_else(|| Error::NoTrainingFile { dir: dir.into() })?,
            valid: first,
            test: file("test"),
            unread: Vec::new(),
        };
        files.unread = files.others(dir)?;
        Ok(files)
    }

    /// Files that look like rows and are no split.
    fn others(&self, dir: &Path) -> Result<Vec<PathBuf>> {
        const ROWS: [&str; 10] = [
            "jsonl", "json", "ndjson", "csv", "tsv", "parquet", "arrow", "txt", "gz", "zst",
        ];
        let io = |error| Error::io(dir, error);
        let mut others = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(io)? {
            let path = entry.map_err(io)?.path();
            let is_rows = path
                .extension()
                .is_some_and(|end| ROWS.iter().any(|known| end == *known));
            let known = [Some(&self.train), self.valid.as_ref(), self.test.as_ref()];
            if is_rows && !known.into_iter().flatten().any(|known| *known == path) {
                others.push(path);
            }
        }
        others.sort();
        Ok(others)
    }
}

fn leaks(train: &Split, valid: Option<&Split>, test: Option<&Split>) -> Vec<Leak> {
    let pairs = [(Some(train), valid), (Some(train), test), (valid, test)];
    pairs
        .into_iter()
        .filter_map(|(left, right)| left.zip(right))
        .map(|(left, right)| Leak {
            left: left.data.path().into(),
            right: right.data.path().into(),
            lines: left.data.overlap(&right.data),
        })
        .filter(|leak| !leak.lines.is_empty())
        .collect()
}

//! A file of rows, read once: checked, rendered, tokenised, counted.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::format::Format;
use crate::loader::load;
use crate::mask::Masker;
use crate::options::DataOptions;
use crate::provenance::Provenance;
use crate::report::DataReport;
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
/// [`Error::Empty`], [`Error::NothingToTrain`], [`Error::Io`].
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
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    pub(crate) examples: Vec<Example>,
    pub(crate) provenance: Vec<Option<Provenance>>,
    pub(crate) store: TokenStore,
    pub(crate) fingerprint: String,
    pub(crate) data_hash: String,
    /// The line and the hash of its rendered ids, for the leak check.
    pub(crate) row_hashes: HashMap<u128, usize>,
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
    /// Where its tokens begin in the store.
    pub(crate) at: usize,
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
        load(
            path,
            &Masker {
                tokenizer,
                template,
                options,
            },
        )
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

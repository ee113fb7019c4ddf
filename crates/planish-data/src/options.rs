//! What a user may choose about rows and masks.

use crate::control::ControlTokens;
use crate::format::{FieldNames, Format};
use crate::record::Role;

/// How rows become examples: the `[data]` section of a run, and the length limit.
#[derive(Debug, Clone, PartialEq)]
pub struct DataOptions {
    /// The format of all rows; inferred from all of them when absent.
    pub format: Option<Format>,
    /// The names of the content fields.
    pub fields: FieldNames,
    /// The longest example, in tokens with its end of text.
    pub max_seq_length: usize,
    /// What happens to a longer one; when absent, text is split and everything else truncated.
    pub overlong: Option<Overlong>,
    /// Which turns are trained.
    pub train: Train,
    /// What happens where a shorter conversation does not render to a prefix of a longer one.
    pub on_prefix_violation: OnPrefixViolation,
    /// What happens to a row that cannot be used.
    pub errors: OnRowError,
    /// What a row without `auth_weight` and `prov_entropy` is, in a file where others have them.
    pub missing_provenance: MissingProvenance,
    /// Allow entropies of different scales in one file.
    pub allow_mixed_scoring: bool,
    /// Refuse rows that are in two splits, and fields that nothing reads or writes, instead of counting them.
    pub strict: bool,
    /// The token that ends a text row; the tokenizer's end of text when absent.
    pub append_eos: Option<String>,
    /// What becomes of control tokens inside messages.
    pub control_tokens: ControlTokens,
    /// The longest line that is read, in bytes.
    pub max_line_bytes: usize,
    /// Tokens are kept in memory up to this size, and in an unnamed temporary file beyond.
    pub memory_limit_bytes: usize,
}

impl Default for DataOptions {
    fn default() -> Self {
        Self {
            format: None,
            fields: FieldNames::default(),
            max_seq_length: 2048,
            overlong: None,
            train: Train::default(),
            on_prefix_violation: OnPrefixViolation::Unroll,
            errors: OnRowError::Stop,
            missing_provenance: MissingProvenance::Error,
            allow_mixed_scoring: false,
            strict: false,
            append_eos: None,
            control_tokens: ControlTokens::Keep,
            max_line_bytes: 32 << 20,
            memory_limit_bytes: 512 << 20,
        }
    }
}

/// Which tokens of a conversation are trained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Train {
    /// Every turn of these roles, with its end-of-turn token. The default is every assistant turn.
    Turns(Vec<Role>),
    /// The last assistant turn only.
    LastTurn,
    /// Every token after the first, prompts and markup included.
    Everything,
    /// As mlx-lm does: everything, or everything from the last message on.
    MlxLm {
        /// mlx-lm's `--mask-prompt`.
        mask_prompt: bool,
    },
}

impl Default for Train {
    fn default() -> Self {
        Self::Turns(vec![Role::Assistant])
    }
}

/// What happens to an example above the length limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlong {
    /// Cut at the right; no end of text is put on the cut.
    Truncate,
    /// Text only: consecutive pieces without overlap; only the last has the end of text.
    Split,
    /// Leave the row out, and count it.
    Drop,
    /// Refuse the row.
    Error,
}

impl std::str::FromStr for Overlong {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "truncate" => Ok(Self::Truncate),
            "split" => Ok(Self::Split),
            "drop" => Ok(Self::Drop),
            "error" => Ok(Self::Error),
            other => Err(format!(
                "{other:?} is no way to treat long rows; there are: truncate, split, drop, error"
            )),
        }
    }
}

/// What happens where a template rewrites history, so that a turn cannot be found in the whole text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPrefixViolation {
    /// Refuse the row, and show where the texts part.
    Error,
    /// Make one example a trained turn: the conversation up to it, with only that turn trained.
    Unroll,
}

/// What happens to a row that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRowError {
    /// Stop, and report up to twenty of them.
    Stop,
    /// Leave it out, count it, and stop only when more than 5 % of the rows are left out.
    Skip,
    /// Leave it out and count it, however many there are: for looking at a file.
    Count,
}

/// What happens to a row without distrust fields in a file that has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MissingProvenance {
    /// It is a faulty row.
    Error,
    /// It gets the neutral weight 1, and is counted.
    Neutral,
}

//! The ways of cutting text before BPE that GGUF files name.

use serde_json::{Value as Json, json};

/// A rule of `tokenizer.ggml.pre` that is carried over exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PreTokenizer {
    /// GPT-2's pattern, built into `ByteLevel`.
    Gpt2,
    /// Single digits, then GPT-2's pattern: SmolLM and SmolLM2.
    SmolLm,
    /// Llama 3: up to three digits together, whole words first.
    Llama3,
    /// Qwen2, Qwen2.5 and Qwen3: single digits, Unicode normalised to NFC.
    Qwen2,
    /// Mistral Nemo and later: words split where capitals begin.
    Tekken,
}

/// Contractions, words with one leading sign, one to three digits, signs with line ends, white space.
const LLAMA3_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits.
const QWEN2_PATTERN: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Words end before a capital; single digits.
const TEKKEN_PATTERN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One step of cutting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Each digit alone.
    Digits,
    /// At the matches of a pattern, which stay.
    Split(&'static str),
    /// Bytes to printable characters; with GPT-2's pattern or without.
    ByteLevel { use_regex: bool },
}

impl PreTokenizer {
    /// Every known rule.
    pub const ALL: [Self; 5] = [Self::Gpt2, Self::SmolLm, Self::Llama3, Self::Qwen2, Self::Tekken];

    /// The names that GGUF files use, the one we write first.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Gpt2 => &["gpt-2"],
            Self::SmolLm => &["smollm"],
            Self::Llama3 => &["llama-bpe", "llama3", "llama-v3"],
            Self::Qwen2 => &["qwen2"],
            Self::Tekken => &["tekken"],
        }
    }

    /// The rule of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|rule| rule.names().contains(&name))
    }

    /// Whether a word that is a token stays whole, whatever the merges say.
    pub(super) fn ignores_merges(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    /// Whether text is normalised to NFC first.
    pub(super) fn normalises(self) -> bool {
        self == Self::Qwen2
    }

    /// Whether the beginning-of-text token is added when the file does not say.
    pub(super) fn adds_bos_by_default(self) -> bool {
        matches!(self, Self::Llama3 | Self::Tekken)
    }

    pub(super) fn steps(self) -> Vec<Step> {
        match self {
            Self::Gpt2 => vec![Step::ByteLevel { use_regex: true }],
            Self::SmolLm => vec![Step::Digits, Step::ByteLevel { use_regex: true }],
            Self::Llama3 => vec![Step::Split(LLAMA3_PATTERN), Step::ByteLevel { use_regex: false }],
            Self::Qwen2 => vec![Step::Split(QWEN2_PATTERN), Step::ByteLevel { use_regex: false }],
            Self::Tekken => vec![Step::Split(TEKKEN_PATTERN), Step::ByteLevel { use_regex: false }],
        }
    }

    /// The `pre_tokenizer` of `tokenizer.json`.
    pub(super) fn to_json(self) -> Json {
        let steps: Vec<Json> = self.steps().into_iter().map(Step::to_json).collect();
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

impl Step {
    /// Whether a component of a `tokenizer.json` does the same. `trim_offsets` moves offsets, not ids.
    pub(super) fn describes(self, json: &Json) -> bool {
        match self {
            Self::Digits => json["type"] == "Digits" && json["individual_digits"] == true,
            Self::Split(pattern) => {
                json["type"] == "Split"
                    && json["pattern"]["Regex"] == pattern
                    && json["behavior"] == "Isolated"
                    && json["invert"] != true
            }
            Self::ByteLevel { use_regex } => {
                json["type"] == "ByteLevel"
                    && json["add_prefix_space"] == false
                    && json["use_regex"].as_bool().unwrap_or(true) == use_regex
            }
        }
    }

    fn to_json(self) -> Json {
        match self {
            Self::Digits => json!({"type": "Digits", "individual_digits": true}),
            Self::Split(pattern) => {
                json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
            }
            Self::ByteLevel { use_regex } => byte_level(false, use_regex),
        }
    }
}

/// A `ByteLevel` component: as pre-tokenizer, and as decoder (where only the type matters).
pub(super) fn byte_level(add_prefix_space: bool, use_regex: bool) -> Json {
    json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex})
}

//! Tokenizers: byte-level BPE, between GGUF metadata and `tokenizer.json`.
//!
//! GGUF keeps the tokens in id order, a type for each, and the merges; how text is cut before merging is only a *name*,
//! `tokenizer.ggml.pre`. The names in [`PreTokenizer`] are the ones whose rules we know; any other is refused, because a
//! wrong guess gives ids that are almost right. So are SentencePiece vocabularies (`tokenizer.ggml.model` = `llama`).

mod from_gguf;
mod pre_tokenizer;
mod to_gguf;

pub use from_gguf::{HuggingFaceTokenizer, from_gguf};
pub use pre_tokenizer::PreTokenizer;
pub use to_gguf::{GgufTokenizer, to_gguf};

/// `tokenizer.ggml.token_type`: what kind of token an id is.
mod token_type {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
    pub(super) const UNUSED: i32 = 5;
}

/// Special tokens: the middle of `tokenizer.ggml.<name>_token_id`, and the key in `tokenizer_config.json`.
const SPECIAL_TOKENS: [(&str, &str); 4] = [
    ("bos", "bos_token"),
    ("eos", "eos_token"),
    ("unknown", "unk_token"),
    ("padding", "pad_token"),
];

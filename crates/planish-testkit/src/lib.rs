//! What tests of several crates share. A dev-dependency only: no product may stand on it.

use std::path::{Path, PathBuf};

/// The tiny model: a Llama of one million weights with its tokenizer and chat template, trained a little.
pub fn tiny_model() -> &'static Path {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../planish-nn/tests/fixtures/tiny-llama-1m"
    ))
}

/// A folder with a random model of some family and what mlx-lm computes of it, such as `qwen2`.
pub fn golden(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../planish-nn/tests/goldens")).join(name)
}

/// A line of a chat: one question and its answer.
///
/// ```
/// assert_eq!(
///     planish_testkit::chat("Who?", "\"I\""),
///     r#"{"messages":[{"role":"user","content":"Who?"},{"role":"assistant","content":"\"I\""}]}"#
/// );
/// ```
pub fn chat(question: &str, answer: &str) -> String {
    // A text's debug form is a JSON string as long as it is printable.
    format!(r#"{{"messages":[{{"role":"user","content":{question:?}}},{{"role":"assistant","content":{answer:?}}}]}}"#)
}

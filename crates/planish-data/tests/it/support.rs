//! What the tests share: the tiny tokenizer, and rows in a temporary file.

use std::path::{Path, PathBuf};

use planish_data::{ChatTemplate, DataOptions, DataReport, Dataset, Result, TemplateOptions, Tokenizer};
use serde_json::{Value, json};

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/it/fixtures")
        .join(name)
}

/// A folder of the fuzzer's inputs.
pub(crate) fn corpus(target: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../fuzz/corpus")
        .join(target);
    assert!(dir.is_dir(), "{} is not there", dir.display());
    dir
}

pub(crate) fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(&fixture("tiny")).unwrap()
}

/// The tiny tokenizer with more special tokens, and with a beginning-of-text token when one is named.
pub(crate) fn tokenizer_with(special: &[&str], bos: Option<&str>, eos: &str) -> Tokenizer {
    let mut json = read_json(&fixture("tiny/tokenizer.json"));
    let added = json["added_tokens"].as_array_mut().unwrap();
    for (index, content) in special.iter().enumerate() {
        added.push(json!({
            "id": 2048 + index, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }));
    }
    let config = json!({"bos_token": bos, "eos_token": eos});
    Tokenizer::from_parts(
        Path::new("tokenizer.json"),
        json.to_string().as_bytes(),
        Some(&config),
        None,
        None,
    )
    .unwrap()
}

pub(crate) fn chatml(tokenizer: &Tokenizer) -> ChatTemplate {
    ChatTemplate::from_dir(&fixture("tiny"), tokenizer, &TemplateOptions::default())
        .unwrap()
        .unwrap()
}

pub(crate) fn template(name: &str, tokenizer: &Tokenizer) -> ChatTemplate {
    let source = std::fs::read_to_string(fixture("templates").join(name)).unwrap();
    ChatTemplate::from_source(&source, name, tokenizer, &TemplateOptions::default()).unwrap()
}

pub(crate) fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A file called `train.jsonl` with these bytes.
pub(crate) struct RowFile {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

pub(crate) fn file(bytes: impl AsRef<[u8]>) -> RowFile {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train.jsonl");
    std::fs::write(&path, bytes).unwrap();
    RowFile { _dir: dir, path }
}

pub(crate) fn rows(rows: &[Value]) -> RowFile {
    file(rows.iter().map(|row| format!("{row}\n")).collect::<String>())
}

pub(crate) fn load(file: &RowFile, options: &DataOptions) -> Result<(Dataset, DataReport)> {
    let tokenizer = tokenizer();
    let template = chatml(&tokenizer);
    Dataset::load(&file.path, &tokenizer, Some(&template), options)
}

/// The trained tokens of an example, written out.
pub(crate) fn trained_text(data: &Dataset, example: usize, tokenizer: &Tokenizer) -> String {
    let tokens = data.tokens(example).unwrap();
    let ids: Vec<u32> = tokens
        .ids
        .iter()
        .zip(&tokens.trained)
        .filter(|(_, trained)| **trained)
        .map(|(id, _)| *id)
        .collect();
    tokenizer.decode_all(&ids).unwrap()
}

pub(crate) fn turn(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

pub(crate) fn chat(turns: &[(&str, &str)]) -> Value {
    json!({"messages": turns.iter().map(|(role, content)| turn(role, content)).collect::<Vec<_>>()})
}

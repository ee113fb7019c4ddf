//! What Apple's Swift engines load: the asset with tokenizer, template and end tokens in one folder.

use std::{
    fs,
    path::{Path, PathBuf},
};

use planish_core::model_config::ModelConfig;
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// What a name ends with that stands for the asset alone.
pub(crate) const ASSET: &str = "aimodel";
/// Version of the bundle's metadata.
const METADATA_VERSION: &str = "0.2";
const METADATA: &str = "metadata.json";
const TOKENIZER: &str = "tokenizer";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// Files that are copied beside the tokenizer's configuration, where the model has them.
const COPIED: [&str; 3] = ["tokenizer.json", "special_tokens_map.json", "generation_config.json"];

/// What the metadata says of a model.
pub(crate) struct Facts<'a> {
    /// Name of the bundle; the asset is `NAME.aimodel`.
    pub(crate) name: String,
    /// Whether there is a bundle around the asset.
    pub(crate) is_bundle: bool,
    pub(crate) config: &'a ModelConfig,
    /// Longest text.
    pub(crate) context: usize,
    /// Form of the weights; `None` for half floats.
    pub(crate) compression: Option<&'a str>,
    /// Tokens that end a text or a turn, the usual one first.
    pub(crate) end_tokens: &'a [String],
}

impl Facts<'_> {
    /// The folder of the asset inside that of the export.
    pub(crate) fn asset(&self, folder: &Path) -> PathBuf {
        match self.is_bundle {
            true => folder.join(self.asset_name()),
            false => folder.to_owned(),
        }
    }

    fn asset_name(&self) -> String {
        format!("{}.{ASSET}", self.name)
    }
}

/// Writes everything but the asset. Returns what a host will miss.
pub(crate) fn write(folder: &Path, model: &Path, facts: &Facts) -> Result<Vec<String>> {
    write_json(&folder.join(METADATA), &metadata(model, facts))?;
    let target = folder.join(TOKENIZER);
    fs::create_dir(&target).map_err(Error::io(&target))?;
    for name in COPIED {
        let from = model.join(name);
        if from.is_file() {
            fs::copy(&from, target.join(name)).map_err(Error::io(&from))?;
        }
    }
    write_json(
        &target.join(TOKENIZER_CONFIG),
        &tokenizer_config(model, facts.end_tokens)?,
    )?;
    let mut warnings = Vec::new();
    if !target.join("tokenizer.json").is_file() {
        warnings.push("the model folder has no tokenizer.json: a host cannot turn text into tokens".to_owned());
    }
    if facts.end_tokens.is_empty() {
        warnings.push("the model names no end token: a host will not know when an answer ends".to_owned());
    }
    Ok(warnings)
}

fn metadata(model: &Path, facts: &Facts) -> Value {
    let id = model.canonicalize().unwrap_or_else(|_| model.to_owned());
    let id = id
        .file_name()
        .map_or_else(|| facts.name.clone(), |name| name.to_string_lossy().into_owned());
    json!({
        "metadata_version": METADATA_VERSION,
        "kind": "llm",
        "name": facts.name,
        "assets": { "main": facts.asset_name() },
        "language": {
            "tokenizer": id,
            "vocab_size": facts.config.arch.vocab_size,
            "max_context_length": facts.context,
            "embedded_tokenizer": true,
            "function_map": { "main": ["main"] },
        },
        "source": { "model_definition": "torch", "hf_model_id": id },
        "compression": facts.compression,
    })
}

/// The model's own configuration with every end token and the template in it, where Apple's engines look for them.
fn tokenizer_config(model: &Path, end_tokens: &[String]) -> Result<Value> {
    let mut config = read_object(&model.join(TOKENIZER_CONFIG))?;
    if let [first, rest @ ..] = end_tokens {
        config.insert("eos_token".into(), first.as_str().into());
        let listed = config.remove("additional_special_tokens").unwrap_or_default();
        let mut all = listed.as_array().cloned().unwrap_or_default();
        for token in rest {
            if !all.iter().any(|known| content(known) == Some(token)) {
                all.push(token.as_str().into());
            }
        }
        if !all.is_empty() {
            config.insert("additional_special_tokens".into(), all.into());
        }
    }
    let template = model.join("chat_template.jinja");
    if template.is_file() && !config.contains_key("chat_template") {
        let text = fs::read_to_string(&template).map_err(Error::io(&template))?;
        config.insert("chat_template".into(), text.into());
    }
    Ok(Value::Object(config))
}

/// A special token is text, or an object that holds it.
fn content(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

/// Reads a bundle as Apple's engines do and refuses one that they could not use, or that ends at other tokens.
pub(crate) fn check(folder: &Path, facts: &Facts) -> Result<()> {
    let fail = |problem: String| Error::CheckFailed { problem };
    let metadata = read_object(&folder.join(METADATA))?;
    let language = &metadata.get("language").cloned().unwrap_or_default();
    let found = [
        &metadata["metadata_version"],
        &metadata["kind"],
        &metadata["assets"]["main"],
        &language["vocab_size"],
        &language["max_context_length"],
    ];
    let expected = [
        json!(METADATA_VERSION),
        json!("llm"),
        json!(facts.asset_name()),
        json!(facts.config.arch.vocab_size),
        json!(facts.context),
    ];
    if found.into_iter().ne(expected.iter()) {
        return Err(fail(format!("metadata.json says {found:?}, expected {expected:?}")));
    }
    let config = read_object(&folder.join(TOKENIZER).join(TOKENIZER_CONFIG))?;
    let listed = config.get("additional_special_tokens").and_then(Value::as_array);
    let first = config.get("eos_token").and_then(content);
    if first != facts.end_tokens.first().map(String::as_str) && !facts.end_tokens.is_empty() {
        return Err(fail(format!(
            "a host will end at {first:?}, expected {:?}",
            facts.end_tokens[0]
        )));
    }
    let known = |token: &String| listed.into_iter().flatten().any(|item| content(item) == Some(token));
    match facts.end_tokens.iter().skip(1).find(|token| !known(token)) {
        Some(missing) => Err(fail(format!("a host will not end at {missing:?}"))),
        None => Ok(()),
    }
}

fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    match serde_json::from_str(&text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::unreadable(path, "not a JSON object")),
        Err(error) => Err(Error::unreadable(path, error)),
    }
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n")).map_err(Error::io(path))
}

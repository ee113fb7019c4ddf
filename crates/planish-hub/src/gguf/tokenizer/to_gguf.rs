//! `tokenizer.json` and its companions → GGUF metadata.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_core::model_config::ModelConfig;
use serde_json::{Map, Value as Json};

use super::pre_tokenizer::PreTokenizer;
use super::{SPECIAL_TOKENS, token_type};
use crate::error::io_at;
use crate::gguf::{Array, Value};
use crate::{Error, Result};

/// The metadata of a folder's tokenizer, and remarks on what GGUF cannot hold but nobody will miss.
#[derive(Clone, Debug)]
pub struct GgufTokenizer {
    /// Keys that begin with `tokenizer.`.
    pub metadata: Vec<(String, Value)>,
    /// For the user.
    pub notes: Vec<String>,
}

/// Reads the tokenizer of a Hugging Face folder. Rows of the embedding without a token get unused ones, `[PAD<id>]`.
///
/// # Errors
/// [`Error::UnsupportedTokenizer`] for anything but byte-level BPE with a known pre-tokenizer, and for tokens that strip
/// the space around them, which GGUF cannot say; [`Error::Json`], [`Error::Io`].
pub fn to_gguf(folder: &Path, config: &ModelConfig) -> Result<GgufTokenizer> {
    let source = Source::read(folder)?;
    let rule = source.rule()?;
    let vocabulary = source.vocabulary(config.arch.vocab_size)?;
    let mut notes = Vec::new();
    let mut metadata = vec![
        ("tokenizer.ggml.model".to_owned(), Value::from("gpt2")),
        ("tokenizer.ggml.pre".to_owned(), Value::from(rule.names()[0])),
        (
            "tokenizer.ggml.tokens".to_owned(),
            Value::Array(Array::String(vocabulary.tokens.clone())),
        ),
        (
            "tokenizer.ggml.token_type".to_owned(),
            Value::Array(Array::I32(vocabulary.types.clone())),
        ),
        (
            "tokenizer.ggml.merges".to_owned(),
            Value::Array(Array::String(source.merges()?)),
        ),
    ];
    metadata.extend(source.special_ids(&vocabulary, config, &mut notes)?);
    metadata.extend(source.framing(&vocabulary, &metadata)?);
    metadata.push(("tokenizer.ggml.add_space_prefix".to_owned(), Value::Bool(false)));
    metadata.extend(source.chat_templates()?);
    Ok(GgufTokenizer { metadata, notes })
}

/// Tokens in id order with their types.
struct Vocabulary {
    tokens: Vec<String>,
    types: Vec<i32>,
}

impl Vocabulary {
    fn id(&self, token: &str) -> Option<u32> {
        let used = self
            .types
            .iter()
            .zip(&self.tokens)
            .position(|(kind, t)| *kind != token_type::UNUSED && t == token);
        used.map(|id| id as u32)
    }
}

/// The files of the folder.
struct Source {
    folder: PathBuf,
    /// `tokenizer.json`.
    path: PathBuf,
    tokenizer: Json,
    config: Json,
    generation: Json,
}

impl Source {
    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        Ok(Self {
            folder: folder.to_path_buf(),
            tokenizer: read_json(&path)?,
            config: read_optional_json(&folder.join("tokenizer_config.json"))?,
            generation: read_optional_json(&folder.join("generation_config.json"))?,
            path,
        })
    }

    fn model(&self) -> &Json {
        &self.tokenizer["model"]
    }

    /// Which known rule cuts text exactly as this tokenizer does.
    fn rule(&self) -> Result<PreTokenizer> {
        let model = self.model();
        if model["type"] != "BPE" {
            return Err(self.unsupported(format!(
                "model type {}: only byte-level BPE can be stored",
                model["type"]
            )));
        }
        for key in [
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "dropout",
            "byte_fallback",
            "fuse_unk",
        ] {
            let neutral = model[key].is_null() || model[key] == "" || model[key] == false;
            if !neutral {
                return Err(self.unsupported(format!("model.{key} = {} cannot be stored", model[key])));
            }
        }
        let steps = flatten(&self.tokenizer["pre_tokenizer"], "pretokenizers");
        let rule = PreTokenizer::ALL.into_iter().find(|rule| {
            let expected = rule.steps();
            steps.len() == expected.len() && steps.iter().zip(expected).all(|(json, step)| step.describes(json))
        });
        let Some(rule) = rule else {
            let shown: String = self.tokenizer["pre_tokenizer"].to_string().chars().take(200).collect();
            return Err(self.unsupported(format!("no GGUF name is known for the pre-tokenizer {shown}")));
        };
        let normalisers = flatten(&self.tokenizer["normalizer"], "normalizers");
        let as_expected = match normalisers.as_slice() {
            [] => !rule.normalises(),
            [one] => rule.normalises() && one["type"] == "NFC",
            _ => false,
        };
        if !as_expected {
            let name = rule.names()[0];
            return Err(self.unsupported(format!("the normalizer is not that of the pre-tokenizer {name}")));
        }
        if model["ignore_merges"].as_bool().unwrap_or(false) != rule.ignores_merges() {
            let name = rule.names()[0];
            return Err(self.unsupported(format!("ignore_merges is not that of the pre-tokenizer {name}")));
        }
        Ok(rule)
    }

    fn vocabulary(&self, n_rows: usize) -> Result<Vocabulary> {
        let vocab = self.model()["vocab"].as_object();
        let vocab = vocab.ok_or_else(|| self.unsupported("model.vocab is no object".into()))?;
        let mut by_id: BTreeMap<usize, (String, i32)> = BTreeMap::new();
        for (token, id) in vocab {
            let id = self.row(token, id, n_rows)?;
            if by_id.insert(id, (token.clone(), token_type::NORMAL)).is_some() {
                return Err(self.unsupported(format!("two tokens have the id {id}")));
            }
        }
        for added in self.tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let Some(content) = added["content"].as_str() else {
                return Err(self.unsupported("an added token has no content".into()));
            };
            for flag in ["lstrip", "rstrip", "single_word"] {
                if added[flag] == true {
                    return Err(self.unsupported(format!("the token {content:?} has {flag}, which GGUF cannot say")));
                }
            }
            let kind = if added["special"] == true {
                token_type::CONTROL
            } else {
                token_type::USER_DEFINED
            };
            let id = self.row(content, &added["id"], n_rows)?;
            by_id.insert(id, (content.to_owned(), kind));
        }
        let token = |id| {
            by_id
                .remove(&id)
                .unwrap_or_else(|| (format!("[PAD{id}]"), token_type::UNUSED))
        };
        let (tokens, types) = (0..n_rows).map(token).unzip();
        Ok(Vocabulary { tokens, types })
    }

    fn row(&self, token: &str, id: &Json, n_rows: usize) -> Result<usize> {
        id.as_u64()
            .map(|id| id as usize)
            .filter(|id| *id < n_rows)
            .ok_or_else(|| {
                self.unsupported(format!(
                    "the token {token:?} has the id {id}, but the embedding has {n_rows} rows"
                ))
            })
    }

    /// Merges as texts, from either form: `"a b"` or `["a", "b"]`.
    fn merges(&self) -> Result<Vec<String>> {
        let merges = self.model()["merges"].as_array();
        let merges = merges.ok_or_else(|| self.unsupported("model.merges is no list".into()))?;
        let text = |merge: &Json| match merge {
            Json::String(text) => Some(text.clone()),
            Json::Array(pair) => match pair.as_slice() {
                [Json::String(left), Json::String(right)] if !left.contains(' ') => Some(format!("{left} {right}")),
                _ => None,
            },
            _ => None,
        };
        let unreadable = |merge: &Json| self.unsupported(format!("the merge {merge} is no pair of tokens"));
        merges
            .iter()
            .map(|merge| text(merge).ok_or_else(|| unreadable(merge)))
            .collect()
    }

    fn special_ids(
        &self,
        vocabulary: &Vocabulary,
        config: &ModelConfig,
        notes: &mut Vec<String>,
    ) -> Result<Vec<(String, Value)>> {
        let key = |name: &str| format!("tokenizer.ggml.{name}_token_id");
        let mut ids = Vec::new();
        let mut ends: Vec<u32> = Vec::new();
        for (ours, theirs) in SPECIAL_TOKENS {
            let stated = self.special_token(theirs);
            let id = match stated {
                Some(token) => Some(vocabulary.id(token).ok_or_else(|| {
                    self.unsupported(format!("{theirs} is {token:?}, which is not in the vocabulary"))
                })?),
                None if ours == "bos" => config.bos_token_id,
                None if ours == "eos" => config.eos_token_ids.first().copied(),
                None => None,
            };
            if let Some(id) = id {
                ids.push((key(ours), Value::U32(id)));
                if ours == "eos" {
                    ends.push(id);
                }
            }
        }
        // A text, a turn and a message may end differently; GGUF has three keys, of which the first is taken.
        for id in config.eos_token_ids.iter().copied().chain(self.generation_ends()) {
            if ends.contains(&id) || id as usize >= vocabulary.tokens.len() {
                continue;
            }
            match ends.len() {
                1 => ids.push((key("eot"), Value::U32(id))),
                2 => ids.push((key("eom"), Value::U32(id))),
                _ => notes.push(format!(
                    "the stop token {id} is not stored: GGUF has three keys for them"
                )),
            }
            ends.push(id);
        }
        Ok(ids)
    }

    fn special_token(&self, name: &str) -> Option<&str> {
        let token = &self.config[name];
        token.as_str().or_else(|| token["content"].as_str())
    }

    fn generation_ends(&self) -> Vec<u32> {
        let ids = &self.generation["eos_token_id"];
        let id = |value: &Json| value.as_u64().and_then(|id| u32::try_from(id).ok());
        ids.as_array().map_or_else(
            || id(ids).into_iter().collect(),
            |list| list.iter().filter_map(id).collect(),
        )
    }

    /// Whether a token is put before and after every text, from the post-processor.
    fn framing(&self, vocabulary: &Vocabulary, metadata: &[(String, Value)]) -> Result<Vec<(String, Value)>> {
        let known = |name: &str| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            metadata
                .iter()
                .find(|(k, _)| *k == key)
                .and_then(|(_, value)| value.as_u64())
        };
        let (mut bos, mut eos) = (false, false);
        for processor in flatten(&self.tokenizer["post_processor"], "processors") {
            if processor["type"] == "ByteLevel" {
                continue; // moves offsets, not ids
            }
            let template = processor["single"]
                .as_array()
                .filter(|_| processor["type"] == "TemplateProcessing");
            let Some(template) = template else {
                return Err(self.unsupported(format!("the post-processor {} cannot be stored", processor["type"])));
            };
            let place = template.iter().position(|part| part.get("Sequence").is_some());
            for (i, part) in template.iter().enumerate().filter(|(i, _)| Some(*i) != place) {
                let token = part["SpecialToken"]["id"]
                    .as_str()
                    .and_then(|token| vocabulary.id(token));
                let (name, flag) = if Some(i) < place {
                    ("bos", &mut bos)
                } else {
                    ("eos", &mut eos)
                };
                if place.is_none()
                    || token.is_none()
                    || token.map(u64::from) != known(name)
                    || std::mem::replace(flag, true)
                {
                    return Err(self.unsupported(format!(
                        "the post-processor adds {part}, expected the {name} token once"
                    )));
                }
            }
        }
        let mut flags = vec![("tokenizer.ggml.add_bos_token".to_owned(), Value::Bool(bos))];
        if eos {
            flags.push(("tokenizer.ggml.add_eos_token".to_owned(), Value::Bool(true)));
        }
        Ok(flags)
    }

    /// The template, from its own file or from `tokenizer_config.json`.
    fn chat_templates(&self) -> Result<Vec<(String, Value)>> {
        const KEY: &str = "tokenizer.chat_template";
        let file = self.folder.join("chat_template.jinja");
        match std::fs::read_to_string(&file) {
            Ok(text) => return Ok(vec![(KEY.to_owned(), Value::String(text))]),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_at(file)(error)),
        }
        match &self.config["chat_template"] {
            Json::Null => Ok(Vec::new()),
            Json::String(text) => Ok(vec![(KEY.to_owned(), Value::from(text.as_str()))]),
            Json::Array(named) => named
                .iter()
                .map(|entry| named_template(entry, KEY).ok_or_else(|| self.odd_template()))
                .collect(),
            _ => Err(self.odd_template()),
        }
    }

    fn odd_template(&self) -> Error {
        let problem = "chat_template is neither a text nor a list of {name, template}".to_owned();
        Error::Json {
            path: self.folder.join("tokenizer_config.json"),
            problem,
        }
    }

    fn unsupported(&self, problem: String) -> Error {
        Error::UnsupportedTokenizer {
            path: self.path.clone(),
            problem,
        }
    }
}

fn named_template(entry: &Json, key: &str) -> Option<(String, Value)> {
    let (name, template) = (entry["name"].as_str()?, entry["template"].as_str()?);
    let key = if name == "default" {
        key.to_owned()
    } else {
        format!("{key}.{name}")
    };
    Some((key, Value::from(template)))
}

/// The parts of a component that may be absent, one, or a sequence under `list`.
fn flatten<'a>(component: &'a Json, list: &str) -> Vec<&'a Json> {
    match component {
        Json::Null => Vec::new(),
        sequence if sequence["type"] == "Sequence" => sequence[list]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|part| flatten(part, list))
            .collect(),
        single => vec![single],
    }
}

fn read_json(path: &Path) -> Result<Json> {
    let text = std::fs::read_to_string(path).map_err(io_at(path))?;
    serde_json::from_str(&text).map_err(|error| Error::Json {
        path: path.to_path_buf(),
        problem: error.to_string(),
    })
}

/// An absent file is an empty object.
fn read_optional_json(path: &Path) -> Result<Json> {
    match read_json(path) {
        Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(Json::Object(Map::new())),
        other => other,
    }
}

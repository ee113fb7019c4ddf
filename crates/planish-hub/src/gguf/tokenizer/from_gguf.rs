//! GGUF metadata → `tokenizer.json` and its companions.

use std::collections::HashMap;

use serde_json::{Map, Value as Json, json};

use super::pre_tokenizer::{PreTokenizer, byte_level};
use super::{SPECIAL_TOKENS, token_type};
use crate::gguf::{Array, Metadata, Value};
use crate::{Error, Result};

/// What a Hugging Face folder says about its tokenizer.
#[derive(Clone, Debug)]
pub struct HuggingFaceTokenizer {
    /// `tokenizer.json`.
    pub tokenizer: Json,
    /// `tokenizer_config.json`, with the chat template.
    pub config: Map<String, Json>,
    /// `special_tokens_map.json`.
    pub special_tokens: Map<String, Json>,
    /// For `config.json` and `generation_config.json`: `bos_token_id`, `eos_token_id` (a list when a turn ends
    /// differently from a text), `pad_token_id`; absent keys are absent in the file.
    pub ids: Map<String, Json>,
}

/// Rebuilds the tokenizer of a GGUF file. `context_length` is written as `model_max_length`.
///
/// # Errors
/// [`Error::UnsupportedMetadata`] for another kind of tokenizer or pre-tokenizer, by name; [`Error::UnsupportedTokenizer`]
/// for token types that have no counterpart, repeated tokens, or merges of things that are no tokens;
/// [`Error::MissingMetadata`], [`Error::MetadataType`].
pub fn from_gguf(metadata: &Metadata, context_length: u64) -> Result<HuggingFaceTokenizer> {
    let rule = rule(metadata)?;
    let vocabulary = Vocabulary::read(metadata)?;
    let special = vocabulary.special_tokens()?;
    let framing = Framing::read(metadata, rule, &vocabulary)?;

    let mut config = Map::new();
    config.insert("add_prefix_space".into(), false.into());
    config.insert("added_tokens_decoder".into(), vocabulary.added_tokens_decoder());
    config.extend(special.clone());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    config.insert("model_max_length".into(), context_length.into());
    // The class that takes tokenizer.json as it is.
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    if let Some(template) = chat_template(metadata)? {
        config.insert("chat_template".into(), template);
    }
    Ok(HuggingFaceTokenizer {
        tokenizer: tokenizer_json(metadata, rule, &vocabulary, &framing)?,
        config,
        special_tokens: special,
        ids: ids(metadata, &vocabulary)?,
    })
}

fn rule(metadata: &Metadata) -> Result<PreTokenizer> {
    let (model_key, pre_key) = ("tokenizer.ggml.model", "tokenizer.ggml.pre");
    let model = metadata.required(model_key, metadata.text(model_key)?)?;
    if model != "gpt2" {
        let reason = "only byte-level BPE (gpt2) is converted; take tokenizer.json from the original model instead";
        return Err(metadata.unsupported(model_key, reason));
    }
    let known: Vec<&str> = PreTokenizer::ALL.into_iter().map(|rule| rule.names()[0]).collect();
    metadata
        .text(pre_key)?
        .and_then(PreTokenizer::from_name)
        .ok_or_else(|| {
            metadata.unsupported(
                pre_key,
                format!("the pre-tokenizers {} are converted", known.join(", ")),
            )
        })
}

/// Tokens in id order with their types.
struct Vocabulary<'a> {
    tokens: &'a [String],
    types: Vec<i32>,
    ids: HashMap<&'a str, usize>,
    metadata: &'a Metadata,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Self> {
        let (tokens_key, types_key) = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type");
        let tokens = metadata.required(tokens_key, metadata.texts(tokens_key)?)?;
        let types = match metadata.get(types_key) {
            None => vec![token_type::NORMAL; tokens.len()],
            Some(Value::Array(Array::I32(types))) if types.len() == tokens.len() => types.clone(),
            Some(_) => {
                return Err(metadata.unsupported(types_key, format!("expected {} numbers of type i32", tokens.len())));
            }
        };
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, (token, kind)) in tokens.iter().zip(&types).enumerate() {
            let problem = match *kind {
                token_type::NORMAL | token_type::CONTROL | token_type::USER_DEFINED => ids
                    .insert(token.as_str(), id)
                    .map(|earlier| format!("token {token:?} appears as {earlier} and as {id}")),
                token_type::UNUSED => None,
                other => Some(format!("token {id} has the type {other}, expected 1, 3, 4 or 5")),
            };
            if let Some(problem) = problem {
                return Err(unsupported(metadata, problem));
            }
        }
        Ok(Self {
            tokens,
            types,
            ids,
            metadata,
        })
    }

    /// The id under `tokenizer.ggml.<name>_token_id`, and its token.
    fn special(&self, name: &str) -> Result<Option<(usize, &'a str)>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.metadata.whole(&key)? else {
            return Ok(None);
        };
        match self.tokens.get(id as usize) {
            Some(token) => Ok(Some((id as usize, token))),
            None => Err(self
                .metadata
                .unsupported(&key, format!("the vocabulary has {} tokens", self.tokens.len()))),
        }
    }

    fn special_tokens(&self) -> Result<Map<String, Json>> {
        let mut map = Map::new();
        for (ours, theirs) in SPECIAL_TOKENS {
            if let Some((_, token)) = self.special(ours)? {
                map.insert(theirs.into(), token.into());
            }
        }
        Ok(map)
    }

    /// Tokens that are found in the text before anything else: id, token, whether decoding may skip it.
    fn added(&self) -> impl Iterator<Item = (usize, &'a str, bool)> {
        self.types
            .iter()
            .zip(self.tokens)
            .enumerate()
            .filter_map(|(id, (kind, token))| match *kind {
                token_type::CONTROL => Some((id, token.as_str(), true)),
                token_type::USER_DEFINED => Some((id, token.as_str(), false)),
                _ => None,
            })
    }

    fn added_tokens_decoder(&self) -> Json {
        self.added()
            .map(|(id, token, special)| (id.to_string(), Json::Object(added_token(token, special))))
            .collect()
    }
}

fn tokenizer_json(
    metadata: &Metadata,
    rule: PreTokenizer,
    vocabulary: &Vocabulary<'_>,
    framing: &Framing<'_>,
) -> Result<Json> {
    let added: Vec<Json> = vocabulary
        .added()
        .map(|(id, token, special)| {
            let mut entry = Map::from_iter([("id".to_owned(), Json::from(id))]);
            entry.extend(added_token(token, special));
            Json::Object(entry)
        })
        .collect();
    // In id order; unused tokens stand for nothing that text can hold.
    let used = vocabulary.types.iter().zip(vocabulary.tokens).enumerate();
    let vocab: Map<String, Json> = used
        .filter(|(_, (kind, _))| **kind != token_type::UNUSED)
        .map(|(id, (_, token))| (token.clone(), Json::from(id)))
        .collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": if rule.normalises() { json!({"type": "NFC"}) } else { Json::Null },
        "pre_tokenizer": rule.to_json(),
        "post_processor": framing.post_processor(),
        "decoder": byte_level(true, true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": rule.ignores_merges(),
            "vocab": vocab,
            "merges": merges(metadata, vocabulary)?,
        },
    }))
}

fn added_token(content: &str, special: bool) -> Map<String, Json> {
    let flags = [
        ("single_word", false),
        ("lstrip", false),
        ("rstrip", false),
        ("normalized", false),
        ("special", special),
    ];
    let mut map = Map::from_iter([("content".to_owned(), Json::from(content))]);
    map.extend(flags.map(|(name, flag)| (name.to_owned(), flag.into())));
    map
}

/// Pairs of tokens whose join is a token; anything else would make the tokenizer unloadable.
fn merges(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Vec<[String; 2]>> {
    let key = "tokenizer.ggml.merges";
    let merges = metadata.required(key, metadata.texts(key)?)?;
    let known = |token: &str| vocabulary.ids.contains_key(token);
    let pair = |(i, merge): (usize, &String)| match merge.split_once(' ') {
        Some((left, right)) if known(left) && known(right) && known(&format!("{left}{right}")) => {
            Ok([left.to_owned(), right.to_owned()])
        }
        _ => Err(unsupported(
            metadata,
            format!("merge {i}, {merge:?}, is not of two tokens into a third"),
        )),
    };
    merges.iter().enumerate().map(pair).collect()
}

/// Tokens put around every text.
struct Framing<'a> {
    bos: Option<(usize, &'a str)>,
    eos: Option<(usize, &'a str)>,
}

impl<'a> Framing<'a> {
    fn read(metadata: &Metadata, rule: PreTokenizer, vocabulary: &Vocabulary<'a>) -> Result<Self> {
        let space_key = "tokenizer.ggml.add_space_prefix";
        if metadata.flag(space_key)? == Some(true) {
            return Err(metadata.unsupported(space_key, "byte-level BPE adds no space"));
        }
        let token = |name: &str, by_default: bool| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            let stated = metadata.flag(&key)?;
            let token = vocabulary.special(name)?.filter(|_| stated.unwrap_or(by_default));
            if stated == Some(true) && token.is_none() {
                return Err(metadata.unsupported(&key, format!("there is no tokenizer.ggml.{name}_token_id")));
            }
            Ok(token)
        };
        Ok(Self {
            bos: token("bos", rule.adds_bos_by_default())?,
            eos: token("eos", false)?,
        })
    }

    fn post_processor(&self) -> Json {
        if self.bos.is_none() && self.eos.is_none() {
            return Json::Null;
        }
        let around = |sequence: &str, type_id: u8| {
            let special = |(_, token): (usize, &str)| json!({"SpecialToken": {"id": token, "type_id": type_id}});
            let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
            let parts = [self.bos.map(special), Some(text), self.eos.map(special)];
            parts.into_iter().flatten().collect::<Vec<Json>>()
        };
        let entry =
            |(id, token): (usize, &str)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
        let special_tokens: Map<String, Json> = [self.bos, self.eos].into_iter().flatten().map(entry).collect();
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": around("A", 0),
            "pair": pair,
            "special_tokens": special_tokens,
        })
    }
}

/// One template as a text, or several as a list of named ones, as transformers writes them.
fn chat_template(metadata: &Metadata) -> Result<Option<Json>> {
    let key = "tokenizer.chat_template";
    let Some(default) = metadata.text(key)? else {
        return Ok(None);
    };
    let mut named = vec![json!({"name": "default", "template": default})];
    for (full, _) in metadata.iter() {
        let Some(name) = full.strip_prefix("tokenizer.chat_template.") else {
            continue;
        };
        let template = metadata.required(full, metadata.text(full)?)?;
        named.push(json!({"name": name, "template": template}));
    }
    Ok(Some(if named.len() == 1 { default.into() } else { named.into() }))
}

fn ids(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<Map<String, Json>> {
    let id = |name: &str| vocabulary.special(name).map(|special| special.map(|(id, _)| id));
    let mut map = Map::new();
    if let Some(bos) = id("bos")? {
        map.insert("bos_token_id".into(), bos.into());
    }
    let mut ends = Vec::new();
    // End of text, of a turn, of a message.
    for name in ["eos", "eot", "eom"] {
        if let Some(end) = id(name)?
            && !ends.contains(&end)
        {
            ends.push(end);
        }
    }
    match ends.as_slice() {
        [] => metadata.required("tokenizer.ggml.eos_token_id", None)?,
        [end] => map.insert("eos_token_id".into(), (*end).into()),
        several => map.insert("eos_token_id".into(), several.into()),
    };
    if let Some(pad) = id("padding")? {
        map.insert("pad_token_id".into(), pad.into());
    }
    Ok(map)
}

fn unsupported(metadata: &Metadata, problem: String) -> Error {
    Error::UnsupportedTokenizer {
        path: metadata.path().to_path_buf(),
        problem,
    }
}

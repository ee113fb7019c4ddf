//! A tokenizer as a model folder holds it: token ids with byte ranges, end-of-text ids, streamed decoding.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::guard::guarded;

/// Text to token ids and back, with what the model folder says about special tokens.
///
/// Reads `tokenizer.json`, and, where they exist, `tokenizer_config.json`, `generation_config.json` and `config.json`.
/// Truncation, padding and trimmed offsets that a `tokenizer.json` may switch on are switched off: lengths are the
/// plan's business, and byte ranges must cover the text.
///
/// # Errors
/// [`Error::Tokenizer`] with the file at fault.
///
/// # Example
/// ```
/// # let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fixtures/tiny");
/// let tokenizer = planish_data::Tokenizer::from_dir(dir.as_ref())?;
/// let ids = tokenizer.encode("one two")?.ids;
/// assert_eq!(tokenizer.decode(&ids)?, "one two");
/// assert!(tokenizer.is_eos(tokenizer.token_to_id("<|im_end|>").unwrap()));
/// # Ok::<(), planish_data::Error>(())
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    digest: String,
    special_strings: HashMap<&'static str, String>,
    additional_special: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    eos_ids: BTreeSet<u32>,
    /// Of these, the ends that the model folder does not name.
    learned_ends: BTreeSet<u32>,
    add_bos: Option<bool>,
    added: HashMap<u32, AddedToken>,
    model_vocab_size: Option<usize>,
}

#[derive(Clone)]
struct AddedToken {
    content: String,
    special: bool,
    strips: bool,
}

/// Token ids with the bytes of the text that each stands for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Encoded {
    /// The ids.
    pub ids: Vec<u32>,
    /// The byte range of each; tokens that share one character have the same range, tokens that stand for no text an
    /// empty one.
    pub ranges: Vec<Range<usize>>,
}

/// The special tokens that chat templates may name.
const SPECIAL_NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

impl Tokenizer {
    /// Opens the tokenizer of a model folder.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => broken(&path, "there is no such file", "use a folder with tokenizer.json"),
            _ => Error::io(&path, source),
        })?;
        Self::from_parts(
            &path,
            &bytes,
            optional_json(&dir.join("tokenizer_config.json"))?.as_ref(),
            optional_json(&dir.join("generation_config.json"))?.as_ref(),
            optional_json(&dir.join("config.json"))?.as_ref(),
        )
    }

    /// Builds a tokenizer from the bytes of `tokenizer.json` and the parsed configuration files; `path` is for errors.
    pub fn from_parts(
        path: &Path,
        tokenizer_json: &[u8],
        tokenizer_config: Option<&Value>,
        generation_config: Option<&Value>,
        model_config: Option<&Value>,
    ) -> Result<Self> {
        const DAMAGED: &str = "take the file from the model's source again";
        let inner = guarded(|| read(tokenizer_json)).flatten();
        let inner = inner.map_err(|error| broken(path, format!("not a tokenizer: {error}"), DAMAGED))?;
        let added = inner
            .get_added_tokens_decoder()
            .into_iter()
            .map(|(id, token)| {
                let strips = token.lstrip || token.rstrip;
                (
                    id,
                    AddedToken {
                        content: token.content,
                        special: token.special,
                        strips,
                    },
                )
            })
            .collect();
        let mut tokenizer = Self {
            inner,
            path: path.to_path_buf(),
            digest: crate::hex(&Sha256::digest(tokenizer_json)),
            special_strings: HashMap::new(),
            additional_special: Vec::new(),
            bos: None,
            eos: None,
            eos_ids: BTreeSet::new(),
            learned_ends: BTreeSet::new(),
            add_bos: None,
            added,
            model_vocab_size: None,
        };
        tokenizer.read_tokenizer_config(tokenizer_config);
        tokenizer.read_model_configs(generation_config, model_config);
        Ok(tokenizer)
    }

    /// Encodes rendered text: special tokens written in the text are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Encoded> {
        self.encode_with(text, false)
    }

    /// Encodes plain text by the tokenizer's own rule, which may put a beginning-of-text token in front.
    pub fn encode_text(&self, text: &str) -> Result<Encoded> {
        let mut encoded = self.encode_with(text, true)?;
        let starts_with_bos = self.bos.is_some() && encoded.ids.first().copied() == self.bos;
        match (self.add_bos, self.bos) {
            (Some(true), Some(bos)) if !starts_with_bos => {
                encoded.ids.insert(0, bos);
                encoded.ranges.insert(0, 0..0);
            }
            (Some(false), _) if starts_with_bos && encoded.ranges[0].is_empty() => {
                encoded.ids.remove(0);
                encoded.ranges.remove(0);
            }
            _ => {}
        }
        Ok(encoded)
    }

    /// Encodes text in which control tokens are no more than their characters.
    pub(crate) fn encode_plain(&self, text: &str) -> Result<Encoded> {
        let mut plain = self.inner.clone();
        plain.set_encode_special_tokens(true);
        let encoded = guarded(|| plain.encode(text, false).map_err(|e| e.to_string())).flatten();
        self.encoded(text, encoded)
    }

    /// Decodes ids, without the special tokens among them.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, true)
    }

    /// Decodes ids with every special token written out.
    pub fn decode_all(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, false)
    }

    /// Decodes ids one after another as a model generates them.
    pub fn stream(&self) -> DecodeStream<'_> {
        DecodeStream {
            tokenizer: self,
            ids: Vec::new(),
            printed: String::new(),
        }
    }

    /// The id of a token, if the vocabulary has it.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token with an id, as the vocabulary spells it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens in the vocabulary, added ones included; the model's own table may be longer.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Rows of the model's embedding, when its `config.json` lies beside the tokenizer.
    pub(crate) fn model_vocab_size(&self) -> Option<usize> {
        self.model_vocab_size
    }

    /// The beginning-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text; appended to text rows.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Every id at which generation stops, from all three configuration files.
    pub fn eos_ids(&self) -> &BTreeSet<u32> {
        &self.eos_ids
    }

    /// Whether generation stops at this id.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos_ids.contains(&id)
    }

    /// Makes generation stop at one more id, such as the end of a turn that the model folder does not name.
    pub fn also_end_at(&mut self, id: u32) {
        if self.eos_ids.insert(id) {
            self.learned_ends.insert(id);
        }
    }

    /// Whether the model folder itself names this id as an end.
    pub(crate) fn is_named_end(&self, id: u32) -> bool {
        self.is_eos(id) && !self.learned_ends.contains(&id)
    }

    /// SHA-256 of `tokenizer.json`, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.digest
    }

    /// The special tokens by the names that templates use (`bos_token`, …).
    pub(crate) fn special_strings(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.special_strings.iter().map(|(name, token)| (*name, token.as_str()))
    }

    pub(crate) fn additional_special(&self) -> &[String] {
        &self.additional_special
    }

    /// The special token at the end of `text`, if there is one: the mark that ends a turn.
    pub(crate) fn special_suffix(&self, text: &str) -> Option<(u32, &str)> {
        self.added
            .iter()
            .filter(|(id, token)| (token.special || self.is_eos(**id)) && !token.content.is_empty())
            .filter(|(_, token)| text.ends_with(&token.content))
            .max_by_key(|(_, token)| token.content.len())
            .map(|(id, token)| (*id, token.content.as_str()))
    }

    /// The bytes of the first control token that is written out in a text.
    pub(crate) fn next_control(&self, text: &str) -> Option<Range<usize>> {
        let controls = self
            .added
            .values()
            .filter(|token| token.special && !token.content.is_empty());
        let places = controls.filter_map(|token| text.find(&token.content).map(|at| at..at + token.content.len()));
        places.min_by_key(|place| (place.start, usize::MAX - place.end))
    }

    /// The first id that the model has no embedding for, with its position.
    pub(crate) fn outside_model(&self, ids: &[u32]) -> Option<(usize, u32)> {
        let limit = self.model_vocab_size?;
        ids.iter().position(|id| *id as usize >= limit).map(|at| (at, ids[at]))
    }

    fn decode_with(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        let decoded = guarded(|| self.inner.decode(ids, skip_special_tokens).map_err(|e| e.to_string())).flatten();
        decoded.map_err(|reason| Error::Decode {
            id: ids.first().copied().unwrap_or_default(),
            reason,
        })
    }

    fn encode_with(&self, text: &str, add_special_tokens: bool) -> Result<Encoded> {
        let encoded = guarded(|| self.inner.encode(text, add_special_tokens).map_err(|e| e.to_string())).flatten();
        self.encoded(text, encoded)
    }

    fn encoded(&self, text: &str, encoded: std::result::Result<tokenizers::Encoding, String>) -> Result<Encoded> {
        let encoding = encoded.map_err(|error| Error::Tokenizer {
            path: self.path.clone(),
            reason: format!("cannot encode {:?}: {error}", text.chars().take(40).collect::<String>()),
            fix: "check that tokenizer.json belongs to this model",
        })?;
        let ids = encoding.get_ids().to_vec();
        let ranges = encoding
            .get_offsets()
            .iter()
            .zip(&ids)
            .map(|((start, end), id)| self.without_stripped_space(text, *start..*end, *id))
            .collect();
        Ok(Encoded { ids, ranges })
    }

    /// An added token that swallows white space beside it claims that space as its text; its mark is what counts.
    fn without_stripped_space(&self, text: &str, range: Range<usize>, id: u32) -> Range<usize> {
        let Some(token) = self.added.get(&id).filter(|token| token.strips) else {
            return range;
        };
        match text.get(range.clone()).and_then(|slice| slice.find(&token.content)) {
            Some(at) => range.start + at..range.start + at + token.content.len(),
            None => range,
        }
    }

    fn read_tokenizer_config(&mut self, config: Option<&Value>) {
        let Some(config) = config else { return };
        for name in SPECIAL_NAMES {
            if let Some(token) = config.get(name).and_then(token_string) {
                self.special_strings.insert(name, token.to_string());
            }
        }
        let listed = config.get("additional_special_tokens").and_then(Value::as_array);
        self.additional_special = listed
            .into_iter()
            .flatten()
            .filter_map(token_string)
            .map(str::to_string)
            .collect();
        self.bos = self
            .special_strings
            .get("bos_token")
            .and_then(|token| self.token_to_id(token));
        self.eos = self
            .special_strings
            .get("eos_token")
            .and_then(|token| self.token_to_id(token));
        self.eos_ids.extend(self.eos);
        self.add_bos = config.get("add_bos_token").and_then(Value::as_bool);
    }

    fn read_model_configs(&mut self, generation_config: Option<&Value>, model_config: Option<&Value>) {
        let text_config = model_config.and_then(|config| config.get("text_config"));
        for config in [generation_config, model_config, text_config].into_iter().flatten() {
            let ids = ids_of(config.get("eos_token_id"));
            self.eos = self.eos.or(ids.first().copied());
            self.eos_ids.extend(ids);
            self.bos = self.bos.or(ids_of(config.get("bos_token_id")).first().copied());
        }
        self.model_vocab_size = [model_config, text_config]
            .into_iter()
            .flatten()
            .find_map(|config| config.get("vocab_size").and_then(Value::as_u64))
            .map(|size| size as usize);
        for (name, id) in [("bos_token", self.bos), ("eos_token", self.eos)] {
            if let (false, Some(token)) = (
                self.special_strings.contains_key(name),
                id.and_then(|id| self.id_to_token(id)),
            ) {
                self.special_strings.insert(name, token);
            }
        }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("vocab_size", &self.vocab_size())
            .field("eos_ids", &self.eos_ids)
            .finish_non_exhaustive()
    }
}

/// Turns generated ids into text piece by piece, never in the middle of a character.
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Ids since the last piece that was given out, after a few of context.
    ids: Vec<u32>,
    /// What those ids spell as far as it was given out.
    printed: String,
}

impl DecodeStream<'_> {
    /// Adds one id; gives the new text once it is complete.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids)?;
        // A replacement character at the end is a character of which bytes are still to come.
        if text.ends_with('\u{fffd}') || text.len() <= self.printed.len() {
            return Ok(None);
        }
        let piece = text[floor(&text, self.printed.len())..].to_string();
        self.keep_context(text)?;
        Ok(Some(piece))
    }

    /// The rest at the end of generation, even where a character was never finished.
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids)?;
        Ok(text[floor(&text, self.printed.len())..].to_string())
    }

    /// Decoders may treat the first token of a text apart (a dropped leading space), so some context stays in front.
    fn keep_context(&mut self, text: String) -> Result<()> {
        const CONTEXT: usize = 4;
        if self.ids.len() < 64 {
            self.printed = text;
            return Ok(());
        }
        let context = self.ids.split_off(self.ids.len() - CONTEXT);
        self.printed = self.tokenizer.decode(&context)?;
        self.ids = context;
        Ok(())
    }
}

fn floor(text: &str, mut at: usize) -> usize {
    at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

/// A tokenizer that cuts nothing, pads nothing and covers the whole text.
fn read(tokenizer_json: &[u8]) -> std::result::Result<tokenizers::Tokenizer, String> {
    // The tokenizers crate panics when a decoder is no JSON, with a message that helps nobody.
    serde_json::from_slice::<serde::de::IgnoredAny>(tokenizer_json).map_err(|error| error.to_string())?;
    let mut inner = tokenizers::Tokenizer::from_bytes(tokenizer_json).map_err(|error| error.to_string())?;
    inner.with_truncation(None).map_err(|error| error.to_string())?;
    inner.with_padding(None);
    cover_whole_text(&mut inner)?;
    Ok(inner)
}

/// Byte-level post-processors may trim white space from the range of a token that stands for it. Masking needs to know
/// the bytes that a token really covers, so trimming is switched off wherever it occurs.
fn cover_whole_text(tokenizer: &mut tokenizers::Tokenizer) -> std::result::Result<(), String> {
    let Some(processor) = tokenizer.get_post_processor() else {
        return Ok(());
    };
    let mut json = serde_json::to_value(processor).map_err(|error| error.to_string())?;
    if !switch_off_trimming(&mut json) {
        return Ok(());
    }
    let processor: tokenizers::PostProcessorWrapper =
        serde_json::from_value(json).map_err(|error| error.to_string())?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

fn switch_off_trimming(json: &mut Value) -> bool {
    match json {
        Value::Object(map) => {
            let mut changed = false;
            for (key, value) in map.iter_mut() {
                if key == "trim_offsets" && *value == Value::Bool(true) {
                    *value = Value::Bool(false);
                    changed = true;
                } else {
                    changed |= switch_off_trimming(value);
                }
            }
            changed
        }
        Value::Array(list) => list
            .iter_mut()
            .fold(false, |changed, value| switch_off_trimming(value) | changed),
        _ => false,
    }
}

/// A JSON file that need not be there; a byte-order mark before it is passed over.
pub(crate) fn optional_json(path: &Path) -> Result<Option<Value>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(path, error)),
    };
    let json = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    serde_json::from_slice(json).map(Some).map_err(|error| {
        broken(
            path,
            format!("not valid JSON: {error}"),
            "take the file from the model's source again",
        )
    })
}

fn token_string(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
}

fn ids_of(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

fn broken(path: &Path, reason: impl Into<String>, fix: &'static str) -> Error {
    Error::Tokenizer {
        path: path.to_path_buf(),
        reason: reason.into(),
        fix,
    }
}

//! What a model's `config.json` says: its architecture, context, special tokens and quantisation.
//!
//! Absent keys take the defaults of the reference implementation (the Python package transformers), family by family. A
//! key that changes the computation in a way that the family's reader does not use is an error that names it: ignoring it would give
//! wrong numbers. The file comes from strangers, so every number is checked.

mod foreign;
pub(crate) mod keys;
mod quantization;
pub(crate) mod rope;
mod tensors;

#[cfg(test)]
mod tests;

use std::path::Path;

use serde_json::Value;

pub use crate::arch::LinearSpec;
pub use quantization::{LayerQuantization, QuantizationConfig, QuantizationMode};
pub use tensors::TensorSpec;

use crate::arch::Arch;
use crate::families::{self, Family};
use crate::{Error, Result};
use keys::{Keys, describe};

/// No real `config.json` comes near this size.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Everything that decides the computation of a model, and nothing else.
///
/// ```
/// use planish_core::model_config::ModelConfig;
/// let json = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
///                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#;
/// let config = ModelConfig::from_json_str(json, "config.json".as_ref())?;
/// assert_eq!((config.family.model_type, config.arch.layers.len()), ("llama", 2));
/// assert_eq!(config.expected_tensors()[0].name, "model.embed_tokens.weight");
/// # Ok::<(), planish_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Who read the file.
    pub family: &'static Family,
    /// What is computed.
    pub arch: Arch,
    /// Longest context the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text or a turn; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// How the weights are quantised, in MLX's form.
    pub quantization: Option<QuantizationConfig>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// As [`from_json_str`](Self::from_json_str), and [`Error::Read`], [`Error::TooLarge`].
    pub fn from_file(path: &Path) -> Result<Self> {
        let bytes = std::fs::metadata(path).map_err(|e| Error::read(path, e))?.len();
        if bytes > MAX_CONFIG_BYTES {
            return Err(Error::TooLarge {
                path: path.to_path_buf(),
                bytes,
                limit: MAX_CONFIG_BYTES,
            });
        }
        let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
        // Programs on Windows put a byte-order mark before it.
        Self::from_json_str(text.trim_start_matches('\u{feff}'), path)
    }

    /// Reads the text of a `config.json`; `origin` is the path that errors name.
    ///
    /// # Errors
    /// [`Error::Json`]; [`Error::ModelKey`] for an absent key or an impossible value; [`Error::UnsupportedModel`] for a
    /// computation that planish does not have.
    pub fn from_json_str(text: &str, origin: &Path) -> Result<Self> {
        let value: Value = serde_json::from_str(text).map_err(|error| Error::Json {
            path: origin.to_path_buf(),
            line: error.line(),
            column: error.column(),
            message: error.to_string(),
        })?;
        match &value {
            Value::Object(map) => Self::from_keys(&Keys::root(origin, map)),
            other => Err(Error::ModelKey {
                path: origin.to_path_buf(),
                key: "(whole file)".into(),
                found: describe(other),
                expected: "a JSON object".into(),
            }),
        }
    }

    fn from_keys(root: &Keys<'_>) -> Result<Self> {
        let family = families::of(root)?;
        let inner = if family.is_nested {
            root.object("text_config")?
        } else {
            None
        };
        let keys = inner.as_ref().unwrap_or(root);
        let (mut arch, max_position_embeddings) = (family.read)(keys)?;
        if family.is_nested && !keys.contains("tie_word_embeddings") {
            arch.head.is_tied = root.flag("tie_word_embeddings")?.unwrap_or(arch.head.is_tied);
        }
        foreign::refuse(keys, family)?;
        let of_either = |name: &str| match keys.token_ids(name)? {
            ids if ids.is_empty() => root.token_ids(name),
            ids => Ok(ids),
        };
        let config = Self {
            family,
            arch,
            max_position_embeddings,
            bos_token_id: of_either("bos_token_id")?.first().copied(),
            eos_token_ids: of_either("eos_token_id")?,
            quantization: quantization::read(root)?,
        };
        quantization::check_shapes(root, &config)?;
        Ok(config)
    }
}

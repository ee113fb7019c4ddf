//! What a model is, as its Hugging Face `config.json` says, and the name and shape of every weight that follows.
//!
//! Absent keys take the defaults of the reference implementation (the Python package transformers), family by family. A
//! key that changes the computation in a way planish does not have is an error that names it: ignoring it would give
//! wrong numbers. The file comes from strangers, so every number is checked.

mod keys;
mod parse;
mod quantization;
mod tensors;

use std::path::Path;

pub use quantization::{LayerQuantization, QuantizationConfig, QuantizationMode};
pub use tensors::{LinearSpec, TensorSpec};

use crate::{Error, Result};

/// No real `config.json` comes near this size.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A family of decoders that share one computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModelFamily {
    /// Llama 1 to 3 and models of the same shape, SmolLM2 among them.
    Llama,
    /// Mistral 7B and its kin: Llama with a sliding attention window.
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3, dense: Llama with a norm on each head's q and k.
    Qwen3,
}

impl ModelFamily {
    /// Every supported family.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// The word that `config.json` has under `model_type`.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// Everything that decides the computation of a model, and nothing else.
///
/// ```
/// use planish_core::model_config::{ModelConfig, ModelFamily};
/// let json = r#"{"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
///                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}"#;
/// let config = ModelConfig::from_json_str(json, "config.json".as_ref())?;
/// assert_eq!((config.family, config.head_dim), (ModelFamily::Llama, 16));
/// assert_eq!(config.expected_tensors()[0].name, "model.embed_tokens.weight");
/// # Ok::<(), planish_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which computation.
    pub family: ModelFamily,
    /// Width of the residual stream, `d`.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; even. `n_heads · head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Longest context the model was trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square inside every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// The head is the transposed embedding; there is no `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// q, k and v projections have a bias.
    pub attention_qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub attention_output_bias: bool,
    /// The three feed-forward projections have a bias.
    pub mlp_bias: bool,
    /// RMSNorm over each head of q and k, before the rotation.
    pub qk_norm: bool,
    /// A token attends to itself and the `sliding_window − 1` tokens before it, in every block; `None` = to all.
    pub sliding_window: Option<usize>,
    /// Token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text or a turn; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// How the weights are quantised, in MLX's form.
    pub quantization: Option<QuantizationConfig>,
}

/// Rotary position embedding: angle of pair `i` at position `p` is `p · theta^(−2i / head_dim)`, then scaled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f32,
    /// Stretching for contexts longer than the original.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between.
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept; greater than `low_freq_factor`.
        high_freq_factor: f32,
        /// Context before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
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
        Self::from_json_str(&text, path)
    }

    /// Reads the text of a `config.json`; `origin` is the path that errors name.
    ///
    /// # Errors
    /// [`Error::Json`]; [`Error::ModelKey`] for an absent key or an impossible value; [`Error::UnsupportedModel`] for a
    /// computation that planish does not have.
    pub fn from_json_str(text: &str, origin: &Path) -> Result<Self> {
        parse::model_config(text, origin)
    }

    /// Query heads that share one key and value head.
    pub fn n_queries_per_kv(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
}

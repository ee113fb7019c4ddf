//! What dense decoders have in common: sizes under the usual keys, and the parts of a layer under the usual names.

use crate::Result;
use crate::arch::{
    Activation, Arch, Attention, FeedForward, GateUp, Head, Layer, Linear, Mixer, Norm, NormKind, QkNorm, QkNormScope,
    QkvProjections, Residual, Rope,
};
use crate::model_config::keys::{Keys, describe};

/// Larger than any model, small enough that products of two sizes fit a 64-bit integer with room.
const MAX_DIMS: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
const MAX_CONTEXT: usize = 1 << 30;
/// What the reference implementations take where a file has no `sliding_window`.
const DEFAULT_WINDOW: usize = 4096;

/// What a family takes where the file is silent; `None` = the file must say it.
pub(super) struct Defaults {
    /// Rows of the embedding.
    pub(super) vocab_size: Option<usize>,
    /// Query heads.
    pub(super) n_heads: Option<usize>,
    /// Key and value heads; `None` = as many as query heads.
    pub(super) n_kv_heads: Option<usize>,
    /// Width of a head; `None` = the hidden size by the number of heads.
    pub(super) head_dim: Option<usize>,
    /// Longest context.
    pub(super) context: usize,
    /// Whether the head is the embedding.
    pub(super) is_tied: bool,
}

impl Defaults {
    /// Those of Llama, from which others differ.
    pub(super) const LLAMA: Self = Self {
        vocab_size: None,
        n_heads: None,
        n_kv_heads: None,
        head_dim: None,
        context: 2048,
        is_tied: false,
    };
}

/// The sizes of a dense decoder.
pub(super) struct Sizes {
    pub(super) hidden_size: usize,
    pub(super) intermediate_size: usize,
    pub(super) n_layers: usize,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab_size: usize,
    pub(super) context: usize,
    pub(super) is_tied: bool,
    pub(super) eps: f32,
}

/// Which projections of an attention have a bias.
#[derive(Clone, Copy)]
pub(super) struct Biases {
    /// Query, key and value.
    pub(super) reading: bool,
    /// The output.
    pub(super) output: bool,
}

impl Biases {
    /// All of them, or none.
    pub(super) fn of_all(has_bias: bool) -> Self {
        Self {
            reading: has_bias,
            output: has_bias,
        }
    }
}

impl Sizes {
    pub(super) fn read(keys: &Keys<'_>, defaults: &Defaults) -> Result<Self> {
        let hidden_size = keys.size("hidden_size", MAX_DIMS)?;
        let n_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
        let n_heads = size_or(keys, "num_attention_heads", MAX_HEADS, defaults.n_heads)?;
        let context = keys.optional_size("max_position_embeddings", MAX_CONTEXT)?;
        let eps = keys.positive("rms_norm_eps", 1.0)?;
        Ok(Self {
            hidden_size,
            intermediate_size: keys.size("intermediate_size", MAX_DIMS)?,
            n_layers,
            n_heads,
            n_kv_heads: n_kv_heads(keys, n_heads, defaults)?,
            head_dim: head_dim(keys, hidden_size, n_heads, defaults)?,
            vocab_size: size_or(keys, "vocab_size", MAX_DIMS, defaults.vocab_size)?,
            context: context.unwrap_or(defaults.context),
            is_tied: keys.flag("tie_word_embeddings")?.unwrap_or(defaults.is_tied),
            eps: eps.unwrap_or(1e-6) as f32,
        })
    }

    /// Attention to everything, scores by `1 / sqrt(head_dim)`, no norms of heads.
    pub(super) fn attention(&self, rope: Option<Rope>, biases: Biases) -> Attention {
        let (d, heads) = (self.hidden_size, |n: usize| n * self.head_dim);
        let reading = |name, n| linear(name, d, heads(n), biases.reading);
        Attention {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
            projections: QkvProjections::Separate {
                query: reading("self_attn.q_proj", self.n_heads),
                key: reading("self_attn.k_proj", self.n_kv_heads),
                value: reading("self_attn.v_proj", self.n_kv_heads),
            },
            output: linear("self_attn.o_proj", heads(self.n_heads), d, biases.output),
            qk_norm: None,
            rope,
            window: None,
            scale: (self.head_dim as f32).sqrt().recip(),
            softcap: None,
        }
    }

    /// Norms of each head's q and k.
    pub(super) fn head_norms(&self, kind: NormKind) -> Option<QkNorm> {
        let norm = |name| self.norm(name, self.head_dim, kind);
        Some(QkNorm {
            scope: QkNormScope::Head,
            query: norm("self_attn.q_norm"),
            key: norm("self_attn.k_norm"),
        })
    }

    pub(super) fn gated(&self, activation: Activation, has_bias: bool) -> FeedForward {
        let (d, f) = (self.hidden_size, self.intermediate_size);
        FeedForward::Gated {
            activation,
            gate_up: GateUp::Separate {
                gate: linear("mlp.gate_proj", d, f, has_bias),
                up: linear("mlp.up_proj", d, f, has_bias),
            },
            down: linear("mlp.down_proj", f, d, has_bias),
        }
    }

    pub(super) fn norm(&self, name: &'static str, dims: usize, kind: NormKind) -> Norm {
        Norm {
            name,
            dims,
            eps: self.eps,
            kind,
        }
    }

    /// Llama's layer: a norm before each half.
    pub(super) fn layer(&self, attention: Attention, feed_forward: FeedForward) -> Layer {
        let norm = |name| Some(self.norm(name, self.hidden_size, PLAIN_RMS));
        Layer {
            mixer: Mixer::Attention(attention),
            feed_forward,
            pre_mixer_norm: norm("input_layernorm"),
            post_mixer_norm: None,
            pre_feed_forward_norm: norm("post_attention_layernorm"),
            post_feed_forward_norm: None,
            residual: Residual::Sequential,
            residual_factor: 1.0,
        }
    }

    /// The whole of `layers`, with the context.
    pub(super) fn arch(&self, layers: Vec<Layer>) -> (Arch, usize) {
        let arch = Arch {
            prefix: "",
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            embedding_factor: 1.0,
            layers,
            norm: self.norm("model.norm", self.hidden_size, PLAIN_RMS),
            head: Head {
                is_tied: self.is_tied,
                factor: 1.0,
                softcap: None,
            },
        };
        (arch, self.context)
    }

    /// Layers that differ in their windows alone.
    pub(super) fn windowed(
        &self,
        windows: &[Option<usize>],
        attention: &Attention,
        feed_forward: &FeedForward,
    ) -> Vec<Layer> {
        let layer = |window: &Option<usize>| {
            let attention = Attention {
                window: *window,
                ..attention.clone()
            };
            self.layer(attention, feed_forward.clone())
        };
        windows.iter().map(layer).collect()
    }
}

/// A root-mean-square norm whose weight is the gain.
pub(super) const PLAIN_RMS: NormKind = NormKind::Rms { offset: 0.0 };

/// The value of `sliding_window`: absent = 4096, null = none.
pub(super) fn window_or_default(keys: &Keys<'_>) -> Result<Option<usize>> {
    let stated = keys.optional_size("sliding_window", MAX_CONTEXT)?;
    Ok(match keys.contains("sliding_window") {
        true => stated,
        false => Some(DEFAULT_WINDOW),
    })
}

/// Each layer's window: `layer_types` says which layers have one, or else `is_windowed` does.
pub(super) fn windows(
    keys: &Keys<'_>,
    n_layers: usize,
    window: Option<usize>,
    is_windowed: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>> {
    let Some(value) = keys.present("layer_types") else {
        return Ok((0..n_layers)
            .map(|layer_idx| window.filter(|_| is_windowed(layer_idx)))
            .collect());
    };
    let types = value.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != n_layers {
        let rule = format!("a list of {n_layers} words, one per layer");
        return Err(keys.wrong("layer_types", &describe(value), &rule));
    }
    let of_type = |layer_type: &serde_json::Value| match layer_type.as_str() {
        Some("full_attention") => Ok(None),
        Some("sliding_attention") if window.is_some() => Ok(window),
        Some("sliding_attention") => Err(keys.missing("sliding_window", "the window of the sliding_attention layers")),
        _ => {
            let reason = format!(
                "{} is neither full_attention nor sliding_attention",
                describe(layer_type)
            );
            Err(keys.unsupported("layer_types", &reason))
        }
    };
    types.iter().map(of_type).collect()
}

/// Qwen's windows: off unless `use_sliding_window`, then from block `max_window_layers` on.
pub(super) fn qwen_windows(keys: &Keys<'_>, n_layers: usize) -> Result<Vec<Option<usize>>> {
    let window = match keys.flag("use_sliding_window")? {
        Some(true) => window_or_default(keys)?,
        _ => None,
    };
    let first = keys.optional_count("max_window_layers", MAX_LAYERS)?.unwrap_or(28);
    windows(keys, n_layers, window, |layer_idx| layer_idx >= first)
}

/// The activation under `key`; `default` where it is absent.
pub(super) fn activation(keys: &Keys<'_>, key: &str, default: Activation) -> Result<Activation> {
    match keys.text(key)? {
        None => Ok(default),
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
        Some(_) => Err(keys.unsupported(key, "planish has silu and gelu_pytorch_tanh")),
    }
}

pub(super) fn linear(name: &'static str, input_dims: usize, output_dims: usize, has_bias: bool) -> Linear {
    Linear {
        name,
        input_dims,
        output_dims,
        has_bias,
    }
}

fn size_or(keys: &Keys<'_>, key: &str, max: usize, default: Option<usize>) -> Result<usize> {
    match (keys.contains(key), default) {
        (false, Some(default)) => Ok(default),
        _ => keys.size(key, max),
    }
}

fn n_kv_heads(keys: &Keys<'_>, n_heads: usize, defaults: &Defaults) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    let n_kv_heads = match (keys.optional_size(KEY, MAX_HEADS)?, keys.contains(KEY)) {
        (Some(n), _) => n,
        (None, true) => n_heads,
        (None, false) => defaults.n_kv_heads.unwrap_or(n_heads),
    };
    if !n_heads.is_multiple_of(n_kv_heads) {
        let rule = format!("a divisor of num_attention_heads = {n_heads}");
        return Err(keys.wrong(KEY, &n_kv_heads.to_string(), &rule));
    }
    Ok(n_kv_heads)
}

fn head_dim(keys: &Keys<'_>, hidden_size: usize, n_heads: usize, defaults: &Defaults) -> Result<usize> {
    const KEY: &str = "head_dim";
    let head_dim = match keys.optional_size(KEY, MAX_HEADS)?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        None => {
            let rule = format!("a multiple of num_attention_heads = {n_heads}, or an explicit head_dim");
            return Err(keys.wrong("hidden_size", &hidden_size.to_string(), &rule));
        }
    };
    match head_dim.is_multiple_of(2) {
        true => Ok(head_dim),
        false => Err(keys.wrong(
            KEY,
            &head_dim.to_string(),
            "an even number (rotary embedding turns pairs)",
        )),
    }
}

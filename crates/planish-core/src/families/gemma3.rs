//! Gemma 3, text: norms before and after each half that hold the gain minus one, norms on q and k, GELU, an embedding times
//! `√hidden_size`, windows in most layers, and two rotations: one for layers with a window, one for those without.
//!
//! `gemma3_text` is the model alone; `gemma3` has it under `text_config`, beside a vision tower that is not read.

use super::Family;
use super::dense::{Biases, Defaults, Sizes, activation, window_or_default, windows};
use crate::Result;
use crate::arch::{Activation, Arch, Attention, FeedForward, Layer, NormKind, Rope};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static TEXT: Family = Family {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

pub(super) static WITH_VISION: Family = Family {
    model_type: "gemma3",
    class: "Gemma3ForConditionalGeneration",
    gguf: None,
    anemll: None,
    is_nested: true,
    other_parts: &["vision_tower.*", "multi_modal_projector.*"],
    read: |keys| {
        let (arch, context) = read(keys)?;
        let prefix = "language_model.";
        Ok((Arch { prefix, ..arch }, context))
    },
};

/// Published files leave out what equals these.
const DEFAULTS: Defaults = Defaults {
    vocab_size: Some(262_208),
    n_heads: Some(8),
    n_kv_heads: Some(4),
    head_dim: Some(256),
    context: 131_072,
    is_tied: true,
};

/// A root-mean-square norm whose weight is the gain minus one.
pub(super) const SHIFTED_RMS: NormKind = NormKind::Rms { offset: 1.0 };

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let pattern = keys.optional_size("sliding_window_pattern", 1 << 12)?.unwrap_or(6);
    let is_windowed = |layer_idx: usize| !(layer_idx + 1).is_multiple_of(pattern);
    let windows = windows(keys, sizes.n_layers, window_or_default(keys)?, is_windowed)?;
    let (full, local) = ropes(keys, &sizes)?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let attention = Attention {
        qk_norm: sizes.head_norms(SHIFTED_RMS),
        scale: query_scale(keys)?,
        softcap: softcap(keys, "attn_logit_softcapping", None)?,
        ..sizes.attention(None, biases)
    };
    let feed_forward = sizes.gated(activation(keys, "hidden_activation", Activation::GeluTanh)?, false);
    let layer = |window: Option<usize>| {
        let rope = if window.is_some() { &local } else { &full };
        let attention = Attention {
            window,
            rope: Some(rope.clone()),
            ..attention.clone()
        };
        with_four_norms(&sizes, attention, feed_forward.clone())
    };
    let (mut arch, context) = arch(&sizes, windows.into_iter().map(layer).collect());
    arch.head.softcap = softcap(keys, "final_logit_softcapping", None)?;
    Ok((arch, context))
}

/// `query_pre_attn_scalar^(−1/2)`.
pub(super) fn query_scale(keys: &Keys<'_>) -> Result<f32> {
    let scalar = keys.positive("query_pre_attn_scalar", 1e6)?.unwrap_or(256.0);
    Ok(scalar.sqrt().recip() as f32)
}

/// A cap: absent = `default`, null = none.
pub(super) fn softcap(keys: &Keys<'_>, key: &str, default: Option<f32>) -> Result<Option<f32>> {
    let stated = keys.positive(key, 1e6)?.map(|cap| cap as f32);
    Ok(if keys.contains(key) { stated } else { default })
}

/// A layer with norms before and after each half.
pub(super) fn with_four_norms(sizes: &Sizes, attention: Attention, feed_forward: FeedForward) -> Layer {
    let norm = |name| Some(sizes.norm(name, sizes.hidden_size, SHIFTED_RMS));
    Layer {
        pre_mixer_norm: norm("input_layernorm"),
        post_mixer_norm: norm("post_attention_layernorm"),
        pre_feed_forward_norm: norm("pre_feedforward_layernorm"),
        post_feed_forward_norm: norm("post_feedforward_layernorm"),
        ..sizes.layer(attention, feed_forward)
    }
}

/// The whole of `layers`, with the context: the embedding scaled, the last norm as the others.
pub(super) fn arch(sizes: &Sizes, layers: Vec<Layer>) -> (Arch, usize) {
    let (mut arch, context) = sizes.arch(layers);
    arch.embedding_factor = (sizes.hidden_size as f64).sqrt() as f32;
    arch.norm.kind = SHIFTED_RMS;
    (arch, context)
}

/// The rotations of layers without and with a window: only the first is ever stretched, unless a file says otherwise.
fn ropes(keys: &Keys<'_>, sizes: &Sizes) -> Result<(Rope, Rope)> {
    let (head_dim, context) = (sizes.head_dim, sizes.context);
    let mut full = match RopeSettings::of_type(keys, "full_attention", head_dim, context)? {
        Some(settings) => settings,
        None => RopeSettings::new(keys, head_dim, context)?,
    };
    full.theta = 1_000_000.0;
    let mut local = match RopeSettings::of_type(keys, "sliding_attention", head_dim, context)? {
        Some(settings) => settings,
        None => RopeSettings::silent(keys, head_dim, context),
    };
    local.theta_key = "rope_local_base_freq";
    Ok((full.read()?, local.read()?))
}

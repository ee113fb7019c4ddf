//! OLMo 2: norms after each half and none before, and norms of q and k over all heads together.

use super::Family;
use super::dense::{Biases, Defaults, PLAIN_RMS, Sizes, activation};
use crate::Result;
use crate::arch::{Activation, Arch, Attention, FeedForward, Layer, QkNorm, QkNormScope};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "olmo2",
    class: "Olmo2ForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = sizes(keys)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let feed_forward = sizes.gated(activation(keys, "hidden_act", Activation::Silu)?, false);
    let layer = layer(&sizes, sizes.attention(Some(rope), biases), feed_forward);
    Ok(sizes.arch(vec![layer; sizes.n_layers]))
}

/// The usual keys; an absent epsilon is 1e-5.
pub(super) fn sizes(keys: &Keys<'_>) -> Result<Sizes> {
    let mut sizes = Sizes::read(keys, &Defaults::LLAMA)?;
    if !keys.contains("rms_norm_eps") {
        sizes.eps = 1e-5;
    }
    Ok(sizes)
}

/// A layer around `attention`, which gets its norms.
pub(super) fn layer(sizes: &Sizes, attention: Attention, feed_forward: FeedForward) -> Layer {
    let norm = |name, dims| sizes.norm(name, dims, PLAIN_RMS);
    let qk_norm = Some(QkNorm {
        scope: QkNormScope::Width,
        query: norm("self_attn.q_norm", sizes.n_heads * sizes.head_dim),
        key: norm("self_attn.k_norm", sizes.n_kv_heads * sizes.head_dim),
    });
    Layer {
        pre_mixer_norm: None,
        post_mixer_norm: Some(norm("post_attention_layernorm", sizes.hidden_size)),
        pre_feed_forward_norm: None,
        post_feed_forward_norm: Some(norm("post_feedforward_layernorm", sizes.hidden_size)),
        ..sizes.layer(Attention { qk_norm, ..attention }, feed_forward)
    }
}

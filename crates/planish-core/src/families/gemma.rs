//! Gemma: Llama with norms that hold the gain minus one, GELU, and an embedding times `√hidden_size`.

use super::Family;
use super::dense::{Biases, Defaults, Sizes, activation};
use super::gemma3::{SHIFTED_RMS, arch};
use crate::Result;
use crate::arch::{Activation, Arch, Layer};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "gemma",
    class: "GemmaForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: Some(256_000),
    n_heads: Some(16),
    n_kv_heads: Some(16),
    head_dim: Some(256),
    context: 8192,
    is_tied: true,
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    // Early files say `gelu` and mean its approximation by tanh: the reference takes them so.
    let activation = match keys.text("hidden_act")? {
        Some("gelu") => Activation::GeluTanh,
        _ => activation(keys, "hidden_act", Activation::GeluTanh)?,
    };
    let norm = |name| Some(sizes.norm(name, sizes.hidden_size, SHIFTED_RMS));
    let layer = Layer {
        pre_mixer_norm: norm("input_layernorm"),
        pre_feed_forward_norm: norm("post_attention_layernorm"),
        ..sizes.layer(sizes.attention(Some(rope), biases), sizes.gated(activation, false))
    };
    Ok(arch(&sizes, vec![layer; sizes.n_layers]))
}

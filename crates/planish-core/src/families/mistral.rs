//! Mistral 7B and its kin: Llama without biases, with a window on attention.

use super::dense::{Biases, Defaults, Sizes, activation, window_or_default, windows};
use super::{Family, Gguf};
use crate::Result;
use crate::arch::{Activation, Arch};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    gguf: Some(Gguf {
        architecture: "llama",
        permutes_query_and_key: true,
        reads_attention_biases: true,
    }),
    anemll: Some("mistral"),
    is_nested: false,
    other_parts: &[],
    read,
};

const DEFAULTS: Defaults = Defaults {
    context: 4096 * 32,
    n_kv_heads: Some(8),
    ..Defaults::LLAMA
};

pub(super) fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let windows = windows(keys, sizes.n_layers, window_or_default(keys)?, |_| true)?;
    let feed_forward = sizes.gated(activation(keys, "hidden_act", Activation::Silu)?, false);
    Ok(sizes.arch(sizes.windowed(
        &windows,
        &sizes.attention(Some(rope), Biases::of_all(false)),
        &feed_forward,
    )))
}

//! Qwen3, dense: Llama with an RMS norm over each head of q and k before the rotation, and a head size of its own.

use super::dense::{Biases, Defaults, PLAIN_RMS, Sizes, activation, qwen_windows};
use super::{Family, Gguf};
use crate::Result;
use crate::arch::{Activation, Arch, Attention};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    gguf: Some(Gguf {
        architecture: "qwen3",
        permutes_query_and_key: false,
        reads_attention_biases: false,
    }),
    anemll: Some("qwen"),
    is_nested: false,
    other_parts: &[],
    read,
};

const DEFAULTS: Defaults = Defaults {
    context: 32_768,
    n_kv_heads: Some(32),
    head_dim: Some(128),
    ..Defaults::LLAMA
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    // Some files state what every model of the family has.
    for key in ["use_qk_norm", "qk_norm"] {
        if keys.flag(key)? == Some(false) {
            return Err(keys.unsupported(key, "every qwen3 model has these norms"));
        }
    }
    let attention = Attention {
        qk_norm: sizes.head_norms(PLAIN_RMS),
        ..sizes.attention(Some(rope), biases)
    };
    let windows = qwen_windows(keys, sizes.n_layers)?;
    let feed_forward = sizes.gated(activation(keys, "hidden_act", Activation::Silu)?, false);
    Ok(sizes.arch(sizes.windowed(&windows, &attention, &feed_forward)))
}

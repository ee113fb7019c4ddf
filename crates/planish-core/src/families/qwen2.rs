//! Qwen2 and Qwen2.5: Llama with biases on q, k and v, and nowhere else.

use super::dense::{Biases, Defaults, Sizes, activation, qwen_windows};
use super::{Family, Gguf};
use crate::Result;
use crate::arch::{Activation, Arch};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    gguf: Some(Gguf {
        architecture: "qwen2",
        permutes_query_and_key: false,
        reads_attention_biases: true,
    }),
    anemll: Some("qwen"),
    is_nested: false,
    other_parts: &[],
    read,
};

const DEFAULTS: Defaults = Defaults {
    context: 32_768,
    n_kv_heads: Some(32),
    ..Defaults::LLAMA
};

const BIASES: Biases = Biases {
    reading: true,
    output: false,
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    keys.flag("attention_bias")?; // always, whatever the file says
    let windows = qwen_windows(keys, sizes.n_layers)?;
    let feed_forward = sizes.gated(activation(keys, "hidden_act", Activation::Silu)?, false);
    Ok(sizes.arch(sizes.windowed(&windows, &sizes.attention(Some(rope), BIASES), &feed_forward)))
}

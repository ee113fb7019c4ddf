//! Llama 1 to 3 and models of the same shape, SmolLM2 among them: pre-norm, grouped queries, rotary positions, SwiGLU; biases only
//! where the configuration says so.

use super::dense::{Biases, Defaults, Sizes, activation};
use super::{Family, Gguf};
use crate::Result;
use crate::arch::{Activation, Arch};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    gguf: Some(Gguf {
        architecture: "llama",
        permutes_query_and_key: true,
        reads_attention_biases: true,
    }),
    anemll: Some("llama"),
    is_nested: false,
    other_parts: &[],
    read,
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &Defaults::LLAMA)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let attention = sizes.attention(Some(rope), biases);
    let activation = activation(keys, "hidden_act", Activation::Silu)?;
    let feed_forward = sizes.gated(activation, keys.flag("mlp_bias")?.unwrap_or(false));
    Ok(sizes.arch(sizes.windowed(&vec![None; sizes.n_layers], &attention, &feed_forward)))
}

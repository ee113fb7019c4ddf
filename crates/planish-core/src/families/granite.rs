//! Granite 3, dense: Llama with four factors: on the embedding, on scores in the place of `1 / sqrt(head_dim)`, on what each half
//! adds, and one by which logits are divided.

use super::Family;
use super::dense::{Biases, Defaults, Sizes, activation};
use crate::Result;
use crate::arch::{Activation, Arch, Attention, Layer};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "granite",
    class: "GraniteForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &Defaults::LLAMA)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let factor = |key: &str| Ok(keys.positive(key, 1e6)?.unwrap_or(1.0) as f32);
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let attention = Attention {
        scale: factor("attention_multiplier")?,
        ..sizes.attention(Some(rope), biases)
    };
    let activation = activation(keys, "hidden_act", Activation::Silu)?;
    let feed_forward = sizes.gated(activation, keys.flag("mlp_bias")?.unwrap_or(false));
    let layer = Layer {
        residual_factor: factor("residual_multiplier")?,
        ..sizes.layer(attention, feed_forward)
    };
    let (mut arch, context) = sizes.arch(vec![layer; sizes.n_layers]);
    arch.embedding_factor = factor("embedding_multiplier")?;
    arch.head.factor = factor("logits_scaling")?.recip();
    Ok((arch, context))
}

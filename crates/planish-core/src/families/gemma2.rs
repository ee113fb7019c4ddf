//! Gemma 2: norms before and after each half that hold the gain minus one, soft caps on scores and logits, windows in every
//! other layer, beginning with the first.

use super::Family;
use super::dense::{Biases, Defaults, Sizes, activation, window_or_default, windows};
use super::gemma3::{arch, query_scale, softcap, with_four_norms};
use crate::Result;
use crate::arch::{Activation, Arch, Attention};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: Some(256_000),
    n_heads: Some(8),
    n_kv_heads: Some(4),
    head_dim: Some(256),
    context: 8192,
    is_tied: true,
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?.read()?;
    let is_windowed = |layer_idx: usize| layer_idx.is_multiple_of(2);
    let windows = windows(keys, sizes.n_layers, window_or_default(keys)?, is_windowed)?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let attention = Attention {
        scale: query_scale(keys)?,
        softcap: softcap(keys, "attn_logit_softcapping", Some(50.0))?,
        ..sizes.attention(Some(rope), biases)
    };
    let feed_forward = sizes.gated(activation(keys, "hidden_activation", Activation::GeluTanh)?, false);
    let layer = |window: Option<usize>| {
        let attention = Attention {
            window,
            ..attention.clone()
        };
        with_four_norms(&sizes, attention, feed_forward.clone())
    };
    let (mut arch, context) = arch(&sizes, windows.into_iter().map(layer).collect());
    arch.head.softcap = softcap(keys, "final_logit_softcapping", Some(30.0))?;
    Ok((arch, context))
}

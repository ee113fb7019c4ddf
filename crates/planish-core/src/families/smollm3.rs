//! SmolLM3: Llama without rotation in every fourth layer.

use super::Family;
use super::dense::{Biases, Defaults, Sizes, activation, window_or_default, windows};
use crate::Result;
use crate::arch::{Activation, Arch, Attention, Layer};
use crate::model_config::keys::{Keys, describe};
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "smollm3",
    class: "SmolLM3ForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

const DEFAULTS: Defaults = Defaults {
    vocab_size: Some(128_256),
    n_heads: Some(16),
    n_kv_heads: Some(4),
    context: 32_768,
    is_tied: true,
    ..Defaults::LLAMA
};

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = Sizes::read(keys, &DEFAULTS)?;
    let mut rope = RopeSettings::new(keys, sizes.head_dim, sizes.context)?;
    rope.theta = 2_000_000.0;
    let rope = rope.read()?;
    let is_rotated = rotated_layers(keys, sizes.n_layers)?;
    let window = match (keys.flag("use_sliding_window")?, keys.contains("sliding_window")) {
        (Some(true), true) => window_or_default(keys)?,
        _ => None,
    };
    let windows = windows(keys, sizes.n_layers, window, |layer_idx| !is_rotated[layer_idx])?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let activation = activation(keys, "hidden_act", Activation::Silu)?;
    let feed_forward = sizes.gated(activation, keys.flag("mlp_bias")?.unwrap_or(false));
    let layer = |(window, is_rotated): (Option<usize>, bool)| -> Layer {
        let attention = Attention {
            window,
            ..sizes.attention(is_rotated.then(|| rope.clone()), biases)
        };
        sizes.layer(attention, feed_forward.clone())
    };
    Ok(sizes.arch(windows.into_iter().zip(is_rotated).map(layer).collect()))
}

/// `no_rope_layers` has 1 for each layer *with* rotation; absent: all but every `no_rope_layer_interval`-th.
fn rotated_layers(keys: &Keys<'_>, n_layers: usize) -> Result<Vec<bool>> {
    let interval = keys
        .optional_size("no_rope_layer_interval", n_layers.max(1 << 12))?
        .unwrap_or(4);
    let Some(value) = keys.present("no_rope_layers") else {
        return Ok((1..=n_layers).map(|number| !number.is_multiple_of(interval)).collect());
    };
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    let flags: Option<Vec<bool>> = list.iter().map(|flag| Some(flag.as_u64()? != 0)).collect();
    flags.filter(|flags| flags.len() == n_layers).ok_or_else(|| {
        let rule = format!("a list of {n_layers} numbers, 1 for a layer with rotation and 0 for one without");
        keys.wrong("no_rope_layers", &describe(value), &rule)
    })
}

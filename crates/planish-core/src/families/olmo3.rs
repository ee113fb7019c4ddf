//! OLMo 3: OLMo 2 with windows in three of four layers; only the layers without one have a stretched rotation.

use super::Family;
use super::dense::{Biases, activation, window_or_default, windows};
use super::olmo2::{layer, sizes};
use crate::Result;
use crate::arch::{Activation, Arch, Attention};
use crate::model_config::keys::Keys;
use crate::model_config::rope::RopeSettings;

pub(super) static FAMILY: Family = Family {
    model_type: "olmo3",
    class: "Olmo3ForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

const THETA: f64 = 500_000.0;

fn read(keys: &Keys<'_>) -> Result<(Arch, usize)> {
    let sizes = sizes(keys)?;
    let mut full = RopeSettings::new(keys, sizes.head_dim, sizes.context)?;
    full.theta = THETA;
    let full = full.read()?;
    let mut local = RopeSettings::silent(keys, sizes.head_dim, sizes.context);
    local.theta = THETA; // a `rope_theta` beside the objects is for the others alone
    let local = local.read()?;
    let is_windowed = |layer_idx: usize| !(layer_idx + 1).is_multiple_of(4);
    let windows = windows(keys, sizes.n_layers, window_or_default(keys)?, is_windowed)?;
    let biases = Biases::of_all(keys.flag("attention_bias")?.unwrap_or(false));
    let feed_forward = sizes.gated(activation(keys, "hidden_act", Activation::Silu)?, false);
    let of_window = |window: Option<usize>| {
        let rope = if window.is_some() { &local } else { &full };
        let attention = Attention {
            window,
            ..sizes.attention(Some(rope.clone()), biases)
        };
        layer(&sizes, attention, feed_forward.clone())
    };
    Ok(sizes.arch(windows.into_iter().map(of_window).collect()))
}

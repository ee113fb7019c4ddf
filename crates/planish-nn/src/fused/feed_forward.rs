use planish_core::arch::Activation;

use super::adapters::{Packing, common_rank, drops, inner, outer};
use super::norm::{can_norm, normed};
use super::output::{Pending, output_of_read};
use super::swiglu::swiglu;
use crate::mlp::Gated;
use crate::{Linear, Result, RmsNorm};

/// `x + feed_forward(norm(x))` for training plain adapters.
#[derive(Debug, Clone)]
pub(crate) struct FusedFeedForward {
    reading: Option<Packing>,
    down: Option<Packing>,
}

impl FusedFeedForward {
    /// `None` where a layer has more to do than this is written for: another activation, DoRA, quantised weights, ranks that differ or are large.
    pub(crate) fn of(layer: &Gated) -> Result<Option<Self>> {
        let Ok((rank, rank_of_down)) = Self::ranks(layer) else {
            return Ok(None);
        };
        Ok(Some(Self {
            reading: Packing::of(&[&layer.gate, &layer.up], rank)?,
            down: Packing::of(&[&layer.down], rank_of_down)?,
        }))
    }

    /// The rank of gate and up, and of down; else why the layer is computed otherwise.
    fn ranks(layer: &Gated) -> Result<(i32, i32), &'static str> {
        if layer.activation != Activation::Silu {
            return Err("an activation other than SiLU");
        }
        if !layer.down.input_dims().is_multiple_of(8) || !can_norm(layer.gate.input_dims()) {
            return Err("widths that are not multiples of 8");
        }
        Ok((common_rank(&[&layer.gate, &layer.up])?, common_rank(&[&layer.down])?))
    }

    /// What stands in the way of the fused block, where something does.
    pub(crate) fn obstacle(layer: &Gated) -> Option<&'static str> {
        let dropout = (!Self::is_without_dropout(layer)).then_some("dropout");
        Self::ranks(layer).err().or(dropout)
    }

    /// Whether no adapter drops inputs, which this cannot do.
    pub(crate) fn is_without_dropout(layer: &Gated) -> bool {
        !drops(&[&layer.gate, &layer.up, &layer.down])
    }

    /// `h` `[b · s, d]` → as much, both sums that are pending.
    pub(crate) fn forward(&self, layer: &Gated, norm: &RmsNorm, h: &Pending) -> Result<Pending> {
        let dtype = h.residual.dtype();
        let packed = |layers: &[&Linear], packing: Option<&Packing>| {
            let packed = packing.map(|packing| inner(layers, packing, dtype));
            packed.transpose()
        };
        let outer_of = |layer: &Linear, packing: Option<&Packing>| {
            let b = packing.map(|packing| outer(layer, packing.rank(), dtype));
            b.transpose()
        };
        let (reading, down) = (self.reading.as_ref(), self.down.as_ref());
        let a = packed(&[&layer.gate, &layer.up], reading)?;
        let a_of_down = packed(&[&layer.down], down)?;
        let (b_of_gate, b_of_up) = (outer_of(&layer.gate, reading)?, outer_of(&layer.up, reading)?);
        let b_of_down = outer_of(&layer.down, down)?;

        let input = normed(h, norm, a.as_ref())?;
        let gate = layer.gate.base_with_bias(&input.normed)?;
        let up = layer.up.base_with_bias(&input.normed)?;
        let update = match (&input.inner, &b_of_gate, &b_of_up) {
            (Some(u), Some(b_of_gate), Some(b_of_up)) => Some([u, b_of_gate, b_of_up]),
            _ => None,
        };
        let (h, u) = swiglu(&gate, &up, update, a_of_down.as_ref())?;
        output_of_read(&layer.down, u.zip(b_of_down), &h, &input.residual)
    }
}

use planish_mlx::Array;

use super::adapters::{Packing, common_rank, diagonal_sizes, drops, inner, outer_diagonal};
use super::norm::{can_norm, normed};
use super::output::{Pending, output};
use super::rotation::{Heads, Turns, rotated};
use crate::attention::Attention;
use crate::joint::Joint;
use crate::mask::ReadyMask;
use crate::{Linear, Result, RmsNorm, Rope};

/// `x + attention(norm(x))` for training plain adapters.
#[derive(Debug, Clone)]
pub(crate) struct FusedAttention {
    joint: Joint,
    reading: Option<Packing>,
    /// Rank and widths of query, key and value.
    widths: Array,
    output: Option<Packing>,
}

impl FusedAttention {
    /// Prepares a layer, whose weights of query, key and value become views of one matrix; `None` where it has more to do than
    /// this is written for: norms of its heads, another rotation, DoRA, quantised weights, ranks that differ or are large.
    pub(crate) fn of(layer: &mut Attention) -> Result<Option<Self>> {
        let Ok((rank, rank_of_output)) = Self::ranks(layer) else {
            return Ok(None);
        };
        let joint = Joint::of([&mut layer.query, &mut layer.key, &mut layer.value])?;
        let Some(joint) = joint else { return Ok(None) };
        let reading: [&Linear; 3] = [&layer.query, &layer.key, &layer.value];
        Ok(Some(Self {
            joint,
            reading: Packing::of(&reading, rank)?,
            widths: diagonal_sizes(reading, rank)?,
            output: Packing::of(&[&layer.output], rank_of_output)?,
        }))
    }

    /// The rank of query, key and value, and of the output; else why the layer is computed otherwise.
    fn ranks(layer: &Attention) -> Result<(i32, i32), &'static str> {
        if layer.head_norms.is_some() {
            return Err("norms of the heads");
        }
        if !layer.rope.as_ref().is_some_and(Rope::turns_halves) {
            return Err("a rotation that does not turn halves of whole heads");
        }
        if layer.head_dim % 8 != 0 || !can_norm(layer.query.input_dims()) {
            return Err("widths that are not multiples of 8");
        }
        let reading = common_rank(&[&layer.query, &layer.key, &layer.value])?;
        Ok((reading, common_rank(&[&layer.output])?))
    }

    /// What stands in the way of the fused block, where something does.
    pub(crate) fn obstacle(layer: &Attention) -> Option<&'static str> {
        let dropout = (!Self::is_without_dropout(layer)).then_some("dropout");
        Self::ranks(layer).err().or(dropout)
    }

    /// Whether no adapter drops inputs, which this cannot do.
    pub(crate) fn is_without_dropout(layer: &Attention) -> bool {
        !drops(&[&layer.query, &layer.key, &layer.value, &layer.output])
    }

    /// `x`, rows of `shape` `[b, s, d]`, → as much, both sums that are pending.
    pub(crate) fn forward(
        &self,
        layer: &Attention,
        norm: &RmsNorm,
        x: &Pending,
        shape: &[i32],
        mask: &ReadyMask,
        turns: &Turns,
    ) -> Result<Pending> {
        let (batch, length, dtype) = (shape[0], shape[1], x.residual.dtype());
        let reading: [&Linear; 3] = [&layer.query, &layer.key, &layer.value];
        let packing = self.reading.as_ref();
        let a = packing.map(|packing| inner(&reading, packing, dtype)).transpose()?;
        let b = packing
            .map(|packing| outer_diagonal(reading, &self.widths, packing.rank(), dtype))
            .transpose()?;
        let input = normed(x, norm, a.as_ref())?;
        let y = self.joint.base(&input.normed)?;
        let heads = Heads {
            query: layer.n_heads as usize,
            key_value: layer.n_kv_heads as usize,
            size: layer.head_dim as usize,
        };
        let rotated = rotated(&y, input.inner.as_ref().zip(b.as_ref()), turns, heads)?;
        let [query, key, value] = rotated.map(|array| {
            let split = array.reshape(&[batch, length, -1, layer.head_dim])?;
            split.transpose_axes(&[0, 2, 1, 3])
        });
        let attended = layer
            .attend(&query?, &key?, &value?, mask)?
            .transpose_axes(&[0, 2, 1, 3])?
            .reshape(&[batch * length, -1])?;
        output(&layer.output, self.output.as_ref(), &attended, &input.residual)
    }
}

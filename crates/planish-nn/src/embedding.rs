use std::sync::Arc;

use mlx_rs::ops::dequantize;
use planish_kernels::PackedLinear;
use planish_mlx::{Array, Dtype};

use crate::native::Kernels;
use crate::parameters::{Parameters, Visitor};
use crate::weight::LinearBase;
use crate::{Error, Linear, Result};

/// A table of one vector a token, which can also serve as the output head (tied weights).
#[derive(Debug, Clone)]
pub(crate) struct Embedding {
    /// `[v, d]`, plain or quantised.
    pub(crate) table: LinearBase,
    /// The table once more as a head, packed, where products are bf16.
    pub(crate) packed_head: Option<Arc<PackedLinear>>,
    /// Whether vectors are widened to f32 as they are taken.
    pub(crate) widens: bool,
    /// What vectors are multiplied by, in their dtype.
    pub(crate) factor: f32,
    /// What computes the head.
    pub(crate) kernels: Kernels,
}

impl Embedding {
    /// Vectors of tokens: i32 `[b, s]` → `[b, s, d]`.
    pub(crate) fn forward(&self, ids: &Array) -> Result<Array> {
        let vectors = self.look_up(ids)?;
        match self.factor {
            1.0 => Ok(vectors),
            factor => Ok(vectors.multiply(Array::from_f32(factor).as_dtype(vectors.dtype())?)?),
        }
    }

    fn look_up(&self, ids: &Array) -> Result<Array> {
        match &self.table {
            LinearBase::Dense { weight } if self.widens => Ok(weight.take_axis(ids, 0)?.as_dtype(Dtype::Float32)?),
            LinearBase::Dense { weight } => Ok(weight.take_axis(ids, 0)?),
            LinearBase::Packed(_) => Err(Error::PackedWeights {
                operation: "looking tokens up",
            }),
            LinearBase::Affine {
                packed,
                scales,
                biases,
                group_size,
                bits,
            } => {
                let rows = |part: &Array| part.take_axis(ids, 0);
                Ok(dequantize(
                    rows(packed)?,
                    rows(scales)?,
                    &rows(biases)?,
                    *group_size,
                    *bits,
                )?)
            }
        }
    }

    /// The tied head: `[..., d]` → logits `[..., v]`.
    pub(crate) fn as_head(&self, hidden: &Array) -> Result<Array> {
        let base = match &self.packed_head {
            Some(head) => LinearBase::Packed(head.clone()),
            None => self.table.clone(),
        };
        let head = Linear {
            base,
            bias: None,
            adapter: None,
            kernels: self.kernels,
        };
        head.forward(hidden)
    }
}

impl Parameters for Embedding {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.table.visit(path, visitor);
    }
}

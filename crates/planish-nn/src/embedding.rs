use mlx_rs::ops::dequantize;
use planish_mlx::Array;

use crate::Result;
use crate::linear::LinearBase;
use crate::parameters::{Parameters, Visitor};

/// A table of one vector a token, which can also serve as the output head (tied weights).
#[derive(Debug, Clone)]
pub(crate) struct Embedding {
    /// `[v, d]`, plain or quantised.
    pub(crate) table: LinearBase,
}

impl Embedding {
    /// Vectors of tokens: i32 `[b, s]` → `[b, s, d]`.
    pub(crate) fn forward(&self, ids: &Array) -> Result<Array> {
        match &self.table {
            LinearBase::Dense { weight } => Ok(weight.take_axis(ids, 0)?),
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
        self.table.forward(hidden)
    }
}

impl Parameters for Embedding {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.table.visit(path, visitor);
    }
}

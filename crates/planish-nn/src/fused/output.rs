use mlx_rs::ops::addmm;
use planish_mlx::Array;
use planish_mlx::transforms::custom_vjp;

use super::adapters::{Packing, inner, outer};
use super::none;
use crate::linear::Linear;
use crate::lora::rows;
use crate::weight::LinearBase;
use crate::{Error, Result};

/// `residual + base + u b`, not summed yet. `[rows, ...]` all.
#[derive(Debug, Clone)]
pub(crate) struct Pending {
    pub(super) residual: Array,
    pub(super) base: Option<Array>,
    pub(super) update: Option<(Array, Array)>,
}

impl Pending {
    /// What is summed already: `[..., d]`.
    pub(crate) fn done(h: &Array) -> Result<Self> {
        Ok(Self {
            residual: rows(h)?,
            base: None,
            update: None,
        })
    }

    /// The sum in another shape of as many numbers.
    pub(crate) fn sum(&self, shape: &[i32]) -> Result<Array> {
        let mut sum = self.residual.clone();
        if let Some(base) = &self.base {
            sum = sum.add(base)?;
        }
        if let Some((u, b)) = &self.update {
            sum = addmm(sum, u, b, None, None)?;
        }
        Ok(sum.reshape(shape)?)
    }
}

/// `residual + layer(x)`. `x` `[rows, in]`, `residual` `[rows, out]`.
pub(super) fn output(layer: &Linear, packing: Option<&Packing>, x: &Array, residual: &Array) -> Result<Pending> {
    let (LinearBase::Dense { weight }, Some(packing)) = (&layer.base, packing) else {
        return output_of_read(layer, None, x, residual);
    };
    let a = inner(&[layer], packing, x.dtype())?;
    let b = outer(layer, packing.rank(), x.dtype())?;
    let [base, u] = read(x, weight, a)?;
    Ok(Pending {
        residual: with_bias(layer, residual)?,
        base: Some(base),
        update: Some((u, b)),
    })
}

/// `x Wᵀ` and `x aᵀ`.
fn read(x: &Array, weight: &Array, a: Array) -> Result<[Array; 2]> {
    custom_vjp(
        |[x, weight, a]: &[Array; 3]| Ok::<_, Error>([x.matmul(weight.t())?, x.matmul(a.t())?]),
        |[x, weight, a]: &[Array; 3], [dy, du]: &[Array; 2], _: &[Array; 2]| {
            // The small product upon the large one: a summand slows the large one down.
            let dx = addmm(dy.matmul(weight)?, du, a, None, None)?;
            Ok([dx, none(weight)?, du.t().matmul(x)?])
        },
        [x, weight, &a],
    )
}

/// `residual + layer(x)` where `u = x aᵀ` is there already.
pub(super) fn output_of_read(
    layer: &Linear,
    update: Option<(Array, Array)>,
    x: &Array,
    residual: &Array,
) -> Result<Pending> {
    Ok(Pending {
        residual: with_bias(layer, residual)?,
        base: Some(layer.base.forward(x)?),
        update,
    })
}

fn with_bias(layer: &Linear, residual: &Array) -> Result<Array> {
    match &layer.bias {
        Some(bias) => Ok(residual.add(bias)?),
        None => Ok(residual.clone()),
    }
}

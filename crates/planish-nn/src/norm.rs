use planish_mlx::{Array, Dtype};

use crate::Result;
use crate::native::{self, Kernels};
use crate::parameters::{Parameters, Role, Visitor, join};

/// Root-mean-square normalisation over the last axis: `y = x / sqrt(mean(x²) + eps) · (offset + weight)`.
///
/// Computed in f32 inside, output in the input's dtype.
///
/// # Shapes
/// `weight`: `[n]`; input `[..., n]` → output `[..., n]`.
///
/// # Reference
/// Zhang and Sennrich 2019, arXiv 1910.07467.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    /// Gain `[n]`, less the offset.
    pub weight: Array,
    /// 0, or 1 where files hold the gain minus one.
    pub offset: f32,
    /// Added to the mean square.
    pub eps: f32,
    /// What computes it.
    pub kernels: Kernels,
}

impl RmsNorm {
    /// Normalises the last axis of `x`.
    ///
    /// # Errors
    /// [`crate::Error::Mlx`] when the last axis is not that of the weight.
    pub fn forward(&self, x: &Array) -> Result<Array> {
        let gain = self.gain()?;
        if self.kernels.is_native() {
            return native::rms_norm(x, &gain, self.eps);
        }
        Ok(mlx_rs::fast::rms_norm(x, Some(&gain), self.eps)?.as_dtype(x.dtype())?)
    }

    /// What normed numbers are multiplied by. With an offset in f32: near 1, a 16-bit sum would lose most of the weight.
    fn gain(&self) -> Result<Array> {
        if self.offset == 0.0 {
            return Ok(self.weight.clone());
        }
        Ok(self
            .weight
            .as_dtype(Dtype::Float32)?
            .add(Array::from_f32(self.offset))?)
    }
}

impl Parameters for RmsNorm {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        visitor(&join(path, "weight"), Role::Weight, &mut self.weight);
    }
}

use planish_mlx::Array;

use crate::Result;
use crate::native::{self, Kernels};
use crate::parameters::{Parameters, Role, Visitor, join};

/// Root-mean-square normalisation over the last axis: `y = x / sqrt(mean(x²) + eps) · weight`.
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
    /// Gain `[n]`.
    pub weight: Array,
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
        if self.kernels.is_native() {
            return native::rms_norm(x, &self.weight, self.eps);
        }
        Ok(mlx_rs::fast::rms_norm(x, Some(&self.weight), self.eps)?)
    }
}

impl Parameters for RmsNorm {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        visitor(&join(path, "weight"), Role::Weight, &mut self.weight);
    }
}

//! The weight of a linear layer: one variant for each format, and all that a format has to know.

use std::sync::Arc;

use planish_kernels::PackedLinear;
use planish_mlx::ops::exactly;
use planish_mlx::{Array, Dtype};

use crate::native::{self, Part};
use crate::parameters::{Parameters, Role, Visitor, join};
use crate::{Error, Result};

/// The weight of a linear layer.
#[derive(Debug, Clone)]
pub enum LinearBase {
    /// `[output_dims, input_dims]` in the model's dtype.
    Dense {
        /// The weight.
        weight: Array,
    },
    /// Rounded to bf16 and packed for the CPU, for both directions; see [`Kernels::NativeBf16`](crate::Kernels).
    Packed(Arc<PackedLinear>),
    /// MLX's affine quantisation: `w = scale · q + bias` for each group of inputs.
    Affine {
        /// u32 `[output_dims, input_dims · bits / 32]`.
        packed: Array,
        /// `[output_dims, input_dims / group_size]`.
        scales: Array,
        /// `[output_dims, input_dims / group_size]`.
        biases: Array,
        /// Neighbouring inputs that share a scale.
        group_size: i32,
        /// Bits a weight.
        bits: i32,
    },
}

impl LinearBase {
    /// `x Wᵀ`.
    pub(crate) fn forward(&self, x: &Array) -> Result<Array> {
        match self {
            LinearBase::Dense { weight } => Ok(x.matmul(weight.t())?),
            LinearBase::Packed(weight) => {
                let part = Part {
                    weight: weight.clone(),
                    update: None,
                };
                let [y] = exactly(native::linears(x, &[part])?)?;
                Ok(y)
            }
            LinearBase::Affine {
                packed,
                scales,
                biases,
                group_size,
                bits,
            } => Ok(mlx_rs::ops::quantized_matmul(
                x,
                packed,
                scales,
                biases,
                true,
                *group_size,
                *bits,
            )?),
        }
    }

    /// The weight `[output_dims, input_dims]`, dequantised where it is quantised.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn dense_weight(&self) -> Result<Array> {
        match self {
            LinearBase::Dense { weight } => Ok(weight.clone()),
            LinearBase::Packed(weight) => {
                let shape = [weight.output_dims() as i32, weight.input_dims() as i32];
                Ok(Array::from_slice(&weight.forward.unpack_transposed(), &shape))
            }
            LinearBase::Affine {
                packed,
                scales,
                biases,
                group_size,
                bits,
            } => Ok(mlx_rs::ops::dequantize(packed, scales, biases, *group_size, *bits)?),
        }
    }

    /// `(output_dims, input_dims)`.
    pub fn dims(&self) -> (usize, usize) {
        match self {
            LinearBase::Dense { weight } => (weight.dim(0) as usize, weight.dim(1) as usize),
            LinearBase::Packed(weight) => (weight.output_dims(), weight.input_dims()),
            LinearBase::Affine { scales, group_size, .. } => {
                (scales.dim(0) as usize, (scales.dim(1) * group_size) as usize)
            }
        }
    }

    /// Takes a part out of the weight, in f32 with one rounding; quantised weights stay as they are.
    pub(crate) fn subtract(&mut self, part: &Array) -> Result<()> {
        if let LinearBase::Dense { weight } = self {
            let rest = weight
                .as_dtype(Dtype::Float32)?
                .subtract(part)?
                .as_dtype(weight.dtype())?;
            rest.eval()?;
            *weight = rest;
        }
        Ok(())
    }

    /// Refuses what cannot be differentiated.
    pub(crate) fn require_dense(&self, path: &str, operation: &'static str) -> Result<()> {
        match self {
            LinearBase::Dense { .. } => Ok(()),
            LinearBase::Packed(_) => Err(Error::PackedWeights { operation }),
            LinearBase::Affine { .. } => Err(Error::Quantized {
                path: path.to_owned(),
                operation,
            }),
        }
    }
}

impl Parameters for LinearBase {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        match self {
            LinearBase::Dense { weight } => visitor(&join(path, "weight"), Role::Weight, weight),
            LinearBase::Packed(_) => {} // no array, and nothing that trains
            LinearBase::Affine {
                packed, scales, biases, ..
            } => {
                visitor(&join(path, "weight"), Role::Constant, packed);
                visitor(&join(path, "scales"), Role::Constant, scales);
                visitor(&join(path, "biases"), Role::Constant, biases);
            }
        }
    }
}

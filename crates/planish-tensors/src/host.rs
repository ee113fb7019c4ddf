use std::path::Path;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::dtype::Dtype;
use super::non_finite::{self, NonFinite};
use crate::error::{Error, Result};

/// A tensor in host memory: element type, shape and row-major little-endian bytes.
///
/// ```
/// use planish_tensors::HostTensor;
/// let tensor = HostTensor::from_f32(&[2, 1], &[1.0, -2.5]);
/// assert_eq!(tensor.bytes, [0, 0, 128, 63, 0, 0, 32, 192]);
/// assert_eq!(tensor.to_f32()?, [1.0, -2.5]);
/// # Ok::<(), planish_tensors::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Sizes of the axes, slowest first; empty for a scalar.
    pub shape: Vec<usize>,
    /// The elements; as many bytes as type and shape say.
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// A tensor of these bytes.
    ///
    /// # Errors
    /// [`Error::ByteCount`] when their number does not follow from type and shape.
    pub fn new(dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> Result<Self> {
        if dtype.byte_len(shape) != Some(bytes.len()) {
            return Err(Error::ByteCount {
                dtype,
                shape: shape.to_vec(),
                found: bytes.len(),
            });
        }
        Ok(Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
        })
    }

    /// An f32 tensor.
    ///
    /// # Panics
    /// When the number of values is not the product of `shape`.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(
            values.len(),
            shape.iter().product::<usize>(),
            "values for shape {shape:?}"
        );
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self {
            dtype: Dtype::F32,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// `values` rounded to `dtype`, to nearest with ties to even.
    ///
    /// # Errors
    /// [`Error::ByteCount`] for a wrong number of values; [`Error::NotFloat`] unless `dtype` is `F32`, `F16` or `BF16`.
    pub fn from_f32_as(dtype: Dtype, shape: &[usize], values: &[f32]) -> Result<Self> {
        let bytes = match dtype {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            _ => return Err(Error::NotFloat { dtype }),
        };
        Self::new(dtype, shape, bytes)
    }

    /// All zeros.
    pub fn zeros(dtype: Dtype, shape: &[usize]) -> Self {
        let bytes = vec![0; dtype.size() * shape.iter().product::<usize>()];
        Self {
            dtype,
            shape: shape.to_vec(),
            bytes,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements as f32, exactly.
    ///
    /// # Errors
    /// [`Error::NotFloat`] unless the type is `F32`, `F16` or `BF16`.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        bytes_to_f32(self.dtype, &self.bytes)
    }

    /// The tensor as a view without a file.
    pub fn view<'a>(&'a self, name: &'a str) -> TensorView<'a> {
        TensorView {
            name,
            dtype: self.dtype,
            shape: &self.shape,
            bytes: &self.bytes,
            file: Path::new(""),
        }
    }
}

/// A tensor inside a mapped file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TensorView<'a> {
    /// Name in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes of the axes, slowest first.
    pub shape: &'a [usize],
    /// The elements, little-endian. They need not lie at a multiple of the element size: files written by MLX do not
    /// align them.
    pub bytes: &'a [u8],
    /// The file that holds it, for messages.
    pub file: &'a Path,
}

impl TensorView<'_> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.dtype.size()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements as f32, exactly.
    ///
    /// # Errors
    /// [`Error::NotFloat`] unless the type is `F32`, `F16` or `BF16`.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        bytes_to_f32(self.dtype, self.bytes)
    }

    /// A copy that outlives the file.
    pub fn to_host(&self) -> HostTensor {
        HostTensor {
            dtype: self.dtype,
            shape: self.shape.to_vec(),
            bytes: self.bytes.to_vec(),
        }
    }

    /// The first NaN or infinity, if any. Types that cannot hold one are not looked at.
    pub fn find_non_finite(&self) -> Option<NonFinite> {
        non_finite::find(self)
    }
}

fn bytes_to_f32(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    widen(dtype, bytes, &mut values)?;
    Ok(values)
}

/// The elements of `bytes` as f32, exactly, into a slice of as many.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) -> Result<()> {
    match dtype {
        Dtype::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        Dtype::F16 => {
            // In a few instructions for eight of them, where the processor has such.
            let mut halves = vec![f16::ZERO; out.len()];
            bytemuck::cast_slice_mut(&mut halves).copy_from_slice(bytes);
            halves.convert_to_f32_slice(out);
        }
        Dtype::BF16 => {
            for (value, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *value = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => return Err(Error::NotFloat { dtype }),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_nearest_even() {
        // Halfway between the bf16 neighbours 1 and 1 + 2^-7.
        let tensor = HostTensor::from_f32_as(Dtype::BF16, &[2], &[1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0]).unwrap();
        assert_eq!(tensor.to_f32().unwrap(), [1.0, 1.0 + 1.0 / 64.0]);
    }

    #[test]
    fn err_wrong_number_of_bytes() {
        let error = HostTensor::new(Dtype::F16, &[3], vec![0; 5]).unwrap_err();
        assert!(matches!(error, Error::ByteCount { found: 5, .. }));
    }

    #[test]
    fn err_integers_are_not_floats() {
        assert!(matches!(
            HostTensor::zeros(Dtype::U32, &[2]).to_f32(),
            Err(Error::NotFloat { dtype: Dtype::U32 })
        ));
    }
}

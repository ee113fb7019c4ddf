//! Typed bytes of the host to arrays and back.

#![allow(unsafe_code)] // reads and writes array buffers as bytes

use mlx_rs::{Array, Dtype};

use crate::{Error, Result, install_error_handler};

/// Bytes that one element takes.
pub(crate) fn element_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bool | Dtype::Uint8 | Dtype::Int8 => 1,
        Dtype::Uint16 | Dtype::Int16 | Dtype::Float16 | Dtype::Bfloat16 => 2,
        Dtype::Uint32 | Dtype::Int32 | Dtype::Float32 => 4,
        Dtype::Uint64 | Dtype::Int64 | Dtype::Float64 | Dtype::Complex64 => 8,
    }
}

/// A new array from little-endian, row-major `bytes`, copied once.
///
/// # Errors
/// [`Error::ByteLength`] when `bytes` do not fill the shape exactly; [`Error::DimensionTooLarge`].
///
/// # Example
/// ```
/// use planish_mlx::{Dtype, host};
/// let array = host::array_from_bytes(&1.5_f32.to_le_bytes(), &[1], Dtype::Float32)?;
/// assert_eq!(host::bytes_of(&array)?, 1.5_f32.to_le_bytes());
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn array_from_bytes(bytes: &[u8], shape: &[usize], dtype: Dtype) -> Result<Array> {
    install_error_handler();
    let expected = shape
        .iter()
        .try_fold(element_bytes(dtype), |product, &dim| product.checked_mul(dim));
    if expected != Some(bytes.len()) {
        return Err(Error::ByteLength {
            shape: shape.to_vec(),
            dtype,
            expected: expected.unwrap_or(usize::MAX),
            found: bytes.len(),
        });
    }
    let dims = i32_shape(shape)?;
    // SAFETY: `bytes` holds exactly the elements of the shape (checked above), and MLX copies them before it returns.
    Ok(unsafe { Array::from_raw_data(bytes.as_ptr().cast(), &dims, dtype) })
}

/// The little-endian, row-major bytes of `array`, evaluated first.
///
/// # Errors
/// [`Error::Mlx`] or [`Error::Operation`] when evaluation fails.
pub fn bytes_of(array: &Array) -> Result<Vec<u8>> {
    install_error_handler();
    let array = array.contiguous()?;
    array.eval()?;
    if array.nbytes() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the array is evaluated and row-contiguous, so its buffer holds `nbytes` bytes from the data pointer on; the
    // pointer is only used while `array` lives.
    unsafe {
        let data = mlx_sys::mlx_array_data_uint8(array.as_ptr());
        Ok(std::slice::from_raw_parts(data, array.nbytes()).to_vec())
    }
}

/// The elements of `array` as f32, evaluated first, row-major.
///
/// # Errors
/// [`Error::Operation`] when the conversion or the evaluation fails.
pub fn to_f32_vec(array: &Array) -> Result<Vec<f32>> {
    let bytes = bytes_of(&array.as_dtype(Dtype::Float32)?)?;
    Ok(bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&element| f32::from_le_bytes(element))
        .collect())
}

fn i32_shape(shape: &[usize]) -> Result<Vec<i32>> {
    shape
        .iter()
        .map(|&dim| i32::try_from(dim).map_err(|_| Error::DimensionTooLarge { shape: shape.to_vec() }))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_for_each_width() {
        for dtype in [
            Dtype::Uint8,
            Dtype::Bfloat16,
            Dtype::Float16,
            Dtype::Float32,
            Dtype::Uint32,
            Dtype::Int64,
        ] {
            let bytes: Vec<u8> = (0..6 * element_bytes(dtype)).map(|byte| byte as u8).collect();
            let array = array_from_bytes(&bytes, &[2, 3], dtype).unwrap();
            assert_eq!(array.dtype(), dtype);
            assert_eq!(array.shape(), &[2, 3]);
            assert_eq!(bytes_of(&array).unwrap(), bytes, "{dtype:?}");
        }
    }

    #[test]
    fn transposed_view_is_written_row_major() {
        let array = Array::from_slice(&[1_u8, 2, 3, 4, 5, 6], &[2, 3]);
        assert_eq!(bytes_of(&array.t()).unwrap(), [1, 4, 2, 5, 3, 6]);
    }

    #[test]
    fn empty_array_has_no_bytes() {
        let array = array_from_bytes(&[], &[0, 3], Dtype::Float32).unwrap();
        assert!(bytes_of(&array).unwrap().is_empty());
    }

    #[test]
    fn err_bytes_that_do_not_fill_the_shape() {
        let error = array_from_bytes(&[0; 7], &[2], Dtype::Float32).unwrap_err();
        assert!(
            matches!(
                error,
                Error::ByteLength {
                    expected: 8,
                    found: 7,
                    ..
                }
            ),
            "{error}"
        );
        let error = array_from_bytes(&[], &[usize::MAX, 2], Dtype::Float32).unwrap_err();
        assert!(matches!(error, Error::ByteLength { .. }), "{error}");
    }
}

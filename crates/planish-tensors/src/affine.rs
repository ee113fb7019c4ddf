use crate::error::{Error, Result};
use crate::{Dtype, HostTensor};

/// A weight quantised as MLX's affine mode does: `w = scale · q + bias`, one scale and bias a group of inputs.
///
/// # Shapes
/// - `weight`: u32 `[output_dims, input_dims · bits / 32]`, a little-endian stream of `bits`-wide numbers per row
/// - `scales`, `biases`: `[output_dims, input_dims / group_size]`, F32, F16 or BF16
#[derive(Clone, Debug, PartialEq)]
pub struct Affine {
    /// Packed numbers.
    pub weight: HostTensor,
    /// One a group.
    pub scales: HostTensor,
    /// One a group.
    pub biases: HostTensor,
}

/// The weight as f32 `[output_dims, input_dims]`: product and sum are rounded to f32, whatever type the scales have.
///
/// # Errors
/// [`Error::Quantization`] when shapes and bits do not fit together; [`Error::NotFloat`].
///
/// # Reference
/// `mlx.core.dequantize`, mode `affine`.
///
/// # Example
/// ```
/// use planish_tensors::{dequantize, quantize};
/// use planish_tensors::Dtype;
///
/// // Sixteen levels from -1 to 0.875: exact in 4 bits.
/// let weight: Vec<f32> = (0..32).map(|i| (i % 16) as f32 / 8.0 - 1.0).collect();
/// let packed = quantize(&weight, 1, 4, 32, Dtype::F32)?;
/// assert_eq!(packed.weight.shape, [1, 4]);
/// assert_eq!(dequantize(&packed, 4)?, weight);
/// # Ok::<(), planish_tensors::Error>(())
/// ```
pub fn dequantize(packed: &Affine, bits: usize) -> Result<Vec<f32>> {
    let (rows, words, groups) = match (packed.weight.shape.as_slice(), packed.scales.shape.as_slice()) {
        ([rows, words], [scale_rows, groups]) if rows == scale_rows && *groups > 0 => (*rows, *words, *groups),
        _ => return Err(unfit(packed, bits)),
    };
    let inputs = words * 32 / bits.max(1);
    let fits = is_supported(bits) && inputs * bits == words * 32 && inputs.is_multiple_of(groups);
    if !fits || packed.biases.shape != packed.scales.shape || packed.weight.dtype != Dtype::U32 {
        return Err(unfit(packed, bits));
    }
    let (scales, biases) = (packed.scales.to_f32()?, packed.biases.to_f32()?);
    let group_size = inputs / groups;
    let mut weight = Vec::with_capacity(rows * inputs);
    for row in 0..rows {
        let stream = &packed.weight.bytes[row * words * 4..(row + 1) * words * 4];
        for (input, q) in unpack(stream, bits).take(inputs).enumerate() {
            let group = row * groups + input / group_size;
            weight.push(scales[group] * q as f32 + biases[group]);
        }
    }
    Ok(weight)
}

/// Quantises a row-major weight `[output_dims, input_dims]`; scales and biases are rounded to `dtype` at the end.
///
/// The larger end of a group's range is a level of its own, and zero is one where the range holds it: scale and bias
/// start from that end, `q = round((w - bias) / scale)`, ties to even.
///
/// # Errors
/// [`Error::Quantization`] when `input_dims` is no multiple of `group_size` or the bits are not 2, 3, 4, 5, 6 or 8;
/// [`Error::NotFloat`].
///
/// # Reference
/// `mlx.core.quantize`, mode `affine`.
pub fn quantize(weight: &[f32], output_dims: usize, bits: usize, group_size: usize, dtype: Dtype) -> Result<Affine> {
    let inputs = weight.len().checked_div(output_dims).unwrap_or(0);
    let fits = is_supported(bits) && group_size > 0 && inputs > 0 && inputs * output_dims == weight.len();
    if !fits || !inputs.is_multiple_of(group_size) || !(inputs * bits).is_multiple_of(32) {
        let reason = format!(
            "a weight of {output_dims} rows and {} values cannot have {bits} bits and groups of {group_size}",
            weight.len()
        );
        return Err(Error::Quantization { reason });
    }
    let groups = weight.len() / group_size;
    let (mut scales, mut biases) = (Vec::with_capacity(groups), Vec::with_capacity(groups));
    let mut bytes = Vec::with_capacity(weight.len() * bits / 8);
    let mut packer = Packer::default();
    for group in weight.chunks_exact(group_size) {
        let (scale, bias) = scale_and_bias(group, bits);
        let top = ((1u32 << bits) - 1) as f32;
        for value in group {
            let q = ((value - bias) / scale).round_ties_even().clamp(0.0, top);
            packer.push(q as u32, bits, &mut bytes);
        }
        scales.push(scale);
        biases.push(bias);
    }
    let shape = [output_dims, inputs / group_size];
    Ok(Affine {
        weight: HostTensor::new(Dtype::U32, &[output_dims, inputs * bits / 32], bytes)?,
        scales: HostTensor::from_f32_as(dtype, &shape, &scales)?,
        biases: HostTensor::from_f32_as(dtype, &shape, &biases)?,
    })
}

/// Smallest scale: a constant group would divide by zero.
const SMALLEST_SCALE: f32 = 1e-7;

fn scale_and_bias(group: &[f32], bits: usize) -> (f32, f32) {
    let low = group.iter().copied().fold(f32::INFINITY, f32::min);
    let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let top = ((1u32 << bits) - 1) as f32;
    let step = ((high - low) / top).max(SMALLEST_SCALE);
    let (edge, scale) = if low.abs() > high.abs() {
        (low, step)
    } else {
        (high, -step)
    };
    // How many steps the edge is from zero; when it is at least one, zero becomes a level.
    let steps = (edge / scale).round_ties_even();
    if steps == 0.0 {
        (scale, 0.0)
    } else {
        (edge / steps, edge)
    }
}

fn is_supported(bits: usize) -> bool {
    matches!(bits, 2 | 3 | 4 | 5 | 6 | 8)
}

fn unfit(packed: &Affine, bits: usize) -> Error {
    let reason = format!(
        "a packed weight {:?} with scales {:?} and biases {:?} cannot have {bits} bits",
        packed.weight.shape, packed.scales.shape, packed.biases.shape
    );
    Error::Quantization { reason }
}

/// The numbers of a little-endian stream of `bits`-wide numbers.
fn unpack(stream: &[u8], bits: usize) -> impl Iterator<Item = u32> {
    let (mut buffer, mut held) = (0u32, 0);
    let mut bytes = stream.iter();
    std::iter::from_fn(move || {
        while held < bits {
            buffer |= u32::from(*bytes.next()?) << held;
            held += 8;
        }
        let number = buffer & ((1 << bits) - 1);
        buffer >>= bits;
        held -= bits;
        Some(number)
    })
}

#[derive(Default)]
struct Packer {
    buffer: u32,
    held: usize,
}

impl Packer {
    fn push(&mut self, number: u32, bits: usize, bytes: &mut Vec<u8>) {
        self.buffer |= number << self.held;
        self.held += bits;
        while self.held >= 8 {
            bytes.push(self.buffer as u8);
            self.buffer >>= 8;
            self.held -= 8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn prop_packing_is_undone(bits in prop::sample::select(vec![2usize, 3, 4, 5, 6, 8]), seed in any::<u32>()) {
            let numbers: Vec<u32> = (0..96u32).map(|i| seed.wrapping_mul(i * 2 + 1).rotate_left(i) & ((1 << bits) - 1)).collect();
            let (mut packer, mut bytes) = (Packer::default(), Vec::new());
            for number in &numbers {
                packer.push(*number, bits, &mut bytes);
            }
            prop_assert_eq!(bytes.len(), 96 * bits / 8);
            prop_assert_eq!(unpack(&bytes, bits).collect::<Vec<_>>(), numbers);
        }

        #[test]
        fn prop_quantised_weight_is_within_one_step(
            values in prop::collection::vec(-3f32..3.0, 128), bits in prop::sample::select(vec![2usize, 3, 4, 5, 6, 8]),
            group_size in prop::sample::select(vec![32usize, 64]),
        ) {
            let packed = quantize(&values, 2, bits, group_size, Dtype::F32).unwrap();
            let back = dequantize(&packed, bits).unwrap();
            let scales = packed.scales.to_f32().unwrap();
            for (i, (value, kept)) in values.iter().zip(&back).enumerate() {
                prop_assert!((value - kept).abs() <= 1.01 * scales[i / group_size].abs());
            }
        }
    }

    #[test]
    fn zero_stays_zero_in_a_group_of_both_signs() {
        let mut values = vec![0.0; 32];
        (values[3], values[4]) = (0.7, -0.3);
        let back = dequantize(&quantize(&values, 1, 4, 32, Dtype::F32).unwrap(), 4).unwrap();
        assert_eq!((back[0], back[3]), (0.0, 0.7));
    }

    #[test]
    fn err_shapes_that_do_not_fit() {
        assert!(matches!(
            quantize(&[0.0; 48], 1, 4, 32, Dtype::F32),
            Err(Error::Quantization { .. })
        ));
        assert!(matches!(
            quantize(&[0.0; 64], 1, 7, 32, Dtype::F32),
            Err(Error::Quantization { .. })
        ));
        let mut packed = quantize(&[0.5; 64], 2, 4, 32, Dtype::F32).unwrap();
        assert!(matches!(dequantize(&packed, 0), Err(Error::Quantization { .. })));
        packed.biases.shape = vec![1, 2];
        assert!(matches!(dequantize(&packed, 4), Err(Error::Quantization { .. })));
    }
}

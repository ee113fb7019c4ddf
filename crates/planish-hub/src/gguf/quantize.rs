//! From f32 to quantised blocks, with the rounding of the reference.

use half::f16;
use planish_tensors::Dtype;

use super::TensorType;

/// Appends `values`, stored as `kind`: F32, F16, BF16, Q8_0 or Q4_0.
///
/// Blocks of 32: `Q8_0` keeps `d = max|x| / 127` and `q = round(x/d)`; `Q4_0` keeps `d = x*/−8`, where `x*` is the value
/// largest in size, and `q = ⌊x/d + 8.5⌋ ≤ 15`. `d` is stored as f16; `q` is computed with the unrounded one.
///
/// # Errors
/// The index of the first value that is not finite, or so large that it (or its block's scale) has no finite image.
///
/// # Panics
/// For another type, or when `values` are no whole number of blocks.
pub(crate) fn quantize(kind: TensorType, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
    let block = match kind {
        TensorType::F32 => return Dtype::F32.append(values, out),
        TensorType::F16 => return Dtype::F16.append(values, out),
        TensorType::BF16 => return Dtype::BF16.append(values, out),
        TensorType::Q8_0 => q8_0,
        TensorType::Q4_0 => q4_0,
        other => panic!("{} is not written", other.name()),
    };
    assert!(
        values.len().is_multiple_of(32),
        "{} values are no whole blocks",
        values.len()
    );
    for (i, x) in values.chunks_exact(32).enumerate() {
        if let Some(bad) = x.iter().position(|v| !v.is_finite()) {
            return Err(32 * i + bad);
        }
        block(x, out).map_err(|()| 32 * i + largest(x))?;
    }
    Ok(())
}

fn q8_0(x: &[f32], out: &mut Vec<u8>) -> Result<(), ()> {
    let d = x[largest(x)].abs() / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    append_scale(d, out)?;
    // Rust's round goes away from zero at halves, as C's does. The cast saturates.
    out.extend(x.iter().map(|x| (x * inverse).round() as i8 as u8));
    Ok(())
}

fn q4_0(x: &[f32], out: &mut Vec<u8>) -> Result<(), ()> {
    let d = x[largest(x)] / -8.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    append_scale(d, out)?;
    // In f64, which gives what the reference gives with a fused multiply–add.
    let q = |x: f32| (f64::from(x) * f64::from(inverse) + 8.5).clamp(0.0, 15.0) as u8;
    out.extend((0..16).map(|j| q(x[j]) | q(x[j + 16]) << 4));
    Ok(())
}

fn append_scale(d: f32, out: &mut Vec<u8>) -> Result<(), ()> {
    let scale = f16::from_f32(d);
    out.extend_from_slice(&scale.to_le_bytes());
    if scale.is_finite() { Ok(()) } else { Err(()) }
}

/// Index of the value largest in size, the first of equals.
fn largest(x: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in x.iter().enumerate() {
        if value.abs() > x[best].abs() {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::dequantize;

    #[test]
    fn zeros_stay_zeros() {
        for kind in [TensorType::Q8_0, TensorType::Q4_0] {
            let mut bytes = Vec::new();
            quantize(kind, &[0.0; 32], &mut bytes).unwrap();
            let mut back = [1.0; 32];
            dequantize(kind, &bytes, &mut back);
            assert_eq!(back, [0.0; 32], "{}", kind.name());
        }
    }

    #[test]
    fn error_is_at_most_half_a_step() {
        let x: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.5) / 100.0).collect();
        for (kind, steps) in [(TensorType::Q8_0, 127.0), (TensorType::Q4_0, 8.0)] {
            let mut bytes = Vec::new();
            quantize(kind, &x, &mut bytes).unwrap();
            let mut back = vec![0.0; 64];
            dequantize(kind, &bytes, &mut back);
            // The positive end of Q4_0 has one step less; f16 rounds the scale by at most 2⁻¹¹.
            let step = 0.315 / steps;
            let bound = if kind == TensorType::Q4_0 {
                step * 1.01
            } else {
                step * 0.51 + 0.315 / 2048.0
            };
            for (a, b) in x.iter().zip(&back) {
                assert!((a - b).abs() <= bound, "{}: {a} {b}", kind.name());
            }
        }
    }

    #[test]
    fn err_value_without_an_image_is_located() {
        let mut x = [0.5; 64];
        x[40] = f32::INFINITY;
        assert_eq!(quantize(TensorType::Q4_0, &x, &mut Vec::new()), Err(40));
        x[40] = 1e7;
        assert_eq!(quantize(TensorType::Q8_0, &x, &mut Vec::new()), Err(40));
    }
}

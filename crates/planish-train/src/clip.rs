//! Clipping by the global norm of the gradient.

use mlx_rs::{Array, Dtype, ops};

use crate::Result;

/// Global L2 norm of the gradients, `sqrt(Σ g²)`, squared and summed in f32 whatever their dtype; a lazy scalar.
///
/// The sum is taken row by row and then over the rows, so that its rounding error grows with the square root of the
/// number of elements and not with the number.
///
/// # Errors
/// MLX's own.
pub(crate) fn global_norm<'a>(gradients: impl IntoIterator<Item = &'a Array>) -> Result<Array> {
    let mut total = Array::from_f32(0.0);
    for gradient in gradients {
        total = total.add(sum_of_squares(gradient)?)?;
    }
    Ok(total.sqrt()?)
}

/// The factor that brings a gradient of this `norm` down to `max_norm`: `min(1, max_norm/(norm + 1e-6))`.
///
/// Exactly 1 where nothing is clipped, so that a bound that is never reached changes no bit.
///
/// # Errors
/// MLX's own.
pub(crate) fn clip_factor(norm: &Array, max_norm: f64) -> Result<Array> {
    let bound = Array::from_f32(max_norm as f32);
    let factor = bound.divide(norm.add(Array::from_f32(1e-6))?)?;
    Ok(ops::select(norm.gt(&bound)?, factor, Array::from_f32(1.0))?)
}

fn sum_of_squares(gradient: &Array) -> Result<Array> {
    const ROW: usize = 1024;
    let squares = gradient.as_dtype(Dtype::Float32)?.square()?.reshape(&[-1])?;
    let whole = squares.size() / ROW * ROW;
    if whole == 0 {
        return Ok(squares.sum(false)?);
    }
    let parts = squares.split_at_indices(&[whole as i32], 0)?;
    let rows = parts[0].reshape(&[-1, ROW as i32])?.sum_axis(-1, false)?;
    Ok(rows.sum(false)?.add(parts[1].sum(false)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pseudo_random(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .collect()
    }

    fn reference_norm(parts: &[Vec<f32>]) -> f64 {
        parts
            .iter()
            .flatten()
            .map(|&x| f64::from(x).powi(2))
            .sum::<f64>()
            .sqrt()
    }

    #[test]
    fn norm_equals_f64_reference() {
        let parts = [pseudo_random(1_000_003, 1), pseudo_random(5, 2), pseudo_random(4096, 3)];
        let arrays: Vec<Array> = parts.iter().map(|p| Array::from_slice(p, &[p.len() as i32])).collect();
        let norm = f64::from(global_norm(&arrays).unwrap().item_exact::<f32>());
        let expected = reference_norm(&parts);
        assert!((norm / expected - 1.0).abs() < 1e-6, "{norm} is not {expected}");
    }

    #[test]
    fn factor_is_exactly_one_below_the_bound() {
        let check = |norm, bound, expected: f32| {
            assert_eq!(
                clip_factor(&Array::from_f32(norm), bound).unwrap().item_exact::<f32>(),
                expected
            );
        };
        check(3.0, 1e9, 1.0);
        check(1.0, 1.0, 1.0);
        check(4.0, 2.0, 2.0 / (4.0 + 1e-6));
        check(0.0, 1.0, 1.0);
    }
}

//! A matrix times one vector: what a linear layer does for a single token. Bound by memory: each weight is read once.

use rayon::prelude::*;

use crate::elementwise::dot;
use crate::simd::multiversion;

/// Numbers of the matrix in a parallel piece.
const PIECE: usize = 64 << 10;

/// `out_i = Σ_k W_ik x_k` in f32; `weight` is `[out.len(), x.len()]`, row by row.
pub fn matrix_vector(weight: &[f32], x: &[f32], out: &mut [f32]) {
    assert_eq!(weight.len(), x.len() * out.len());
    let rows = (PIECE / x.len().max(1)).max(1);
    out.par_chunks_mut(rows)
        .zip(weight.par_chunks(rows * x.len().max(1)))
        .for_each(|(out, weight)| piece(weight, x, out));
}

multiversion! { fn piece = piece_body(weight: &[f32], x: &[f32], out: &mut [f32]) }

#[inline(always)]
fn piece_body<const FMA: bool>(weight: &[f32], x: &[f32], out: &mut [f32]) {
    for (out, row) in out.iter_mut().zip(weight.chunks_exact(x.len())) {
        *out = dot::<FMA>(row, x);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_matches_the_definition_at_every_edge() {
        for (rows, width) in [(1, 1), (3, 31), (7, 64), (300, 577), (1, 100_000)] {
            let numbers =
                |count: usize, seed: f32| -> Vec<f32> { (0..count).map(|i| (i as f32 * 0.731 + seed).sin()).collect() };
            let (weight, x) = (numbers(rows * width, 0.1), numbers(width, 0.7));
            let mut out = vec![f32::NAN; rows];
            matrix_vector(&weight, &x, &mut out);
            for (row, found) in weight.chunks(width).zip(&out) {
                let expect: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                // Sums of `width` products of up to 1, all of one sign in the worst case, in f32.
                assert!((f64::from(*found) - expect).abs() < 1e-6 * (width as f64).max(10.0));
            }
        }
    }
}

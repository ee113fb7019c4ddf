//! SwiGLU and RMS norm, forward and backward, one pass each over memory.

use rayon::prelude::*;

use crate::simd::{exp, mul_add, multiversion};

/// Elements of a parallel piece: small enough to balance, large enough to be worth a task.
const PIECE: usize = 16 << 10;

/// `out = silu(gate) · up`, element by element; `silu(g) = g / (1 + e⁻ᵍ)`.
pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == out.len() && up.len() == out.len());
    out.par_chunks_mut(PIECE)
        .zip(gate.par_chunks(PIECE))
        .zip(up.par_chunks(PIECE))
        .for_each(|((out, gate), up)| {
            swiglu_piece(gate, up, out);
        });
}

/// Gradients of [`swiglu`]: `d_gate = d_out · up · s · (1 + gate · (1 − s))` and `d_up = d_out · gate · s`, `s = 1 / (1 + e⁻ᵍ)`.
pub fn swiglu_backward(d_out: &[f32], gate: &[f32], up: &[f32], d_gate: &mut [f32], d_up: &mut [f32]) {
    let n = d_out.len();
    assert!(gate.len() == n && up.len() == n && d_gate.len() == n && d_up.len() == n);
    let outputs = d_gate.par_chunks_mut(PIECE).zip(d_up.par_chunks_mut(PIECE));
    let inputs = d_out
        .par_chunks(PIECE)
        .zip(gate.par_chunks(PIECE))
        .zip(up.par_chunks(PIECE));
    outputs.zip(inputs).for_each(|((d_gate, d_up), ((d_out, gate), up))| {
        swiglu_backward_piece(d_out, gate, up, d_gate, d_up);
    });
}

/// `out = x · weight / sqrt(mean(x²) + eps)` for each row of `weight.len()` numbers.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let rows = rows_a_piece(weight.len());
    out.par_chunks_mut(rows)
        .zip(x.par_chunks(rows))
        .for_each(|(out, x)| rms_norm_piece(x, weight, eps, out));
}

/// Gradient of [`rms_norm`] with respect to `x`: `d_x = r · (d·w − x · r² · mean(d·w·x))`, `r = 1 / sqrt(mean(x²) + eps)`.
pub fn rms_norm_backward(d_out: &[f32], x: &[f32], weight: &[f32], eps: f32, d_x: &mut [f32]) {
    assert!(x.len() == d_x.len() && d_out.len() == d_x.len());
    let rows = rows_a_piece(weight.len());
    d_x.par_chunks_mut(rows)
        .zip(d_out.par_chunks(rows))
        .zip(x.par_chunks(rows))
        .for_each(|((d_x, d_out), x)| {
            rms_norm_backward_piece(d_out, x, weight, eps, d_x);
        });
}

fn rows_a_piece(width: usize) -> usize {
    (PIECE / width).max(1) * width
}

multiversion! { fn swiglu_piece = swiglu_body(gate: &[f32], up: &[f32], out: &mut [f32]) }

#[inline(always)]
fn swiglu_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, g), u) in out.iter_mut().zip(gate).zip(up) {
        *out = g / (1.0 + exp::<FMA>(-g)) * u;
    }
}

multiversion! {
    fn swiglu_backward_piece = swiglu_backward_body(d_out: &[f32], gate: &[f32], up: &[f32], d_gate: &mut [f32], d_up: &mut [f32])
}

#[inline(always)]
fn swiglu_backward_body<const FMA: bool>(
    d_out: &[f32],
    gate: &[f32],
    up: &[f32],
    d_gate: &mut [f32],
    d_up: &mut [f32],
) {
    let inputs = d_out.iter().zip(gate).zip(up);
    for (((d, g), u), (d_gate, d_up)) in inputs.zip(d_gate.iter_mut().zip(d_up)) {
        let s = 1.0 / (1.0 + exp::<FMA>(-g));
        *d_gate = d * u * s * mul_add::<FMA>(*g, 1.0 - s, 1.0);
        *d_up = d * g * s;
    }
}

multiversion! { fn rms_norm_piece = rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) }

#[inline(always)]
fn rms_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let r = reciprocal_rms::<FMA>(x, eps);
        for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
            *out = x * r * w;
        }
    }
}

multiversion! {
    fn rms_norm_backward_piece = rms_norm_backward_body(d_out: &[f32], x: &[f32], weight: &[f32], eps: f32, d_x: &mut [f32])
}

#[inline(always)]
fn rms_norm_backward_body<const FMA: bool>(d_out: &[f32], x: &[f32], weight: &[f32], eps: f32, d_x: &mut [f32]) {
    let width = weight.len();
    let rows = d_out
        .chunks_exact(width)
        .zip(x.chunks_exact(width))
        .zip(d_x.chunks_exact_mut(width));
    for ((d_out, x), d_x) in rows {
        let r = reciprocal_rms::<FMA>(x, eps);
        for ((d_x, d), w) in d_x.iter_mut().zip(d_out).zip(weight) {
            *d_x = d * w;
        }
        let shift = r * r * dot::<FMA>(d_x, x) / width as f32;
        for (d_x, x) in d_x.iter_mut().zip(x) {
            *d_x = r * mul_add::<FMA>(-shift, *x, *d_x);
        }
    }
}

#[inline(always)]
fn reciprocal_rms<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot::<FMA>(x, x) / x.len() as f32 + eps).sqrt()
}

/// Sum of products in 32 partial sums: a single one could not be computed in vectors.
#[inline(always)]
pub(crate) fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0_f32; 32];
    let (left, right) = (a.chunks_exact(32), b.chunks_exact(32));
    let rest: f32 = left.remainder().iter().zip(right.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in left.zip(right) {
        for lane in 0..32 {
            sums[lane] = mul_add::<FMA>(a[lane], b[lane], sums[lane]);
        }
    }
    sums.iter().sum::<f32>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f32) -> Vec<f32> {
        (0..count).map(|i| (i as f32 * 0.731 + seed).sin() * 4.0).collect()
    }

    fn close(found: &[f32], expect: impl Iterator<Item = f64>) {
        for (index, (found, expect)) in found.iter().zip(expect).enumerate() {
            assert!(
                (f64::from(*found) - expect).abs() < 1e-5 * expect.abs().max(1.0),
                "{index}: {found} {expect}"
            );
        }
    }

    /// Central differences of `f` in f64 at each of `at`.
    fn slopes(at: &[f32], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
        let at: Vec<f64> = at.iter().map(|&v| f64::from(v)).collect();
        let moved = |index: usize, by: f64| {
            let mut moved = at.clone();
            moved[index] += by;
            f(&moved)
        };
        (0..at.len())
            .map(|index| (moved(index, 1e-5) - moved(index, -1e-5)) / 2e-5)
            .collect()
    }

    #[test]
    fn swiglu_and_its_gradient_match_the_definition() {
        let (gate, up, d) = (numbers(75, 0.1), numbers(75, 0.5), numbers(75, 0.9));
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let mut out = vec![0.0; 75];
        swiglu(&gate, &up, &mut out);
        close(
            &out,
            gate.iter().zip(&up).map(|(g, u)| silu(f64::from(*g)) * f64::from(*u)),
        );
        let (mut d_gate, mut d_up) = (vec![0.0; 75], vec![0.0; 75]);
        swiglu_backward(&d, &gate, &up, &mut d_gate, &mut d_up);
        let total = |gate: &[f64], up: &[f64]| {
            gate.iter()
                .zip(up)
                .zip(&d)
                .map(|((g, u), d)| silu(*g) * u * f64::from(*d))
                .sum::<f64>()
        };
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        close(&d_gate, slopes(&gate, |gate| total(gate, &wide(&up))).into_iter());
        close(&d_up, slopes(&up, |up| total(&wide(&gate), up)).into_iter());
    }

    #[test]
    fn rms_norm_and_its_gradient_match_the_definition() {
        let (x, weight, d) = (numbers(3 * 37, 0.2), numbers(37, 1.1), numbers(3 * 37, 2.0));
        let norm = |x: &[f64]| -> Vec<f64> {
            x.chunks(37)
                .flat_map(|row| {
                    let r = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / 37.0 + 1e-5_f32 as f64).sqrt();
                    row.iter()
                        .zip(&weight)
                        .map(move |(v, w)| v * r * f64::from(*w))
                        .collect::<Vec<_>>()
                })
                .collect()
        };
        let wide: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
        let mut out = vec![0.0; x.len()];
        rms_norm(&x, &weight, 1e-5, &mut out);
        close(&out, norm(&wide).into_iter());
        let mut d_x = vec![0.0; x.len()];
        rms_norm_backward(&d, &x, &weight, 1e-5, &mut d_x);
        close(
            &d_x,
            slopes(&x, |x| norm(x).iter().zip(&d).map(|(y, d)| y * f64::from(*d)).sum()).into_iter(),
        );
    }
}

//! Cross-entropy of a linear head without its logits: a block of tokens at a time, loss and gradient together.

use std::cell::RefCell;

use crate::PackedLinear;
use crate::simd::{exp, multiversion};
use rayon::prelude::*;

/// Tokens whose logits exist at once: at a vocabulary of 49,152 they take 25 MB, which a third-level cache holds.
const BLOCK: usize = 128;

thread_local! {
    /// Kept from call to call: a fresh buffer would be cleared page by page.
    static LOGITS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Negative log-likelihood of each target and, if wanted, its gradient with respect to the hidden state.
///
/// `nll = log Σ eˡ − l[target]`, `d_hidden = headᵀ (softmax(l) − onehot(target))`, `l = head(hidden)` in f32 with products of
/// bf16 numbers.
///
/// # Shapes
/// `hidden` and `d_hidden` `[t, d]`, `targets` and `nll` `[t]`; a target is below the head's vocabulary.
pub fn linear_cross_entropy(
    head: &PackedLinear,
    hidden: &[f32],
    targets: &[i32],
    nll: &mut [f32],
    d_hidden: Option<&mut [f32]>,
) {
    let (width, vocabulary) = (head.input_dims(), head.output_dims());
    assert!(hidden.len() == targets.len() * width && nll.len() == targets.len());
    assert!(d_hidden.as_ref().is_none_or(|gradient| gradient.len() == hidden.len()));
    let mut logits = LOGITS.take();
    logits.resize(logits.len().max(BLOCK.min(targets.len()) * vocabulary), 0.0);
    let mut gradients = d_hidden.map(|gradient| gradient.chunks_mut(BLOCK * width));
    let blocks = targets.chunks(BLOCK).zip(nll.chunks_mut(BLOCK));
    for (hidden, (targets, nll)) in hidden.chunks(BLOCK * width).zip(blocks) {
        let logits = &mut logits[..targets.len() * vocabulary];
        head.forward.multiply(hidden, None, logits);
        let rows = logits.par_chunks_mut(vocabulary).zip(targets).zip(nll);
        rows.for_each(|((row, &target), nll)| *nll = softmax_gradient(row, target as usize));
        if let Some(d_hidden) = gradients.as_mut().and_then(Iterator::next) {
            head.backward.multiply(logits, None, d_hidden);
        }
    }
    LOGITS.set(logits);
}

/// The same from logits `[t, v]` that exist already, with the gradient with respect to them.
pub fn softmax_gradients(logits: &[f32], targets: &[i32], vocabulary: usize, gradient: &mut [f32], nll: &mut [f32]) {
    assert!(logits.len() == targets.len() * vocabulary && gradient.len() == logits.len() && nll.len() == targets.len());
    let rows = gradient.par_chunks_mut(vocabulary).zip(logits.par_chunks(vocabulary));
    rows.zip(targets).zip(nll).for_each(|(((row, logits), &target), nll)| {
        row.copy_from_slice(logits);
        *nll = softmax_gradient(row, target as usize);
    });
}

multiversion! {
    /// Turns a row of logits into `softmax − onehot(target)` and returns the negative log-likelihood of the target.
    pub fn softmax_gradient = softmax_gradient_body(row: &mut [f32], target: usize) -> f32
}

#[inline(always)]
fn softmax_gradient_body<const FMA: bool>(row: &mut [f32], target: usize) -> f32 {
    let at_target = row[target];
    let highest = highest(row);
    let sum = exponentials::<FMA>(row, highest);
    let scale = 1.0 / sum;
    for value in row.iter_mut() {
        *value *= scale;
    }
    // Kept apart from p so that p − 1 loses nothing where p is nearly 1: e.g. p = 1 − 1e-9.
    row[target] -= 1.0;
    (highest - at_target) + sum.ln()
}

/// Numbers that are worked on side by side.
pub(crate) const LANES: usize = 32;

/// Replaces each number by `e^(number − highest)` and returns the sum.
#[inline(always)]
pub(crate) fn exponentials<const FMA: bool>(row: &mut [f32], highest: f32) -> f32 {
    let mut sums = [0_f32; LANES];
    let mut chunks = row.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for lane in 0..LANES {
            chunk[lane] = exp::<FMA>(chunk[lane] - highest);
            sums[lane] += chunk[lane];
        }
    }
    let mut rest = 0.0;
    for value in chunks.into_remainder() {
        *value = exp::<FMA>(*value - highest);
        rest += *value;
    }
    // Pairwise in f64: a vocabulary has a hundred thousand entries.
    (sums.iter().map(|&sum| f64::from(sum)).sum::<f64>() + f64::from(rest)) as f32
}

#[inline(always)]
pub(crate) fn highest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] {
                chunk[lane]
            } else {
                lanes[lane]
            };
        }
    }
    lanes.iter().copied().fold(rest, f32::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_and_gradient_match_the_definition() {
        let (tokens, width, vocabulary) = (150, 6, 75);
        // Multiples of 1/64 below 1 are exact in bf16, so the products are exact.
        let exact = |count: usize, step: usize| -> Vec<f32> {
            (0..count)
                .map(|i| ((i * step) % 101) as f32 / 64.0 - 0.75)
                .map(|v| half::bf16::from_f32(v).to_f32())
                .collect()
        };
        let (hidden, head) = (exact(tokens * width, 37), exact(vocabulary * width, 53));
        let targets: Vec<i32> = (0..tokens).map(|i| (i * 7 % vocabulary) as i32).collect();
        let packed = PackedLinear::new(&head, vocabulary, width);
        let (mut nll, mut d_hidden) = (vec![0.0; tokens], vec![0.0; tokens * width]);
        linear_cross_entropy(&packed, &hidden, &targets, &mut nll, Some(&mut d_hidden));
        for token in 0..tokens {
            let h = &hidden[token * width..][..width];
            let logits: Vec<f64> = head
                .chunks(width)
                .map(|w| w.iter().zip(h).map(|(w, h)| f64::from(w * h)).sum())
                .collect();
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            let target = targets[token] as usize;
            assert!((f64::from(nll[token]) - (sum.ln() - logits[target])).abs() < 1e-5);
            for d in 0..width {
                let p = |v: usize| logits[v].exp() / sum - f64::from(u8::from(v == target));
                let expect: f64 = (0..vocabulary).map(|v| p(v) * f64::from(head[v * width + d])).sum();
                // The gradient of the logits is rounded to bf16: 2⁻⁹ of each term.
                assert!(
                    (f64::from(d_hidden[token * width + d]) - expect).abs() < 4e-3,
                    "{token},{d}"
                );
            }
        }
    }

    #[test]
    fn certain_rows_do_not_overflow() {
        let mut row = vec![-1e30_f32, 1e30, 0.0];
        assert_eq!(softmax_gradient(&mut row, 1), 0.0);
        assert_eq!(row, [0.0, 0.0, 0.0]);
    }

    #[test]
    fn uniform_logits_cost_the_logarithm_of_the_vocabulary() {
        let mut row = vec![3.5_f32; 1000];
        assert!((softmax_gradient(&mut row, 7) - 1000_f32.ln()).abs() < 1e-6);
    }
}

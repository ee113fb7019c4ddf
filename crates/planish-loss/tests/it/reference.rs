//! The same formulas in plain f64 loops, and gradients by central differences.

/// Numbers in `[-0.5, 0.5)`, always the same for one seed.
pub(crate) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect()
}

/// `(1 − ε)·nll + ε·(log Z − mean) + z·log Z²` of one row of logits.
pub(crate) fn token_objective(logits: &[f64], target: usize, smoothing: f64, z_loss: f64) -> f64 {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_z = largest + logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
    let mean = logits.iter().sum::<f64>() / logits.len() as f64;
    (1.0 - smoothing) * (log_z - logits[target]) + smoothing * (log_z - mean) + z_loss * log_z * log_z
}

/// `Σ_i w_i · objective(head · h_i)` for `hidden [t, d]` and `head [v, d]`.
pub(crate) fn linear_objective(
    hidden: &[f64],
    head: &[f64],
    targets: &[usize],
    weights: &[f64],
    smoothing: f64,
    z_loss: f64,
) -> f64 {
    let dims = hidden.len() / targets.len();
    let rows = hidden.chunks(dims).zip(targets).zip(weights);
    rows.map(|((state, &target), weight)| {
        let logits: Vec<f64> = head
            .chunks(dims)
            .map(|row| row.iter().zip(state).map(|(a, b)| a * b).sum())
            .collect();
        weight * token_objective(&logits, target, smoothing, z_loss)
    })
    .sum()
}

/// Central differences of `f` at `x`.
pub(crate) fn gradient(f: impl Fn(&[f64]) -> f64, x: &[f64]) -> Vec<f64> {
    const H: f64 = 1e-5;
    let mut at = x.to_vec();
    (0..x.len())
        .map(|i| {
            at[i] = x[i] + H;
            let above = f(&at);
            at[i] = x[i] - H;
            let below = f(&at);
            at[i] = x[i];
            (above - below) / (2.0 * H)
        })
        .collect()
}

pub(crate) fn to_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

pub(crate) fn assert_close(found: &[f32], expected: &[f64], relative: f64) {
    let size = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    let off = found
        .iter()
        .zip(expected)
        .map(|(&a, b)| (f64::from(a) - b).powi(2))
        .sum::<f64>()
        .sqrt();
    assert_eq!(found.len(), expected.len());
    assert!(off <= relative * size.max(1e-12), "‖Δ‖/‖expected‖ = {}", off / size);
}

//! Next-token cross-entropy from hidden states through a head packed in bf16: logits exist for a block of tokens at a time.

use std::sync::Arc;

use mlx_rs::{Array, stop_gradient};
use planish_kernels::PackedLinear;
use planish_mlx::host_kernel::{Input, Output, OutputSpec, host_kernel};

use crate::chunked_cross_entropy::with_gradient;
use crate::{Result, TokenLoss, TrainedPositions};

/// Plain cross-entropy of the trained positions, with its gradient, by one kernel on the CPU.
///
/// As [`chunked_cross_entropy`](crate::chunked_cross_entropy()) with default options, products of bf16 numbers and sums in
/// f32. `hidden` `[b, l, d]` f32 → `[t]`, f32, in nats.
///
/// # Errors
/// [`crate::Error::ShapeMismatch`] when the positions were made for another `b·l`; MLX's own.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use mlx_rs::Array;
/// use planish_kernels::PackedLinear;
/// use planish_loss::{TrainedPositions, packed_cross_entropy};
///
/// let hidden = Array::from_slice(&[0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6], &[1, 3, 2]);
/// let positions = TrainedPositions::select(&[0, 3, 1], &[0.0, 1.0, 1.0])?;
/// let head = Arc::new(PackedLinear::new(&[0.0; 8], 4, 2));
/// let loss = packed_cross_entropy(&hidden, &head, &positions)?;
/// assert!((loss.nll.sum(false)?.item_exact::<f32>() / 2.0 - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn packed_cross_entropy(
    hidden: &Array,
    head: &Arc<PackedLinear>,
    positions: &TrainedPositions,
) -> Result<TokenLoss> {
    let states = positions.gather(hidden)?; // [t, d]
    let specs = [positions.len() as i32].map(|t| [OutputSpec::f32(&[t]), OutputSpec::f32(states.shape())]);
    let mut outputs = run(&states, head, positions, &specs[0])?;
    let gradient = outputs.swap_remove(1);
    let nll = outputs.swap_remove(0);
    Ok(TokenLoss {
        objective: with_gradient(&nll, &gradient, &states)?,
        nll,
    })
}

/// The same without gradient, for evaluation: `[t]`, f32, in nats.
///
/// # Errors
/// As [`packed_cross_entropy`].
pub fn packed_token_nll(hidden: &Array, head: &Arc<PackedLinear>, positions: &TrainedPositions) -> Result<Array> {
    let states = positions.gather(hidden)?; // [t, d]
    let specs = [OutputSpec::f32(&[positions.len() as i32])];
    Ok(run(&states, head, positions, &specs)?.swap_remove(0))
}

fn run(
    states: &Array,
    head: &Arc<PackedLinear>,
    positions: &TrainedPositions,
    specs: &[OutputSpec],
) -> Result<Vec<Array>> {
    let inputs = [stop_gradient(states)?, positions.targets().clone()];
    let head = head.clone();
    let kernel = move |inputs: &[Input<'_>], outputs: &mut [Output<'_>]| {
        let (hidden, targets) = (inputs[0].f32(), inputs[1].i32());
        let mut outputs = outputs.iter_mut().map(Output::f32_mut);
        if let Some(nll) = outputs.next() {
            let gradient = outputs.next();
            planish_kernels::on_pool(|| {
                planish_kernels::linear_cross_entropy(&head, hidden, targets, nll, gradient);
            });
        }
    };
    Ok(host_kernel("linear_cross_entropy", &inputs, specs, kernel)?)
}

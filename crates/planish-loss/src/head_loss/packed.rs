//! The plain loss through a head packed in bf16, by one kernel on the CPU: logits exist for a block of tokens at a time.

use std::sync::Arc;

use mlx_rs::{Array, stop_gradient};
use planish_kernels::PackedLinear;
use planish_mlx::host_kernel::{Input, Output, OutputSpec, host_kernel};

use super::Rows;
use crate::{Result, TrainedPositions};

/// Losses of `states` `[t, d]`, f32, and their gradients if wanted: products of bf16 numbers, sums in f32.
pub(super) fn losses(
    states: &Array,
    head: &Arc<PackedLinear>,
    positions: &TrainedPositions,
    with_gradient: bool,
) -> Result<Rows> {
    let inputs = [&stop_gradient(states)?, positions.targets()];
    let of_nll = OutputSpec::f32(&[positions.len() as i32]);
    let head = head.clone();
    let run = move |[states, targets]: &[Input<'_>; 2], nll: &mut [f32], gradient: Option<&mut [f32]>| {
        let (states, targets) = (states.f32(), targets.i32());
        planish_kernels::on_pool(|| planish_kernels::linear_cross_entropy(&head, states, targets, nll, gradient));
    };
    let (nll, gradient) = if with_gradient {
        let specs = [of_nll, OutputSpec::f32(states.shape())];
        let run = move |inputs: &[Input<'_>; 2], [nll, gradient]: &mut [Output<'_>; 2]| {
            run(inputs, nll.f32_mut(), Some(gradient.f32_mut()));
        };
        let [nll, gradient] = host_kernel("linear_cross_entropy", inputs, specs, run)?;
        (nll, Some(gradient))
    } else {
        let run = move |inputs: &[Input<'_>; 2], [nll]: &mut [Output<'_>; 1]| run(inputs, nll.f32_mut(), None);
        let [nll] = host_kernel("linear_cross_entropy", inputs, [of_nll], run)?;
        (nll, None)
    };
    Ok(Rows {
        objective: nll.clone(),
        nll,
        gradient,
    })
}

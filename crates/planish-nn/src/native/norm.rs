use planish_mlx::Array;

use super::{kernel, only, with_gradient};
use crate::Result;

/// `x · weight / sqrt(mean(x²) + eps)` over the last axis, f32.
pub(crate) fn rms_norm(x: &Array, weight: &Array, eps: f32) -> Result<Array> {
    let outputs = with_gradient(
        move |inputs| forward(inputs, eps),
        move |inputs, cotangents, _| backward(inputs, &cotangents[0], eps),
        &[x.clone(), weight.clone()],
    )?;
    only(outputs)
}

fn forward(inputs: &[Array], eps: f32) -> Result<Vec<Array>> {
    let shape = inputs[0].shape().to_vec();
    kernel("rms_norm", inputs, &[shape], move |inputs, outputs| {
        planish_kernels::rms_norm(inputs[0].f32(), inputs[1].f32(), eps, outputs[0].f32_mut());
    })
}

fn backward(inputs: &[Array], d_out: &Array, eps: f32) -> Result<Vec<Array>> {
    let shape = inputs[0].shape().to_vec();
    let all = [d_out.clone(), inputs[0].clone(), inputs[1].clone()];
    let d_x = kernel("rms_norm_backward", &all, &[shape], move |inputs, outputs| {
        let [d_out, x, weight] = [0, 1, 2].map(|index: usize| inputs[index].f32());
        planish_kernels::rms_norm_backward(d_out, x, weight, eps, outputs[0].f32_mut());
    })?;
    Ok(vec![only(d_x)?, weight_gradient(&inputs[0], d_out, eps)?])
}

/// `Σ_rows d · x / rms(x)`; never computed while the weight is frozen, since nobody asks for it.
fn weight_gradient(x: &Array, d_out: &Array, eps: f32) -> Result<Array> {
    let mean_square = x.square()?.mean_axis(-1, true)?;
    let normalised = x.multiply(mean_square.add(Array::from_f32(eps))?.rsqrt()?)?;
    let by_row = d_out.multiply(normalised)?.reshape(&[-1, x.dim(-1)])?;
    Ok(by_row.sum_axis(0, false)?)
}

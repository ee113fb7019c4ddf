use planish_mlx::Array;
use planish_mlx::transforms::custom_vjp;

use super::kernel;
use crate::Result;

/// `x · weight / sqrt(mean(x²) + eps)` over the last axis, f32.
pub(crate) fn rms_norm(x: &Array, weight: &Array, eps: f32) -> Result<Array> {
    let [y] = custom_vjp(
        move |[x, weight]: &[Array; 2]| {
            kernel("rms_norm", [x, weight], [x.shape()], move |[x, weight], [y]| {
                planish_kernels::rms_norm(x.f32(), weight.f32(), eps, y);
            })
        },
        move |[x, weight]: &[Array; 2], [d_y]: &[Array; 1], _: &[Array; 1]| {
            let inputs = [d_y, x, weight];
            let [d_x] = kernel(
                "rms_norm_backward",
                inputs,
                [x.shape()],
                move |[d_y, x, weight], [d_x]| {
                    planish_kernels::rms_norm_backward(d_y.f32(), x.f32(), weight.f32(), eps, d_x);
                },
            )?;
            Ok([d_x, weight_gradient(x, d_y, eps)?])
        },
        [x, weight],
    )?;
    Ok(y)
}

/// `Σ_rows d · x / rms(x)`; never computed while the weight is frozen, since nobody asks for it.
fn weight_gradient(x: &Array, d_out: &Array, eps: f32) -> Result<Array> {
    let mean_square = x.square()?.mean_axis(-1, true)?;
    let normalised = x.multiply(mean_square.add(Array::from_f32(eps))?.rsqrt()?)?;
    let by_row = d_out.multiply(normalised)?.reshape(&[-1, x.dim(-1)])?;
    Ok(by_row.sum_axis(0, false)?)
}

use planish_mlx::Array;
use planish_mlx::transforms::custom_vjp;

use super::kernel;
use crate::Result;

/// `silu(gate) · up`, f32, arrays of one shape.
pub(crate) fn swiglu(gate: &Array, up: &Array) -> Result<Array> {
    let [out] = custom_vjp(
        |[gate, up]: &[Array; 2]| {
            kernel("swiglu", [gate, up], [gate.shape()], |[gate, up], [out]| {
                planish_kernels::swiglu(gate.f32(), up.f32(), out);
            })
        },
        |[gate, up]: &[Array; 2], [d_out]: &[Array; 1], _: &[Array; 1]| {
            let (inputs, shapes) = ([d_out, gate, up], [gate.shape(); 2]);
            kernel(
                "swiglu_backward",
                inputs,
                shapes,
                |[d_out, gate, up], [d_gate, d_up]| {
                    planish_kernels::swiglu_backward(d_out.f32(), gate.f32(), up.f32(), d_gate, d_up);
                },
            )
        },
        [gate, up],
    )?;
    Ok(out)
}

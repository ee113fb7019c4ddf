use planish_mlx::Array;

use super::{kernel, only, slices, with_gradient};
use crate::Result;

/// `silu(gate) · up`, f32, arrays of one shape.
pub(crate) fn swiglu(gate: &Array, up: &Array) -> Result<Array> {
    only(with_gradient(forward, backward, &[gate.clone(), up.clone()])?)
}

fn forward(inputs: &[Array]) -> Result<Vec<Array>> {
    kernel("swiglu", inputs, &[inputs[0].shape().to_vec()], |inputs, outputs| {
        planish_kernels::swiglu(inputs[0].f32(), inputs[1].f32(), outputs[0].f32_mut());
    })
}

fn backward(inputs: &[Array], cotangents: &[Array], _: &[Array]) -> Result<Vec<Array>> {
    let shape = inputs[0].shape().to_vec();
    let all = [cotangents[0].clone(), inputs[0].clone(), inputs[1].clone()];
    kernel("swiglu_backward", &all, &[shape.clone(), shape], |inputs, outputs| {
        let [d_out, gate, up] = [0, 1, 2].map(|index: usize| inputs[index].f32());
        let mut gradients = slices(outputs);
        if let (Some(d_gate), Some(d_up)) = (gradients.next(), gradients.next()) {
            planish_kernels::swiglu_backward(d_out, gate, up, d_gate, d_up);
        }
    })
}

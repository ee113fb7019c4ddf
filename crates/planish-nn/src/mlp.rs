use mlx_rs::ops::sigmoid;
use planish_mlx::{Array, Dtype, ops, transforms};

use crate::dropout::DropoutKeys;
use crate::native::{self, Kernels};
use crate::parameters::{Parameters, Visitor, join};
use crate::{Error, Linear, Result};

/// The gated feed-forward network: `down(silu(gate(x)) · up(x))`, `silu(z) = z · sigmoid(z)`.
///
/// # Reference
/// Shazeer 2020, arXiv 2002.05202.
#[derive(Debug, Clone)]
pub(crate) struct SwiGlu {
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
    pub(crate) kernels: Kernels,
}

impl SwiGlu {
    /// `x` `[b, s, d]` → `[b, s, d]`.
    pub(crate) fn forward(&self, x: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let [gate, up] = Linear::forward_together([&self.gate, &self.up], x, keys)?; // [b, s, f]
        if self.kernels.is_native() {
            return self.down.forward_with(&native::swiglu(&gate, &up)?, keys);
        }
        let inner = match gate.dtype() {
            Dtype::Float32 => gated(&gate, &up)?,
            _ => gated_again(&gate, &up)?,
        };
        self.down.forward_with(&inner, keys)
    }
}

/// `silu(gate) · up`.
fn gated(gate: &Array, up: &Array) -> Result<Array> {
    // Written out: the silu of mlx-rs is a compiled function, which calls a C++ compiler at run time on the CPU.
    Ok(gate.multiply(sigmoid(gate)?)?.multiply(up)?)
}

/// The same, keeping only `gate` and `up` for the backward pass: what else it needs is cheap to compute again, and as wide.
///
/// `∂up = c · silu(gate)`, `∂gate = c · up · s · (1 + gate · (1 − s))`, `s = sigmoid(gate)`, `c` the gradient of the output.
fn gated_again(gate: &Array, up: &Array) -> Result<Array> {
    let [inner] = transforms::custom_vjp(
        |[gate, up]: &[Array; 2]| Ok::<_, Error>([gated(gate, up)?]),
        |[gate_of_forward, up]: &[Array; 2], [cotangent]: &[Array; 1], _: &[Array; 1]| {
            // Apart from the forward pass, and from each other: each becomes one fused kernel in a trace, which shares nothing
            // that it would have to write down.
            let gate = ops::after(gate_of_forward, std::slice::from_ref(cotangent))?;
            let of_up = cotangent.multiply(gate.multiply(sigmoid(&gate)?)?)?;
            let gate = ops::after(gate_of_forward, std::slice::from_ref(&of_up))?;
            let (s, one) = (sigmoid(&gate)?, Array::from_f32(1.0).as_dtype(gate.dtype())?);
            let slope = s.multiply(one.add(gate.multiply(one.subtract(&s)?)?)?)?;
            Ok([cotangent.multiply(up)?.multiply(slope)?, of_up])
        },
        [gate, up],
    )?;
    Ok(inner)
}

impl Parameters for SwiGlu {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.gate.visit(&join(path, "gate_proj"), visitor);
        self.up.visit(&join(path, "up_proj"), visitor);
        self.down.visit(&join(path, "down_proj"), visitor);
    }
}

#[cfg(test)]
mod tests {
    use planish_mlx::transforms::value_and_grad;

    use super::*;

    #[test]
    fn gradient_rule_equals_differentiation() {
        let values = |seed: u64| {
            let key = mlx_rs::random::key(seed).unwrap();
            mlx_rs::random::uniform::<_, f32>(-4.0, 4.0, &[3, 50], &key).unwrap()
        };
        let arguments = [values(1), values(2)];
        let gradients = |function: fn(&Array, &Array) -> Result<Array>| {
            let weights = values(3);
            let objective = |a: &[Array]| Ok::<_, Error>(vec![function(&a[0], &a[1])?.multiply(&weights)?.sum(false)?]);
            value_and_grad(objective, &arguments, &[0, 1]).unwrap()
        };
        let ((value, rule), (expected, plain)) = (gradients(gated_again), gradients(gated));
        assert_eq!(value[0].item_exact::<f32>(), expected[0].item_exact::<f32>());
        for (one, other) in rule.iter().zip(&plain) {
            assert!(one.all_close(other, 1e-5, 1e-6, None).unwrap());
        }
    }
}

use std::f32::consts::FRAC_2_PI;

use mlx_rs::ops::{sigmoid, tanh};
use planish_core::arch::Activation;
use planish_mlx::{Array, Dtype, ops, transforms};

use crate::dropout::DropoutKeys;
use crate::native::{self, Kernels};
use crate::parameters::{Named, Parameters, Visitor};
use crate::{Error, Linear, Result};

/// The gated feed-forward network: `down(act(gate(x)) · up(x))`.
///
/// # Reference
/// Shazeer 2020, arXiv 2002.05202.
#[derive(Debug, Clone)]
pub(crate) struct Gated {
    pub(crate) activation: Activation,
    pub(crate) gate: Named<Linear>,
    pub(crate) up: Named<Linear>,
    pub(crate) down: Named<Linear>,
    pub(crate) kernels: Kernels,
}

impl Gated {
    pub(crate) const N_LINEARS: usize = 3;

    /// `x` `[b, s, d]` → `[b, s, d]`.
    pub(crate) fn forward(&self, x: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let [gate, up] = Linear::forward_together([&self.gate, &self.up], x, keys)?; // [b, s, f]
        self.down.forward_with(&self.activated(&gate, &up)?, keys)
    }

    /// `act(gate) · up`: by our own kernel where there is one, in 16 bits keeping only the inputs for the backward pass.
    fn activated(&self, gate: &Array, up: &Array) -> Result<Array> {
        match (self.activation, gate.dtype()) {
            (Activation::Silu, _) if self.kernels.is_native() => native::swiglu(gate, up),
            (Activation::Silu, Dtype::Float32) => gated(gate, up),
            (Activation::Silu, _) => gated_again(gate, up),
            (Activation::GeluTanh, Dtype::Float32) => Ok(gelu_tanh(gate)?.multiply(up)?),
            (Activation::GeluTanh, _) => {
                let both = |inputs: &[Array]| Ok::<_, Error>(vec![gelu_tanh(&inputs[0])?.multiply(&inputs[1])?]);
                let [inner] = ops::exactly(transforms::checkpoint(both, &[gate.clone(), up.clone()])?)?;
                Ok(inner)
            }
        }
    }

    /// What our own kernel of the CPU is not written for, where there is something.
    pub(crate) fn native_obstacle(&self) -> Option<&'static str> {
        match self.activation {
            Activation::Silu => None,
            Activation::GeluTanh => Some("GELU"),
        }
    }

    /// Its linear layers, in the order of the computation.
    pub(crate) fn linears_mut(&mut self) -> [&mut Named<Linear>; Self::N_LINEARS] {
        [&mut self.gate, &mut self.up, &mut self.down]
    }
}

/// `z / 2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))`, computed in f32.
///
/// # Reference
/// Hendrycks and Gimpel 2016, arXiv 1606.08415.
fn gelu_tanh(z: &Array) -> Result<Array> {
    let scalar = Array::from_f32;
    let wide = z.as_dtype(Dtype::Float32)?;
    let cube = wide.square()?.multiply(&wide)?.multiply(scalar(0.044_715))?;
    let slope = tanh(wide.add(cube)?.multiply(scalar(FRAC_2_PI.sqrt()))?)?;
    let activated = wide.multiply(slope.add(scalar(1.0))?)?.multiply(scalar(0.5))?;
    Ok(activated.as_dtype(z.dtype())?)
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

impl Parameters for Gated {
    /// `path` is that of the layer.
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.linears_mut()
            .into_iter()
            .for_each(|linear| linear.visit(path, visitor));
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

    #[test]
    fn gelu_equals_known_values_in_f32_and_bf16() {
        let z = Array::from_slice(&[-3.0_f32, -1.0, 0.0, 0.5, 2.0], &[5]);
        let expect = [-0.003_637_4_f32, -0.158_808, 0.0, 0.345_714, 1.954_597_8]; // torch's gelu, approximate = "tanh"
        let check = |dtype, tolerance: f32| {
            let found = gelu_tanh(&z.as_dtype(dtype).unwrap()).unwrap();
            assert_eq!(found.dtype(), dtype);
            let found = planish_mlx::host::to_f32_vec(&found).unwrap();
            assert!(
                found.iter().zip(expect).all(|(a, b)| (a - b).abs() <= tolerance),
                "{found:?}"
            );
        };
        check(Dtype::Float32, 1e-6);
        check(Dtype::Bfloat16, 4e-3);
    }
}

use mlx_rs::ops::sigmoid;
use planish_mlx::Array;

use crate::dropout::DropoutKeys;
use crate::native::{self, Kernels};
use crate::parameters::{Parameters, Visitor, join};
use crate::{Linear, Result};

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
        // Written out: the silu of mlx-rs is a compiled function, which calls a C++ compiler at run time on the CPU.
        let inner = gate.multiply(sigmoid(&gate)?)?.multiply(up)?;
        self.down.forward_with(&inner, keys)
    }
}

impl Parameters for SwiGlu {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.gate.visit(&join(path, "gate_proj"), visitor);
        self.up.visit(&join(path, "up_proj"), visitor);
        self.down.visit(&join(path, "down_proj"), visitor);
    }
}

use mlx_rs::Array;

use super::{Slot, Step, UpdateRule, check_betas, check_range, moving_average, scalar};
use crate::Result;

/// Adam without weight decay, or with the decoupled decay of mlx-lm's `adamw`.
///
/// Without bias correction, `θ ← (1 − lr·λ)·θ − lr·m/(√v + ε)`: the arithmetic of mlx-lm's `adam` (λ = 0) and `adamw`
/// (λ = 0.01), for `--compat mlx-lm`. With it, as [`AdamW`](super::AdamW) with `λ = 0`. The decay here reaches every
/// tensor, as mlx-lm's does.
///
/// # Reference
/// Kingma & Ba 2014, arXiv 1412.6980.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adam {
    /// `β1`, `β2`.
    pub betas: [f64; 2],
    /// `ε`.
    pub eps: f64,
    /// Whether the moments are divided by `1 − βᵗ`.
    pub bias_correction: bool,
    /// `λ`.
    pub weight_decay: f64,
}

impl Default for Adam {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.999],
            eps: 1e-8,
            bias_correction: true,
            weight_decay: 0.0,
        }
    }
}

impl UpdateRule for Adam {
    fn check(&self) -> Result<()> {
        check_betas(self.betas)?;
        check_range(
            self.eps > 0.0 && self.eps.is_finite(),
            "optimizer.eps",
            self.eps,
            "(0, ∞)",
        )?;
        let decay = self.weight_decay;
        check_range(
            decay >= 0.0 && decay.is_finite(),
            "optimizer.weight_decay",
            decay,
            "[0, ∞)",
        )
    }

    fn is_elementwise(&self) -> bool {
        true
    }

    fn slots(&self, shape: &[i32]) -> Vec<Slot> {
        vec![Slot::new("m", shape), Slot::new("v", shape)]
    }

    fn update(&self, step: &Step, parameter: &Array, gradient: &Array, slots: &[Array]) -> Result<(Array, Vec<Array>)> {
        let [beta1, beta2] = self.betas;
        let m = moving_average(&slots[0], gradient, beta1)?;
        let v = moving_average(&slots[1], &gradient.square()?, beta2)?;
        let (mut numerator, mut variance) = (m.clone(), v.clone());
        if self.bias_correction {
            numerator = numerator.divide(step.bias_correction(beta1)?)?;
            variance = variance.divide(step.bias_correction(beta2)?)?;
        }
        let mut moved = parameter.clone();
        if self.weight_decay != 0.0 {
            let kept = scalar(1.0).subtract(step.lr.multiply(scalar(self.weight_decay))?)?;
            moved = moved.multiply(kept)?;
        }
        let direction = numerator.divide(variance.sqrt()?.add(scalar(self.eps))?)?;
        Ok((moved.subtract(direction.multiply(&step.lr)?)?, vec![m, v]))
    }
}

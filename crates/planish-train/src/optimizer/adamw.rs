use mlx_rs::Array;

use super::{Slot, Step, UpdateRule, check_betas, check_range, moving_average, scalar};
use crate::Result;

/// Adam with bias correction and decoupled weight decay.
///
/// `m = β1·m + (1 − β1)·g`, `v = β2·v + (1 − β2)·g²`, `m̂ = m/(1 − β1ᵗ)`, `v̂ = v/(1 − β2ᵗ)`,
/// `θ ← θ − lr·(m̂/(√v̂ + ε) + λ·θ)`, all in f32; `λ` only for tensors that [decay](super::decays).
///
/// # Reference
/// Loshchilov & Hutter 2017, arXiv 1711.05101.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// `β1`, `β2`.
    pub betas: [f64; 2],
    /// `ε`.
    pub eps: f64,
    /// `λ`.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.01,
        }
    }
}

impl UpdateRule for AdamW {
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
        let denominator = v.divide(step.bias_correction(beta2)?)?.sqrt()?.add(scalar(self.eps))?;
        let mut direction = m.divide(step.bias_correction(beta1)?)?.divide(denominator)?;
        if step.decays && self.weight_decay != 0.0 {
            direction = direction.add(parameter.multiply(scalar(self.weight_decay))?)?;
        }
        Ok((parameter.subtract(direction.multiply(&step.lr)?)?, vec![m, v]))
    }
}

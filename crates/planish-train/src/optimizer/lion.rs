use mlx_rs::{Array, ops};

use super::{Slot, Step, UpdateRule, check_betas, check_range, moving_average, scalar};
use crate::Result;

/// Moves every weight by the same amount, in the direction of an interpolated momentum.
///
/// `θ ← θ − lr·(sign(β1·m + (1 − β1)·g) + λ·θ)`, then `m ← β2·m + (1 − β2)·g`. Wants a learning rate 3 to 10 times smaller
/// than AdamW.
///
/// # Reference
/// Chen et al. 2023, arXiv 2302.06675.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Lion {
    /// `β1` (direction), `β2` (memory).
    pub betas: [f64; 2],
    /// `λ`.
    pub weight_decay: f64,
}

impl Default for Lion {
    fn default() -> Self {
        Self {
            betas: [0.9, 0.99],
            weight_decay: 0.0,
        }
    }
}

impl UpdateRule for Lion {
    fn check(&self) -> Result<()> {
        check_betas(self.betas)?;
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
        vec![Slot::new("m", shape)]
    }

    fn update(&self, step: &Step, parameter: &Array, gradient: &Array, slots: &[Array]) -> Result<(Array, Vec<Array>)> {
        let mut direction = ops::sign(moving_average(&slots[0], gradient, self.betas[0])?)?;
        if step.decays && self.weight_decay != 0.0 {
            direction = direction.add(parameter.multiply(scalar(self.weight_decay))?)?;
        }
        let memory = moving_average(&slots[0], gradient, self.betas[1])?;
        Ok((parameter.subtract(direction.multiply(&step.lr)?)?, vec![memory]))
    }
}

use mlx_rs::Array;

use super::{Slot, Step, UpdateRule, check_range, scalar};
use crate::Result;

/// Stochastic gradient descent with momentum.
///
/// `d = g + λ·θ`, `b = μ·b + d` (`b = 0` before the first step), `θ ← θ − lr·(b or, with Nesterov, d + μ·b)`.
///
/// # Reference
/// Sutskever et al. 2013; same conventions as PyTorch's SGD without dampening.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sgd {
    /// `μ`, 0 for none.
    pub momentum: f64,
    /// Looks ahead along the momentum.
    pub nesterov: bool,
    /// `λ`.
    pub weight_decay: f64,
}

impl UpdateRule for Sgd {
    fn check(&self) -> Result<()> {
        check_range(
            (0.0..1.0).contains(&self.momentum),
            "optimizer.momentum",
            self.momentum,
            "[0, 1)",
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
        if self.momentum == 0.0 {
            Vec::new()
        } else {
            vec![Slot::new("momentum", shape)]
        }
    }

    fn update(&self, step: &Step, parameter: &Array, gradient: &Array, slots: &[Array]) -> Result<(Array, Vec<Array>)> {
        let mut direction = gradient.clone();
        if step.decays && self.weight_decay != 0.0 {
            direction = direction.add(parameter.multiply(scalar(self.weight_decay))?)?;
        }
        let mut new_slots = Vec::new();
        if self.momentum != 0.0 {
            let momentum = slots[0].multiply(scalar(self.momentum))?.add(&direction)?;
            direction = match self.nesterov {
                true => direction.add(momentum.multiply(scalar(self.momentum))?)?,
                false => momentum.clone(),
            };
            new_slots.push(momentum);
        }
        Ok((parameter.subtract(direction.multiply(&step.lr)?)?, new_slots))
    }
}

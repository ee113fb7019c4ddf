use mlx_rs::{Array, ops};

use super::{Slot, Step, UpdateRule, check_range, moving_average_by, scalar};
use crate::Result;

/// Adaptive steps whose second moment of a matrix is kept as one row and one column.
///
/// With `β_t = 1 − t^(−d)`: `r` and `c` are moving averages of the row and column means of `g² + ε`;
/// `u = g·√(mean(r)/(r ⊗ c))`, then divided by `max(1, rms(u)/clip)`; `θ ← θ − lr·(u + λ·θ)`. Vectors keep the whole second
/// moment. The learning rate is the schedule's: no relative step, no scaling by the parameter, which would hold a fresh
/// `lora_b = 0` where it is.
///
/// # Reference
/// Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adafactor {
    /// `d`: how fast the memory grows.
    pub decay_exponent: f64,
    /// `ε`, added to the squared gradient.
    pub eps: f64,
    /// Largest root mean square of an update before the learning rate.
    pub clip_threshold: f64,
    /// `λ`.
    pub weight_decay: f64,
}

impl Default for Adafactor {
    fn default() -> Self {
        Self {
            decay_exponent: 0.8,
            eps: 1e-30,
            clip_threshold: 1.0,
            weight_decay: 0.0,
        }
    }
}

impl UpdateRule for Adafactor {
    fn check(&self) -> Result<()> {
        let positive = |x: f64| x > 0.0 && x.is_finite();
        check_range(
            positive(self.decay_exponent),
            "optimizer.decay_exponent",
            self.decay_exponent,
            "(0, ∞)",
        )?;
        check_range(
            positive(self.clip_threshold),
            "optimizer.clip_threshold",
            self.clip_threshold,
            "(0, ∞)",
        )?;
        check_range(positive(self.eps), "optimizer.eps", self.eps, "(0, ∞)")?;
        let decay = self.weight_decay;
        check_range(
            decay >= 0.0 && decay.is_finite(),
            "optimizer.weight_decay",
            decay,
            "[0, ∞)",
        )
    }

    fn is_elementwise(&self) -> bool {
        false
    }

    fn slots(&self, shape: &[i32]) -> Vec<Slot> {
        match shape {
            [.., rows, _] => {
                let mut column = shape.to_vec();
                column.remove(column.len() - 2);
                let mut row = shape[..shape.len() - 2].to_vec();
                row.push(*rows);
                vec![Slot::new("row", &row), Slot::new("column", &column)]
            }
            _ => vec![Slot::new("v", shape)],
        }
    }

    fn update(&self, step: &Step, parameter: &Array, gradient: &Array, slots: &[Array]) -> Result<(Array, Vec<Array>)> {
        let beta = scalar(1.0).subtract(step.t.power(scalar(-self.decay_exponent))?)?;
        let squares = gradient.square()?.add(scalar(self.eps))?;
        let (mut direction, new_slots) = match slots {
            [row, column] => {
                let row = moving_average_by(row, &squares.mean_axis(-1, false)?, &beta)?;
                let column = moving_average_by(column, &squares.mean_axis(-2, false)?, &beta)?;
                let relative_row = row.divide(row.mean_axis(-1, true)?)?;
                let scale = relative_row
                    .rsqrt()?
                    .expand_dims(-1)?
                    .multiply(column.rsqrt()?.expand_dims(-2)?)?;
                (gradient.multiply(scale)?, vec![row, column])
            }
            _ => {
                let v = moving_average_by(&slots[0], &squares, &beta)?;
                (gradient.multiply(v.rsqrt()?)?, vec![v])
            }
        };
        let rms = direction.square()?.mean(false)?.sqrt()?;
        direction = direction.divide(ops::maximum(rms.divide(scalar(self.clip_threshold))?, scalar(1.0))?)?;
        if step.decays && self.weight_decay != 0.0 {
            direction = direction.add(parameter.multiply(scalar(self.weight_decay))?)?;
        }
        Ok((parameter.subtract(direction.multiply(&step.lr)?)?, new_slots))
    }
}

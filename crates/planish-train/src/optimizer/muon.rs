use mlx_rs::Array;

use super::{AdamW, Slot, Step, UpdateRule, check_range, scalar};
use crate::Result;

/// Momentum made orthogonal before it is applied; matrices only, the rest is left to AdamW.
///
/// `b = μ·b + g`, `d = g + μ·b` (Nesterov), `O = NS(d)` (five Newton–Schulz steps bring all singular values of `d` near 1),
/// `θ ← θ − lr·(√max(1, rows/columns)·O + λ·θ)`.
///
/// Tensors that are not 2-D, token embeddings and the head follow [`AdamW`] with
/// [`fallback_learning_rate_ratio`](Self::fallback_learning_rate_ratio) times the learning rate.
///
/// # Reference
/// Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Muon {
    /// `μ`.
    pub momentum: f64,
    /// `λ`.
    pub weight_decay: f64,
    /// For everything that is no hidden matrix.
    pub fallback: AdamW,
    /// Learning rate of the fallback relative to Muon's own, which is usually far larger.
    pub fallback_learning_rate_ratio: f64,
}

impl Default for Muon {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            weight_decay: 0.0,
            fallback: AdamW::default(),
            fallback_learning_rate_ratio: 0.1,
        }
    }
}

impl Muon {
    fn is_hidden_matrix(shape: &[i32]) -> bool {
        shape.len() == 2
    }
}

impl UpdateRule for Muon {
    fn check(&self) -> Result<()> {
        self.fallback.check()?;
        check_range(
            (0.0..1.0).contains(&self.momentum),
            "optimizer.momentum",
            self.momentum,
            "[0, 1)",
        )?;
        let ratio = self.fallback_learning_rate_ratio;
        check_range(
            ratio > 0.0 && ratio.is_finite(),
            "optimizer.fallback_learning_rate_ratio",
            ratio,
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
        false
    }

    fn slots(&self, shape: &[i32]) -> Vec<Slot> {
        if Self::is_hidden_matrix(shape) {
            vec![Slot::new("momentum", shape)]
        } else {
            self.fallback.slots(shape)
        }
    }

    fn update(&self, step: &Step, parameter: &Array, gradient: &Array, slots: &[Array]) -> Result<(Array, Vec<Array>)> {
        if !Self::is_hidden_matrix(parameter.shape()) {
            let lr = step.lr.multiply(scalar(self.fallback_learning_rate_ratio))?;
            let step = Step {
                lr,
                t: step.t.clone(),
                decays: step.decays,
            };
            return self.fallback.update(&step, parameter, gradient, slots);
        }
        let momentum = slots[0].multiply(scalar(self.momentum))?.add(gradient)?;
        let ahead = gradient.add(momentum.multiply(scalar(self.momentum))?)?;
        let stretch = (f64::from(parameter.dim(0)) / f64::from(parameter.dim(1)))
            .max(1.0)
            .sqrt();
        let mut direction = orthogonalised(&ahead)?.multiply(scalar(stretch))?;
        if step.decays && self.weight_decay != 0.0 {
            direction = direction.add(parameter.multiply(scalar(self.weight_decay))?)?;
        }
        Ok((parameter.subtract(direction.multiply(&step.lr)?)?, vec![momentum]))
    }
}

/// Five steps of `X ← aX + (bA + cA²)X`, `A = XXᵀ`, from `X = G/‖G‖`, on the side that has fewer rows.
fn orthogonalised(matrix: &Array) -> Result<Array> {
    const COEFFICIENTS: [f64; 3] = [3.4445, -4.7750, 2.0315];
    const STEPS: usize = 5;
    let tall = matrix.dim(0) > matrix.dim(1);
    let norm = matrix.square()?.sum(false)?.sqrt()?.add(scalar(1e-7))?;
    let mut x = matrix.divide(norm)?;
    if tall {
        x = x.transpose()?;
    }
    let [a, b, c] = COEFFICIENTS.map(scalar);
    for _ in 0..STEPS {
        let gram = x.matmul(x.transpose()?)?;
        let polynomial = gram.multiply(&b)?.add(gram.matmul(&gram)?.multiply(&c)?)?;
        x = x.multiply(&a)?.add(polynomial.matmul(&x)?)?;
    }
    if tall { Ok(x.transpose()?) } else { Ok(x) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthogonalised_matrix_has_singular_values_near_one() {
        let matrix = Array::from_slice(&[3.0f32, 0.5, -1.0, 2.0, 0.3, 0.7, 1.1, -2.0], &[4, 2]);
        let out = orthogonalised(&matrix).unwrap();
        let gram = out.transpose().unwrap().matmul(&out).unwrap();
        let gram = gram.as_slice::<f32>();
        // The five steps aim at the band 0.7 to 1.2 and not at 1 exactly.
        assert!(
            (0.4..1.5).contains(&gram[0]) && (0.4..1.5).contains(&gram[3]),
            "{gram:?}"
        );
        assert!(gram[1].abs() < 0.35, "{gram:?}");
    }
}

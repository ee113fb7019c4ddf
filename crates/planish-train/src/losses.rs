//! Losses of a batch, a window or a validation set, on the host.

use mlx_rs::Array;

use crate::Result;
use crate::figures::Figures;
use crate::objective::{About, Counted, Objective};
use crate::options::Reduction;

/// Sums over items: what the objective averages over, trained tokens or pairs.
#[derive(Debug, Default)]
pub(crate) struct Losses {
    /// Sum over the items in nats, unweighted.
    pub(crate) sum: f64,
    /// The same with the weights of examples.
    pub(crate) weighted_sum: f64,
    /// Sum of the squares.
    pub(crate) squares: f64,
    /// Items.
    pub(crate) n_items: usize,
    /// Trained tokens.
    pub(crate) tokens: usize,
    /// Sum over the micro-batches of their own means.
    pub(crate) means: f64,
    /// Micro-batches.
    pub(crate) micro_batches: usize,
    /// Examples with a loss that is not finite.
    pub(crate) bad_examples: Vec<usize>,
    /// Sums of what the objective reports besides.
    pub(crate) figures: Figures,
}

impl Losses {
    /// Adds the figures that a forward pass gave; waits for them.
    pub(crate) fn add(
        &mut self,
        objective: &dyn Objective,
        figures: &[Array],
        counted: &[Counted],
        about: &About<'_>,
    ) -> Result<()> {
        let Some((losses, figures)) = figures.split_first() else {
            return Ok(());
        };
        let losses = losses.to_vec_exact::<f32>()?;
        let mut sum = 0.0;
        for &Counted { item, example } in counted {
            let loss = f64::from(losses[item]);
            if !loss.is_finite() && self.bad_examples.last() != Some(&example) {
                self.bad_examples.push(example);
            }
            sum += loss;
            self.squares += loss * loss;
            self.weighted_sum += about.weight(example) * loss;
        }
        self.sum += sum;
        self.n_items += counted.len();
        self.means += sum / counted.len().max(1) as f64;
        self.micro_batches += 1;
        for (name, values) in objective.figures().iter().zip(figures) {
            let values = values.to_vec_exact::<f32>()?;
            self.figures.add(
                name,
                counted.iter().map(|counted| f64::from(values[counted.item])).sum(),
            );
        }
        Ok(())
    }

    /// Mean loss of the items.
    pub(crate) fn mean(&self, reduction: Reduction) -> f64 {
        match reduction {
            Reduction::TokenExact => self.sum / self.n_items as f64,
            Reduction::MeanOfMeans => self.mean_of_means(),
        }
    }

    /// Mean over the micro-batches of their own means.
    pub(crate) fn mean_of_means(&self) -> f64 {
        self.means / self.micro_batches.max(1) as f64
    }
}

//! Odds-ratio preference optimisation: learn the chosen answer, and push its odds above those of the rejected one.
//!
//! Minimises the mean over the pairs of a window of `−log p̄_c − λ·log σ(log odds_c − log odds_r)`, `p̄` the geometric mean
//! over the tokens of an answer. There is no reference model.

use planish_data::{Batch, Window};
use planish_loss::dpo::PairLogProbabilities;
use planish_loss::orpo::orpo;
use planish_nn::Model;

use super::{missing_arrays, preference};
use crate::Result;
use crate::objective::{About, Collated, Fill, Item, Objective, Outcome, Pass};

#[derive(Debug)]
pub(crate) struct Orpo {
    pub(crate) lambda: f32,
}

impl Objective for Orpo {
    fn item(&self) -> Item {
        Item::Pair
    }

    fn figures(&self) -> &'static [&'static str] {
        preference::FIGURES
    }

    /// Adds the trained tokens of the chosen and of the rejected answers, `[n]` each.
    fn collate(&self, batch: &Batch, window: &Window, _: &About<'_>, fill: Fill) -> Result<Collated> {
        let (mut collated, pairs) = preference::collate(batch, window, fill)?;
        collated.extra.extend(pairs.lengths());
        Ok(collated)
    }

    fn forward(&self, model: &Model, batch: &Collated, pass: Pass<'_>) -> Result<Outcome> {
        let [members, shares, chosen, rejected] = &batch.extra[..] else {
            return Err(missing_arrays());
        };
        let sums = preference::log_probabilities(model, &batch.tokens, members, pass)?;
        let means = PairLogProbabilities {
            chosen: sums.chosen.divide(chosen)?,
            rejected: sums.rejected.divide(rejected)?,
        };
        preference::outcome(orpo(&means, self.lambda)?, shares)
    }
}

//! Direct preference optimisation: make the chosen answer likelier than the rejected one, relative to the model as it was.
//!
//! Minimises the mean over the pairs of a window of `−log σ(r_c − r_r − margin)`, `r = β·(log π(y) − log π_ref(y))`. The
//! reference is the model as it was loaded: with adapters this is the same arrays with the adapter off and costs no
//! memory; when all weights train, it is a second copy of them.

use mlx_rs::transforms::async_eval;
use planish_data::{Batch, Window};
use planish_loss::dpo::{DpoOptions, PairLogProbabilities, dpo};
use planish_nn::Model;

use super::{missing_arrays, preference};
use crate::Result;
use crate::objective::{About, Collated, Fill, Item, Objective, Outcome, Pass};

#[derive(Debug)]
pub(crate) struct Dpo {
    pub(crate) reference: Model,
    pub(crate) loss: DpoOptions,
}

impl Objective for Dpo {
    fn item(&self) -> Item {
        Item::Pair
    }

    fn figures(&self) -> &'static [&'static str] {
        preference::FIGURES
    }

    /// Adds the reference's log-probabilities and the margins that the rows ask for, `[n]` each.
    fn collate(&self, batch: &Batch, window: &Window, about: &About<'_>, fill: Fill) -> Result<Collated> {
        let (mut collated, pairs) = preference::collate(batch, window, fill)?;
        let pass = Pass {
            training: None,
            options: about.options,
        };
        let reference = preference::log_probabilities(&self.reference, &collated.tokens, &collated.extra[0], pass)?;
        async_eval([&reference.chosen, &reference.rejected])?;
        let known = about.data.map_or(&[][..], |data| data.examples());
        let margin = |&example: &usize| known.get(example).and_then(|example| example.margin).unwrap_or(0.0) as f32;
        let margins: Vec<f32> = pairs.examples.iter().map(margin).collect();
        let margins = pairs.array(&pairs.spread(&margins));
        collated.extra.extend([reference.chosen, reference.rejected, margins]);
        Ok(collated)
    }

    fn forward(&self, model: &Model, batch: &Collated, pass: Pass<'_>) -> Result<Outcome> {
        let [members, shares, chosen, rejected, margins] = &batch.extra[..] else {
            return Err(missing_arrays());
        };
        let policy = preference::log_probabilities(model, &batch.tokens, members, pass)?;
        let reference = PairLogProbabilities {
            chosen: chosen.clone(),
            rejected: rejected.clone(),
        };
        preference::outcome(dpo(&policy, &reference, Some(margins), &self.loss)?, shares)
    }
}

//! Odds-ratio preference optimisation: learn the chosen answer, and push its odds above those of the rejected one.
//!
//! Minimises the mean over the pairs of a window of `−log p̄_c − λ·log σ(log odds_c − log odds_r)`, `p̄` the geometric mean
//! over the tokens of an answer. There is no reference model.

use planish_data::{Batch, Dataset, Window};
use planish_loss::orpo::orpo;
use planish_nn::{Model, Training};

use super::preference::{self, Pairs};
use super::{About, BatchObjective, Objective};
use crate::Result;
use crate::evaluate::Judgement;
use crate::window::WindowLosses;

#[derive(Debug)]
pub(crate) struct Orpo {
    pub(crate) lambda: f32,
}

impl Objective for Orpo {
    fn of_batch<'b>(&'b self, batch: &'b Batch, window: &Window, about: &About<'b>) -> Result<BatchObjective<'b>> {
        let options = about.options;
        let pairs = Pairs::of(batch)?;
        let pairs_in_window = window.examples / 2;
        Ok(Box::new(move |model: &Model, training: Training<'_>| {
            let means = pairs.mean_log_probabilities(model, batch, Some(training), options)?;
            preference::outcome(&orpo(&means, self.lambda)?, pairs_in_window)
        }))
    }

    fn account(&self, batch: &Batch, items: &[f32], _: &About<'_>, losses: &mut WindowLosses) {
        preference::account(batch, items, losses);
    }

    fn judge(&self, model: &Model, valid: &Dataset, about: &About<'_>) -> Result<Judgement> {
        preference::judge(valid, about.options, &|batch, pairs| {
            let means = pairs.mean_log_probabilities(model, batch, None, about.options)?;
            Ok(orpo(&means, self.lambda)?)
        })
    }
}

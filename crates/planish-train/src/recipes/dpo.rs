//! Direct preference optimisation: make the chosen answer likelier than the rejected one, relative to the model as it was.
//!
//! Minimises the mean over the pairs of a window of `−log σ(r_c − r_r − margin)`, `r = β·(log π(y) − log π_ref(y))`. The
//! reference is the model as it was loaded: with adapters this is the same arrays with the adapter off and costs no
//! memory; when all weights train, it is a second copy of them.

use mlx_rs::Array;
use planish_data::{Batch, Dataset, Window};
use planish_loss::dpo::{DpoOptions, PairLogProbabilities, dpo};
use planish_nn::{Model, Training};

use super::preference::{self, Pairs};
use super::{About, BatchObjective, Objective};
use crate::Result;
use crate::evaluate::Judgement;
use crate::options::TrainOptions;
use crate::window::WindowLosses;

#[derive(Debug)]
pub(crate) struct Dpo {
    reference: Model,
    loss: DpoOptions,
    margins: Vec<Option<f64>>,
}

impl Dpo {
    pub(crate) fn new(base: &Model, data: &Dataset, loss: DpoOptions) -> Self {
        Self {
            reference: base.clone(),
            loss,
            margins: data.examples().iter().map(|example| example.margin).collect(),
        }
    }

    /// Log-probabilities under the reference, evaluated, so that nothing is differentiated through them.
    fn of_reference(&self, batch: &Batch, pairs: &Pairs, options: &TrainOptions) -> Result<PairLogProbabilities> {
        let found = pairs.log_probabilities(&self.reference, batch, None, options)?;
        mlx_rs::transforms::eval([&found.chosen, &found.rejected])?;
        Ok(found)
    }
}

impl Objective for Dpo {
    fn of_batch<'b>(&'b self, batch: &'b Batch, window: &Window, about: &About<'b>) -> Result<BatchObjective<'b>> {
        let options = about.options;
        let pairs = Pairs::of(batch)?;
        let reference = self.of_reference(batch, &pairs, options)?;
        let margins: Option<Array> = pairs.margins(&|example| self.margins.get(example).copied().flatten());
        let pairs_in_window = window.examples / 2;
        Ok(Box::new(move |model: &Model, training: Training<'_>| {
            let policy = pairs.log_probabilities(model, batch, Some(training), options)?;
            preference::outcome(
                &dpo(&policy, &reference, margins.as_ref(), &self.loss)?,
                pairs_in_window,
            )
        }))
    }

    fn account(&self, batch: &Batch, items: &[f32], _: &About<'_>, losses: &mut WindowLosses) {
        preference::account(batch, items, losses);
    }

    fn judge(&self, model: &Model, valid: &Dataset, about: &About<'_>) -> Result<Judgement> {
        preference::judge(valid, about.options, &|batch, pairs| {
            let reference = self.of_reference(batch, pairs, about.options)?;
            let policy = pairs.log_probabilities(model, batch, None, about.options)?;
            Ok(dpo(&policy, &reference, None, &self.loss)?)
        })
    }
}

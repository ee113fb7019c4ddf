//! What the recipes differ in: what is minimised over a batch, and how a validation set is judged. Everything else (order,
//! optimizer, guard, saving, resuming) is the [`Trainer`](crate::Trainer)'s and the same for all.
//!
//! | recipe | learns from | minimises |
//! |---|---|---|
//! | [`Sft`](sft) | texts and conversations | cross-entropy of the trained tokens |
//! | [`Dpo`](dpo) | preference pairs | the pair's loss against a frozen reference, the model as it was loaded |
//! | [`Orpo`](orpo) | preference pairs | cross-entropy of the chosen answer and the odds of choosing it |

pub(crate) mod dpo;
pub(crate) mod orpo;
pub(crate) mod preference;
pub(crate) mod sft;

use mlx_rs::Array;
use planish_data::{Batch, Dataset, Format, Window};
use planish_loss::dpo::DpoOptions;
use planish_nn::{Model, Training};

use crate::evaluate::Judgement;
use crate::options::TrainOptions;
use crate::traced::Arguments;
use crate::weighting::ExampleWeights;
use crate::window::WindowLosses;
use crate::{Error, Result};

/// Which recipe a run follows.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Recipe {
    /// Supervised fine-tuning: continue the trained tokens of each example.
    #[default]
    Sft,
    /// Direct preference optimisation against the model as it was loaded.
    Dpo(DpoOptions),
    /// Odds-ratio preference optimisation, without a reference model.
    Orpo {
        /// Factor of the odds-ratio term; 0.1 is usual.
        lambda: f32,
    },
}

/// What a run minimises.
pub(crate) trait Objective: std::fmt::Debug {
    /// The share of one batch in the objective of its window. Whatever needs no gradient is computed here.
    fn of_batch<'b>(&'b self, batch: &'b Batch, window: &Window, about: &About<'b>) -> Result<BatchObjective<'b>>;

    /// Whether [`arguments`](Self::arguments) exist.
    fn can_be_traced(&self) -> bool {
        false
    }

    /// The same share as a function of arrays, for tracing.
    ///
    /// # Errors
    /// [`Error::Config`] where updates of this recipe [cannot be traced](Self::can_be_traced).
    fn arguments(&self, _batch: &Batch, _window: &Window, _about: &About<'_>) -> Result<Arguments> {
        Err(refused("train.compile", "this recipe is not compiled"))
    }

    /// Adds what a batch reported to the sums of its window.
    fn account(&self, batch: &Batch, items: &[f32], about: &About<'_>, losses: &mut WindowLosses);

    /// The loss of a validation set.
    fn judge(&self, model: &Model, valid: &Dataset, about: &About<'_>) -> Result<Judgement>;
}

/// What objectives know about their run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct About<'a> {
    pub(crate) options: &'a TrainOptions,
    pub(crate) weights: &'a ExampleWeights,
}

/// Runs a model forward over one batch.
pub(crate) type BatchObjective<'b> = Box<dyn Fn(&Model, Training<'_>) -> Result<Outcome> + 'b>;

/// What a forward pass gives.
pub(crate) struct Outcome {
    /// What is minimised, a scalar that already is the batch's share of the window.
    pub(crate) objective: Array,
    /// What is reported, f32 `[n]`; the objective knows what it means.
    pub(crate) items: Array,
}

impl Recipe {
    /// The objective, for a model to which nothing has been attached yet.
    pub(crate) fn objective(&self, base: &Model, data: &Dataset, options: &TrainOptions) -> Result<Box<dyn Objective>> {
        self.check_data(data)?;
        let distrust_is_off = options.distrust.mode == planish_loss::distrust::Mode::Off;
        if *self != Self::Sft && !distrust_is_off {
            return Err(refused(
                "loss.distrust.mode",
                "distrust weights examples, not pairs; set it to \"off\"",
            ));
        }
        Ok(match *self {
            Self::Sft => Box::new(sft::Sft),
            Self::Dpo(loss) => Box::new(dpo::Dpo::new(base, data, loss)),
            Self::Orpo { lambda } => Box::new(orpo::Orpo { lambda }),
        })
    }

    /// The name in the configuration.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sft => "cross_entropy",
            Self::Dpo(_) => "dpo",
            Self::Orpo { .. } => "orpo",
        }
    }

    fn check_data(&self, data: &Dataset) -> Result<()> {
        let path = data.path().display();
        match (self, data.format()) {
            (Self::Sft, Format::Preference) => Err(refused(
                "loss.name",
                &format!(
                    "{path} holds preference pairs, which cross_entropy would teach both sides of; set \"dpo\" or \"orpo\""
                ),
            )),
            (Self::Sft, _) | (_, Format::Preference) => Ok(()),
            (_, format) => Err(refused(
                "loss.name",
                &format!(
                    "{} learns from preference pairs, and {path} holds rows of type {format}",
                    self.name()
                ),
            )),
        }
    }
}

fn refused(key: &'static str, reason: &str) -> Error {
    Error::Config {
        key,
        reason: reason.to_owned(),
    }
}

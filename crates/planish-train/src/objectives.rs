//! The objectives there are. Everything else (order, optimizer, guard, saving, resuming) is the
//! [`Trainer`](crate::Trainer)'s and the same for all.
//!
//! | objective | learns from | minimises |
//! |---|---|---|
//! | [`Sft`] | texts and conversations | cross-entropy of the trained tokens |
//! | [`Dpo`](dpo) | preference pairs | the pair's loss against a frozen reference, the model as it was loaded |
//! | [`Orpo`](orpo) | preference pairs | cross-entropy of the chosen answer and the odds of choosing it |

mod dpo;
mod orpo;
mod preference;
mod sft;

use std::rc::Rc;

use planish_data::{Dataset, Format};
use planish_loss::dpo::DpoOptions;
use planish_nn::Model;

pub use sft::Sft;

use crate::objective::Objective;
use crate::options::TrainOptions;
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

impl Recipe {
    /// The objective, for a model to which nothing has been attached yet.
    pub(crate) fn objective(&self, base: &Model, data: &Dataset, options: &TrainOptions) -> Result<Rc<dyn Objective>> {
        self.check_data(data)?;
        let distrust_is_off = options.distrust.mode == planish_loss::distrust::Mode::Off;
        if *self != Self::Sft && !distrust_is_off {
            return Err(refused(
                "loss.distrust.mode",
                "distrust weights examples, not pairs; set it to \"off\"",
            ));
        }
        Ok(match *self {
            Self::Sft => Rc::new(Sft),
            Self::Dpo(loss) => Rc::new(dpo::Dpo {
                reference: base.clone(),
                loss,
            }),
            Self::Orpo { lambda } => Rc::new(orpo::Orpo { lambda }),
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

/// A batch that was collated by another objective.
fn missing_arrays() -> Error {
    Error::MlxLayer(planish_mlx::Error::Operation(
        "a batch does not have the arrays of its objective".to_owned(),
    ))
}

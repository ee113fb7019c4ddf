//! Supervised fine-tuning: continue the trained tokens of each example.
//!
//! Minimises `Σ ω·CE / N` over a window, `N` its trained tokens, `ω` the distrust weight of the token's example (1 without).

use mlx_rs::Array;
use planish_data::{Batch, Window};
use planish_loss::weighted_sum;
use planish_nn::Model;

use super::missing_arrays;
use crate::Result;
use crate::objective::{About, Collated, Fill, Item, Objective, Outcome, Pass, Tokens};
use crate::options::{Reduction, TrainOptions};

/// Cross-entropy of the trained tokens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sft;

impl Objective for Sft {
    fn item(&self) -> Item {
        Item::Token
    }

    /// Adds the weight of each slot, f32 `[slots]`, and what all are multiplied by.
    fn collate(&self, batch: &Batch, window: &Window, about: &About<'_>, fill: Fill) -> Result<Collated> {
        let (tokens, slots) = Tokens::collate(batch, fill)?;
        let weighted = batch.weighted(|example| about.weight(example));
        let mut weights = vec![0f32; slots.positions.len()];
        for counted in &slots.counted {
            weights[counted.item] = weighted[slots.positions[counted.item]];
        }
        Ok(Collated {
            tokens,
            extra: vec![
                Array::from_slice(&weights, &[weights.len() as i32]),
                Array::from_f32(share_of_window(batch, window, about.options) as f32),
            ],
            counted: slots.counted,
        })
    }

    fn forward(&self, model: &Model, batch: &Collated, pass: Pass<'_>) -> Result<Outcome> {
        let [weights, share] = &batch.extra[..] else {
            return Err(missing_arrays());
        };
        let losses = batch.tokens.losses(model, pass, pass.options.loss)?;
        Ok(Outcome {
            objective: weighted_sum(&losses.objective, weights)?.multiply(share)?,
            figures: vec![losses.nll],
        })
    }
}

/// What a token's loss is multiplied by, besides its own weight.
fn share_of_window(batch: &Batch, window: &Window, options: &TrainOptions) -> f64 {
    match options.reduction {
        Reduction::TokenExact => 1.0 / window.target_tokens as f64,
        Reduction::MeanOfMeans => 1.0 / (batch.target_tokens * window.micro_batches.len()) as f64,
    }
}

//! Token-weighted loss over a data set: dropout off, unweighted, never resampled.

use planish_data::{Batch, Dataset};
use planish_loss::{TokenLossOptions, TrainedPositions};
use planish_nn::Model;

use crate::Result;
use crate::batches::Batches;
use crate::events::PreferenceReport;
use crate::options::TrainOptions;
use crate::window::{in_row_order, token_losses};

/// Loss of a model on the whole of a data set, or on its first `batches` batches.
///
/// `loss = Σ CE / Σ targets` in nats: a mean over tokens, so neither batch size nor packing nor padding moves it.
/// Sums are taken in f64.
///
/// # Errors
/// Those of the plan and the model.
pub fn evaluate(
    model: &Model,
    data: &Dataset,
    options: &TrainOptions,
    batches: Option<usize>,
    weight: Option<&dyn Fn(usize) -> f64>,
) -> Result<Evaluation> {
    let plan = Batches::for_evaluation(data, options)?;
    let windows = plan.windows_in_epoch(0)?.min(batches.unwrap_or(usize::MAX));
    let mut sums = Sums::default();
    for index in 0..windows {
        for batch in plan.window(data, 0, index)?.micro_batches {
            if batch.target_tokens > 0 {
                sums.add(&batch, &losses_of(model, &batch, options)?, weight);
            }
        }
    }
    Ok(sums.finish())
}

/// Loss on a data set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Cross-entropy a token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Standard error of the loss, from the variance over tokens.
    pub loss_se: f64,
    /// `perplexity · loss_se`.
    pub perplexity_se: f64,
    /// Tokens that were counted.
    pub tokens: usize,
    /// `Σ ω·CE / Σ targets`, where weights were given.
    pub loss_weighted: Option<f64>,
}

/// What a recipe says of a validation set.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Judgement {
    /// Mean over what the recipe averages, in nats: decides which adapter is the best.
    pub(crate) loss: f64,
    /// Perplexity and its standard error, where the loss is that of tokens.
    pub(crate) perplexity: Option<(f64, f64)>,
    /// Trained tokens that were counted.
    pub(crate) tokens: usize,
    /// The loss with the weights of examples.
    pub(crate) loss_weighted: Option<f64>,
    /// Figures of preference pairs.
    pub(crate) preference: Option<PreferenceReport>,
}

impl From<Evaluation> for Judgement {
    fn from(found: Evaluation) -> Self {
        Self {
            loss: found.loss,
            perplexity: Some((found.perplexity, found.perplexity_se)),
            tokens: found.tokens,
            loss_weighted: found.loss_weighted,
            preference: None,
        }
    }
}

/// The loss of each trained position, in order.
fn losses_of(model: &Model, batch: &Batch, options: &TrainOptions) -> Result<Vec<f32>> {
    let positions = TrainedPositions::select(&batch.targets, &batch.target_weights)?;
    let losses = token_losses(model, batch, &positions, None, options, &TokenLossOptions::default())?;
    Ok(losses.nll.to_vec_exact::<f32>()?)
}

#[derive(Default)]
struct Sums {
    nll: f64,
    squares: f64,
    weighted: Option<f64>,
    tokens: usize,
}

impl Sums {
    fn add(&mut self, batch: &Batch, losses: &[f32], weight: Option<&dyn Fn(usize) -> f64>) {
        let mut next = 0;
        for segment in in_row_order(batch) {
            let own = &losses[next..next + segment.target_tokens];
            next += segment.target_tokens;
            let nll: f64 = own.iter().map(|&x| f64::from(x)).sum();
            self.nll += nll;
            self.squares += own.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
            if let Some(weight) = weight {
                *self.weighted.get_or_insert(0.0) += weight(segment.example) * nll;
            }
        }
        self.tokens += losses.len();
    }

    fn finish(self) -> Evaluation {
        let n = self.tokens.max(1) as f64;
        let loss = self.nll / n;
        let variance = (self.squares / n - loss * loss).max(0.0);
        let loss_se = (variance / n).sqrt();
        let perplexity = loss.exp();
        Evaluation {
            loss,
            perplexity,
            loss_se,
            perplexity_se: perplexity * loss_se,
            tokens: self.tokens,
            loss_weighted: self.weighted.map(|sum| sum / n),
        }
    }
}

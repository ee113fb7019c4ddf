//! Token-weighted loss over a data set: dropout off, unweighted, never resampled.

use mlx_rs::Array;
use planish_data::{Batch, BatchPlan, Dataset, PlanOptions};
use planish_loss::{TokenLossOptions, TrainedPositions, chunked_cross_entropy};
use planish_nn::Model;

use crate::options::SftOptions;
use crate::window::{chunk_tokens, in_row_order, model_inputs};
use crate::{Error, Result};

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
    options: &SftOptions,
    batches: Option<usize>,
    weight: Option<&dyn Fn(usize) -> f64>,
) -> Result<Evaluation> {
    let plan = BatchPlan::new(data, &plan_options(options))?;
    let windows = plan.windows_in_epoch(0)?.min(batches.unwrap_or(usize::MAX));
    let mut sums = Sums::default();
    for index in 0..windows {
        for batch in plan.window(data, 0, index)?.micro_batches {
            if batch.target_tokens > 0 {
                sums.add(&batch, &token_losses(model, &batch, options)?, weight);
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

fn plan_options(options: &SftOptions) -> PlanOptions {
    PlanOptions {
        batch_size: options.batch_size,
        accumulation: 1,
        max_seq_length: options.max_seq_length,
        seed: options.seed,
        shuffle: false,
        packing: options.packing,
        rungs: options.rungs,
        ..PlanOptions::default()
    }
}

/// The loss of each trained position, in order.
fn token_losses(model: &Model, batch: &Batch, options: &SftOptions) -> Result<Vec<f32>> {
    let (ids, mask) = model_inputs(batch);
    let positions = TrainedPositions::select(&batch.targets, &batch.target_weights)?;
    let hidden = model.hidden(&ids, &mask, None)?;
    let head = |states: &Array| Ok::<_, Error>(model.logits(states)?);
    let chunk = chunk_tokens(options, positions.len(), model.config().vocab_size);
    let loss = chunked_cross_entropy(&hidden, &head, &positions, chunk, &TokenLossOptions::default())?;
    Ok(loss.nll.to_vec_exact::<f32>()?)
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

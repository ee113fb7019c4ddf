//! Loss and perplexity of a model on a data set.

use planish_data::{Dataset, Window};
use planish_nn::Model;

use crate::Result;
use crate::batches::Batches;
use crate::figures::Figures;
use crate::losses::Losses;
use crate::objective::{About, Fill, Objective, Pass};
use crate::objectives::Sft;
use crate::options::TrainOptions;
use crate::update::{cut, trained};
use crate::weighting::ExampleWeights;

/// Cross-entropy of a model on the whole of a data set, or on its first `batches` batches.
///
/// `loss = Σ CE / Σ targets` in nats: a mean over tokens, so neither batch size nor packing nor padding moves it.
/// Sums are taken in f64.
///
/// # Errors
/// Those of the plan and the model.
pub fn evaluate(model: &Model, data: &Dataset, options: &TrainOptions, batches: Option<usize>) -> Result<Evaluation> {
    let about = About {
        options,
        data: Some(data),
        weights: &ExampleWeights::equal(),
    };
    let plan = Batches::for_evaluation(data, options)?;
    let windows = plan.windows_in_epoch(0)?.min(batches.unwrap_or(usize::MAX));
    let windows = (0..windows).map(|index| plan.window(data, 0, index));
    Ok(judge(&Sft, model, windows, &about, 1)?.into())
}

/// Loss on a data set.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Mean loss per item in nats: cross-entropy per token, or the loss per preference pair.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Standard error of the loss, from the variance over items.
    pub loss_se: f64,
    /// `perplexity · loss_se`.
    pub perplexity_se: f64,
    /// Trained tokens that were counted.
    pub tokens: usize,
    /// The loss with the weights of examples.
    pub loss_weighted: f64,
    /// Means of what the objective reports besides.
    pub figures: Figures,
}

/// Losses of an objective on some windows, each batch cut into so many pieces.
pub(crate) fn judge(
    objective: &dyn Objective,
    model: &Model,
    windows: impl Iterator<Item = Result<Window>>,
    about: &About<'_>,
    pieces: usize,
) -> Result<Losses> {
    let pass = Pass {
        training: None,
        options: about.options,
    };
    let mut losses = Losses::default();
    for window in windows {
        let window = window?;
        for batch in trained(&window).flat_map(|batch| cut(batch, pieces)) {
            let collated = objective.collate(&batch, &window, about, Fill::Exact)?;
            let outcome = objective.forward(model, &collated, pass)?;
            losses.add(objective, &outcome.figures, &collated.counted, about)?;
            losses.tokens += batch.target_tokens;
        }
    }
    Ok(losses)
}

impl From<Losses> for Evaluation {
    fn from(sums: Losses) -> Self {
        let n = sums.n_items.max(1) as f64;
        let loss = sums.sum / n;
        let variance = (sums.squares / n - loss * loss).max(0.0);
        let loss_se = (variance / n).sqrt();
        let perplexity = loss.exp();
        Self {
            loss,
            perplexity,
            loss_se,
            perplexity_se: perplexity * loss_se,
            tokens: sums.tokens,
            loss_weighted: sums.weighted_sum / n,
            figures: sums.figures.means(sums.n_items),
        }
    }
}

//! Supervised fine-tuning: continue the trained tokens of each example.
//!
//! Minimises `Σ ω·CE / N` over a window, `N` its trained tokens, `ω` the distrust weight of the token's example (1 without).

use mlx_rs::Array;
use planish_data::{Batch, Dataset, Window};
use planish_loss::{HeadLoss, TrainedPositions, weighted_sum};
use planish_nn::{AttentionMask, Model, Training};

use super::{About, BatchObjective, Objective, Outcome};
use crate::Result;
use crate::evaluate::{Judgement, evaluate};
use crate::options::{Reduction, TrainOptions};
use crate::traced::{Arguments, Signature};
use crate::window::{WindowLosses, in_row_order, token_losses};

#[derive(Debug)]
pub(crate) struct Sft;

impl Objective for Sft {
    fn of_batch<'b>(&'b self, batch: &'b Batch, window: &Window, about: &About<'b>) -> Result<BatchObjective<'b>> {
        let options = about.options;
        let positions = TrainedPositions::select(&batch.targets, &batch.target_weights)?;
        let weights = token_weights(batch, &positions, about);
        let share = Array::from_f32(share_of_window(batch, window, options) as f32);
        Ok(Box::new(move |model: &Model, training: Training<'_>| {
            let losses = token_losses(model, batch, &positions, Some(training), options, &options.loss)?;
            Ok(Outcome {
                objective: weighted_sum(&losses.objective, &weights)?.multiply(&share)?,
                items: losses.nll,
            })
        }))
    }

    fn can_be_traced(&self) -> bool {
        true
    }

    fn arguments(&self, batch: &Batch, window: &Window, about: &About<'_>) -> Result<Arguments> {
        let weighted = batch.weighted(|example| about.weights.of_example(example));
        let positions = TrainedPositions::select(&batch.targets, &batch.target_weights)?;
        let trained: Vec<usize> = positions.host_indices.iter().map(|&i| i as usize).collect();
        let signature = Signature::new((batch.rows, batch.length), batch.segment_ids.is_some(), trained.len());
        let (chosen, counted) = match signature.is_whole() {
            true => ((0..weighted.len()).collect(), trained),
            false => {
                let counted = (0..trained.len()).collect();
                // The rest repeats a trained position, with weight 0.
                let mut chosen = trained;
                chosen.resize(signature.slots, chosen[0]);
                (chosen, counted)
            }
        };
        let n_counted = if signature.is_whole() {
            chosen.len()
        } else {
            counted.len()
        };
        let pick = |i: usize, &position: &usize| if i < n_counted { weighted[position] } else { 0.0 };
        let weights: Vec<f32> = chosen
            .iter()
            .enumerate()
            .map(|(i, position)| pick(i, position))
            .collect();
        let targets: Vec<i32> = chosen.iter().map(|&i| batch.targets[i]).collect();

        let (slots, shape) = ([signature.slots as i32], [batch.rows as i32, batch.length as i32]);
        let mut arrays = vec![
            Array::from_slice(&batch.inputs, &shape),
            Array::from_slice(&targets, &slots),
            Array::from_slice(&weights, &slots),
            Array::from_f32(share_of_window(batch, window, about.options) as f32),
        ];
        if let Some(segment_ids) = &batch.segment_ids {
            arrays.push(Array::from_slice(segment_ids, &shape));
        }
        if !signature.is_whole() {
            let indices: Vec<i32> = chosen.iter().map(|&i| i as i32).collect();
            arrays.push(Array::from_slice(&indices, &slots));
        }
        Ok(Arguments {
            signature,
            arrays,
            counted,
            forward,
        })
    }

    fn account(&self, batch: &Batch, items: &[f32], about: &About<'_>, losses: &mut WindowLosses) {
        let mut next = 0;
        let mut sum_of_batch = 0.0;
        for segment in in_row_order(batch) {
            let own = &items[next..next + segment.target_tokens];
            next += segment.target_tokens;
            let sum: f64 = own.iter().map(|&x| f64::from(x)).sum();
            if !sum.is_finite() {
                losses.bad_examples.push(segment.example);
            }
            sum_of_batch += sum;
            losses.weighted_sum += about.weights.of_example(segment.example) * sum;
        }
        losses.sum += sum_of_batch;
        losses.n_items += items.len();
        losses.mean_of_means += sum_of_batch / items.len().max(1) as f64;
    }

    fn judge(&self, model: &Model, valid: &Dataset, about: &About<'_>) -> Result<Judgement> {
        let options = about.options;
        let weight = about.weights.for_other(valid, &options.distrust);
        let weight = weight.as_ref().map(|weight| weight as &dyn Fn(usize) -> f64);
        Ok(evaluate(model, valid, options, options.val_batches, weight)?.into())
    }
}

/// [`Sft::of_batch`] with the batch as arrays: ids, targets, weights, share, segments if there are some, indices of the
/// positions unless they are all.
fn forward(
    model: &Model,
    signature: Signature,
    arrays: &[Array],
    training: Training<'_>,
    options: &TrainOptions,
) -> Result<Outcome> {
    let [ids, targets, weights, share, rest @ ..] = arrays else {
        return Err(super::refused("train.compile", "arguments of a batch are missing"));
    };
    let mask = match rest.first().filter(|_| signature.is_packed) {
        Some(segment_ids) => AttentionMask::Packed {
            segment_ids: segment_ids.clone(),
        },
        None => AttentionMask::Causal,
    };
    let indices = rest.last().filter(|_| !signature.is_whole()).cloned();
    let positions = TrainedPositions::on_device(indices, targets.clone(), signature.rows * signature.length);
    let hidden = model.hidden_for_training(ids, &mask, training)?;
    let how = HeadLoss {
        terms: options.loss,
        chunk_tokens: options.chunk_tokens,
        is_trained: true,
    };
    let losses = model.head_loss(&hidden, &positions, &how)?;
    Ok(Outcome {
        objective: weighted_sum(&losses.objective, weights)?.multiply(share)?,
        items: losses.nll,
    })
}

/// What a token's loss is multiplied by, besides its own weight.
fn share_of_window(batch: &Batch, window: &Window, options: &TrainOptions) -> f64 {
    match options.reduction {
        Reduction::TokenExact => 1.0 / window.target_tokens as f64,
        Reduction::MeanOfMeans => 1.0 / (batch.target_tokens * window.micro_batches.len()) as f64,
    }
}

fn token_weights(batch: &Batch, positions: &TrainedPositions, about: &About<'_>) -> Array {
    let weighted = batch.weighted(|example| about.weights.of_example(example));
    let picked: Vec<f32> = positions.host_indices.iter().map(|&i| weighted[i as usize]).collect();
    Array::from_slice(&picked, &[picked.len() as i32])
}

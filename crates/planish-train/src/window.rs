//! One optimizer update: forward and backward over the micro-batches of a window, then one step.

use mlx_rs::{Array, transforms::eval};
use planish_data::{Batch, Window};
use planish_loss::{TrainedPositions, chunked_cross_entropy, weighted_sum};
use planish_mlx::transforms::value_and_grad;
use planish_nn::{AttentionMask, Model, Training};

use crate::optimizer::{Gradients, Optimizer};
use crate::options::{Reduction, SftOptions};
use crate::{Error, Result, clip, seeds};

/// Logits of a chunk may take this much before chunks get smaller.
const LOGITS_BYTES: usize = 256 << 20;
/// Trained positions of a chunk when all at once would take more.
const CHUNK_TOKENS: usize = 1024;

/// Gradients and losses of a window.
pub(crate) struct WindowGradients {
    /// Summed over the micro-batches, f32.
    pub(crate) gradients: Gradients,
    /// What was minimised, a scalar.
    objective: Array,
    /// What to report.
    pub(crate) losses: WindowLosses,
}

/// Token losses of a window, on the host.
#[derive(Debug, Default)]
pub(crate) struct WindowLosses {
    /// `Σ CE` in nats, unweighted.
    pub(crate) nll_sum: f64,
    /// `Σ ω·CE`.
    pub(crate) weighted_sum: f64,
    /// Trained tokens.
    pub(crate) tokens: usize,
    /// Mean over the micro-batches of their own means.
    pub(crate) mean_of_means: f64,
    /// Examples with a loss that is not finite.
    pub(crate) bad_examples: Vec<usize>,
}

/// How one update went.
pub(crate) struct Applied {
    /// Global norm before clipping.
    pub(crate) grad_norm: f64,
    /// Whether loss and gradient were finite, so that the step counted.
    pub(crate) accepted: bool,
}

/// Runs the micro-batches of a window and sums their gradients, which are those of
/// `Σ ω·CE / N` over the whole window, however it is cut.
///
/// After each micro-batch the sum is evaluated, so that its graph can be freed.
pub(crate) fn window_gradients(
    model: &mut Model,
    optimizer: &Optimizer,
    window: &Window,
    weight: &dyn Fn(usize) -> f64,
    options: &SftOptions,
    step: usize,
) -> Result<WindowGradients> {
    let trainables: Vec<Array> = model.trainables().into_iter().map(|(_, value)| value).collect();
    let outcome = (|| {
        let mut total: Option<(Gradients, Array)> = None;
        let mut losses = WindowLosses::default();
        let trained = window.micro_batches.iter().filter(|batch| batch.target_tokens > 0);
        for (index, batch) in trained.enumerate() {
            let key = seeds::dropout_key(options.seed, step, index)?;
            let (gradients, objective, nll) = micro_batch(
                model,
                &trainables,
                batch,
                weight,
                scale_of(batch, window, options),
                &key,
                options,
            )?;
            let mut gradients = optimizer.gather(&gradients)?;
            let mut objective = objective;
            if let Some((sum, objectives)) = &total {
                gradients = sum.add(&gradients)?;
                objective = objectives.add(objective)?;
            }
            eval(gradients.arrays().iter().chain([&objective, &nll]))?;
            losses.add(batch, &nll, weight)?;
            total = Some((gradients, objective));
        }
        let (gradients, objective) = total.ok_or(planish_loss::Error::NoTrainedTokens { rows: window.examples })?;
        losses.mean_of_means /= window.micro_batches.len() as f64;
        Ok(WindowGradients {
            gradients,
            objective,
            losses,
        })
    })();
    // The traced function left its own arrays in the model.
    model.set_trainables(&trainables)?;
    outcome
}

/// Clips, updates, and puts the new values into the model; a gradient or loss that is not finite changes nothing.
pub(crate) fn apply(
    model: &mut Model,
    optimizer: &mut Optimizer,
    window: &WindowGradients,
    learning_rate: f64,
    clip_norm: Option<f64>,
) -> Result<Applied> {
    let norm = window.gradients.norm()?;
    let accept = norm.is_finite()?.logical_and(window.objective.is_finite()?)?;
    let values = match clip_norm {
        Some(most) => {
            let clipped = window.gradients.scale(&clip::clip_factor(&norm, most)?)?;
            optimizer.step(&clipped, learning_rate, &accept)?
        }
        None => optimizer.step(&window.gradients, learning_rate, &accept)?,
    };
    eval(values.iter().chain(optimizer.pending()).chain([&norm, &accept]))?;
    model.set_trainables(&values)?;
    Ok(Applied {
        grad_norm: f64::from(norm.try_item_exact::<f32>()?),
        accepted: accept.try_item_exact::<bool>()?,
    })
}

/// Token ids and mask of a batch.
pub(crate) fn model_inputs(batch: &Batch) -> (Array, AttentionMask) {
    let shape = [batch.rows as i32, batch.length as i32];
    let ids = Array::from_slice(&batch.inputs, &shape);
    let mask = match &batch.segment_ids {
        None => AttentionMask::Causal,
        Some(segments) => AttentionMask::Packed {
            segment_ids: Array::from_slice(segments, &shape),
        },
    };
    (ids, mask)
}

/// Trained positions whose logits exist at one time.
pub(crate) fn chunk_tokens(options: &SftOptions, trained: usize, vocab_size: usize) -> usize {
    let all_fit = trained * vocab_size * size_of::<f32>() <= LOGITS_BYTES;
    options
        .chunk_tokens
        .unwrap_or(if all_fit { trained.max(1) } else { CHUNK_TOKENS })
}

fn micro_batch(
    model: &mut Model,
    trainables: &[Array],
    batch: &Batch,
    weight: &dyn Fn(usize) -> f64,
    scale: f64,
    dropout_key: &Array,
    options: &SftOptions,
) -> Result<(Vec<Array>, Array, Array)> {
    let (ids, mask) = model_inputs(batch);
    let positions = TrainedPositions::select(&batch.targets, &batch.target_weights)?;
    let weights = token_weights(batch, &positions, weight);
    let chunk = chunk_tokens(options, positions.len(), model.config().vocab_size);
    let all: Vec<usize> = (0..trainables.len()).collect();
    let objective = |values: &[Array]| {
        model.set_trainables(values)?;
        let model = &*model;
        let training = Training {
            dropout_key: Some(dropout_key),
            activation_checkpointing: options.activation_checkpointing,
        };
        let hidden = model.hidden_for_training(&ids, &mask, training)?;
        let head = |states: &Array| Ok::<_, Error>(model.logits(states)?);
        let loss = chunked_cross_entropy(&hidden, &head, &positions, chunk, &options.loss)?;
        let objective = weighted_sum(&loss.objective, &weights)?.multiply(Array::from_f32(scale as f32))?;
        Ok::<_, Error>(vec![objective, loss.nll])
    };
    let (mut outputs, gradients) = value_and_grad(objective, trainables, &all)?;
    let nll = outputs.swap_remove(1);
    Ok((gradients, outputs.swap_remove(0), nll))
}

/// What a token's loss is multiplied by, besides its own weight.
fn scale_of(batch: &Batch, window: &Window, options: &SftOptions) -> f64 {
    match options.reduction {
        Reduction::TokenExact => 1.0 / window.target_tokens as f64,
        Reduction::MeanOfMeans => 1.0 / (batch.target_tokens * window.micro_batches.len()) as f64,
    }
}

fn token_weights(batch: &Batch, positions: &TrainedPositions, weight: &dyn Fn(usize) -> f64) -> Array {
    let weighted = batch.weighted(weight);
    let picked: Vec<f32> = positions.host_indices.iter().map(|&i| weighted[i as usize]).collect();
    Array::from_slice(&picked, &[picked.len() as i32])
}

impl WindowLosses {
    fn add(&mut self, batch: &Batch, nll: &Array, weight: &dyn Fn(usize) -> f64) -> Result<()> {
        let values = nll.to_vec_exact::<f32>()?;
        let mut next = 0;
        let mut sum_of_batch = 0.0;
        for segment in in_row_order(batch) {
            let own = &values[next..next + segment.target_tokens];
            next += segment.target_tokens;
            let sum: f64 = own.iter().map(|&x| f64::from(x)).sum();
            if !sum.is_finite() {
                self.bad_examples.push(segment.example);
            }
            sum_of_batch += sum;
            self.weighted_sum += weight(segment.example) * sum;
        }
        self.nll_sum += sum_of_batch;
        self.tokens += values.len();
        self.mean_of_means += sum_of_batch / values.len().max(1) as f64;
        Ok(())
    }

    /// Cross-entropy a token.
    pub(crate) fn loss(&self, reduction: Reduction) -> f64 {
        match reduction {
            Reduction::TokenExact => self.nll_sum / self.tokens as f64,
            Reduction::MeanOfMeans => self.mean_of_means,
        }
    }
}

/// The segments of a batch in the order of its flattened positions.
pub(crate) fn in_row_order(batch: &Batch) -> Vec<planish_data::Segment> {
    let mut segments = batch.segments.clone();
    segments.sort_by_key(|segment| (segment.row, segment.start));
    segments
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use planish_data::{BatchPlan, ChatTemplate, DataOptions, Dataset, PlanOptions, TemplateOptions, Tokenizer};
    use planish_loss::{TokenLossOptions, cross_entropy};
    use planish_nn::{LoadOptions, LoraConfig};

    use super::*;
    use crate::optimizer::{Groups, Rule};

    fn tiny() -> (Model, Dataset) {
        let dir = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../planish-nn/tests/fixtures/tiny-llama-1m"
        ));
        let (mut model, _) = Model::load(dir, &LoadOptions::default()).unwrap();
        model
            .attach_lora(
                &LoraConfig {
                    rank: 2,
                    ..LoraConfig::default()
                },
                3,
            )
            .unwrap();
        // B = 0 has no gradient for A; move away from it.
        let moved: Vec<Array> = model
            .trainables()
            .iter()
            .enumerate()
            .map(|(i, (_, v))| nudged(v, i))
            .collect();
        model.set_trainables(&moved).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("train.jsonl");
        let row = |q: &str, a: &str| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": "{q}"}}, {{"role": "assistant", "content": "{a}"}}]}}"#
            )
        };
        let rows = [
            row("What?", "Tea."),
            row("Who is there now?", "It is Emma, and Mr. Knightley with her."),
            row("Where?", "In Bath."),
        ];
        std::fs::write(&file, rows.join("\n")).unwrap();
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let template = ChatTemplate::from_dir(dir, &tokenizer, &TemplateOptions::default()).unwrap();
        let options = DataOptions {
            max_seq_length: 64,
            ..DataOptions::default()
        };
        (
            model,
            Dataset::load(&file, &tokenizer, template.as_ref(), &options).unwrap().0,
        )
    }

    fn nudged(value: &Array, seed: usize) -> Array {
        let noise: Vec<f32> = (0..value.size())
            .map(|i| ((i * 37 + seed * 11) % 17) as f32 * 0.002 - 0.016)
            .collect();
        value.add(Array::from_slice(&noise, value.shape())).unwrap()
    }

    /// `Σ ω·CE / N` through the ordinary full logits.
    fn plain_objective(model: &Model, window: &Window, weight: &dyn Fn(usize) -> f64) -> Array {
        let mut total = Array::from_f32(0.0);
        for batch in &window.micro_batches {
            let (ids, mask) = model_inputs(batch);
            let shape = [batch.rows as i32, batch.length as i32];
            let logits = model.logits(&model.hidden(&ids, &mask, None).unwrap()).unwrap();
            let targets = Array::from_slice(&batch.targets, &shape);
            let weights = Array::from_slice(&batch.weighted(weight), &shape);
            let loss = cross_entropy(&logits, &targets, &TokenLossOptions::default()).unwrap();
            total = total.add(weighted_sum(&loss.objective, &weights).unwrap()).unwrap();
        }
        total.divide(Array::from_f32(window.target_tokens as f32)).unwrap()
    }

    #[test]
    fn gradient_matches_full_logits_and_finite_differences() {
        let (mut model, data) = tiny();
        let options = SftOptions {
            batch_size: 2,
            accumulation: 2,
            max_seq_length: 64,
            chunk_tokens: Some(5),
            ..SftOptions::default()
        };
        let plan = BatchPlan::new(
            &data,
            &PlanOptions {
                batch_size: 2,
                accumulation: 2,
                max_seq_length: 64,
                ..PlanOptions::default()
            },
        )
        .unwrap();
        let window = plan.window(&data, 0, 0).unwrap();
        let weight = |example: usize| [0.5, 1.25, 2.0][example];
        let named = model.trainables();
        let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &named).unwrap();
        let found = window_gradients(&mut model, &optimizer, &window, &weight, &options, 0).unwrap();
        let found = planish_mlx::host::to_f32_vec(&found.gradients.arrays()[0]).unwrap();

        let start: Vec<Array> = named.iter().map(|(_, v)| v.clone()).collect();
        let all: Vec<usize> = (0..start.len()).collect();
        let (_, plain) = value_and_grad(
            |values: &[Array]| {
                model.set_trainables(values)?;
                Ok::<_, Error>(vec![plain_objective(&model, &window, &weight)])
            },
            &start,
            &all,
        )
        .unwrap();
        let plain: Vec<f32> = plain
            .iter()
            .flat_map(|g| planish_mlx::host::to_f32_vec(g).unwrap())
            .collect();
        let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let off: Vec<f32> = found.iter().zip(&plain).map(|(a, b)| a - b).collect();
        assert!(norm(&off) <= 1e-5 * norm(&plain), "{} of {}", norm(&off), norm(&plain));

        // Along the gradient itself the directional derivative is its norm.
        let along = |sign: f64| {
            let h = 2e-3;
            let mut at = 0;
            let moved: Vec<Array> = start
                .iter()
                .map(|value| {
                    let own = &plain[at..at + value.size()];
                    at += value.size();
                    let step: Vec<f32> = own
                        .iter()
                        .map(|&g| (f64::from(g) * sign * h / norm(&plain)) as f32)
                        .collect();
                    value.add(Array::from_slice(&step, value.shape())).unwrap()
                })
                .collect();
            model.clone().set_trainables(&moved).unwrap();
            let mut other = model.clone();
            other.set_trainables(&moved).unwrap();
            f64::from(plain_objective(&other, &window, &weight).item_exact::<f32>())
        };
        let difference = (along(1.0) - along(-1.0)) / (2.0 * 2e-3);
        assert!(
            (difference / norm(&plain) - 1.0).abs() < 1e-2,
            "{difference} is not {}",
            norm(&plain)
        );
    }
}

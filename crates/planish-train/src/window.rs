//! One optimizer update: forward and backward over the micro-batches of a window, then one step.

use mlx_rs::{Array, transforms::eval};
use planish_data::{Batch, Window};
use planish_loss::{HeadLoss, TokenLoss, TokenLossOptions, TrainedPositions};
use planish_mlx::transforms::value_and_grad;
use planish_nn::{AttentionMask, Model, Training};

use crate::optimizer::{Gradients, Optimizer};
use crate::options::{Reduction, TrainOptions};
use crate::recipes::preference::Figures;
use crate::recipes::{About, BatchObjective, Objective, Outcome};
use crate::update::Place;
use crate::{Error, Result, clip, seeds};

/// Gradients and losses of a window.
pub(crate) struct WindowGradients {
    /// Summed over the micro-batches, f32.
    pub(crate) gradients: Gradients,
    /// What was minimised, a scalar.
    objective: Array,
    /// What to report.
    pub(crate) losses: WindowLosses,
}

/// Losses of a window, on the host; an item is what the recipe averages over, a trained token or a pair.
#[derive(Debug, Default)]
pub(crate) struct WindowLosses {
    /// Sum over the items in nats, unweighted.
    pub(crate) sum: f64,
    /// The same with the weights of examples.
    pub(crate) weighted_sum: f64,
    /// Items.
    pub(crate) n_items: usize,
    /// Trained tokens.
    pub(crate) tokens: usize,
    /// Mean over the micro-batches of their own means.
    pub(crate) mean_of_means: f64,
    /// Examples with a loss that is not finite.
    pub(crate) bad_examples: Vec<usize>,
    /// Figures of preference pairs.
    pub(crate) preference: Option<Figures>,
}

/// How one update went.
pub(crate) struct Applied {
    /// Global norm before clipping.
    pub(crate) grad_norm: f64,
    /// Whether loss and gradient were finite, so that the step counted.
    pub(crate) accepted: bool,
}

/// Runs the micro-batches of a window and sums their gradients, which are those of the objective over the whole window,
/// however it is cut.
///
/// After each micro-batch the sum is evaluated, so that its graph can be freed.
pub(crate) fn window_gradients(
    model: &mut Model,
    optimizer: &Optimizer,
    window: &Window,
    objective: &dyn Objective,
    about: &About<'_>,
    step: usize,
) -> Result<WindowGradients> {
    let trainables: Vec<Array> = model.trainables().into_iter().map(|(_, value)| value).collect();
    let outcome = (|| {
        let mut total: Option<(Gradients, Array)> = None;
        let mut losses = WindowLosses::default();
        for (index, batch) in trained(window).enumerate() {
            let of_batch = objective.of_batch(batch, window, about)?;
            let key = seeds::dropout_key(about.options.seed, step, index)?;
            let training = Training {
                dropout_key: Some(&key),
                activation_checkpointing: about.options.activation_checkpointing,
            };
            let (gradients, outcome) = differentiate(model, &trainables, &of_batch, training)?;
            let (mut gradients, mut minimised) = (optimizer.gather(&gradients)?, outcome.objective);
            if let Some((sum, minimised_so_far)) = &total {
                gradients = sum.add(&gradients)?;
                minimised = minimised_so_far.add(minimised)?;
            }
            eval(gradients.arrays().iter().chain([&minimised, &outcome.items]))?;
            objective.account(batch, &outcome.items.to_vec_exact::<f32>()?, about, &mut losses);
            losses.tokens += batch.target_tokens;
            total = Some((gradients, minimised));
        }
        let (gradients, minimised) = total.ok_or(planish_loss::Error::NoTrainedTokens { rows: window.examples })?;
        losses.mean_of_means /= window.micro_batches.len() as f64;
        Ok(WindowGradients {
            gradients,
            objective: minimised,
            losses,
        })
    })();
    // The traced function left its own arrays in the model.
    model.set_trainables(&trainables)?;
    outcome
}

/// The micro-batches that train something.
pub(crate) fn trained(window: &Window) -> impl Iterator<Item = &Batch> {
    window.micro_batches.iter().filter(|batch| batch.target_tokens > 0)
}

/// Clips, updates, and puts the new values into the model; a gradient or loss that is not finite changes nothing.
pub(crate) fn apply(
    model: &mut Model,
    optimizer: &mut Optimizer,
    window: &WindowGradients,
    place: Place,
    clip_norm: Option<f64>,
) -> Result<Applied> {
    let norm = window.gradients.norm()?;
    let accept = match place.counts {
        true => norm.is_finite()?.logical_and(window.objective.is_finite()?)?,
        false => Array::from_bool(false),
    };
    let learning_rate = place.learning_rate;
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

/// Cross-entropy of the trained positions, for training or, with `None`, as the model is used.
pub(crate) fn token_losses(
    model: &Model,
    batch: &Batch,
    positions: &TrainedPositions,
    training: Option<Training<'_>>,
    options: &TrainOptions,
    loss: &TokenLossOptions,
) -> Result<TokenLoss> {
    let (ids, mask) = model_inputs(batch);
    let hidden = match training {
        Some(training) => model.hidden_for_training(&ids, &mask, training)?,
        None => model.hidden(&ids, &mask, None)?,
    };
    let how = HeadLoss {
        terms: *loss,
        chunk_tokens: options.chunk_tokens,
        is_trained: training.is_some(),
    };
    Ok(model.head_loss(&hidden, positions, &how)?)
}

fn differentiate(
    model: &mut Model,
    trainables: &[Array],
    of_batch: &BatchObjective<'_>,
    training: Training<'_>,
) -> Result<(Vec<Array>, Outcome)> {
    let all: Vec<usize> = (0..trainables.len()).collect();
    let forward = |values: &[Array]| {
        model.set_trainables(values)?;
        let outcome = of_batch(model, training)?;
        Ok::<_, Error>(vec![outcome.objective, outcome.items])
    };
    let (mut outputs, gradients) = value_and_grad(forward, trainables, &all)?;
    let items = outputs.swap_remove(1);
    let objective = outputs.swap_remove(0);
    Ok((gradients, Outcome { objective, items }))
}

impl WindowLosses {
    /// Mean loss of the items.
    pub(crate) fn loss(&self, reduction: Reduction) -> f64 {
        match reduction {
            Reduction::TokenExact => self.sum / self.n_items as f64,
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
    use planish_loss::{cross_entropy, weighted_sum};
    use planish_nn::{Kernels, LoadOptions, LoraConfig};

    use super::*;
    use crate::optimizer::{Groups, Rule};
    use crate::recipes::sft::Sft;
    use crate::weighting::ExampleWeights;

    fn tiny(kernels: Kernels, n_rows: usize, nudge: f32) -> (Model, Dataset) {
        let dir = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../planish-nn/tests/fixtures/tiny-llama-1m"
        ));
        let options = LoadOptions::with_kernels(kernels);
        let (mut model, _) = Model::load(dir, &options).unwrap();
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
            .map(|(i, (_, v))| nudged(v, i, nudge))
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
            row("When?", "In the morning, before the others are down."),
            row("Is it far?", "Not at all."),
            row("Will Harriet come?", "She will, if the weather allows it."),
            row("And her letter?", "It is on the table."),
            row("Why?", "I cannot tell."),
        ];
        std::fs::write(&file, rows[..n_rows].join("\n")).unwrap();
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

    fn nudged(value: &Array, seed: usize, size: f32) -> Array {
        let noise: Vec<f32> = (0..value.size())
            .map(|i| ((i * 37 + seed * 11) % 17) as f32 / 8.0 - 1.0)
            .collect();
        let noise: Vec<f32> = noise.iter().map(|x| x * size).collect();
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
        let (mut model, data) = tiny(Kernels::Composed, 3, 0.016);
        let options = TrainOptions {
            batch_size: 2,
            accumulation: 2,
            max_seq_length: 64,
            chunk_tokens: Some(5),
            ..TrainOptions::default()
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
        let of_examples = [0.5, 1.25, 2.0];
        let weights = ExampleWeights::fixed(&of_examples);
        let about = About {
            options: &options,
            weights: &weights,
        };
        let weight = |example: usize| of_examples[example];
        let named = model.trainables();
        let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &named).unwrap();
        let found = window_gradients(&mut model, &optimizer, &window, &Sft, &about, 0).unwrap();
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

    /// The gradient of one window over eight rows, flat, and its loss.
    fn of_window(kernels: Kernels, options: &TrainOptions, reversed: bool, nudge: f32) -> (Vec<f32>, f64) {
        let (mut model, data) = tiny(kernels, 8, nudge);
        let plan = PlanOptions {
            batch_size: options.batch_size,
            accumulation: options.accumulation,
            max_seq_length: 64,
            packing: options.packing,
            ..PlanOptions::default()
        };
        let mut window = BatchPlan::new(&data, &plan).unwrap().window(&data, 0, 0).unwrap();
        assert_eq!(window.examples, 8);
        if reversed {
            window.micro_batches = window.micro_batches.iter().map(reversed_rows).collect();
        }
        let optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &model.trainables()).unwrap();
        let weights = ExampleWeights::fixed(&[0.5, 1.25, 2.0, 1.0, 0.75, 1.5, 0.25, 0.75]);
        let about = About {
            options,
            weights: &weights,
        };
        let found = window_gradients(&mut model, &optimizer, &window, &Sft, &about, 0).unwrap();
        let gradient = planish_mlx::host::to_f32_vec(&found.gradients.arrays()[0]).unwrap();
        (gradient, found.losses.weighted_sum)
    }

    /// The same batch with its rows in the other order.
    fn reversed_rows(batch: &Batch) -> Batch {
        fn flip<T: Copy>(values: &[T], length: usize) -> Vec<T> {
            values.chunks(length).rev().flatten().copied().collect()
        }
        let mut other = batch.clone();
        other.inputs = flip(&batch.inputs, batch.length);
        other.targets = flip(&batch.targets, batch.length);
        other.target_weights = flip(&batch.target_weights, batch.length);
        other
            .segments
            .iter_mut()
            .for_each(|segment| segment.row = batch.rows - 1 - segment.row);
        other
    }

    #[test]
    fn weighted_gradient_does_not_depend_on_cut_packing_or_order() {
        let cut = |batch_size, accumulation, packing| TrainOptions {
            batch_size,
            accumulation,
            packing,
            max_seq_length: 64,
            ..TrainOptions::default()
        };
        let kinds = [Kernels::Composed, Kernels::Native, Kernels::NativeBf16];
        for (kernels, nudge) in kinds.into_iter().flat_map(|k| [0.0, 0.002, 0.016].map(|n| (k, n))) {
            // Our own products take a token's sums in one order wherever it lies in a batch, and so does the attention of our
            // kernels: what is left is the order of the sum over tokens (measured 6e-7 at most). OpenBLAS and MLX's attention
            // do not, and the tiny differences grow on the way back (measured 1.2e-5 at most, with AVX2's kernels).
            let bound = if kernels == Kernels::NativeBf16 { 1e-6 } else { 3e-5 };
            let (whole, loss) = of_window(kernels, &cut(8, 1, false), false, nudge);
            let norm = |v: &[f32]| v.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let others = [
                ("4x2", cut(4, 2, false), false),
                ("2x4", cut(2, 4, false), false),
                ("1x8", cut(1, 8, false), false),
                ("packed", cut(8, 1, true), false),
                ("reversed", cut(8, 1, false), true),
            ];
            for (name, options, reversed) in others {
                let (other, other_loss) = of_window(kernels, &options, reversed, nudge);
                let off: Vec<f32> = whole.iter().zip(&other).map(|(a, b)| a - b).collect();
                let (share, of_loss) = (norm(&off) / norm(&whole), (other_loss / loss - 1.0).abs());
                println!("{kernels:?} nudge {nudge} {name}: gradient {share:.1e}, loss {of_loss:.1e}");
                assert!(share <= bound, "{kernels:?} {name}: {share}");
                assert!(of_loss <= 1e-6, "{name}: {other_loss} {loss}");
            }
        }
    }
}

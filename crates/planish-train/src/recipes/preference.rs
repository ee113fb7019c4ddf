//! What recipes over preference pairs share: log-probabilities of the two answers, figures, and the judging of a set.

use mlx_rs::{Array, ops};
use planish_data::{Batch, Dataset, Side};
use planish_loss::dpo::{PairLogProbabilities, PreferenceLoss, sequence_sums};
use planish_loss::{TokenLossOptions, TrainedPositions};
use planish_nn::{Model, Training};

use super::Outcome;
use crate::Result;
use crate::batches::Batches;
use crate::evaluate::Judgement;
use crate::events::PreferenceReport;
use crate::options::TrainOptions;
use crate::window::{WindowLosses, in_row_order, token_losses};

/// The pairs of a batch, in the order of its rows.
#[derive(Debug)]
pub(crate) struct Pairs {
    positions: TrainedPositions,
    /// The answer that each trained token belongs to: `i` for the chosen one of pair `i`, `n + i` for the rejected one.
    answer_of_token: Vec<usize>,
    /// Trained tokens of each answer, chosen ones first.
    lengths: Vec<f32>,
    /// The chosen example of each pair.
    examples: Vec<usize>,
}

impl Pairs {
    pub(crate) fn of(batch: &Batch) -> Result<Self> {
        let n_pairs = batch.segments.len() / 2;
        let mut pairs = Self {
            positions: TrainedPositions::select(&batch.targets, &batch.target_weights)?,
            answer_of_token: Vec::new(),
            lengths: vec![0.0; 2 * n_pairs],
            examples: Vec::new(),
        };
        for segment in in_row_order(batch) {
            let answer = match segment.side {
                Some(Side::Rejected) => n_pairs + pairs.examples.len() - 1,
                _ => {
                    pairs.examples.push(segment.example);
                    pairs.examples.len() - 1
                }
            };
            pairs.lengths[answer] = segment.target_tokens as f32;
            pairs
                .answer_of_token
                .extend(std::iter::repeat_n(answer, segment.target_tokens));
        }
        Ok(pairs)
    }

    pub(crate) fn len(&self) -> usize {
        self.examples.len()
    }

    /// The margins that the rows ask for, `[n]`; `None` where no row asks.
    pub(crate) fn margins(&self, data_margins: &dyn Fn(usize) -> Option<f64>) -> Option<Array> {
        let margins: Vec<Option<f64>> = self.examples.iter().map(|&example| data_margins(example)).collect();
        margins.iter().any(Option::is_some).then(|| {
            let values: Vec<f32> = margins.iter().map(|margin| margin.unwrap_or(0.0) as f32).collect();
            Array::from_slice(&values, &[values.len() as i32])
        })
    }

    /// `Σ log p` over the tokens of each answer.
    pub(crate) fn log_probabilities(
        &self,
        model: &Model,
        batch: &Batch,
        training: Option<Training<'_>>,
        options: &TrainOptions,
    ) -> Result<PairLogProbabilities> {
        let plain = TokenLossOptions::default();
        let losses = token_losses(model, batch, &self.positions, training, options, &plain)?;
        let sums = sequence_sums(&losses.objective, &self.answer_of_token, 2 * self.len())?;
        Ok(PairLogProbabilities::split(&sums.negative()?)?)
    }

    /// The same divided by the number of tokens.
    pub(crate) fn mean_log_probabilities(
        &self,
        model: &Model,
        batch: &Batch,
        training: Option<Training<'_>>,
        options: &TrainOptions,
    ) -> Result<PairLogProbabilities> {
        let sums = self.log_probabilities(model, batch, training, options)?;
        let (chosen, rejected) = self.lengths.split_at(self.len());
        let shape = [self.len() as i32];
        Ok(PairLogProbabilities {
            chosen: sums.chosen.divide(Array::from_slice(chosen, &shape))?,
            rejected: sums.rejected.divide(Array::from_slice(rejected, &shape))?,
        })
    }
}

/// The mean loss over the pairs of a window, and its figures: `[3n]`, losses, chosen rewards, rejected rewards.
pub(crate) fn outcome(loss: &PreferenceLoss, pairs_in_window: usize) -> Result<Outcome> {
    let share = Array::from_f32(1.0 / pairs_in_window as f32);
    Ok(Outcome {
        objective: loss.losses.sum(false)?.multiply(share)?,
        items: items(loss)?,
    })
}

fn items(loss: &PreferenceLoss) -> Result<Array> {
    Ok(ops::concatenate(
        &[&loss.losses, &loss.chosen_rewards, &loss.rejected_rewards],
        0,
    )?)
}

/// Books the items of [`outcome`].
pub(crate) fn account(batch: &Batch, items: &[f32], losses: &mut WindowLosses) {
    let figures = Figures::of(items);
    let chosen = in_row_order(batch)
        .into_iter()
        .filter(|segment| segment.side == Some(Side::Chosen));
    for (segment, loss) in chosen.zip(items) {
        if !loss.is_finite() {
            losses.bad_examples.push(segment.example);
        }
    }
    losses.sum += figures.loss;
    losses.weighted_sum += figures.loss;
    losses.n_items += figures.n;
    losses.mean_of_means += figures.loss / figures.n.max(1) as f64;
    losses.preference.get_or_insert_default().add(&figures);
}

/// Means over the pairs of a set; `loss_of` computes those of one batch.
pub(crate) fn judge(
    valid: &Dataset,
    options: &TrainOptions,
    loss_of: &dyn Fn(&Batch, &Pairs) -> Result<PreferenceLoss>,
) -> Result<Judgement> {
    let plan = Batches::for_evaluation(valid, options)?;
    let windows = plan.windows_in_epoch(0)?.min(options.val_batches.unwrap_or(usize::MAX));
    let mut total = Figures::default();
    for index in 0..windows {
        for batch in plan.window(valid, 0, index)?.micro_batches {
            let loss = loss_of(&batch, &Pairs::of(&batch)?)?;
            total.add(&Figures::of(&items(&loss)?.to_vec_exact::<f32>()?));
        }
    }
    Ok(Judgement {
        loss: total.loss / total.n.max(1) as f64,
        tokens: total.tokens(valid),
        preference: Some(total.report()),
        ..Judgement::default()
    })
}

/// Sums over pairs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Figures {
    pub(crate) n: usize,
    pub(crate) loss: f64,
    pub(crate) chosen: f64,
    pub(crate) rejected: f64,
    pub(crate) right: f64,
}

impl Figures {
    fn of(items: &[f32]) -> Self {
        let n = items.len() / 3;
        let sum = |part: &[f32]| part.iter().map(|&x| f64::from(x)).sum();
        let (chosen, rejected) = (&items[n..2 * n], &items[2 * n..]);
        Self {
            n,
            loss: sum(&items[..n]),
            chosen: sum(chosen),
            rejected: sum(rejected),
            right: chosen
                .iter()
                .zip(rejected)
                .filter(|(chosen, rejected)| chosen > rejected)
                .count() as f64,
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.n += other.n;
        self.loss += other.loss;
        self.chosen += other.chosen;
        self.rejected += other.rejected;
        self.right += other.right;
    }

    pub(crate) fn report(&self) -> PreferenceReport {
        let n = self.n.max(1) as f64;
        PreferenceReport {
            margin: (self.chosen - self.rejected) / n,
            accuracy: self.right / n,
            chosen_reward: self.chosen / n,
            rejected_reward: self.rejected / n,
        }
    }

    fn tokens(&self, valid: &Dataset) -> usize {
        valid
            .examples()
            .iter()
            .take(2 * self.n)
            .map(|example| example.n_targets)
            .sum()
    }
}

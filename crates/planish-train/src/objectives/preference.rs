//! What objectives over preference pairs share: the pairs of a batch as arrays, log-probabilities of the two answers,
//! and figures.

use mlx_rs::{Array, Dtype};
use planish_data::{Batch, Side, Window};
use planish_loss::dpo::{PairLogProbabilities, PreferenceLoss, sequence_sums};
use planish_loss::{TokenLossOptions, weighted_sum};
use planish_nn::Model;

use crate::Result;
use crate::objective::{Collated, Counted, Fill, Outcome, Pass, Tokens, in_row_order};

/// What is reported per pair besides its loss. A reward is `β·(log π(y) − log π_ref(y))` for DPO and the log-odds of the
/// answer for ORPO.
pub(super) const FIGURES: &[&str] = &["reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy"];

/// A micro-batch of pairs; `extra` begins with
/// - which slots belong to which answer, f32 `[2n, slots]`, chosen answers first,
/// - the share of each pair in the window, f32 `[n]`: 0 for fillers, which repeat the first pair.
pub(super) fn collate(batch: &Batch, window: &Window, fill: Fill) -> Result<(Collated, Pairs)> {
    let (tokens, slots) = Tokens::collate(batch, fill)?;
    let pairs = Pairs::of(batch, fill);
    let n_slots = slots.positions.len();
    let mut members = vec![0f32; 2 * pairs.places * n_slots];
    let of_token = pairs.answers.iter().enumerate();
    let of_token = of_token.flat_map(|(answer, &tokens)| std::iter::repeat_n(answer, tokens));
    for (counted, answer) in slots.counted.iter().zip(of_token) {
        for place in pairs.places_of(answer) {
            members[place * n_slots + counted.item] = 1.0;
        }
    }
    let share = 1.0 / (window.examples / 2).max(1) as f32;
    let n_pairs = pairs.examples.len();
    let shares: Vec<f32> = (0..pairs.places)
        .map(|place| if place < n_pairs { share } else { 0.0 })
        .collect();
    let counted = pairs
        .examples
        .iter()
        .enumerate()
        .map(|(item, &example)| Counted { item, example });
    let collated = Collated {
        tokens,
        extra: vec![
            Array::from_slice(&members, &[2 * pairs.places as i32, n_slots as i32]),
            pairs.array(&shares),
        ],
        counted: counted.collect(),
    };
    Ok((collated, pairs))
}

/// The pairs of a batch.
pub(super) struct Pairs {
    /// Pairs that there is place for.
    places: usize,
    /// The chosen example of each pair, in the order of the rows.
    pub(super) examples: Vec<usize>,
    /// Trained tokens of each answer, in the order of the rows: chosen and rejected in turn.
    answers: Vec<usize>,
}

impl Pairs {
    fn of(batch: &Batch, fill: Fill) -> Self {
        let segments = in_row_order(batch);
        let chosen = segments.iter().filter(|segment| segment.side != Some(Side::Rejected));
        let examples: Vec<usize> = chosen.map(|segment| segment.example).collect();
        Self {
            places: match fill {
                Fill::Exact => examples.len(),
                Fill::Bounded => batch.rows / 2,
            },
            examples,
            answers: segments.iter().map(|segment| segment.target_tokens).collect(),
        }
    }

    /// One value per place, from those of the pairs; fillers repeat the first.
    pub(super) fn spread<T: Copy>(&self, of_pairs: &[T]) -> Vec<T> {
        let mut values = of_pairs.to_vec();
        values.resize(self.places, of_pairs[0]);
        values
    }

    /// One number per place.
    pub(super) fn array(&self, values: &[f32]) -> Array {
        Array::from_slice(values, &[self.places as i32])
    }

    /// Trained tokens of the chosen and of the rejected answers, `[n]` each.
    pub(super) fn lengths(&self) -> [Array; 2] {
        [0, 1].map(|side| {
            let lengths: Vec<f32> = self
                .answers
                .iter()
                .skip(side)
                .step_by(2)
                .map(|&tokens| tokens as f32)
                .collect();
            self.array(&self.spread(&lengths))
        })
    }

    /// Rows of the members that an answer fills, by its place in the order of the batch.
    fn places_of(&self, answer: usize) -> impl Iterator<Item = usize> {
        let (pair, first_row) = (answer / 2, (answer % 2) * self.places);
        let fillers = if pair == 0 {
            self.examples.len()..self.places
        } else {
            0..0
        };
        std::iter::once(pair).chain(fillers).map(move |place| first_row + place)
    }
}

/// `Σ log p` over the tokens of each answer.
pub(super) fn log_probabilities(
    model: &Model,
    tokens: &Tokens,
    members: &Array,
    pass: Pass<'_>,
) -> Result<PairLogProbabilities> {
    let losses = tokens.losses(model, pass, TokenLossOptions::default())?;
    let sums = sequence_sums(&losses.objective, members)?;
    Ok(PairLogProbabilities::split(&sums.negative()?)?)
}

/// The mean loss over the pairs of a window, and the [`FIGURES`] of each.
pub(super) fn outcome(loss: PreferenceLoss, shares: &Array) -> Result<Outcome> {
    let (chosen, rejected) = (loss.chosen_rewards, loss.rejected_rewards);
    let margin = chosen.subtract(&rejected)?;
    let is_right = chosen.gt(&rejected)?.as_dtype(Dtype::Float32)?;
    Ok(Outcome {
        objective: weighted_sum(&loss.losses, shares)?,
        figures: vec![loss.losses, chosen, rejected, margin, is_right],
    })
}

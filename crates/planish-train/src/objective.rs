//! What a run minimises: an [`Objective`] turns a batch into arrays, and runs a model forward over them.
//!
//! The same two functions serve updates that run as they are written, updates that are traced and compiled, and
//! evaluation: whatever differs from batch to batch is an array, so that a trace can take it as an argument.

use mlx_rs::Array;
use planish_data::{Batch, Dataset, Segment, Window};
use planish_loss::{HeadLoss, TokenLoss, TokenLossOptions, TrainedPositions};
use planish_nn::{AttentionMask, Model, Training};

use crate::Result;
use crate::options::TrainOptions;
use crate::weighting::ExampleWeights;

/// What a run minimises over the micro-batches of a window.
pub trait Objective: std::fmt::Debug {
    /// What the loss is a mean over.
    fn item(&self) -> Item;

    /// Names of what is reported per item besides its loss, in the order of [`Outcome::figures`]; fields of
    /// `metrics.jsonl`.
    fn figures(&self) -> &'static [&'static str] {
        &[]
    }

    /// One micro-batch as arrays. Whatever needs no gradient is computed here.
    ///
    /// # Errors
    /// Those of the model and of MLX; [`planish_loss::Error::NoTrainedTokens`].
    fn collate(&self, batch: &Batch, window: &Window, about: &About<'_>, fill: Fill) -> Result<Collated>;

    /// Runs the model forward over the arrays of [`collate`](Self::collate).
    ///
    /// # Errors
    /// Those of the model and of MLX.
    fn forward(&self, model: &Model, batch: &Collated, pass: Pass<'_>) -> Result<Outcome>;
}

/// What the loss of an objective is a mean over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// Trained tokens; the exponential of the mean is the perplexity.
    Token,
    /// Preference pairs.
    Pair,
}

/// What an objective knows about its run.
#[derive(Debug, Clone, Copy)]
pub struct About<'a> {
    /// The settings.
    pub options: &'a TrainOptions,
    /// The split that the batches are of; `None` for batches of no data set.
    pub data: Option<&'a Dataset>,
    pub(crate) weights: &'a ExampleWeights,
}

impl About<'_> {
    /// What the losses of an example are multiplied by.
    pub fn weight(&self, example: usize) -> f64 {
        self.weights.of_example(example)
    }
}

/// How many places a batch has for its trained positions and its pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// As many as there are.
    Exact,
    /// One of a few numbers per shape, so that few traces are made; the rest is filled up with copies of weight 0.
    Bounded,
}

/// How a forward pass is run.
#[derive(Debug, Clone, Copy)]
pub struct Pass<'a> {
    /// `None`: as the model is used, without dropout and gradients.
    pub training: Option<Training<'a>>,
    /// The settings.
    pub options: &'a TrainOptions,
}

/// What a forward pass gives.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What is minimised, a scalar that already is the batch's share of the window.
    pub objective: Array,
    /// The loss of each item, f32 `[n]`, then the named [`Objective::figures`], `[n]` each.
    pub figures: Vec<Array>,
}

/// A micro-batch as arrays.
#[derive(Debug, Clone)]
pub struct Collated {
    /// What the model reads and what it should predict.
    pub tokens: Tokens,
    /// What the objective adds; shapes must follow from those of the tokens.
    pub extra: Vec<Array>,
    /// The items that count, among those of the outcome.
    pub counted: Vec<Counted>,
}

/// An item that is no filler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// Its place among the items of the outcome.
    pub item: usize,
    /// The example that it belongs to.
    pub example: usize,
}

impl Collated {
    /// Everything in one list, for a function that is traced.
    pub(crate) fn arrays(&self) -> Vec<Array> {
        let Tokens {
            ids,
            targets,
            segments,
            indices,
            ..
        } = &self.tokens;
        let of_tokens = [Some(ids), Some(targets), segments.as_ref(), indices.as_ref()];
        of_tokens.into_iter().flatten().chain(&self.extra).cloned().collect()
    }

    /// The same batch with the arrays of another of its [`Signature`]; `None` if there are too few.
    pub(crate) fn of_arrays(signature: Signature, arrays: &[Array]) -> Option<Self> {
        let mut arrays = arrays.iter().cloned();
        let (ids, targets) = (arrays.next()?, arrays.next()?);
        let segments = if signature.is_packed {
            Some(arrays.next()?)
        } else {
            None
        };
        let indices = if signature.is_whole() {
            None
        } else {
            Some(arrays.next()?)
        };
        Some(Self {
            tokens: Tokens {
                signature,
                ids,
                targets,
                segments,
                indices,
            },
            extra: arrays.collect(),
            counted: Vec::new(),
        })
    }
}

/// The tokens of a micro-batch as arrays.
#[derive(Debug, Clone)]
pub struct Tokens {
    signature: Signature,
    /// i32 `[rows, length]`.
    ids: Array,
    /// i32 `[slots]`: what each slot should predict.
    targets: Array,
    /// i32 `[rows, length]`, with packing only.
    segments: Option<Array>,
    /// i32 `[slots]`: where in the flattened batch each slot is; `None`: every position is one, in order.
    indices: Option<Array>,
}

/// Where the trained positions of a batch have gone.
#[derive(Debug, Clone)]
pub struct Slots {
    /// The position of each slot in the flattened batch; a filler repeats the first trained one.
    pub positions: Vec<usize>,
    /// The slots of the trained positions, in order, with the example of each.
    pub counted: Vec<Counted>,
}

impl Tokens {
    /// The tokens of a batch, and which slot each trained position has.
    ///
    /// # Errors
    /// [`planish_loss::Error::NoTrainedTokens`].
    pub fn collate(batch: &Batch, fill: Fill) -> Result<(Self, Slots)> {
        let positions = 0..batch.targets.len();
        let trained: Vec<usize> = positions.filter(|&i| batch.target_weights[i] != 0.0).collect();
        let Some(&first) = trained.first() else {
            return Err(planish_loss::Error::NoTrainedTokens { rows: batch.rows }.into());
        };
        let signature = Signature::of(batch, trained.len(), fill);
        let examples = in_row_order(batch).into_iter();
        let examples = examples.flat_map(|segment| std::iter::repeat_n(segment.example, segment.target_tokens));
        let is_whole = signature.is_whole();
        let counted = trained
            .iter()
            .enumerate()
            .zip(examples)
            .map(|((i, &position), example)| Counted {
                item: if is_whole { position } else { i },
                example,
            });
        let counted = counted.collect();
        let positions = if is_whole {
            (0..batch.targets.len()).collect()
        } else {
            let mut positions = trained;
            positions.resize(signature.slots, first);
            positions
        };
        let (slots, shape) = ([signature.slots as i32], [batch.rows as i32, batch.length as i32]);
        let of_slots = |value: &dyn Fn(usize) -> i32| {
            let values: Vec<i32> = positions.iter().map(|&position| value(position)).collect();
            Array::from_slice(&values, &slots)
        };
        let tokens = Self {
            signature,
            ids: Array::from_slice(&batch.inputs, &shape),
            targets: of_slots(&|position| batch.targets[position]),
            segments: batch.segment_ids.as_ref().map(|ids| Array::from_slice(ids, &shape)),
            indices: (!is_whole).then(|| of_slots(&|position| position as i32)),
        };
        Ok((tokens, Slots { positions, counted }))
    }

    /// i32 `[rows, length]`: what the model reads.
    pub fn ids(&self) -> &Array {
        &self.ids
    }

    /// Who may attend to whom.
    pub fn mask(&self) -> AttentionMask {
        match &self.segments {
            None => AttentionMask::Causal,
            Some(segment_ids) => AttentionMask::Packed {
                segment_ids: segment_ids.clone(),
            },
        }
    }

    /// Cross-entropy of each slot, f32 `[slots]`, in nats.
    ///
    /// # Errors
    /// Those of the model and of MLX.
    pub fn losses(&self, model: &Model, pass: Pass<'_>, terms: TokenLossOptions) -> Result<TokenLoss> {
        let (ids, mask) = (self.ids(), self.mask());
        let hidden = match pass.training {
            Some(training) => model.hidden_for_training(ids, &mask, training)?,
            None => model.hidden(ids, &mask, None)?,
        };
        let how = HeadLoss {
            terms,
            chunk_tokens: pass.options.chunk_tokens,
            is_trained: pass.training.is_some(),
        };
        Ok(model.head_loss(&hidden, &self.positions(), &how)?)
    }

    /// The positions whose loss is wanted, one per slot.
    pub fn positions(&self) -> TrainedPositions {
        let n_positions = self.signature.rows * self.signature.length;
        TrainedPositions::on_device(self.indices.clone(), self.targets.clone(), n_positions)
    }

    pub(crate) fn signature(&self) -> Signature {
        self.signature
    }
}

/// Slots are filled up to the next of so many parts of a batch.
const PARTS: usize = 4;

/// What decides the shapes of a batch's arrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Signature {
    rows: usize,
    length: usize,
    is_packed: bool,
    slots: usize,
}

impl Signature {
    fn of(batch: &Batch, trained: usize, fill: Fill) -> Self {
        let (rows, length) = (batch.rows, batch.length);
        let slots = match fill {
            Fill::Exact => trained,
            Fill::Bounded => bounded_slots(rows * length, trained),
        };
        Self {
            rows,
            length,
            is_packed: batch.segment_ids.is_some(),
            slots,
        }
    }

    /// Whether every position has its slot.
    fn is_whole(self) -> bool {
        self.slots == self.rows * self.length
    }

    /// Most signatures that batches of so many shapes have.
    pub(crate) fn most(n_shapes: usize) -> usize {
        n_shapes * PARTS
    }
}

fn bounded_slots(positions: usize, trained: usize) -> usize {
    let part = positions.div_ceil(PARTS).max(1);
    (trained.div_ceil(part).max(1) * part).min(positions)
}

/// The segments of a batch in the order of its flattened positions.
pub(crate) fn in_row_order(batch: &Batch) -> Vec<Segment> {
    let mut segments = batch.segments.clone();
    segments.sort_by_key(|segment| (segment.row, segment.start));
    segments
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn prop_a_shape_has_four_numbers_of_slots_at_most_and_all_tokens_find_a_place() {
        for positions in [1, 2, 7, 15, 4096, 2664] {
            let all: BTreeSet<usize> = (0..=positions)
                .map(|trained| bounded_slots(positions, trained))
                .collect();
            assert!(all.len() <= Signature::most(1), "{all:?}");
            assert!((1..=positions).all(|trained| bounded_slots(positions, trained) >= trained));
            assert_eq!(bounded_slots(positions, positions), positions);
        }
    }
}

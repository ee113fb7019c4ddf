//! The batches that mlx-lm makes, for runs that must give its numbers.
//!
//! Read in mlx-lm 0.32.2, `tuner/trainer.py` `iterate_batches` and `default_loss`: rows are sorted by their number of
//! fields (which leaves rows of equal fields in file order), batches are consecutive, the last partial one is lost, the
//! length is one more than a multiple of 32 and at most the limit, and each padded row trains one padding token.

use crate::batch::Batch;
use crate::dataset::{Dataset, ExampleTokens};
use crate::error::{Error, Result};
use crate::order::{Purpose, Random};

/// mlx-lm's fixed batches over a data set that was read with [`Train::MlxLm`](crate::Train::MlxLm).
///
/// # Errors
/// [`Error::Plan`] when there are fewer rows than a batch has, or a batch trains nothing (mlx-lm's loss is NaN there).
#[derive(Debug, Clone, PartialEq)]
pub struct MlxLmPlan {
    batches: Vec<Vec<usize>>,
    max_seq_length: usize,
}

const PAD_TO: usize = 32;

impl MlxLmPlan {
    /// Makes the batches.
    pub fn new(data: &Dataset, batch_size: usize, max_seq_length: usize) -> Result<Self> {
        if data.len() < batch_size || batch_size == 0 {
            return Err(Error::plan(
                format!(
                    "mlx-lm needs at least batch_size = {batch_size} rows, and there are {}",
                    data.len()
                ),
                "lower train.batch_size, or leave out --compat mlx-lm",
            ));
        }
        if let Some(longest) = data
            .examples()
            .iter()
            .map(|e| e.n_tokens)
            .max()
            .filter(|n| *n > max_seq_length)
        {
            return Err(Error::plan(
                format!("an example has {longest} tokens, and the plan's limit is {max_seq_length}"),
                "plan with the max_seq_length that the data was read with",
            ));
        }
        let mut order: Vec<usize> = (0..data.len()).collect();
        order.sort_by_key(|example| data.examples()[*example].n_fields);
        Ok(Self {
            batches: order.chunks_exact(batch_size).map(<[usize]>::to_vec).collect(),
            max_seq_length,
        })
    }

    /// Batches of an epoch.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether there is none, which cannot be.
    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// An order of the batches for an epoch. It is ours: mlx-lm's comes from numpy's generator, and a parity run gives
    /// its order in a file.
    pub fn order(&self, seed: u64, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.len()).collect();
        Random::new(seed, epoch, Purpose::Windows).shuffle(&mut order);
        order
    }

    /// One batch: `[batch_size, T - 1]`, with mlx-lm's padding target among the trained ones.
    pub fn batch(&self, data: &Dataset, index: usize) -> Result<Batch> {
        let examples = self.batches.get(index).ok_or(Error::NoSuchWindow {
            epoch: 0,
            index,
            windows: self.len(),
        })?;
        let rows = examples
            .iter()
            .map(|example| data.tokens(*example))
            .collect::<Result<Vec<_>>>()?;
        let longest = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0);
        // One more than a multiple of 32, unless the limit cuts it; rows are cut to the limit when they are read.
        let length = (1 + longest.next_multiple_of(PAD_TO)).min(self.max_seq_length);
        let mut batch = Batch::new(rows.len(), length - 1, false);
        for (row, (example, tokens)) in examples.iter().zip(&rows).enumerate() {
            batch.place(*example, tokens, row, 0, None);
            train_padding_target(&mut batch, row, tokens, data.examples()[*example].prompt_tokens);
        }
        if batch.target_tokens == 0 {
            let lines: Vec<String> = examples.iter().map(|e| data.examples()[*e].line.to_string()).collect();
            return Err(Error::plan(
                format!(
                    "the batch of lines {} has no token to train; mlx-lm's loss is NaN there",
                    lines.join(", ")
                ),
                "remove the rows, raise train.max_seq_length, or leave out --compat mlx-lm",
            ));
        }
        Ok(batch)
    }
}

/// mlx-lm masks steps `s` with `offset <= s <= length`, where step `s` predicts token `s`: one past the last token.
fn train_padding_target(batch: &mut Batch, row: usize, tokens: &ExampleTokens, offset: usize) {
    let n = tokens.ids.len();
    if n >= 1 && n <= batch.length && offset <= n {
        let at = row * batch.length + n - 1;
        // The input of this step is the last token, which an unpadded row never feeds.
        batch.inputs[at] = tokens.ids[n - 1] as i32;
        batch.target_weights[at] = 1.0;
        batch.target_tokens += 1;
        if let Some(segment) = batch.segments.last_mut() {
            segment.target_tokens += 1;
            segment.len += 1;
        }
    }
}

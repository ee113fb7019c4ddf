//! Updates on random tokens, timed: the work of a run without its data.

use std::rc::Rc;

use planish_data::{Batch, Cursor, Segment, Window};
use planish_nn::Model;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::Result;
use crate::objective::About;
use crate::objectives::Sft;
use crate::optimizer::Optimizer;
use crate::options::TrainOptions;
use crate::update::{Place, Updates, WindowSource};
use crate::weighting::ExampleWeights;

/// Runs `count` updates of `model`'s trainables, each on `rows` rows of `length` random tokens which are all targets, the
/// same code as in a run.
///
/// # Errors
/// [`Error::Config`](crate::Error::Config) for settings; those of the model.
pub fn timed_steps(
    model: &mut Model,
    (rows, length): (usize, usize),
    options: &TrainOptions,
    count: usize,
) -> Result<Vec<TimedStep>> {
    let mut optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
    let about = About {
        options,
        data: None,
        weights: &ExampleWeights::equal(),
    };
    let mut source = RandomTokens {
        rows,
        length,
        vocab_size: model.config().arch.vocab_size,
        random: ChaCha8Rng::seed_from_u64(options.seed),
    };
    let mut updates = Updates::new(model, Rc::new(Sft), options)?;
    let place = |step| Place {
        cursor: Cursor::default(),
        step,
        learning_rate: options.learning_rate,
        counts: true,
    };
    let timed = (0..count).map(|step| {
        let next = (step + 1 < count).then(|| place(step + 1));
        let done = updates.make(model, &mut optimizer, &mut source, &about, place(step), next)?;
        Ok(TimedStep {
            seconds: done.seconds,
            loss: done.losses.mean(options.reduction),
        })
    });
    timed.collect()
}

/// One update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimedStep {
    /// From the tokens to the new values.
    pub seconds: f64,
    /// Cross-entropy a token before the update, in nats.
    pub loss: f64,
}

#[derive(Debug)]
struct RandomTokens {
    rows: usize,
    length: usize,
    vocab_size: usize,
    random: ChaCha8Rng,
}

impl WindowSource for RandomTokens {
    fn window(&mut self, _: Cursor, _: &Model) -> Result<Window> {
        let Self { rows, length, .. } = *self;
        let mut token = || (self.random.next_u32() as usize % self.vocab_size) as i32;
        let lines: Vec<Vec<i32>> = (0..rows).map(|_| (0..=length).map(|_| token()).collect()).collect();
        let batch = Batch {
            inputs: lines.iter().flat_map(|line| &line[..length]).copied().collect(),
            targets: lines.iter().flat_map(|line| &line[1..]).copied().collect(),
            ..full_batch(rows, length)
        };
        Ok(window_of(batch))
    }
}

/// A batch of zeros without padding in which every position is trained, each row an example of its own.
pub(crate) fn full_batch(rows: usize, length: usize) -> Batch {
    let tokens = rows * length;
    let segment = |row| Segment {
        example: row,
        row,
        start: 0,
        len: length,
        target_tokens: length,
        side: None,
    };
    Batch {
        rows,
        length,
        inputs: vec![0; tokens],
        targets: vec![0; tokens],
        target_weights: vec![1.0; tokens],
        segment_ids: None,
        row_ids: (0..rows).collect(),
        segments: (0..rows).map(segment).collect(),
        target_tokens: tokens,
        used_positions: tokens,
    }
}

/// A window of one micro-batch.
pub(crate) fn window_of(batch: Batch) -> Window {
    Window {
        target_tokens: batch.target_tokens,
        examples: batch.row_ids.len(),
        micro_batches: vec![batch],
    }
}

//! Updates on random tokens, timed: the work of a run without its data.

use std::time::Instant;

use planish_data::{Batch, Segment, Window};
use planish_nn::Model;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::optimizer::Optimizer;
use crate::options::TrainOptions;
use crate::recipes::{About, sft::Sft};
use crate::update::{Place, Updates};
use crate::weighting::ExampleWeights;
use crate::{Error, Result};

/// Runs `count` updates of `model`'s trainables, each on `rows` rows of `length` random tokens which are all targets, the
/// same code as in a run.
///
/// # Errors
/// [`Error::Config`] for settings; those of the model.
pub fn timed_steps(
    model: &mut Model,
    (rows, length): (usize, usize),
    options: &TrainOptions,
    count: usize,
) -> Result<Vec<TimedStep>> {
    let mut optimizer = Optimizer::new(options.rule.clone(), options.groups, &model.trainables())?;
    let weights = ExampleWeights::equal();
    let about = About {
        options,
        weights: &weights,
    };
    let mut random = ChaCha8Rng::seed_from_u64(options.seed);
    let vocab_size = model.config().arch.vocab_size;
    let mut updates = Updates::new(model, &Sft, &about)?;
    let mut launch = |step: usize, updates: &mut Updates| {
        let window = random_window(rows, length, vocab_size, &mut random);
        let place = Place {
            step,
            learning_rate: options.learning_rate,
            counts: true,
        };
        let started = Instant::now();
        let launched = updates.launch(model, &mut optimizer, &window, &Sft, &about, place)?;
        Ok::<_, Error>((window, launched, started))
    };
    let mut ahead = None;
    let mut last_read: Option<Instant> = None;
    (0..count)
        .map(|step| {
            let (window, launched, mut started) = match ahead.take() {
                Some(launched) => launched,
                None => launch(step, &mut updates)?,
            };
            if updates.are_traced() && options.launch_ahead && step + 1 < count {
                ahead = Some(launch(step + 1, &mut updates)?);
            }
            let (losses, _) = updates.read(launched, &window, &Sft, &about)?;
            if let Some(last) = last_read.filter(|last| *last > started) {
                started = last; // it was waited for behind another
            }
            last_read = Some(Instant::now());
            Ok(TimedStep {
                seconds: started.elapsed().as_secs_f64(),
                loss: losses.loss(options.reduction),
            })
        })
        .collect::<Result<_, Error>>()
}

/// One update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimedStep {
    /// From the tokens to the new values.
    pub seconds: f64,
    /// Cross-entropy a token before the update, in nats.
    pub loss: f64,
}

fn random_window(rows: usize, length: usize, vocab_size: usize, random: &mut ChaCha8Rng) -> Window {
    let mut token = || (random.next_u32() as usize % vocab_size) as i32;
    let lines: Vec<Vec<i32>> = (0..rows).map(|_| (0..=length).map(|_| token()).collect()).collect();
    let segment = |row| Segment {
        example: row,
        row,
        start: 0,
        len: length,
        target_tokens: length,
        side: None,
    };
    let tokens = rows * length;
    let batch = Batch {
        rows,
        length,
        inputs: lines.iter().flat_map(|line| &line[..length]).copied().collect(),
        targets: lines.iter().flat_map(|line| &line[1..]).copied().collect(),
        target_weights: vec![1.0; tokens],
        segment_ids: None,
        row_ids: (0..rows).collect(),
        segments: (0..rows).map(segment).collect(),
        target_tokens: tokens,
        used_positions: tokens,
    };
    Window {
        micro_batches: vec![batch],
        target_tokens: tokens,
        examples: rows,
    }
}

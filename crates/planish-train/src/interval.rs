//! Figures collected between two reports.

use std::time::Instant;

use planish_checkpoint::run_state::{DistrustSums, Interval as Sums, RunState};
use planish_data::Window;
use planish_loss::distrust::effective_sample_size;

use crate::events::{DistrustReport, Position, StepReport, TrainReport};
use crate::figures::Figures;
use crate::options::{Reduction, TrainOptions};
use crate::update::Done;
use crate::weighting::ExampleWeights;
use crate::{Result, memory};

/// Sums of the current interval, and of the whole run.
#[derive(Debug)]
pub(crate) struct Interval {
    pub(crate) tokens: u64,
    pub(crate) tokens_total: u64,
    pub(crate) examples: u64,
    pub(crate) skipped_steps: u64,
    started: Instant,
    seconds: f64,
    sums: Sums,
}

impl Interval {
    pub(crate) fn start() -> Self {
        Self {
            tokens: 0,
            tokens_total: 0,
            examples: 0,
            skipped_steps: 0,
            started: Instant::now(),
            seconds: 0.0,
            sums: Sums::default(),
        }
    }

    /// The interval of a saved run. Seconds start anew: they are not part of what must be equal.
    pub(crate) fn resumed(state: &RunState) -> Self {
        Self {
            tokens: state.counters.trained_tokens,
            tokens_total: state.counters.total_tokens,
            examples: state.counters.examples,
            skipped_steps: state.counters.skipped_steps,
            sums: state.interval.clone(),
            ..Self::start()
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sums.steps == 0
    }

    /// What a checkpoint keeps of an interval that is not over.
    pub(crate) fn unfinished(&self) -> Sums {
        self.sums.clone()
    }

    pub(crate) fn elapsed_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Takes one update into account.
    pub(crate) fn add(&mut self, step: &StepReport, done: &Done, options: &TrainOptions, weights: &ExampleWeights) {
        let (sums, losses, window) = (&mut self.sums, &done.losses, &done.window);
        sums.steps += 1;
        sums.clipped += u64::from(options.clip_norm.is_some_and(|most| step.grad_norm > most));
        sums.loss.0 += losses.sum;
        sums.weighted_loss.0 += losses.weighted_sum;
        sums.means.0 += losses.mean_of_means();
        sums.items += losses.n_items as u64;
        sums.tokens += losses.tokens as u64;
        sums.learning_rate.0 = step.learning_rate;
        sums.grad_norm.0 = step.grad_norm;
        for (name, value) in losses.figures.iter() {
            sums.figures.entry(name.to_owned()).or_default().0 += value;
        }
        for batch in &window.micro_batches {
            sums.used_positions += batch.used_positions as u64;
            sums.positions += (batch.rows * batch.length) as u64;
            sums.shapes.insert((batch.rows as u64, batch.length as u64));
            self.tokens_total += batch.used_positions as u64;
        }
        self.seconds += step.seconds;
        self.tokens += losses.tokens as u64;
        self.examples += window.examples as u64;
        if weights.is_on() {
            add_distrust(sums.distrust.get_or_insert_default(), window, weights);
        }
    }

    /// The report of the interval; starts the next one.
    pub(crate) fn finish(
        &mut self,
        position: Position,
        total_steps: usize,
        options: &TrainOptions,
        weights: &ExampleWeights,
    ) -> Result<TrainReport> {
        let next = Sums {
            shapes: self.sums.shapes.clone(),
            ..Sums::default()
        };
        let sums = std::mem::replace(&mut self.sums, next);
        let (steps, items) = (sums.steps.max(1) as f64, sums.items.max(1) as f64);
        let seconds = std::mem::take(&mut self.seconds).max(f64::MIN_POSITIVE);
        let loss = match options.reduction {
            Reduction::TokenExact => sums.loss.0 / items,
            Reduction::MeanOfMeans => sums.means.0 / steps,
        };
        let (lr, ratio) = (sums.learning_rate.0, options.groups.lora_b_ratio);
        let figures: Figures = sums.figures.into_iter().map(|(name, sum)| (name, sum.0)).collect();
        Ok(TrainReport {
            position,
            loss,
            loss_weighted: weights.changes_the_objective().then(|| sums.weighted_loss.0 / items),
            distrust: sums.distrust.map(|sums| distrust_report(&sums, steps)),
            figures: figures.means(sums.items as usize),
            lr,
            lr_b: (ratio != 1.0).then_some(lr * ratio),
            grad_norm: sums.grad_norm.0,
            clipped: sums.clipped as f64 / steps,
            tokens: self.tokens,
            tokens_total: self.tokens_total,
            examples: self.examples,
            tokens_per_second: sums.tokens as f64 / seconds,
            steps_per_second: steps / seconds,
            elapsed_seconds: self.elapsed_seconds(),
            eta_seconds: total_steps.saturating_sub(position.step) as f64 * seconds / steps,
            memory: memory::read_and_reset_peak()?,
            padding_fraction: 1.0 - sums.used_positions as f64 / sums.positions.max(1) as f64,
            shapes_seen: sums.shapes.len(),
            skipped_steps: self.skipped_steps,
        })
    }
}

fn add_distrust(sums: &mut DistrustSums, window: &Window, weights: &ExampleWeights) {
    let batches = window.micro_batches.iter();
    let examples: Vec<usize> = batches.flat_map(|batch| batch.row_ids.clone()).collect();
    let used: Vec<f64> = examples.iter().map(|&example| weights.of_example(example)).collect();
    let ess = effective_sample_size(&used);
    sums.ess.0 += ess;
    sums.ess_fraction.0 += ess / used.len().max(1) as f64;
    sums.weight_max.0 = used.iter().copied().fold(sums.weight_max.0, f64::max);
    for value in examples.iter().filter_map(|&example| weights.value_of(example)) {
        sums.values.0 += value;
        sums.n_values += 1;
    }
}

fn distrust_report(sums: &DistrustSums, windows: f64) -> DistrustReport {
    DistrustReport {
        ess: sums.ess.0 / windows,
        ess_fraction: sums.ess_fraction.0 / windows,
        weight_max: sums.weight_max.0,
        value: sums.values.0 / sums.n_values.max(1) as f64,
    }
}

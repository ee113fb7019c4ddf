//! Figures collected between two reports.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use planish_data::Window;
use planish_loss::distrust::effective_sample_size;

use crate::events::{DistrustReport, Position, StepReport, TrainReport};
use crate::options::{Reduction, TrainOptions};
use crate::recipes::preference::Figures;
use crate::weighting::ExampleWeights;
use crate::window::WindowLosses;
use crate::{Result, memory};

/// Sums of the current interval, and of the whole run.
#[derive(Debug)]
pub(crate) struct Interval {
    pub(crate) tokens: u64,
    pub(crate) tokens_total: u64,
    pub(crate) examples: u64,
    pub(crate) skipped_steps: u64,
    shapes: BTreeSet<(usize, usize)>,
    started: Instant,
    sums: Sums,
}

#[derive(Debug, Default)]
struct Sums {
    steps: usize,
    clipped: usize,
    loss: f64,
    weighted: f64,
    means: f64,
    items: usize,
    tokens: usize,
    seconds: f64,
    used: usize,
    positions: usize,
    last_lr: f64,
    last_norm: f64,
    weights_change_it: bool,
    distrust: Option<DistrustSums>,
    preference: Option<Figures>,
}

#[derive(Debug, Default)]
struct DistrustSums {
    ess: f64,
    ess_fraction: f64,
    weight_max: f64,
    values: f64,
    n_values: usize,
}

impl Interval {
    pub(crate) fn start() -> Self {
        Self {
            tokens: 0,
            tokens_total: 0,
            examples: 0,
            skipped_steps: 0,
            shapes: BTreeSet::new(),
            started: Instant::now(),
            sums: Sums::default(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.sums.steps == 0
    }

    pub(crate) fn elapsed_seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// Takes one update into account.
    pub(crate) fn add(
        &mut self,
        step: &StepReport,
        window: &Window,
        losses: &WindowLosses,
        options: &TrainOptions,
        weights: &ExampleWeights,
    ) {
        let sums = &mut self.sums;
        sums.steps += 1;
        sums.clipped += usize::from(options.clip_norm.is_some_and(|most| step.grad_norm > most));
        sums.loss += losses.sum;
        sums.items += losses.n_items;
        sums.weighted += losses.weighted_sum;
        sums.means += losses.mean_of_means;
        sums.tokens += losses.tokens;
        sums.seconds += step.seconds;
        sums.last_lr = step.learning_rate;
        sums.last_norm = step.grad_norm;
        sums.weights_change_it = weights.changes_the_objective();
        for batch in &window.micro_batches {
            sums.used += batch.used_positions;
            sums.positions += batch.rows * batch.length;
            self.shapes.insert((batch.rows, batch.length));
            self.tokens_total += batch.used_positions as u64;
        }
        self.tokens += losses.tokens as u64;
        self.examples += window.examples as u64;
        if let Some(figures) = &losses.preference {
            sums.preference.get_or_insert_default().add(figures);
        }
        if weights.is_on() {
            sums.distrust.get_or_insert_default().add(window, weights);
        }
    }

    /// The report of the interval; starts the next one.
    pub(crate) fn finish(
        &mut self,
        position: Position,
        total_steps: usize,
        lora_b_ratio: f64,
        options: &TrainOptions,
    ) -> Result<TrainReport> {
        let sums = std::mem::take(&mut self.sums);
        let (steps, items) = (sums.steps.max(1) as f64, sums.items.max(1) as f64);
        let seconds = sums.seconds.max(f64::MIN_POSITIVE);
        let loss = match options.reduction {
            Reduction::TokenExact => sums.loss / items,
            Reduction::MeanOfMeans => sums.means / steps,
        };
        Ok(TrainReport {
            position,
            loss,
            loss_weighted: sums.weights_change_it.then(|| sums.weighted / items),
            distrust: sums.distrust.map(|d| d.finish(steps)),
            preference: sums.preference.map(|figures| figures.report()),
            lr: sums.last_lr,
            lr_b: (lora_b_ratio != 1.0).then_some(sums.last_lr * lora_b_ratio),
            grad_norm: sums.last_norm,
            clipped: sums.clipped as f64 / steps,
            tokens: self.tokens,
            tokens_total: self.tokens_total,
            examples: self.examples,
            tokens_per_second: sums.tokens as f64 / seconds,
            steps_per_second: steps / seconds,
            elapsed_seconds: self.elapsed_seconds(),
            eta_seconds: total_steps.saturating_sub(position.step) as f64 * seconds / steps,
            memory: memory::read_and_reset_peak()?,
            padding_fraction: 1.0 - sums.used as f64 / sums.positions.max(1) as f64,
            shapes_seen: self.shapes.len(),
            skipped_steps: self.skipped_steps,
        })
    }
}

/// What a checkpoint keeps of an interval that is not over, by name.
impl Interval {
    pub(crate) fn unfinished(&self) -> BTreeMap<String, Vec<f64>> {
        let s = &self.sums;
        let mut kept = BTreeMap::from([
            (
                "interval".to_owned(),
                vec![
                    s.steps as f64,
                    s.clipped as f64,
                    s.loss,
                    s.weighted,
                    s.means,
                    s.items as f64,
                    s.tokens as f64,
                    s.used as f64,
                    s.positions as f64,
                    s.last_lr,
                    s.last_norm,
                    f64::from(u8::from(s.weights_change_it)),
                ],
            ),
            (
                "shapes".to_owned(),
                self.shapes.iter().flat_map(|&(r, l)| [r as f64, l as f64]).collect(),
            ),
        ]);
        if let Some(d) = &s.distrust {
            let values = vec![d.ess, d.ess_fraction, d.weight_max, d.values, d.n_values as f64];
            kept.insert("interval_distrust".to_owned(), values);
        }
        if let Some(p) = &s.preference {
            let values = vec![p.n as f64, p.loss, p.chosen, p.rejected, p.right];
            kept.insert("interval_preference".to_owned(), values);
        }
        kept
    }

    /// Puts [`unfinished`](Self::unfinished) back. Seconds start anew: they are not part of what must be equal.
    pub(crate) fn resume_from(&mut self, kept: &BTreeMap<String, Vec<f64>>) {
        let of = |name: &str| kept.get(name).map_or(&[][..], Vec::as_slice);
        if let &[
            steps,
            clipped,
            loss,
            weighted,
            means,
            items,
            tokens,
            used,
            positions,
            last_lr,
            last_norm,
            changes,
        ] = of("interval")
        {
            self.sums = Sums {
                steps: steps as usize,
                clipped: clipped as usize,
                loss,
                weighted,
                means,
                items: items as usize,
                tokens: tokens as usize,
                used: used as usize,
                positions: positions as usize,
                last_lr,
                last_norm,
                weights_change_it: changes != 0.0,
                ..Sums::default()
            };
        }
        if let &[ess, ess_fraction, weight_max, values, n_values] = of("interval_distrust") {
            let n_values = n_values as usize;
            self.sums.distrust = Some(DistrustSums {
                ess,
                ess_fraction,
                weight_max,
                values,
                n_values,
            });
        }
        if let &[n, loss, chosen, rejected, right] = of("interval_preference") {
            self.sums.preference = Some(Figures {
                n: n as usize,
                loss,
                chosen,
                rejected,
                right,
            });
        }
        self.shapes = of("shapes")
            .chunks_exact(2)
            .map(|s| (s[0] as usize, s[1] as usize))
            .collect();
    }
}

impl DistrustSums {
    fn add(&mut self, window: &Window, weights: &ExampleWeights) {
        let examples: Vec<usize> = window
            .micro_batches
            .iter()
            .flat_map(|batch| batch.row_ids.clone())
            .collect();
        let used: Vec<f64> = examples.iter().map(|&example| weights.of_example(example)).collect();
        let ess = effective_sample_size(&used);
        self.ess += ess;
        self.ess_fraction += ess / used.len().max(1) as f64;
        self.weight_max = used.iter().copied().fold(self.weight_max, f64::max);
        for value in examples.iter().filter_map(|&example| weights.value_of(example)) {
            self.values += value;
            self.n_values += 1;
        }
    }

    fn finish(self, windows: f64) -> DistrustReport {
        DistrustReport {
            ess: self.ess / windows,
            ess_fraction: self.ess_fraction / windows,
            weight_max: self.weight_max,
            value: self.values / self.n_values.max(1) as f64,
        }
    }
}

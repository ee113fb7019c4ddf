//! One update at the largest shape before the run, for its memory; nothing of it is kept.

use mlx_rs::Dtype;
use planish_core::units::format_bytes;
use planish_data::{Batch, Segment, Side, Window};
use planish_nn::Model;

use super::Trainer;
use crate::batches::Batches;
use crate::optimizer::Optimizer;
use crate::preflight::{MemoryEstimate, TRUST, suggestion, too_large};
use crate::recipes::{About, Objective, Recipe};
use crate::update::{Place, Updates};
use crate::weighting::ExampleWeights;
use crate::{Result, memory};

/// What a trial looked at and found.
pub(super) struct Trial<'a> {
    pub(super) setup: &'a Trainer<'a>,
    pub(super) plan: &'a Batches,
    pub(super) objective: &'a dyn Objective,
    pub(super) weights: &'a ExampleWeights,
}

impl Trial<'_> {
    /// Refuses a run that does not fit, by its estimate where that is beyond doubt, else by measurement. Gives the peak and
    /// a sentence.
    pub(super) fn run(
        &self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        updates: &mut Updates,
    ) -> Result<(Option<u64>, String)> {
        let options = &self.setup.options;
        let Some(budget) = self
            .setup
            .memory_budget
            .map_or_else(memory::budget, |bytes| Ok(Some(bytes)))?
        else {
            let note = "the system does not tell its memory: whether the run fits is not checked";
            return Ok((None, note.to_owned()));
        };
        let shape = self.plan.largest_shape();
        let (weight_bytes, config) = (weight_bytes(model), model.config().clone());
        let estimate = MemoryEstimate::of(&config, weight_bytes, options, shape.0, shape.1)?.total();
        let refuse = |needed: u64, is_measured: bool| {
            let correction = if is_measured {
                needed as f64 / estimate.max(1) as f64
            } else {
                1.0
            };
            let advice = suggestion(&config, weight_bytes, options, shape, budget, correction);
            advice.map_or_else(
                |error| error,
                |advice| too_large(needed, is_measured, budget, shape, advice),
            )
        };
        if estimate as f64 > TRUST * budget as f64 {
            return Err(refuse(estimate, false));
        }
        let measured = self.peak(model, optimizer, updates, shape)?;
        if measured > budget {
            return Err(refuse(measured, true));
        }
        let note = format!(
            "memory: an update of {}x{} takes {} (estimated {}) of {}",
            shape.0,
            shape.1,
            format_bytes(measured),
            format_bytes(estimate),
            format_bytes(budget)
        );
        Ok((Some(measured), note))
    }

    /// The peak of one whole update, which is not accepted.
    fn peak(
        &self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        updates: &mut Updates,
        (rows, length): (usize, usize),
    ) -> Result<u64> {
        let options = &self.setup.options;
        let batch = full_batch(rows, length, options.recipe != Recipe::Sft, options.packing);
        let window = Window {
            target_tokens: batch.target_tokens,
            examples: rows,
            micro_batches: vec![batch],
        };
        let about = About {
            options,
            weights: self.weights,
        };
        memory::read_and_reset_peak()?;
        let place = Place {
            step: 0,
            learning_rate: 0.0,
            counts: false,
        };
        let launched = updates.launch(model, optimizer, &window, self.objective, &about, place)?;
        updates.read(launched, &window, self.objective, &about)?;
        Ok(memory::read_and_reset_peak()?.peak_bytes)
    }
}

fn weight_bytes(model: &Model) -> u64 {
    let n: usize = model
        .config()
        .expected_tensors()
        .iter()
        .map(|t| t.shape.iter().product::<usize>())
        .sum();
    (n * if model.dtype() == Dtype::Float32 { 4 } else { 2 }) as u64
}

/// A batch without padding in which every position is trained.
fn full_batch(rows: usize, length: usize, is_pairs: bool, is_packed: bool) -> Batch {
    let size = rows * length;
    let segment = |row: usize| Segment {
        example: 0,
        row,
        start: 0,
        len: length,
        target_tokens: length,
        side: is_pairs.then_some(if row.is_multiple_of(2) {
            Side::Chosen
        } else {
            Side::Rejected
        }),
    };
    Batch {
        rows,
        length,
        inputs: vec![0; size],
        targets: vec![0; size],
        target_weights: vec![1.0; size],
        segment_ids: is_packed.then(|| vec![0; size]),
        row_ids: vec![0; rows],
        segments: (0..rows).map(segment).collect(),
        target_tokens: size,
        used_positions: size,
    }
}

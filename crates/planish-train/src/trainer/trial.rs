//! One update at the largest shape before the run, for its memory; nothing of it is kept.

use mlx_rs::Dtype;
use planish_core::model_config::ModelConfig;
use planish_core::units::format_bytes;
use planish_data::{Cursor, Side, Window};
use planish_nn::Model;

use super::Trainer;
use super::under_way::may_shrink;
use crate::batches::Batches;
use crate::objective::{About, Item};
use crate::optimizer::Optimizer;
use crate::preflight::{MemoryEstimate, TRUST, suggestion, too_large};
use crate::timed_steps::{full_batch, window_of};
use crate::update::{Place, Updates, WindowSource};
use crate::{Error, Result, memory};

/// What a run is tried with.
pub(super) struct Trial<'a> {
    setup: &'a Trainer<'a>,
    config: ModelConfig,
    weight_bytes: u64,
    /// Rows and length of the largest batch.
    shape: (usize, usize),
    estimate: u64,
    budget: u64,
}

impl<'a> Trial<'a> {
    /// Refuses a run whose estimate is beyond doubt too large, before anything is made for it. `None` where the system does
    /// not tell its memory.
    pub(super) fn of(setup: &'a Trainer<'a>, model: &Model, plan: &Batches) -> Result<Option<Self>> {
        let Some(budget) = setup
            .memory_budget
            .map_or_else(memory::budget, |bytes| Ok(Some(bytes)))?
        else {
            return Ok(None);
        };
        let (shape, weight_bytes, config) = (plan.largest_shape(), weight_bytes(model), model.config().clone());
        let estimate = MemoryEstimate::of(&config, weight_bytes, &setup.options, shape.0, shape.1)?.total();
        let trial = Self {
            setup,
            config,
            weight_bytes,
            shape,
            estimate,
            budget,
        };
        if estimate as f64 > TRUST * budget as f64 {
            return Err(trial.refusal(estimate, false));
        }
        Ok(Some(trial))
    }

    /// Refuses a run that does not fit by measurement, after smaller pieces where the device gives up. Gives the peak and a
    /// sentence.
    pub(super) fn run(
        &self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        updates: &mut Updates,
        about: &About<'_>,
    ) -> Result<(u64, String)> {
        let measured = loop {
            match self.peak(model, optimizer, updates, about) {
                Err(error) if may_shrink(&error, about.options) => {
                    if !(updates.shrink(self.shape.0) && updates.undo(model, optimizer)?) {
                        return Err(error);
                    }
                }
                other => break other?,
            }
        };
        if measured > self.budget {
            return Err(self.refusal(measured, true));
        }
        let note = format!(
            "memory: an update of {}x{} takes {} (estimated {}) of {}",
            self.shape.0,
            self.shape.1,
            format_bytes(measured),
            format_bytes(self.estimate),
            format_bytes(self.budget)
        );
        Ok((measured, note))
    }

    fn refusal(&self, needed: u64, is_measured: bool) -> Error {
        let (options, shape, budget) = (&self.setup.options, self.shape, self.budget);
        let correction = if is_measured {
            needed as f64 / self.estimate.max(1) as f64
        } else {
            1.0
        };
        let advice = suggestion(&self.config, self.weight_bytes, options, shape, budget, correction);
        advice.map_or_else(
            |error| error,
            |advice| too_large(needed, is_measured, budget, shape, advice),
        )
    }

    /// The peak of one whole update, which is not accepted.
    fn peak(
        &self,
        model: &mut Model,
        optimizer: &mut Optimizer,
        updates: &mut Updates,
        about: &About<'_>,
    ) -> Result<u64> {
        let place = Place {
            cursor: Cursor::default(),
            step: 0,
            learning_rate: 0.0,
            counts: false,
        };
        memory::read_and_reset_peak()?;
        let mut source = Largest {
            shape: self.shape,
            is_pairs: updates.objective().item() == Item::Pair,
            is_packed: self.setup.options.packing,
        };
        updates.make(model, optimizer, &mut source, about, place, None)?;
        Ok(memory::read_and_reset_peak()?.peak_bytes)
    }
}

/// Windows of one batch of the largest shape, without padding, in which every position is trained.
#[derive(Debug)]
struct Largest {
    shape: (usize, usize),
    is_pairs: bool,
    is_packed: bool,
}

impl WindowSource for Largest {
    fn window(&mut self, _: Cursor, _: &Model) -> Result<Window> {
        let mut batch = full_batch(self.shape.0, self.shape.1);
        batch.segment_ids = self.is_packed.then(|| vec![0; batch.inputs.len()]);
        batch.row_ids.fill(0);
        for segment in &mut batch.segments {
            segment.example = 0;
            let sides = [Side::Chosen, Side::Rejected];
            segment.side = self.is_pairs.then_some(sides[segment.row % 2]);
        }
        Ok(window_of(batch))
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

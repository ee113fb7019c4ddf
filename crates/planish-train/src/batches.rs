//! The batches of a run: planish's own plan, or mlx-lm's.

use planish_core::hash::sha256_hex;
use planish_data::{BatchPlan, Cursor, Dataset, MlxLmPlan, PlanOptions, PlanSummary, ShapeCount, Window};
use planish_nn::Model;

use crate::Result;
use crate::options::{Compat, TrainOptions};
use crate::update::WindowSource;
use crate::weighting::ExampleWeights;

/// Which rows make which update.
#[derive(Debug)]
pub(crate) enum Batches {
    /// Windows first, lengths on a ladder, nothing left out.
    Planish(BatchPlan),
    /// The batches of mlx-lm.
    MlxLm(MlxLmBatches),
}

impl Batches {
    pub(crate) fn for_training(data: &Dataset, options: &TrainOptions, weights: &ExampleWeights) -> Result<Self> {
        if let Compat::MlxLm { batch_order } = &options.compat {
            let accumulation = options.accumulation;
            return Ok(Self::MlxLm(MlxLmBatches::new(
                data,
                options,
                accumulation,
                batch_order.clone(),
            )?));
        }
        let plan = PlanOptions {
            accumulation: options.accumulation,
            shuffle: true,
            sampler_weights: weights.for_sampler(),
            ..plan_options(options)
        };
        Ok(Self::Planish(BatchPlan::new(data, &plan)?))
    }

    pub(crate) fn for_evaluation(data: &Dataset, options: &TrainOptions) -> Result<Self> {
        if options.compat != Compat::Native {
            let in_order = MlxLmPlan::new(data, options.batch_size, options.max_seq_length)?.len();
            let order = Some((0..in_order).collect());
            return Ok(Self::MlxLm(MlxLmBatches::new(data, options, 1, order)?));
        }
        let plan = PlanOptions {
            accumulation: 1,
            shuffle: false,
            ..plan_options(options)
        };
        Ok(Self::Planish(BatchPlan::new(data, &plan)?))
    }

    pub(crate) fn windows_in_epoch(&self, epoch: u64) -> Result<usize> {
        match self {
            Self::Planish(plan) => Ok(plan.windows_in_epoch(epoch)?),
            Self::MlxLm(plan) => Ok(plan.summary.windows),
        }
    }

    pub(crate) fn window(&self, data: &Dataset, epoch: u64, index: usize) -> Result<Window> {
        match self {
            Self::Planish(plan) => Ok(plan.window(data, epoch, index)?),
            Self::MlxLm(plan) => plan.window(data, index),
        }
    }

    pub(crate) fn advance(&self, cursor: Cursor) -> Result<Cursor> {
        match self {
            Self::Planish(plan) => Ok(plan.advance(cursor)?),
            Self::MlxLm(_) => Ok(Cursor {
                epoch: 0,
                window_index: cursor.window_index + 1,
            }),
        }
    }

    /// A saved place, or the beginning of the next epoch where this plan is too short to have it.
    pub(crate) fn place(&self, saved: Cursor) -> Result<Cursor> {
        match self {
            Self::Planish(plan) if saved.window_index >= plan.windows_in_epoch(saved.epoch)? => Ok(Cursor {
                epoch: saved.epoch + 1,
                window_index: 0,
            }),
            _ => Ok(saved),
        }
    }

    /// Passes over the data before a place, with the fraction of the current one.
    pub(crate) fn epoch_at(&self, cursor: Cursor) -> Result<f64> {
        let within = |windows: f64| cursor.epoch as f64 + cursor.window_index as f64 / windows;
        match self {
            Self::Planish(plan) => Ok(within(plan.windows_in_epoch(cursor.epoch)? as f64)),
            Self::MlxLm(plan) => Ok(within(plan.plan.len() as f64 / plan.accumulation as f64)),
        }
    }

    pub(crate) fn plan_hash(&self) -> &str {
        match self {
            Self::Planish(plan) => plan.plan_hash(),
            Self::MlxLm(plan) => &plan.hash,
        }
    }

    /// Rows and length of the largest batch that may come.
    pub(crate) fn largest_shape(&self) -> (usize, usize) {
        match self {
            Self::Planish(plan) => plan.largest_shape(),
            Self::MlxLm(plan) => {
                let shapes = plan.summary.shapes.iter();
                shapes
                    .map(|shape| (shape.rows, shape.length))
                    .max_by_key(|(_, length)| *length)
                    .unwrap_or((0, 0))
            }
        }
    }

    pub(crate) fn summary(&self) -> &PlanSummary {
        match self {
            Self::Planish(plan) => plan.summary(),
            Self::MlxLm(plan) => &plan.summary,
        }
    }
}

/// The windows of a plan over its data set.
#[derive(Debug)]
pub(crate) struct Planned<'a> {
    pub(crate) plan: &'a Batches,
    pub(crate) data: &'a Dataset,
}

impl WindowSource for Planned<'_> {
    fn window(&mut self, at: Cursor, _: &Model) -> Result<Window> {
        self.plan.window(self.data, at.epoch, at.window_index)
    }
}

/// mlx-lm's batches as one endless row of micro-batches: updates run across the ends of epochs, as they do there.
#[derive(Debug)]
pub(crate) struct MlxLmBatches {
    plan: MlxLmPlan,
    accumulation: usize,
    seed: u64,
    /// Indices of batches for the whole run, taken around in a circle; `None`: drawn anew for each epoch.
    order: Option<Vec<usize>>,
    hash: String,
    summary: PlanSummary,
}

impl MlxLmBatches {
    fn new(data: &Dataset, options: &TrainOptions, accumulation: usize, order: Option<Vec<usize>>) -> Result<Self> {
        let plan = MlxLmPlan::new(data, options.batch_size, options.max_seq_length)?;
        let decides = format!(
            "mlx-lm {} {:?} {accumulation} {order:?}",
            data.fingerprint(),
            (options.batch_size, options.max_seq_length, options.seed)
        );
        let summary = summary(&plan, data, accumulation)?;
        Ok(Self {
            plan,
            accumulation,
            seed: options.seed,
            order: order.filter(|order| !order.is_empty()),
            hash: sha256_hex(decides.as_bytes()),
            summary,
        })
    }

    fn window(&self, data: &Dataset, index: usize) -> Result<Window> {
        let first = index * self.accumulation;
        let micro_batches = (first..first + self.accumulation)
            .map(|micro| Ok(self.plan.batch(data, self.batch_at(micro))?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Window {
            target_tokens: micro_batches.iter().map(|batch| batch.target_tokens).sum(),
            examples: micro_batches.iter().map(|batch| batch.row_ids.len()).sum(),
            micro_batches,
        })
    }

    fn batch_at(&self, micro: usize) -> usize {
        match &self.order {
            Some(order) => order[micro % order.len()],
            None => self.plan.order(self.seed, (micro / self.plan.len()) as u64)[micro % self.plan.len()],
        }
    }
}

fn plan_options(options: &TrainOptions) -> PlanOptions {
    PlanOptions {
        batch_size: options.batch_size,
        max_seq_length: options.max_seq_length,
        seed: options.seed,
        packing: options.packing,
        rungs: options.rungs,
        ..PlanOptions::default()
    }
}

fn summary(plan: &MlxLmPlan, data: &Dataset, accumulation: usize) -> Result<PlanSummary> {
    let mut shapes: Vec<ShapeCount> = Vec::new();
    let (mut examples, mut target_tokens, mut used, mut positions) = (0, 0, 0, 0);
    for index in 0..plan.len() {
        let batch = plan.batch(data, index)?;
        examples += batch.row_ids.len();
        target_tokens += batch.target_tokens;
        used += batch.used_positions;
        positions += batch.rows * batch.length;
        match shapes.iter_mut().find(|shape| shape.length == batch.length) {
            Some(shape) => shape.batches += 1,
            None => shapes.push(ShapeCount {
                rows: batch.rows,
                length: batch.length,
                batches: 1,
            }),
        }
    }
    shapes.sort_by_key(|shape| shape.length);
    Ok(PlanSummary {
        shapes,
        windows: (plan.len() / accumulation).max(1),
        micro_batches: plan.len(),
        examples,
        target_tokens,
        padding_fraction: 1.0 - used as f64 / positions.max(1) as f64,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use planish_data::{ChatTemplate, DataOptions, TemplateOptions, Tokenizer};

    use super::*;

    /// The batches of five rows, two a batch: three windows an epoch.
    fn batches(compat: Compat) -> Batches {
        let dir = Path::new(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../planish-nn/tests/fixtures/tiny-llama-1m"
        ));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("train.jsonl");
        let row = |i| {
            format!(
                r#"{{"messages": [{{"role": "user", "content": "What is {i}?"}}, {{"role": "assistant", "content": "It is {i}."}}]}}"#
            )
        };
        std::fs::write(&file, (0..5).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let template = ChatTemplate::from_dir(dir, &tokenizer, &TemplateOptions::default()).unwrap();
        let (data, _) = Dataset::load(&file, &tokenizer, template.as_ref(), &DataOptions::default()).unwrap();
        let options = TrainOptions {
            batch_size: 2,
            compat,
            ..TrainOptions::default()
        };
        Batches::for_training(&data, &options, &ExampleWeights::equal()).unwrap()
    }

    fn at(epoch: u64, window_index: usize) -> Cursor {
        Cursor { epoch, window_index }
    }

    #[test]
    fn place_that_the_plan_has_is_kept_and_one_behind_its_end_begins_the_next_epoch() {
        let batches = batches(Compat::Native);
        assert_eq!(batches.windows_in_epoch(4).unwrap(), 3);
        for (saved, expect) in [
            (at(4, 0), at(4, 0)),
            (at(4, 2), at(4, 2)),
            (at(4, 3), at(5, 0)),
            (at(4, 70), at(5, 0)),
        ] {
            assert_eq!(batches.place(saved).unwrap(), expect, "{saved:?}");
        }
    }

    /// mlx-lm's batches go on for ever: an index behind the first pass is no epoch's end.
    #[test]
    fn place_in_the_batches_of_mlx_lm_is_kept() {
        let batches = batches(Compat::MlxLm { batch_order: None });
        assert_eq!(batches.place(at(0, 70)).unwrap(), at(0, 70));
    }
}

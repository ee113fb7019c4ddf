//! Updates as functions that MLX traces once a shape: whatever differs from batch to batch is an argument.

use std::collections::BTreeMap;

use mlx_rs::{Array, Dtype};
use planish_mlx::device::{self, DeviceKind};
use planish_mlx::transforms::{Compiled, value_and_grad};
use planish_nn::{Model, Training};

use crate::optimizer::{Gradients, Optimizer};
use crate::options::{Compat, Compile, TrainOptions, Tuning};
use crate::recipes::sft::Sft;
use crate::recipes::{Objective, Outcome};
use crate::update::Place;
use crate::{Error, Result, clip};

/// Trained positions are filled up to the next of so many parts of the batch.
const PARTS: usize = 4;

/// A batch as arguments of a traced function.
pub(crate) struct Arguments {
    /// What the trace depends on.
    pub(crate) signature: Signature,
    /// What it does not depend on.
    pub(crate) arrays: Vec<Array>,
    /// Where among the reported items those stand that count, in order.
    pub(crate) counted: Vec<usize>,
    /// The forward pass over them.
    pub(crate) forward: Forward,
}

/// A forward pass over the arrays of [`Arguments`].
pub(crate) type Forward = fn(&Model, Signature, &[Array], Training<'_>, &TrainOptions) -> Result<Outcome>;

/// What decides the shapes of a batch's arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Signature {
    pub(crate) rows: usize,
    pub(crate) length: usize,
    /// Whether there are segments.
    pub(crate) is_packed: bool,
    /// Places for trained positions.
    pub(crate) slots: usize,
}

impl Signature {
    pub(crate) fn new((rows, length): (usize, usize), is_packed: bool, trained: usize) -> Self {
        let part = (rows * length).div_ceil(PARTS).max(1);
        Self {
            rows,
            length,
            is_packed,
            slots: (trained.div_ceil(part).max(1) * part).min(rows * length),
        }
    }

    /// Whether every position has its place.
    pub(crate) fn is_whole(self) -> bool {
        self.slots == self.rows * self.length
    }

    /// Most signatures that batches of so many shapes have.
    pub(crate) fn most(n_shapes: usize) -> usize {
        n_shapes * PARTS
    }
}

/// Whether updates are traced.
///
/// # Errors
/// [`Error::Config`] when they shall be and cannot.
pub(crate) fn is_wanted(model: &Model, objective: &dyn Objective, options: &TrainOptions) -> Result<bool> {
    let obstacle = if !objective.can_be_traced() {
        Some("dpo and orpo are not compiled")
    } else if options.compat != Compat::Native {
        Some("train.compat = \"mlx-lm\" is not compiled")
    } else if model.kernels().is_native() {
        Some("kernels of our own for the CPU are not compiled: set model.kernels = \"composed\"")
    } else {
        None
    };
    match (options.compile, obstacle) {
        (Compile::Off, _) | (Compile::Auto, Some(_)) => Ok(false),
        (Compile::Auto, None) => Ok(device::default_kind()? == DeviceKind::Gpu),
        (Compile::On, None) => Ok(true),
        (Compile::On, Some(reason)) => Err(Error::Config {
            key: "train.compile",
            reason: reason.to_owned(),
        }),
    }
}

/// Whether supervised updates of `model` with these options are traced and compiled on the default device.
///
/// # Errors
/// [`Error::Config`] when they shall be and cannot.
pub fn compiles_updates(model: &Model, options: &TrainOptions) -> Result<bool> {
    is_wanted(model, &Sft, options)
}

/// The traced functions of a run.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    /// The model that the traces are made of, where its weights do not train.
    joined: Option<Model>,
    gradients: BTreeMap<Signature, Compiled<Error>>,
    apply: Option<Compiled<Error>>,
}

/// What forward and backward pass over a micro-batch give, not computed yet.
pub(crate) struct MicroBatch {
    pub(crate) gradients: Gradients,
    pub(crate) outcome: Outcome,
}

/// What an update gives besides the optimizer's new state, not computed yet.
pub(crate) struct Update {
    pub(crate) norm: Array,
    pub(crate) accept: Array,
}

impl Traces {
    /// Objective, items and gradients of a micro-batch.
    pub(crate) fn gradients(
        &mut self,
        model: &mut Model,
        optimizer: &Optimizer,
        batch: &Arguments,
        dropout_key: &Array,
        options: &TrainOptions,
    ) -> Result<MicroBatch> {
        let function = match self.gradients.entry(batch.signature) {
            std::collections::btree_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => {
                // What is not computed when a trace is made, every call of it would compute again.
                model.materialize()?;
                let model = match options.tuning {
                    // Nothing may hold the weights that the run began with.
                    Tuning::Full => &*model,
                    Tuning::Adapters(_) if self.joined.is_none() => self.joined.insert(model.joined()?),
                    Tuning::Adapters(_) => self.joined.as_ref().unwrap_or(model),
                };
                place.insert(gradients_of(model, optimizer, batch, options)?)
            }
        };
        let mut arguments = optimizer.masters();
        arguments.push(dropout_key.clone());
        arguments.extend_from_slice(&batch.arrays);
        let mut outputs = function.call(&arguments)?.into_iter();
        let (Some(objective), Some(items)) = (outputs.next(), outputs.next()) else {
            return Err(incomplete());
        };
        Ok(MicroBatch {
            gradients: Gradients::from_arrays(outputs.as_slice()),
            outcome: Outcome { objective, items },
        })
    }

    /// Clips and updates; a gradient or objective that is not finite changes nothing.
    pub(crate) fn apply(
        &mut self,
        optimizer: &mut Optimizer,
        gradients: &Gradients,
        objective: &Array,
        place: Place,
        clip_norm: Option<f64>,
    ) -> Result<Update> {
        let function = match &mut self.apply {
            Some(function) => function,
            None => self.apply.insert(application_of(optimizer, clip_norm)?),
        };
        let mut arguments: Vec<Array> = optimizer.pending().into_iter().cloned().collect();
        arguments.extend_from_slice(gradients.arrays());
        arguments.extend([objective.clone(), Array::from_bool(place.counts)]);
        arguments.extend(optimizer.learning_rates(place.learning_rate));
        let mut outputs = function.call(&arguments)?;
        let (Some(accept), Some(norm)) = (outputs.pop(), outputs.pop()) else {
            return Err(incomplete());
        };
        optimizer.set_pending(&outputs)?;
        Ok(Update { norm, accept })
    }
}

/// Masters, dropout key and batch → objective, items and gradients in the optimizer's layout.
fn gradients_of(
    model: &Model,
    optimizer: &Optimizer,
    batch: &Arguments,
    options: &TrainOptions,
) -> Result<Compiled<Error>> {
    let (mut model, optimizer, options) = (model.clone(), emptied(optimizer)?, options.clone());
    let (signature, forward) = (batch.signature, batch.forward);
    let trainables = model.trainables();
    let narrow = narrow_dtype(&model, &trainables);
    let all: Vec<usize> = (0..trainables.len()).collect();
    drop(trainables);
    let function = move |arguments: &[Array]| {
        let n_masters = optimizer.masters().len();
        let Some((masters, [dropout_key, arrays @ ..])) = arguments.split_at_checked(n_masters) else {
            return Err(incomplete());
        };
        let training = Training {
            dropout_key: Some(dropout_key),
            activation_checkpointing: options.activation_checkpointing,
        };
        let objective = |values: &[Array]| {
            model.set_trainables(values)?;
            let outcome = forward(&model, signature, arrays, training, &options)?;
            Ok::<_, Error>(vec![outcome.objective, outcome.items])
        };
        let values = optimizer.trainables_of(masters, narrow)?;
        let (mut outputs, gradients) = value_and_grad(objective, &values, &all)?;
        outputs.extend_from_slice(optimizer.gather(&gradients)?.arrays());
        // Neither the arrays of the trace nor those that the run began with are needed again.
        model.set_trainables(&vec![Array::from_int(0); all.len()])?;
        Ok(outputs)
    };
    Ok(Compiled::new(function)?)
}

/// An optimizer with the same layout that holds no memory.
fn emptied(optimizer: &Optimizer) -> Result<Optimizer> {
    let mut empty = optimizer.clone();
    empty.set_pending(&vec![Array::from_int(0); optimizer.pending().len()])?;
    Ok(empty)
}

/// The dtype that all trainables are used in, where each would be narrowed to it by itself.
fn narrow_dtype(model: &Model, trainables: &[(String, Array)]) -> Option<Dtype> {
    let is_product = |name: &str| name.ends_with(".lora_a") || name.ends_with(".lora_b");
    let only_products = trainables.iter().all(|(name, _)| is_product(name));
    Some(model.dtype()).filter(|dtype| only_products && *dtype != Dtype::Float32)
}

/// Optimizer's state, gradients, objective, whether it may count, and learning rates → new state, norm and whether the update counts.
fn application_of(optimizer: &Optimizer, clip_norm: Option<f64>) -> Result<Compiled<Error>> {
    let mut optimizer = emptied(optimizer)?;
    let n_state = optimizer.pending().len();
    let function = move |arguments: &[Array]| {
        let n_units = optimizer.masters().len();
        let Some((state, rest)) = arguments.split_at_checked(n_state) else {
            return Err(incomplete());
        };
        let Some((gradients, [objective, counts, learning_rates @ ..])) = rest.split_at_checked(n_units) else {
            return Err(incomplete());
        };
        optimizer.set_pending(state)?;
        let mut gradients = Gradients::from_arrays(gradients);
        let norm = gradients.norm()?;
        let accept = norm
            .is_finite()?
            .logical_and(objective.is_finite()?)?
            .logical_and(counts)?;
        if let Some(most) = clip_norm {
            gradients = gradients.scale(&clip::clip_factor(&norm, most)?)?;
        }
        optimizer.step_at(&gradients, learning_rates, &accept)?;
        let mut outputs: Vec<Array> = optimizer.pending().into_iter().cloned().collect();
        outputs.extend([norm, accept]);
        optimizer = emptied(&optimizer)?;
        Ok(outputs)
    };
    Ok(Compiled::new(function)?)
}

fn incomplete() -> Error {
    Error::MlxLayer(planish_mlx::Error::Operation(
        "a traced function has not all of its arguments or results".to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn prop_a_shape_has_four_signatures_at_most_and_all_tokens_find_a_place() {
        for (rows, length) in [(1, 1), (1, 2), (1, 7), (3, 5), (4, 1024), (8, 333)] {
            let of = |trained| Signature::new((rows, length), false, trained);
            let all: BTreeSet<Signature> = (0..=rows * length).map(of).collect();
            assert!(all.len() <= Signature::most(1), "{all:?}");
            assert!((1..=rows * length).all(|trained| of(trained).slots >= trained));
            assert!(of(rows * length).is_whole());
        }
    }
}

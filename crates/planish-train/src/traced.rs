//! Updates as functions that MLX traces once a shape: whatever differs from batch to batch is an argument.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::rc::Rc;

use mlx_rs::{Array, Dtype};
use planish_mlx::device::{self, DeviceKind};
use planish_mlx::transforms::Compiled;
use planish_nn::Model;

use crate::objective::{Collated, Objective, Outcome, Pass, Signature};
use crate::optimizer::{Gradients, Optimizer};
use crate::options::{Compat, Compile, TrainOptions, Tuning};
use crate::update::{Place, Step, Summed, differentiate, step, training};
use crate::{Error, Result};

/// Whether updates are traced.
///
/// # Errors
/// [`Error::Config`] when compilation is requested but not possible.
pub(crate) fn is_wanted(model: &Model, options: &TrainOptions) -> Result<bool> {
    let obstacle = if options.compat != Compat::Native {
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

/// Whether updates of `model` with these options are traced and compiled on the default device.
///
/// # Errors
/// [`Error::Config`] when compilation is requested but not possible.
pub fn compiles_updates(model: &Model, options: &TrainOptions) -> Result<bool> {
    is_wanted(model, options)
}

/// The traced functions of a run.
#[derive(Debug, Default)]
pub(crate) struct Traces {
    /// The model that the traces are made of, where its weights do not train.
    joined: Option<Model>,
    gradients: BTreeMap<Signature, Compiled<Error>>,
    step: Option<Compiled<Error>>,
}

impl Traces {
    /// Gradients in the optimizer's layout and outcome of a micro-batch, not computed yet.
    pub(crate) fn gradients(
        &mut self,
        objective: &Rc<dyn Objective>,
        model: &mut Model,
        optimizer: &Optimizer,
        batch: &Collated,
        dropout_key: &Array,
        options: &TrainOptions,
    ) -> Result<(Gradients, Outcome)> {
        let signature = batch.tokens.signature();
        let function = match self.gradients.entry(signature) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(place) => {
                // What is not computed when a trace is made, every call of it would compute again.
                model.materialize()?;
                let model = match options.tuning {
                    // Nothing may hold the weights that the run began with.
                    Tuning::Full => &*model,
                    Tuning::Adapters(_) if self.joined.is_none() => self.joined.insert(model.joined()?),
                    Tuning::Adapters(_) => self.joined.as_ref().unwrap_or(model),
                };
                place.insert(gradients_of(objective.clone(), model, optimizer, signature, options)?)
            }
        };
        let mut arguments = optimizer.masters();
        arguments.push(dropout_key.clone());
        arguments.extend(batch.arrays());
        let mut figures = function.call(&arguments)?;
        let n_figures = 2 + objective.figures().len();
        if figures.len() < n_figures {
            return Err(incomplete());
        }
        let gradients = Gradients::from_arrays(&figures.split_off(n_figures));
        let objective = figures.remove(0);
        Ok((gradients, Outcome { objective, figures }))
    }

    /// Clips and steps; a gradient or an objective that is not finite changes nothing.
    pub(crate) fn step(
        &mut self,
        optimizer: &mut Optimizer,
        summed: &Summed,
        place: Place,
        clip_norm: Option<f64>,
    ) -> Result<Step> {
        let function = match &mut self.step {
            Some(function) => function,
            None => self.step.insert(step_of(optimizer, clip_norm)?),
        };
        let mut arguments: Vec<Array> = optimizer.pending().into_iter().cloned().collect();
        arguments.extend_from_slice(summed.gradients.arrays());
        arguments.extend([summed.objective.clone(), Array::from_bool(place.counts)]);
        arguments.extend(optimizer.learning_rates(place.learning_rate));
        let mut outputs = function.call(&arguments)?;
        let (Some(accept), Some(norm)) = (outputs.pop(), outputs.pop()) else {
            return Err(incomplete());
        };
        optimizer.set_pending(&outputs)?;
        Ok(Step { norm, accept })
    }
}

/// Masters, dropout key and batch → objective, figures and gradients in the optimizer's layout.
fn gradients_of(
    objective: Rc<dyn Objective>,
    model: &Model,
    optimizer: &Optimizer,
    signature: Signature,
    options: &TrainOptions,
) -> Result<Compiled<Error>> {
    let (mut model, optimizer, options) = (model.clone(), emptied(optimizer)?, options.clone());
    let trainables = model.trainables();
    let (n_trainables, narrow) = (trainables.len(), narrow_dtype(&model, &trainables));
    drop(trainables);
    let function = move |arguments: &[Array]| {
        let n_masters = optimizer.masters().len();
        let Some((masters, [dropout_key, arrays @ ..])) = arguments.split_at_checked(n_masters) else {
            return Err(incomplete());
        };
        let batch = Collated::of_arrays(signature, arrays).ok_or_else(incomplete)?;
        let pass = Pass {
            training: Some(training(dropout_key, &options)),
            options: &options,
        };
        let values = optimizer.trainables_of(masters, narrow)?;
        let (gradients, outcome) = differentiate(&*objective, &mut model, &values, &batch, pass)?;
        let mut outputs = vec![outcome.objective];
        outputs.extend(outcome.figures);
        outputs.extend_from_slice(optimizer.gather(&gradients)?.arrays());
        // Neither the arrays of the trace nor those that the run began with are needed again.
        model.set_trainables(&vec![Array::from_int(0); n_trainables])?;
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

/// Optimizer's state, gradients, objective, whether it may count, and learning rates → new state, norm and whether the
/// update counts.
fn step_of(optimizer: &Optimizer, clip_norm: Option<f64>) -> Result<Compiled<Error>> {
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
        let summed = Summed {
            gradients: Gradients::from_arrays(gradients),
            objective: objective.clone(),
        };
        let Step { norm, accept } = step(&mut optimizer, &summed, counts, learning_rates, clip_norm)?;
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

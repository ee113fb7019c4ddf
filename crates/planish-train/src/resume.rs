//! From a run to a checkpoint and back, so that the rest is what it would have been without the stop.

use std::collections::BTreeMap;

use mlx_rs::{Array, Dtype};
use planish_checkpoint::ExactF64;
use planish_checkpoint::run_state::{
    Best as SavedBest, Counters, DataCursor, Distrust, Environment, Position as SavedPosition, RngState, RunInputs,
    RunState, Schedule as SavedSchedule,
};
use planish_core::hash::sha256_hex;
use planish_data::Dataset;
use planish_mlx::device::{self, DeviceFact};
use planish_mlx::host;
use planish_nn::Model;
use planish_tensors::{Dtype as FileDtype, HostTensor};

use crate::batches::Batches;
use crate::options::TrainOptions;
use crate::schedule::Schedule;
use crate::weighting::ExampleWeights;
use crate::{Error, Result};

/// How a run treats what lies in its output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Resume {
    /// Start in an empty folder.
    #[default]
    Fresh,
    /// Go on from the newest whole checkpoint, exactly; from step 0 when there is none.
    Exact,
    /// Take only the trained tensors of the newest whole checkpoint: new optimizer, step 0.
    WeightsOnly,
}

/// What a recipe cannot see of its inputs, to be compared when a run goes on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    /// Stands for the base weights.
    pub base_sha256: String,
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: String,
    /// SHA-256 of the chat template.
    pub template_sha256: String,
}

/// The inputs that must be the same when a run goes on.
pub(crate) fn inputs(options: &TrainOptions, identity: &Identity, data: &Dataset, plan: &Batches) -> RunInputs {
    RunInputs {
        config_sha256: sha256_hex(deciding(options).as_bytes()),
        base_sha256: identity.base_sha256.clone(),
        data_hash: data.data_hash().to_owned(),
        tokenizer_hash: identity.tokenizer_sha256.clone(),
        template_hash: identity.template_sha256.clone(),
        plan_hash: plan.plan_hash().to_owned(),
    }
}

/// Where it is computed.
pub(crate) fn environment(model: &Model) -> Result<Environment> {
    let kind = device::default_kind()?;
    let facts = device::facts(kind)?;
    let name = facts.get("device_name").map(|fact| match fact {
        DeviceFact::Text(text) => text.clone(),
        DeviceFact::Number(number) => number.to_string(),
    });
    Ok(Environment {
        planish_version: env!("CARGO_PKG_VERSION").to_owned(),
        mlx_version: planish_mlx::version()?,
        backend: kind.name().to_owned(),
        device: name.unwrap_or_default(),
        kernels: model.kernels().describe().to_owned(),
    })
}

/// Everything of a run that is not a tensor.
pub(crate) struct Snapshot<'a> {
    pub(crate) options: &'a TrainOptions,
    pub(crate) inputs: &'a RunInputs,
    pub(crate) environment: &'a Environment,
    pub(crate) position: SavedPosition,
    pub(crate) window_index: usize,
    pub(crate) schedule: &'a Schedule,
    pub(crate) best: Option<SavedBest>,
    pub(crate) counters: Counters,
    pub(crate) weights: &'a ExampleWeights,
    pub(crate) accumulators: BTreeMap<String, Vec<f64>>,
    pub(crate) metrics_offset: u64,
}

impl Snapshot<'_> {
    pub(crate) fn to_state(&self) -> RunState {
        let inputs = self.inputs;
        let numbers = [
            ("learning_rate", self.schedule.learning_rate),
            ("min_learning_rate", self.schedule.min_learning_rate),
            ("warmup_start", self.schedule.warmup_start),
            ("warmup_steps", self.schedule.warmup_steps as f64),
            ("total_steps", self.schedule.total_steps as f64),
        ];
        RunState {
            schema: RunState::SCHEMA,
            environment: self.environment.clone(),
            position: self.position,
            data: DataCursor {
                epoch: self.position.epoch,
                window_index: self.window_index as u64,
                plan_hash: inputs.plan_hash.clone(),
                data_hash: inputs.data_hash.clone(),
                tokenizer_hash: inputs.tokenizer_hash.clone(),
                template_hash: inputs.template_hash.clone(),
                order_seed: self.options.seed,
            },
            rng: RngState {
                seed: self.options.seed,
                ..RngState::default()
            },
            schedule: SavedSchedule {
                name: format!("{:?}", self.schedule.shape).to_lowercase(),
                parameters: numbers
                    .into_iter()
                    .map(|(name, x)| (name.to_owned(), ExactF64(x)))
                    .collect(),
                position: self.position.step,
            },
            best: self.best.clone(),
            counters: self.counters.clone(),
            distrust: self.distrust(),
            accumulators: exact(&self.accumulators),
            metrics_offset: self.metrics_offset,
            config_sha256: inputs.config_sha256.clone(),
            base_sha256: inputs.base_sha256.clone(),
        }
    }

    fn distrust(&self) -> Option<Distrust> {
        let normalisers = self.weights.normalisers()?;
        let distrust = &self.options.distrust;
        Some(Distrust {
            mode: format!("{:?}", distrust.mode).to_lowercase(),
            link: distrust.weighting.link.name().to_owned(),
            mu0: ExactF64(normalisers.mu0),
            mu1: ExactF64(normalisers.mu1),
            floor: ExactF64(distrust.weighting.floor),
            cap: ExactF64(distrust.weighting.cap),
        })
    }
}

/// Saved numbers as plain ones.
pub(crate) fn plain(saved: &BTreeMap<String, Vec<ExactF64>>) -> BTreeMap<String, Vec<f64>> {
    saved
        .iter()
        .map(|(name, values)| (name.clone(), values.iter().map(|x| x.0).collect()))
        .collect()
}

/// Saved tensors in the order of the trainables, which they must match exactly.
pub(crate) fn trainables(saved: &BTreeMap<String, HostTensor>, now: &[(String, Array)]) -> Result<Vec<Array>> {
    let refuse = |reason| Error::CheckpointTensors { reason };
    if let Some(name) = saved.keys().find(|name| now.iter().all(|(known, _)| known != *name)) {
        return Err(refuse(format!("{name} is not trained now")));
    }
    now.iter()
        .map(|(name, value)| {
            let tensor = saved.get(name).ok_or_else(|| refuse(format!("{name} is missing")))?;
            let array = to_array(name, tensor)?;
            if array.shape() != value.shape() || array.dtype() != value.dtype() {
                return Err(refuse(format!(
                    "{name} has shape {:?} and type {:?}, expected {:?} and {:?}",
                    array.shape(),
                    array.dtype(),
                    value.shape(),
                    value.dtype()
                )));
            }
            Ok(array)
        })
        .collect()
}

/// Saved optimizer state as arrays.
pub(crate) fn arrays(saved: &BTreeMap<String, HostTensor>) -> Result<BTreeMap<String, Array>> {
    saved
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), to_array(name, tensor)?)))
        .collect()
}

fn to_array(name: &str, tensor: &HostTensor) -> Result<Array> {
    let dtype = match tensor.dtype {
        FileDtype::F32 => Dtype::Float32,
        FileDtype::F16 => Dtype::Float16,
        FileDtype::BF16 => Dtype::Bfloat16,
        other => {
            let reason = format!("{name} is of type {other}, which is never trained");
            return Err(Error::CheckpointTensors { reason });
        }
    };
    Ok(host::array_from_bytes(&tensor.bytes, &tensor.shape, dtype)?)
}

fn exact(values: &BTreeMap<String, Vec<f64>>) -> BTreeMap<String, Vec<ExactF64>> {
    values
        .iter()
        .map(|(name, values)| (name.clone(), values.iter().map(|&x| ExactF64(x)).collect()))
        .collect()
}

/// The settings that decide the numbers; how often they are saved and shown does not.
fn deciding(options: &TrainOptions) -> String {
    let shown = TrainOptions {
        checkpoint_every: None,
        keep_last: 0,
        tensorboard: false,
        activation_checkpointing: false,
        preflight: false,
        ..options.clone()
    };
    format!("{shown:?}")
}

//! From a run to a checkpoint and back, so that the rest is what it would have been without the stop.

use std::collections::BTreeMap;
use std::path::Path;

use mlx_rs::{Array, Dtype};
use planish_checkpoint::run_state::{Environment, RunInputs, RunState};
use planish_core::hash::sha256_hex;
use planish_data::Dataset;
use planish_mlx::device::{self, DeviceFact};
use planish_mlx::host;
use planish_nn::Model;
use planish_tensors::{Dtype as FileDtype, HostTensor};

use crate::batches::Batches;
use crate::options::TrainOptions;
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
    /// Seconds since 1970 that the template took for the time, kept for when the run goes on ([`template_time`]).
    pub template_time: Option<i64>,
}

/// What chat templates took for the time in the run that can go on in a folder, by its newest checkpoint.
pub fn template_time(out: &Path) -> Option<i64> {
    RunState::newest(out)?.template_time
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

/// The settings that decide the numbers; how often they are saved and shown does not.
fn deciding(options: &TrainOptions) -> String {
    let shown = TrainOptions {
        checkpoint_every: None,
        checkpoint_interval: None,
        keep_last: 0,
        tensorboard: false,
        activation_checkpointing: false,
        preflight: false,
        ..options.clone()
    };
    format!("{shown:?}")
}

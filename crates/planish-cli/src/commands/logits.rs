use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use planish_mlx::host;
use planish_nn::AttentionMask;
use planish_tensors::{self as tensors, HostTensor};

use crate::model::ModelArgs;
use crate::model_path::require_model;

/// Write a model's logits for given tokens, to compare with other implementations
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// Safetensors file to write: f32 `logits` [1, T, V]
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model.model)?;
    let model = args.model.load()?;
    let ids = model.token_array(&[&args.tokens])?;
    let hidden = model.hidden(&ids, &AttentionMask::Causal, None)?;
    let logits = host::to_f32_vec(&model.logits(&hidden)?)?;
    let shape = [1, args.tokens.len(), model.config().arch.vocab_size];
    let file = BTreeMap::from([("logits".to_string(), HostTensor::from_f32(&shape, &logits))]);
    tensors::write(&args.out, &file, &BTreeMap::new()).with_context(|| format!("cannot write {}", args.out.display()))
}

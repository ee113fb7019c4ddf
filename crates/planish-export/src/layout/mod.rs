//! Which packages an export consists of, and the names that hosts know them by.

mod anemll;
mod monolith;

pub(crate) use anemll::{companion_files, plan as plan_anemll};
pub(crate) use monolith::plan as plan_monolith;

use coreml_mil::{DType, FunctionBuilder, Result, State, Tensor, TensorType};

/// The name under which hosts look for the cache.
pub(crate) const STATE: &str = "model_model_kv_cache_0";

/// Inputs that every decoder function has.
struct Inputs {
    positions: Tensor,
    mask: Tensor,
}

fn common_inputs(b: &mut FunctionBuilder, tokens: usize, columns: usize) -> Result<Inputs> {
    let positions = b.input("position_ids", TensorType::new(DType::I32, &[tokens]))?;
    let mask = b.input("causal_mask", TensorType::new(DType::F16, &[1, 1, tokens, columns]))?;
    Ok(Inputs { positions, mask })
}

fn state_inputs(b: &mut FunctionBuilder, cache: TensorType) -> Result<(Tensor, State)> {
    let position = b.input("current_pos", TensorType::new(DType::I32, &[1]))?;
    Ok((position, b.state(STATE, cache)?))
}

fn logit_names(parts: usize) -> Vec<String> {
    (1..=parts).map(|part| format!("logits{part}")).collect()
}

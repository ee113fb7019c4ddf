//! Pure values that every planish crate stands on: no MLX, no network, nothing printed.
//!
//! - [`arch`]: what a model computes, layer by layer, with the name and shape of every weight · [`families`]: who reads which model into it
//! - [`model_config`]: the whole of a Hugging Face `config.json`
//! - [`run_config`]: what a training run does, from file, `--set` and flags · [`target_modules`]: which layers it adapts
//! - [`fs`]: files that appear whole or not at all · [`hash`]: SHA-256 · [`units`]: numbers for people
//! - [`suggest`]: "did you mean …?"

pub mod arch;
mod error;
pub mod families;
pub mod fs;
#[doc(hidden)]
pub mod fuzzing;
pub mod hash;
pub mod memory;
pub mod model_config;
pub mod run_config;
pub mod suggest;
pub mod target_modules;
pub mod units;

pub use error::{Error, Result};

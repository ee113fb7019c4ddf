//! Pure values that every planish crate stands on: no MLX, no network, nothing printed.
//!
//! - [`model_config`]: what a model is, read from a Hugging Face `config.json`, with the name and shape of every weight
//! - [`run_config`]: what a training run does, from file, `--set` and flags · [`target_modules`]: which layers it adapts
//! - [`fs`]: files that appear whole or not at all · [`hash`]: SHA-256 · [`units`]: numbers for people
//! - [`suggest`]: "did you mean …?"

mod error;
pub mod fs;
#[doc(hidden)]
pub mod fuzzing;
pub mod hash;
pub mod model_config;
pub mod run_config;
pub mod suggest;
pub mod target_modules;
pub mod units;

pub use error::{Error, Result};

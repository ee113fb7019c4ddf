//! Pure values that every planish crate stands on: no MLX, no network, nothing printed.
//!
//! - [`model_config`]: what a model is, read from a Hugging Face `config.json`, with the name and shape of every weight
//! - [`fs`]: files that appear whole or not at all · [`hash`]: SHA-256 · [`units`]: numbers for people
//! - [`suggest`]: "did you mean …?"

mod error;
pub mod fs;
pub mod hash;
pub mod model_config;
pub mod suggest;
pub mod units;

pub use error::{Error, Result};

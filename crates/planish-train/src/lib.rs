//! Training: optimizers, schedules, evaluation and recipes. This crate emits events and prints nothing.

mod error;

pub mod clip;
pub mod optimizer;
pub mod schedule;

pub use error::{Error, Result};

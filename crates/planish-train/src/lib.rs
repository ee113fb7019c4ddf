//! Training: optimizers, schedules, evaluation and recipes. This crate emits events and prints nothing.
//!
//! [`recipes::sft::Sft`] is the way in: a model, a data set and [`SftOptions`] become an adapter in a folder, and an
//! [`Observer`] hears what happens. The parts can be used alone: [`optimizer`], [`schedule`], [`clip`], [`evaluate()`],
//! [`metrics`], [`guard`].

pub mod best;
pub mod clip;
mod error;
mod evaluate;
pub mod events;
pub mod guard;
mod interval;
mod memory;
pub mod metrics;
pub mod optimizer;
mod options;
pub mod recipes;
mod resume;
mod run_dir;
pub mod schedule;
mod seeds;
pub mod tensorboard;
mod weighting;
mod window;

pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate};
pub use events::{End, Event, Observer, Position, Silent, StopFlag, Summary};
pub use options::{DistrustOptions, Length, Reduction, SftOptions, Tuning};
pub use resume::{Identity, Resume};

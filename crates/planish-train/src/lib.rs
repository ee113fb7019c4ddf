//! Training: optimizers, schedules, evaluation and recipes. This crate emits events and prints nothing.
//!
//! [`Trainer`] is the way in: a model, a data set and [`TrainOptions`] become an adapter in a folder, and an [`Observer`]
//! hears what happens. The parts can be used alone: [`optimizer`], [`schedule`], [`clip`], [`evaluate()`],
//! [`metrics`], [`guard`].

mod batches;
pub mod best;
pub mod clip;
mod error;
mod evaluate;
pub mod events;
mod export;
mod figures;
pub mod guard;
mod interval;
mod losses;
mod memory;
pub mod metrics;
pub mod objective;
mod objectives;
pub mod optimizer;
mod options;
mod preflight;
mod resume;
mod run_dir;
mod samples;
pub mod schedule;
mod seeds;
pub mod tensorboard;
mod timed_steps;
mod traced;
mod trainer;
mod update;
mod weighting;

pub use error::{Error, Result};
pub use evaluate::{Evaluation, evaluate};
pub use events::{End, Event, Observer, Position, Silent, StopFlag, Summary};
pub use objectives::{Recipe, Sft};
pub use options::{Compat, Compile, DistrustOptions, Length, Reduction, TrainOptions, Tuning};
pub use preflight::MemoryEstimate;
pub use resume::{Identity, Resume, template_time};
pub use timed_steps::{TimedStep, timed_steps};
pub use traced::compiles_updates;
pub use trainer::Trainer;
pub use update::WindowSource;

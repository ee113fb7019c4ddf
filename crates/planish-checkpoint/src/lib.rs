//! Adapters and resumable run state on disk. No MLX.
//!
//! - [`adapter`]: trained updates in the layouts of mlx-lm and PEFT, and the lossless way between them
//! - [`fuse`]: an adapter folded into its base, with a measure of what rounding leaves of it
//! - [`model_files`]: what a model folder has besides its weights
//! - [`run_state`]: checkpoints from which a run goes on to the same bits
//!
//! Everything is written beside its destination, flushed, and renamed: a file either is whole or does not exist.
//! Everything is read with suspicion: sizes, names, shapes and types are compared with what was expected before a byte
//! is used, and an error names file and tensor.

pub mod adapter;
mod error;
mod exact;
pub mod fuse;
pub mod model_files;
pub mod run_state;

pub use error::{Error, Result};
pub use exact::ExactF64;

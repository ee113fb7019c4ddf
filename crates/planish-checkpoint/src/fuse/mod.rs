//! Folding an adapter into the weights of its base model, and measuring what of it survives.
//!
//! Everything is computed in f32 and rounded once, one module in memory at a time. `ΔW = scale · bᵀaᵀ` for linear layers,
//! `scale · a b` for embeddings; DoRA rescales each row of `W + ΔW` to its magnitude. Rounding to a narrow type, and
//! above all quantising, can erase a small update: the [`FuseReport`] says per module how much is left.

mod report;
mod retention;
mod source;
mod stream;

pub use report::{FuseReport, LogitsCheck, ModuleRetention, Verdict};
pub use retention::Retention;
pub use stream::{FuseOptions, FuseTarget, export_safetensors, fuse, fuse_checked, open_merged, read_update};

//! Runs the functions of an asset on the CPU: the check of a written asset, not an engine.
//!
//! Reading order: [`Machine`] (functions, inputs, states) · `exec` (one operation after the other) · `operations` (what
//! each computes) · `kernels` (composites by their declaration) · `stored` (weights, read in rows when needed).

mod exec;
mod kernels;
mod operations;
mod stored;
mod value;

pub use exec::{Arithmetic, Machine, Outputs, States, Understanding};
pub use value::Value;

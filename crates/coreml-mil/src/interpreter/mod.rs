//! Reads a written package back, distrusting all of it, and runs it on the CPU.
//!
//! It shares with the builder the operator table ([`crate::infer()`]) and the weight file: what it computes
//! is what the files say. Every rule of the format that coremltools or Core ML checks is an error at opening.

mod exec;
mod load;
mod value;

pub use exec::{Precision, StateMap};
pub use load::Package;
pub use value::Value;

//! Reads a written package back, distrusting all of it, and runs it on the CPU.
//!
//! It knows nothing of the exporter but the operator table ([`crate::mil::infer`]) and the weight file: what it computes
//! is what the files say. Every rule of the format that coremltools or Core ML checks is an error at opening.

mod exec;
mod load;
mod value;

pub use exec::{Precision, StateMap};
pub use load::Package;
pub use value::Value;

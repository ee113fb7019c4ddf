//! Core ML programs, written and run by Rust alone: MIL is the language of a `.mlpackage`.
//!
//! Reading order: [`FunctionBuilder`] (a function, operation by operation; what does not fit is refused where it is
//! written) · [`infer`] (the operator table that builder and reader share) · [`proto`] (the messages) · [`BlobPlan`],
//! [`BlobWriter`] and [`BlobReader`] (the weight file) · [`interpreter`] (reads a package back, distrusting all of it, and
//! runs it on the CPU).
//!
//! The crate knows no model: what a program computes is its caller's business. Nothing here needs a Mac.

mod blob;
mod builder;
mod dtype;
mod error;
mod infer;
pub mod interpreter;
pub mod proto;
mod types;

pub use blob::{BlobPlan, BlobReader, BlobWriter};
pub use builder::{BlobRef, BuiltFunction, FunctionBuilder, State, Tensor, is_identifier};
pub use dtype::{DType, pack_bits, unpack_bits};
pub use error::{Error, Result};
pub use infer::{Operand, Operands, infer};
pub use types::{Dim, Literal, TensorType, Type};

/// iOS 18 and macOS 15: states, several functions, `slice_update`, int4.
pub const SPECIFICATION_VERSION: i32 = 9;
/// Name of the only function of a package that has one.
pub const MAIN: &str = "main";

//! Core AI's `.aimodel` folders: written, read and run without Apple's code, MLIR or a language model in mind.
//!
//! An asset is a folder of three files; the program with its weights is `main.mlirb`, MLIR bytecode of the one dialect
//! `aicode`. MLIR documents the container; the dialect's encoding of types and attributes is documented nowhere and is
//! the table of codes in `bytecode`.
//!
//! Reading order: [`program`] (what a program is) · [`builder`] (makes one: result types are inferred, decompositions
//! are written along) · [`AssetWriter`] (streams it with its weights to disk) · [`Asset`] (reads it back) ·
//! [`interpreter`] (runs it on the CPU).

mod asset;
pub mod builder;
mod bytecode;
mod error;
pub mod interpreter;
pub mod program;
mod types;

pub use asset::{Asset, AssetWriter, FileReport};
pub use error::{Error, Result};
pub use types::{Element, TensorType, Type};

#[doc(hidden)]
pub use bytecode::fuzzing;

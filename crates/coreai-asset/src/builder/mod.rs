//! Builds programs: each method adds one operation, infers its result's type, and refuses operands that do not fit.
//!
//! The runtime checks little of this (a wrong shape of a reshape passes, a wrong type of a transpose aborts the
//! process), so that a program which builds without an error is well typed. Decomposable operations carry their own
//! decomposition, for systems that do not know them: `decompose`.

mod decompose;
mod graph;
mod infer;

pub use graph::{BlockBuilder, Extent, GraphBuilder, ProgramBuilder, State, Tensor, WeightId};

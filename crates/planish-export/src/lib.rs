//! Decoder language models as Core ML packages, written by Rust alone and checked off a Mac.
//!
//! Reading order: [`export`] (model folder → packages, top to bottom) · `graph` (the decoder as MIL operations) · [`mil`]
//! (builder and operator rules) · [`weights`] (streaming, adapters, compression) · [`blob`] and [`proto`] (the files). The
//! checks: [`interpreter`] reads a package back and runs it, [`reference`](mod@reference) is the f32 pass it is compared with, [`check`]
//! does so as a host would. No MLX anywhere: weights come from `planish-checkpoint` as bytes.
//!
//! Nothing here has run on Apple hardware; docs/coreml.md says what was checked against what.

pub mod blob;
pub mod check;
pub mod dtype;
mod error;
mod export;
mod graph;
pub mod interpreter;
mod layout;
pub mod mil;
mod package;
pub mod proto;
pub mod reference;
mod rope;
mod settings;
mod verify;
pub mod weights;
pub use dtype::DType;
pub use error::{Error, Result};
pub use export::{ExportReport, export};
pub use package::PackageReport;
pub use rope::rope_tables;
pub use settings::*;

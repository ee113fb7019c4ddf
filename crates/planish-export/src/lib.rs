//! Decoder language models as Core ML packages, written by Rust alone and checked off a Mac.
//!
//! Reading order: [`export`] (model folder → packages, top to bottom) · `graph` (the decoder as operations of [`coreml_mil`]) ·
//! [`weights`] (streaming, adapters, compression) · [`reference`](mod@reference) (the f32 pass that a package is compared with) ·
//! [`check`] (compares, as a host would). No MLX anywhere: weights come from `planish-checkpoint` as bytes.
//!
//! Nothing here has run on Apple hardware; docs/coreml.md says what was checked against what.

pub mod check;
mod coreai;
mod error;
mod export;
mod graph;
mod layout;
mod package;
mod plain;
pub mod reference;
mod rope;
mod settings;
mod verify;
pub mod weights;
pub use coreai::{CoreAiCheck, CoreAiOptions, CoreAiReport, check_coreai, export_coreai, write_stored};
pub use error::{Error, Result};
pub use export::{ExportReport, export};
pub use package::PackageReport;
pub use rope::rope_tables;
pub use settings::*;

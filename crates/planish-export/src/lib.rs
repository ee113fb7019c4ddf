//! x
pub mod blob;
pub mod dtype;
mod error;
mod export;
mod graph;
mod layout;
pub mod mil;
mod package;
pub mod proto;
mod rope;
mod settings;
pub mod weights;
pub use dtype::DType;
pub use error::{Error, Result};
pub use export::{ExportReport, export};
pub use package::PackageReport;
pub use rope::rope_tables;
pub use settings::*;

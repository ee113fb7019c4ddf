//! What can go wrong.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Failures of building, writing, reading and running a program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The folder or its program is not a valid asset.
    #[error("{path} is not a valid Core AI asset: {problem}")]
    BadAsset {
        /// The asset, or the file inside it.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Operands do not fit an operation.
    #[error("{operation}: {problem}")]
    Operands {
        /// The operation's name.
        operation: String,
        /// What is wrong with which operand, and what was expected.
        problem: String,
    },
    /// A function, input or state does not exist or has another shape.
    #[error("{name}: {problem}")]
    Binding {
        /// Function, input or state.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// The data of a weight do not have the planned length.
    #[error("weight {name}: {problem}")]
    Weight {
        /// Name of the weight.
        name: String,
        /// What is wrong.
        problem: String,
    },
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn bad_asset(path: &Path, problem: impl Into<String>) -> Self {
        Self::BadAsset {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn operands(operation: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Operands {
            operation: operation.into(),
            problem: problem.into(),
        }
    }

    pub(crate) fn binding(name: &str, problem: impl Into<String>) -> Self {
        Self::Binding {
            name: name.to_owned(),
            problem: problem.into(),
        }
    }
}

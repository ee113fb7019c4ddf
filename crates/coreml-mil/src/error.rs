//! Everything that can go wrong with a program or a package.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a program could not be built, or a package not be written, opened or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Something that the format or this crate does not have.
    #[error("{what} is not supported")]
    Unsupported {
        /// The thing.
        what: String,
    },
    /// An operation was built or run with operands that it does not take.
    #[error("operation {operation}: {problem}")]
    Operation {
        /// Operator, and name where it has one.
        operation: String,
        /// What does not fit.
        problem: String,
    },
    /// A package was run with a function or an input that it does not take.
    #[error("{what} {name} does not fit\n{rule}")]
    Call {
        /// `function` or `input`.
        what: &'static str,
        /// Its name.
        name: String,
        /// What would fit.
        rule: String,
    },
    /// A package on disk is damaged or breaks a rule of the format.
    #[error("{path}: {problem}")]
    BadPackage {
        /// The file inside the package.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The weight file was not filled as it was planned, or another fault of the caller's code.
    #[error("internal error: {problem}; please report it")]
    Internal {
        /// What should not have happened.
        problem: String,
    },
}

impl Error {
    /// For `map_err`: an I/O error at a path.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn internal(problem: impl Into<String>) -> Self {
        Self::Internal {
            problem: problem.into(),
        }
    }

    pub(crate) fn bad_package(path: &Path, problem: impl Into<String>) -> Self {
        Self::BadPackage {
            path: path.to_owned(),
            problem: problem.into(),
        }
    }

    pub(crate) fn call(what: &'static str, name: impl ToString, rule: impl Into<String>) -> Self {
        Self::Call {
            what,
            name: name.to_string(),
            rule: rule.into(),
        }
    }
}

//! What can be wrong with a configuration.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate, with the place and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A configuration file is larger than any real one: probably not a configuration.
    #[error("{}: {bytes} bytes, expected a configuration file of at most {limit} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The largest size accepted.
        limit: u64,
    },
    /// The text is not JSON.
    #[error("{}:{line}:{column}: not valid JSON: {message}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What the parser met.
        message: String,
    },
    /// A key of a model's `config.json` is absent, has the wrong type, or a value out of range.
    #[error("{}: `{key}`: found {found}, expected {expected}", path.display())]
    ModelKey {
        /// The file.
        path: PathBuf,
        /// The key, dotted when nested.
        key: String,
        /// What was there.
        found: String,
        /// What is accepted.
        expected: String,
    },
    /// A key of a model's `config.json` asks for a computation that planish does not have; loading it all the same
    /// would give wrong numbers.
    #[error("{}: `{key}` = {found} is not supported: {reason}", path.display())]
    UnsupportedModel {
        /// The file.
        path: PathBuf,
        /// The key, dotted when nested.
        key: String,
        /// Its value.
        found: String,
        /// What is supported instead.
        reason: String,
    },
}

impl Error {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read {
            path: path.to_path_buf(),
            source,
        }
    }
}

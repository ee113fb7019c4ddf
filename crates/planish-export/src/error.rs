//! Everything that can go wrong in an export.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an export, or the check of a package, did not succeed. Nothing is left on disk after any of them.
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
    /// The destination already exists.
    #[error("{path} already exists\nchoose another --out or remove it first")]
    OutputExists {
        /// The destination.
        path: PathBuf,
    },
    /// The disk has less room than the package needs.
    #[error("{path}: the package needs {} and only {} are free\nmake room or choose another disk",
        planish_core::units::format_bytes(*needed), planish_core::units::format_bytes(*available))]
    NoSpace {
        /// The folder that would hold the package.
        path: PathBuf,
        /// Bytes of the package.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// `config.json` is not that of a supported model.
    #[error(transparent)]
    Config(#[from] planish_core::Error),
    /// The weights of the model are not right, or the adapter does not fit them.
    #[error(transparent)]
    Tensors(#[from] planish_tensors::Error),
    /// A finite weight is too large for fp16.
    #[error("{tensor}[{index}] is {value}, fp16 ends at ±65504\nrescale this layer before the export")]
    Fp16Range {
        /// Name of the tensor.
        tensor: String,
        /// Index of the element, counted in row-major order.
        index: usize,
        /// The weight.
        value: f32,
    },
    /// The model computes numbers on the calibration text that fp16 cannot hold.
    #[error(
        "{place} reaches {peak} on the calibration text, fp16 ends at ±65504: the package would give NaN\n\
         train with a smaller learning rate or a smaller scale of the adapter, or export text like yours with --text if this one is not"
    )]
    ActivationRange {
        /// Where, such as `layers.3 residual`.
        place: String,
        /// Largest magnitude there.
        peak: f32,
    },
    /// A setting does not fit the model.
    #[error("{option} {found} does not fit\n{rule}")]
    Option {
        /// Name of the setting as the command line spells it.
        option: &'static str,
        /// Its value.
        found: String,
        /// What would fit.
        rule: String,
    },
    /// Something the format or this exporter does not have.
    #[error("{what} is not supported")]
    Unsupported {
        /// The thing.
        what: String,
    },
    /// A program could not be built, or a package not be opened or run.
    #[error(transparent)]
    Package(#[from] coreml_mil::Error),
    /// A Core AI program could not be built, or an asset not be opened or run.
    #[error(transparent)]
    Asset(#[from] coreai_asset::Error),
    /// A file of the model folder does not hold what its name says.
    #[error("{path}: {problem}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The written package computes something else than the model.
    #[error("the package does not agree with the model: {problem}; nothing was written")]
    CheckFailed {
        /// The comparison and its numbers.
        problem: String,
    },
    /// A fault of this crate, not of the input.
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

    pub(crate) fn unreadable(path: &Path, problem: impl ToString) -> Self {
        Self::Unreadable {
            path: path.to_owned(),
            problem: problem.to_string(),
        }
    }

    pub(crate) fn internal(problem: impl Into<String>) -> Self {
        Self::Internal {
            problem: problem.into(),
        }
    }

    pub(crate) fn bad_package(path: &Path, problem: impl Into<String>) -> Self {
        Self::Package(coreml_mil::Error::BadPackage {
            path: path.to_owned(),
            problem: problem.into(),
        })
    }

    pub(crate) fn option(option: &'static str, found: impl ToString, rule: impl Into<String>) -> Self {
        Self::Option {
            option,
            found: found.to_string(),
            rule: rule.into(),
        }
    }
}

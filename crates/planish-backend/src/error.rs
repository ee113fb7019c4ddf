use std::path::PathBuf;

use crate::Backend;

/// What can go wrong while a device is probed or chosen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The asked-for device cannot be used.
    #[error(
        "backend {requested} cannot be used: {reason}\nuse --backend cpu or auto, or see `planish doctor` for what is missing"
    )]
    Unusable {
        /// The device that was asked for.
        requested: Backend,
        /// Verdict and code of its probe.
        reason: String,
    },

    /// No device can be used, not even the CPU.
    #[error("no usable device: {}", reasons.join("; "))]
    NoneUsable {
        /// Why each was rejected.
        reasons: Vec<String>,
    },

    /// The probe process could not be started or watched.
    #[error("the device probe cannot {action}: {source}")]
    Process {
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },

    /// A file of the probe cannot be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },

    /// A call into MLX failed.
    #[error(transparent)]
    Mlx(#[from] planish_mlx::Error),

    /// The hidden subcommand was called with wrong arguments.
    #[error("usage: {} BACKEND REPORT SEED", crate::PROBE_COMMAND)]
    Usage,
}

impl From<mlx_rs::error::Exception> for Error {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        Self::Mlx(exception.into())
    }
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

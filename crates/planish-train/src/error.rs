use std::path::PathBuf;

use mlx_rs::error::Exception;

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is outside its range or contradicts another.
    #[error("{key}: {reason}")]
    Config {
        /// The key, as written in run.toml.
        key: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },

    /// MLX refused an operation.
    #[error("MLX: {}", .0.what())]
    Mlx(#[from] Exception),

    /// A value on the device cannot be read as asked.
    #[error("MLX: {0}")]
    Read(#[from] mlx_rs::error::ConversionError),

    /// A call into MLX failed.
    #[error(transparent)]
    MlxLayer(#[from] planish_mlx::Error),

    /// A loss refused its input.
    #[error(transparent)]
    Loss(#[from] planish_loss::Error),

    /// A file of the run cannot be read or written.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted, as a verb phrase.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },

    /// Saved optimizer state does not belong to the parameters it should continue.
    #[error("optimizer state: {reason}")]
    OptimizerState {
        /// The tensor and what is wrong with it.
        reason: String,
    },
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

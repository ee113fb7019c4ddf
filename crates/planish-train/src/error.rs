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

    /// The model refused to be loaded, adapted or run.
    #[error(transparent)]
    Model(#[from] planish_nn::Error),

    /// The data cannot be read or planned.
    #[error(transparent)]
    Data(#[from] planish_data::Error),

    /// A tensor cannot be stored.
    #[error(transparent)]
    Tensors(#[from] planish_tensors::Error),

    /// An adapter or a checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] planish_checkpoint::Error),

    /// The configuration is wrong.
    #[error(transparent)]
    RunConfig(#[from] planish_core::Error),

    /// Several updates in a row had a loss or a gradient that is not finite.
    #[error(
        "{in_a_row} updates in a row were not finite (the last at step {step}, rows {}); nothing of them was applied; {kept}\n\
         lower optimizer.learning_rate, or look at the rows, which are listed in bad_rows.jsonl",
        rows.join(", ")
    )]
    Diverged {
        /// The last of them.
        step: usize,
        /// How many there were.
        in_a_row: usize,
        /// Rows of the last one, as `file:line`.
        rows: Vec<String>,
        /// What the run leaves behind.
        kept: String,
    },

    /// A loss is not finite although the updates were.
    #[error("the {what} at step {step} is not finite: the run has diverged; {kept}\nlower optimizer.learning_rate")]
    NotFinite {
        /// Which loss.
        what: &'static str,
        /// When.
        step: usize,
        /// What the run leaves behind.
        kept: String,
    },

    /// The model's loss is not finite before anything was trained.
    #[error("the {what} is not finite before the first update: the model or its data is at fault, not the training")]
    BadStart {
        /// Which loss.
        what: &'static str,
    },

    /// The largest batch needs more memory than there is.
    #[error(
        "one update with {rows} rows of {length} tokens {how} {needed}, and {budget} may be used\nset {suggestion}; or raise \
         backend.memory_limit, or set train.preflight=false to try anyway"
    )]
    Memory {
        /// What it needs.
        needed: String,
        /// Whether that was measured or estimated, as a verb.
        how: &'static str,
        /// What there is.
        budget: String,
        /// Rows of the batch.
        rows: usize,
        /// Tokens of a row.
        length: usize,
        /// Settings that fit.
        suggestion: String,
    },

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

    /// The output folder holds something already.
    #[error("{} is not empty: choose another output folder, or resume the run in it", path.display())]
    OutNotEmpty {
        /// The folder.
        path: PathBuf,
    },

    /// The tensors of a checkpoint are not those that are trained now.
    #[error("checkpoint: {reason}; resume with the settings that the run was started with")]
    CheckpointTensors {
        /// The tensor and what is wrong with it.
        reason: String,
    },

    /// Saved optimizer state does not belong to the parameters it should continue.
    #[error("optimizer state: {reason}")]
    OptimizerState {
        /// The tensor and what is wrong with it.
        reason: String,
    },
}

impl Error {
    /// Whether the device gave up on a piece of work that was too long or too large for it: Metal's watchdog, or its or
    /// CUDA's memory. Smaller pieces may do.
    pub(crate) fn is_of_the_device(&self) -> bool {
        const SIGNS: [&str; 8] = [
            "kIOGPUCommandBufferCallbackErrorTimeout",
            "kIOGPUCommandBufferCallbackErrorImpactingInteractivity",
            "kIOGPUCommandBufferCallbackErrorInnocentVictim",
            "kIOGPUCommandBufferCallbackErrorOutOfMemory",
            "Insufficient Memory",
            "greater than the maximum allowed buffer size",
            "Unable to allocate",
            "out of memory",
        ];
        let is_of_mlx = matches!(
            self,
            Self::Mlx(_) | Self::MlxLayer(_) | Self::Model(_) | Self::Loss(_) | Self::Read(_)
        );
        let text = self.to_string();
        is_of_mlx && SIGNS.iter().any(|sign| text.contains(sign))
    }

    /// Whether losses are not finite any more.
    pub(crate) fn is_divergence(&self) -> bool {
        matches!(self, Self::Diverged { .. } | Self::NotFinite { .. })
    }
}

/// [`std::result::Result`] with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

//! What can be wrong with adapters and runs.

use std::path::{Path, PathBuf};

use planish_core::units::format_bytes;

use crate::adapter::Refusal;
use crate::fuse::{FuseReport, LogitsCheck};
use crate::run_state::{ChangedInput, PassedOver};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate, with the place and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor file is wrong, or a tensor in memory.
    #[error(transparent)]
    Tensors(#[from] planish_tensors::Error),
    /// A file or directory could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file or directory could not be written: the disk is full, or permission is missing.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A JSON file is not what it should be.
    #[error("{}: {reason}", path.display())]
    BadJson {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },
    /// An adapter cannot be used as it is; the refusal has a stable name.
    #[error("{}: refused [{}]: {refusal}; {}", path.display(), refusal.id(), refusal.way_out())]
    AdapterRefused {
        /// The adapter's folder or file.
        path: PathBuf,
        /// Why, and the way out.
        refusal: Box<Refusal>,
    },
    /// A model was given where an adapter is wanted.
    #[error("{}: this is a model, not an adapter; give it with --model instead", path.display())]
    ModelAsAdapter {
        /// The folder.
        path: PathBuf,
    },
    /// A folder is no adapter, or two.
    #[error("{}: expected exactly one of adapters.safetensors (mlx-lm) and adapter_model.safetensors (PEFT), found {}", path.display(), if *both { "both" } else { "neither" })]
    UnclearAdapter {
        /// The folder.
        path: PathBuf,
        /// Whether both files are there.
        both: bool,
    },
    /// The configuration of a model could not be read.
    #[error("the model's configuration cannot be used")]
    Config {
        /// What is wrong with it.
        source: Box<planish_core::Error>,
    },
    /// Another process writes into the run directory.
    #[error("{}: another run{} writes here; wait for it, stop it, or choose another --out", path.display(), pid.map(|pid| format!(" (process {pid})")).unwrap_or_default())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// The process that holds it, when it said so.
        pid: Option<u32>,
    },
    /// There are checkpoints, and every one of them is damaged.
    #[error("{}: no checkpoint is whole: {}\nrestore one from a copy, or move the folder away to start at step 0", path.display(), list(passed_over))]
    NoWholeCheckpoint {
        /// The directory of the checkpoints.
        path: PathBuf,
        /// Each with what is wrong with it, newest first.
        passed_over: Vec<PassedOver>,
    },
    /// A checkpoint is not whole.
    #[error("{}: the checkpoint is damaged: {problem}", path.display())]
    BrokenCheckpoint {
        /// The directory or file.
        path: PathBuf,
        /// Which file is wrong, and how.
        problem: String,
    },
    /// The run would go on with other inputs than it had.
    #[error(
        "the run cannot go on from step {step} because these have changed: {}; restore them, or go on all the same with --accept-changed {}, or start a new optimizer from the saved weights with --resume-weights-only",
        list(changed),
        changed.iter().map(|change| change.input.word()).collect::<Vec<_>>().join(",")
    )]
    InputsChanged {
        /// The step of the checkpoint.
        step: u64,
        /// Every input that differs.
        changed: Vec<ChangedInput>,
    },
    /// The disk has too little room for another checkpoint.
    #[error("{}: {} free, a checkpoint needs {}; the earlier checkpoints are untouched\nmake room, then go on with --resume", path.display(), format_bytes(*available), format_bytes(*needed))]
    NoSpace {
        /// Where it would be written.
        path: PathBuf,
        /// Bytes wanted: twice the last checkpoint.
        needed: u64,
        /// Bytes there are.
        available: u64,
    },
    /// Storing the fused weights so would lose the update of some modules.
    #[error(
        "{how} loses the update of {failed} of {of} modules (worst: {worst}, cosine {cosine:.3}); {way_out}, or pass --accept-loss\n{report}"
    )]
    FuseLoss {
        /// `quantising`, or `rounding to` a type.
        how: String,
        /// What keeps the update.
        way_out: &'static str,
        /// Modules below the limit.
        failed: usize,
        /// Adapted modules.
        of: usize,
        /// The module that lost most.
        worst: String,
        /// Its cosine.
        cosine: f64,
        /// All modules.
        report: Box<FuseReport>,
    },
    /// The fused model does not say what base and adapter say.
    #[error(
        "the fused model answers differently from base and adapter: {check}\nfuse with --dequantize, or --dtype f32; --accept-loss writes it all the same\n{report}"
    )]
    FusedLogits {
        /// How they differ.
        check: LogitsCheck,
        /// All modules.
        report: Box<FuseReport>,
    },
}

impl Error {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(crate) fn write(path: &Path, source: std::io::Error) -> Self {
        Self::Write {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(crate) fn refused(path: &Path, refusal: Refusal) -> Self {
        Self::AdapterRefused {
            path: path.to_path_buf(),
            refusal: Box::new(refusal),
        }
    }

    /// The same refusal about another place: the input of a conversion, not its half-made output.
    pub(crate) fn about(self, path: &Path) -> Self {
        match self {
            Self::AdapterRefused { refusal, .. } => Self::refused(path, *refusal),
            other => other,
        }
    }

    pub(crate) fn json(path: &Path, source: &serde_json::Error) -> Self {
        Self::BadJson {
            path: path.to_path_buf(),
            reason: source.to_string(),
        }
    }
}

fn list<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}

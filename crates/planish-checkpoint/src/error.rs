//! What can be wrong with files of tensors, adapters and runs.

use std::path::{Path, PathBuf};

use planish_core::units::format_bytes;

use crate::adapter::Refusal;
use crate::fuse::{FuseReport, LogitsCheck};
use crate::run_state::{ChangedInput, PassedOver};
use crate::tensors::{Dtype, HeaderProblem, LoadReport};

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every failure of this crate, with the place and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
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
    /// The header of a safetensors file lies, or is not one.
    #[error("{}: {problem}; fetch or write the file again", path.display())]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<HeaderProblem>,
    },
    /// A JSON file is not what it should be.
    #[error("{}: {reason}", path.display())]
    BadJson {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        reason: String,
    },
    /// A folder holds no tensor file.
    #[error("{}: no model.safetensors and no {}; expected a folder with safetensors files", path.display(), crate::tensors::INDEX_FILE)]
    NoTensorFile {
        /// The folder.
        path: PathBuf,
    },
    /// A folder holds several tensor files and nothing says how they belong together.
    #[error("{}: several safetensors files ({}) but no {}; name one file, or fetch the index", path.display(), files.join(", "), crate::tensors::INDEX_FILE)]
    NoIndex {
        /// The folder.
        path: PathBuf,
        /// The files.
        files: Vec<String>,
    },
    /// Files and expectation disagree about which tensors there are.
    #[error("{}: the tensors are not the expected ones\n{report}", path.display())]
    Refused {
        /// The file or folder.
        path: PathBuf,
        /// Every disagreement.
        report: Box<LoadReport>,
    },
    /// A tensor that must be there is not.
    #[error("{}: no tensor {name:?}{}", path.display(), hint(nearest))]
    NoTensor {
        /// The file or folder.
        path: PathBuf,
        /// The name.
        name: String,
        /// The most similar name that is there.
        nearest: Option<String>,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor {name:?} has the value {value} at element {index}; the file is damaged or its training diverged", path.display())]
    NonFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Position in row-major order.
        index: usize,
        /// The value.
        value: f64,
    },
    /// A number of the model has no finite image in the type it shall be stored in.
    #[error("tensor {name:?}, element {index}: {value} is too large for {dtype}\nstore as BF16 or F32")]
    TooLarge {
        /// The tensor.
        name: String,
        /// Position in row-major order.
        index: usize,
        /// The number.
        value: f32,
        /// The type.
        dtype: Dtype,
    },
    /// Type, shape and number of bytes of a tensor disagree.
    #[error("a tensor of type {dtype} and shape {shape:?} cannot have {found} bytes")]
    ByteCount {
        /// Element type.
        dtype: Dtype,
        /// Shape.
        shape: Vec<usize>,
        /// Bytes given.
        found: usize,
    },
    /// Floating-point values were wanted from a tensor of another type.
    #[error("elements of type {dtype} are not read as f32; expected F32, F16 or BF16")]
    NotFloat {
        /// Element type.
        dtype: Dtype,
    },
    /// An adapter cannot be used as it is; the refusal has a stable name.
    #[error("{}: refused [{}]: {refusal}; {}", path.display(), refusal.id(), refusal.way_out())]
    AdapterRefused {
        /// The adapter's folder or file.
        path: PathBuf,
        /// Why, and the way out.
        refusal: Box<Refusal>,
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
    /// A run would go on from an old checkpoint and overwrite later ones.
    #[error("{}: there are checkpoints after step {step} ({}); go on elsewhere with --branch NEW_RUN, or delete them with --discard-later", path.display(), list(later))]
    LaterCheckpoints {
        /// The run directory.
        path: PathBuf,
        /// The step asked for.
        step: u64,
        /// The later steps.
        later: Vec<u64>,
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
    /// A quantised weight cannot be read or made.
    #[error("{reason}")]
    Quantization {
        /// Which, and why.
        reason: String,
    },
    /// Quantising would lose the update of some modules.
    #[error(
        "quantising loses the update of {failed} of {of} modules (worst: {worst}, cosine {cosine:.3}); fuse with --dequantize or --bits 8, or pass --accept-loss\n{report}"
    )]
    FuseLoss {
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
    /// A writer was given other tensors than it was created for.
    #[error("{}: {reason}", path.display())]
    WriterMisuse {
        /// The file being written.
        path: PathBuf,
        /// Which tensor, and what is wrong with it.
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

fn hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!(" (the nearest is {name:?})"))
        .unwrap_or_default()
}

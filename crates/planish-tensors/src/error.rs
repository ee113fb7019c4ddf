//! What can be wrong with files of tensors and with tensors in memory.

use std::path::{Path, PathBuf};

use crate::{Dtype, HeaderProblem, LoadReport};

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
    #[error("{}: no model.safetensors and no {}; expected a folder with safetensors files", path.display(), crate::INDEX_FILE)]
    NoTensorFile {
        /// The folder.
        path: PathBuf,
    },
    /// A folder holds several tensor files and nothing says how they belong together.
    #[error("{}: several safetensors files ({}) but no {}; name one file, or fetch the index", path.display(), files.join(", "), crate::INDEX_FILE)]
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
    /// Head and embedding of a model that ties them are two matrices.
    #[error(
        "{}: lm_head.weight is not the embedding, although config.json ties them (tie_word_embeddings)\na merged or trained head of its own needs tie_word_embeddings = false in config.json; otherwise remove lm_head.weight",
        path.display()
    )]
    HeadDiffers {
        /// The folder.
        path: PathBuf,
    },
    /// The update of an adapter does not fit the tensor that it changes.
    #[error("{reason}")]
    UpdateShape {
        /// Which, and why.
        reason: String,
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
    /// A quantised weight cannot be read or made.
    #[error("{reason}")]
    Quantization {
        /// Which, and why.
        reason: String,
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

    pub(crate) fn json(path: &Path, source: &serde_json::Error) -> Self {
        Self::BadJson {
            path: path.to_path_buf(),
            reason: source.to_string(),
        }
    }
}

fn hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!(" (the nearest is {name:?})"))
        .unwrap_or_default()
}

//! Tensors in files and in host memory. No MLX.
//!
//! Files are safetensors: read strictly, written deterministically.
//!
//! [`TensorStore`] opens one file, a sharded model or a folder. It maps the files into memory and checks every header
//! before it hands out a byte: bounds, overlaps, sizes, element types, and, for shards, that index and files agree.
//! [`TensorStore::check`] then compares the content with what a model needs and returns a [`LoadReport`].
//!
//! [`write()`] and the streaming [`TensorFileWriter`] and [`ShardWriter`] turn equal tensors into equal bytes.
//! [`quantize`] and [`dequantize`] are MLX's affine mode on the host.
//!
//! [`ModelWeights`] is a model folder as numbers: dequantised, with the [`Update`] of an adapter merged in, a few rows at a time.
//! What reads weights reads them there, whatever it makes of them.

mod affine;
mod dtype;
mod error;
mod header;
mod host;
mod index;
mod merge;
mod model_weights;
mod non_finite;
mod report;
mod shard_writer;
mod store;
mod writer;

pub use affine::{Affine, dequantize, quantize};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use header::HeaderProblem;
pub use host::{HostTensor, TensorView};
pub use merge::{LowRank, Update};
pub use model_weights::{ModelWeights, first_outside, without_wrappers};
pub use non_finite::NonFinite;
pub use report::{Findings, LoadReport, MAX_LISTED, Mismatch};
pub use shard_writer::{DEFAULT_SHARD_BYTES, ShardSummary, ShardWriter};
pub use store::{LoadRules, TensorStore};
pub use writer::{TensorFileWriter, TensorInfo, write};

/// The name of the file that says which shard holds which tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

#[doc(hidden)]
pub mod fuzzing {
    //! Entry points for the fuzz targets.

    use std::path::Path;

    /// Reads `bytes` as a safetensors file and touches all that it declares.
    pub fn safetensors(bytes: &[u8]) {
        let Ok(header) = super::header::parse(bytes, Path::new("fuzz.safetensors")) else {
            return;
        };
        for entry in header.entries {
            let data = &bytes[entry.range.clone()];
            assert_eq!(Some(data.len()), entry.dtype.byte_len(&entry.shape));
        }
    }

    /// Reads `bytes` as a shard index.
    pub fn safetensors_index(bytes: &[u8]) {
        let _ = super::index::parse(bytes, Path::new("model.safetensors.index.json"));
    }
}

//! From checkpoint tensors to blobs of the weight file, in pieces of a few megabytes.

mod compress;
mod kmeans;
mod plan;
mod rows;
mod stream;

pub(crate) use compress::row_quantum;
pub use compress::{Compressed, WeightFormat, compress, dequantize, restore};
pub use kmeans::palettize;
pub(crate) use plan::Job;
pub use plan::{Encoded, WeightPlan};
pub use rows::{Rows, StoredRows};
pub(crate) use stream::fill;
pub use stream::{Importance, LayerError, Sink, stream};

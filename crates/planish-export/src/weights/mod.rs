//! From checkpoint tensors to blobs of the weight file, in pieces of a few megabytes.

mod adapter;
mod compress;
mod kmeans;
mod plan;
mod rows;
mod source;
mod stream;

pub use adapter::{AdapterDelta, LoraDelta};
pub use compress::{Compressed, WeightFormat, compress, dequantize};
pub use kmeans::palettize;
pub use plan::{Encoded, WeightPlan};
pub use rows::{Rows, StoredRows};
pub use source::WeightSource;
pub use stream::{Importance, LayerError, stream};

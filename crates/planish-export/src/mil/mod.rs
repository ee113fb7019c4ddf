//! MIL, the language of Core ML programs: types, a builder that refuses what does not fit, and the rules both share
//! with the reader.

mod builder;
mod infer;
mod types;

pub(crate) use builder::is_identifier;
pub use builder::{BlobRef, BuiltFunction, FunctionBuilder, OPSET, State, Tensor, WEIGHT_FILE};
pub use infer::{Operand, Operands, infer};
pub(crate) use infer::{axis_of, broadcast};
pub use types::{Dim, Literal, TensorType, Type};

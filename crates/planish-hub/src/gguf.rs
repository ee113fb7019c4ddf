//! GGUF, the single-file format of llama.cpp: read strictly, turned into a Hugging Face folder, and written.
//!
//! A file is a header, metadata (key → typed value), tensor descriptions, padding, tensor data. Everything comes from
//! strangers, so the reader checks every length against the file before it allocates, and refuses by name what it does
//! not know.
//!
//! # Differences between a GGUF and a Hugging Face model
//! - Shapes list the fastest axis first; here they are turned round, `[output_dims, input_dims]`.
//! - In `llama` files the rows of the q and k projections are permuted: the two rows that rope rotates together lie
//!   side by side, Hugging Face keeps them half a head apart. `qwen2` and `qwen3` files are not permuted. See [`rows`].
//! - The tokenizer is a list of tokens, their types, merges, and the *name* of a pre-tokenizer. See [`tokenizer`].
//! - Llama 3's rope scaling is a tensor of factors, `rope_freqs.weight`, not four numbers. See [`config`].
//!
//! # Reference
//! The GGUF specification in the ggml repository (`docs/gguf.md`), version 3.

mod blocks;
pub mod config;
mod export;
mod import;
mod metadata;
mod names;
mod quantize;
mod reader;
pub mod rows;
mod sayable;
mod tensor_type;
pub mod tokenizer;
mod writer;

pub use blocks::dequantize;
pub use export::{ExportFormat, ExportReport, export_gguf};
pub(crate) use import::import_into;
pub use import::{ImportReport, check, import};
pub use metadata::{Array, Metadata, Value};
pub use names::gguf_name;
pub use reader::{Gguf, TensorInfo};
pub use tensor_type::TensorType;
pub use writer::{TensorPlan, write};

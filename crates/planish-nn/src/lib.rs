//! Decoders on MLX, as an [`Arch`](planish_core::arch::Arch) describes them, with low-rank adapters designed into the linear layer.
//!
//! [`Model::load`] reads a Hugging Face folder strictly; [`Model::hidden`] and [`Model::logits`] run it;
//! [`Model::attach_lora`] adds adapters, which [`Model::trainables`] hands to an optimizer; [`generate::generate`] writes text.
//! No family is named here: `build.rs` makes the blocks from the description: [`Linear`], [`RmsNorm`], [`Rope`], attention, gated networks.
//!
//! # Legend of shapes
//! `b` rows · `s` tokens of this call · `t` tokens attended to (cache included) · `d` hidden size · `f` feed-forward size ·
//! `n_h` query heads · `n_kv` key and value heads · `h_d` head size · `v` vocabulary · `r` rank.
//!
//! # Rules
//! - Everything stays on the device: no function here reads a value back, except [`generate`] and the readers of weights.
//! - Low-rank products are computed in the dtype of the activations, from f32 masters.
//! - Adapters of a fresh model change nothing: `B = 0` gives the base model's logits bit for bit.

mod adapter;
mod attention;
mod build;
mod cache;
mod decoder;
mod dropout;
mod embedding;
mod error;
mod fused;
pub mod generate;
mod joint;
mod linear;
mod lora;
mod mask;
mod mlp;
mod model;
mod native;
mod norm;
mod parameters;
mod plan;
mod rope;
mod sampling;
mod softcap;
mod weight;
mod weights;

pub use cache::KvCache;
pub use error::{Error, Result};
pub use linear::Linear;
pub use lora::{LoraAdapter, LoraConfig, LoraInit, LoraMethod, LoraScale};
pub use mask::AttentionMask;
pub use model::{LoadOptions, Model, Training};
pub use native::Kernels;
pub use norm::RmsNorm;
pub use parameters::Trainable;
pub use plan::{ChosenKernels, Plan, PlannedPart, Purpose};
pub use rope::Rope;
pub use sampling::Sampling;
pub use weight::LinearBase;

use softcap::softcapped;

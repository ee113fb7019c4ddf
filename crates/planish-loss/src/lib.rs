//! Training losses, one a file: formula, mask, reduction.
//!
//! Every loss returns **one value a token or a sequence**, never a mean: the recipe knows the denominator of its window
//! before the first micro-batch (`planish-train`), so a loss that divides by its own batch would weight accumulated
//! gradients wrongly.
//!
//! | module | loss |
//! |---|---|
//! | [`cross_entropy()`] | next-token cross-entropy from logits |
//! | [`head_loss()`] | the same from hidden states, without ever holding all logits; by MLX's operations or kernels of our own |
//! | [`distrust`] | weights for examples from authority and provenance (pure f64 host code) |
//! | [`dpo`] | direct preference optimisation |
//! | [`orpo`] | odds-ratio preference optimisation |
//!
//! Shape letters: `b` rows, `l` tokens of a row, `t` trained tokens, `d` hidden size, `v` vocabulary, `n` sequences.

mod error;
mod positions;

pub mod cross_entropy;
pub mod distrust;
pub mod dpo;
pub mod head_loss;
pub mod orpo;

pub use cross_entropy::{TokenLoss, TokenLossOptions, cross_entropy, weighted_sum};
pub use error::{Error, Result};
pub use head_loss::{Head, HeadKernel, HeadLoss, head_loss};
pub use positions::TrainedPositions;

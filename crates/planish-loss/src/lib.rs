//! Training losses, one a file: formula, mask, reduction.
//!
//! Every loss returns **one value a token or a sequence**, never a mean: the recipe knows the denominator of its window
//! before the first micro-batch (`planish-train`), so a loss that divides by its own batch would weight accumulated
//! gradients wrongly.
//!
//! | module | loss |
//! |---|---|
//! | [`cross_entropy()`] | next-token cross-entropy from logits |
//! | [`chunked_cross_entropy()`] | the same from hidden states, without ever holding all logits |
//! | [`packed_cross_entropy()`] | the same through a head packed in bf16, in one CPU kernel |
//! | [`distrust`] | weights for examples from authority and provenance (pure f64 host code) |
//! | [`dpo`] | direct preference optimisation |
//! | [`orpo`] | odds-ratio preference optimisation |
//!
//! Shape letters: `b` rows, `l` tokens of a row, `t` trained tokens, `d` hidden size, `v` vocabulary, `n` sequences.

mod error;

pub mod chunked_cross_entropy;
pub mod cross_entropy;
pub mod distrust;
pub mod dpo;
pub mod orpo;
pub mod packed_cross_entropy;

pub use chunked_cross_entropy::{
    Head, TrainedPositions, chunked_cross_entropy, chunked_cross_entropy_fused, chunked_cross_entropy_native,
    chunked_cross_entropy_traced,
};
pub use cross_entropy::{TokenLoss, TokenLossOptions, cross_entropy, weighted_sum};
pub use error::{Error, Result};
pub use packed_cross_entropy::{packed_cross_entropy, packed_token_nll};

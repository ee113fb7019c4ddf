//! Recipes: what a run does, read from top to bottom.

pub mod sft;

//! Integration tests of training.
#![allow(clippy::unwrap_used)] // helpers of tests may panic

mod optimizers;
mod sft;
mod world;

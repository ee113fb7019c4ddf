//! Integration tests of training.
#![allow(clippy::unwrap_used)] // helpers of tests may panic

mod compiled;
mod endings;
mod kernels;
mod memory;
mod optimizers;
mod preference;
mod sft;
mod variants;
mod world;

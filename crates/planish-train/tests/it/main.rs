//! Integration tests of training.

mod optimizers;
mod sft;
mod world;

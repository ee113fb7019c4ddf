//! Integration tests of training.

mod optimizers;

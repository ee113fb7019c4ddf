//! Tests from outside the crate.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test that cannot go on must say why.

mod fuzz_corpus;

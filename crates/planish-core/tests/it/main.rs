//! Tests from outside the crate.

mod fuzz_corpus;

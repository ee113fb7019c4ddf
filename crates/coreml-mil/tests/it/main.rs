//! Integration tests of coreml-mil: one binary.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test that cannot go on fails.

mod blob;

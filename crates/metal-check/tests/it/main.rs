//! Facts about whole logs, wheels and records.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test that cannot go on fails.

mod fuzz_corpus;
mod logs;
mod wheels;

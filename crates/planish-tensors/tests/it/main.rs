//! Integration tests of planish-tensors: files on disk, through the public API.

// Helpers of tests fail as tests do; the lint knows only the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr)]

mod affine;
mod fuzz_corpus;
mod tensor_files;

//! Integration tests: files in, batches out.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod support;

mod cases;
mod corpus;
mod looking;
mod masking;
mod parity;
mod planning;
mod reading;
mod templates;

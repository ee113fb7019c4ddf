//! Integration tests of planish-export: one binary.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)] // A test that cannot go on fails; a skipped one says so.

mod adapters;
mod compressed;
mod coreai;
mod mutants;
mod packages;
mod reference;
mod refusals;
mod support;

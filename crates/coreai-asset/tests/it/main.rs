//! Integration tests: what is written is read back, Apple's own file runs, strangers' bytes never panic.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod apple;
mod builders;
mod round_trip;
mod support;

//! The chores of this repository, in Rust: `cargo xtask check` and its parts.
#![allow(clippy::print_stdout, clippy::print_stderr)]

fn main() {}

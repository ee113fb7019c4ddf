//! The chores, run as programs.

#![allow(clippy::unwrap_used, clippy::expect_used)] // A test that cannot go on fails.

mod metal_check;

//! Integration tests of the losses: against f64 references, finite differences, and one another.
#![allow(clippy::unwrap_used)] // helpers of tests may panic

mod losses;
mod preferences;
mod reference;

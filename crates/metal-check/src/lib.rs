//! What runs on this Mac, and why not: decisions over recorded facts.
//!
//! Everything here is a pure function of bytes that somebody else recorded — a build log, the answers of `sw_vers` and
//! `xcrun`, the headers of a library and a shader archive. Nothing here starts a process, reads the clock or links MLX, so
//! that it builds and is tested on a machine where MLX itself does not build, which is where it is needed.
//!
//! | question | module |
//! |---|---|
//! | it failed; why? | [`classify`], with the table in [`catalogue`] |
//! | what is on this machine? | [`preflight`], [`deployment`] |
//! | which build fits this macOS? | [`wheel`], [`metallib`], [`macho`], [`predict`] |
//! | what should be tried? | [`candidate`] |
//! | did it help? | [`history`] |
//! | what came out? | [`report`], [`exit`] |

#![deny(missing_docs)]

pub mod candidate;
pub mod catalogue;
pub mod classify;
pub mod deployment;
mod error;
pub mod excerpt;
pub mod exit;
pub mod history;
pub mod macho;
pub mod metallib;
pub mod micro_probe;
pub mod predict;
pub mod preflight;
pub mod redact;
pub mod report;
pub mod runner;
pub mod text;
pub mod verdict;
pub mod version;
pub mod wheel;

pub use error::Error;

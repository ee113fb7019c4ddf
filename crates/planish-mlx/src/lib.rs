//! The one small safe layer over raw `mlx-sys` calls that `mlx-rs` lacks, and the home of the project's `unsafe`.
//!
//! Arrays are [`mlx_rs::Array`], and most operations are taken from `mlx-rs` directly. This crate adds what is missing there:
//! - [`transforms`]: value and gradient with respect to listed arguments, activation checkpointing, custom gradients;
//! - [`host`]: typed bytes to arrays and back, one copy each way;
//! - [`device`] and [`memory`]: what the machine has, what MLX uses;
//! - [`library`]: where MLX was loaded from and what it was built for;
//! - [`host_kernel`] and [`cuda_kernel`]: operations of our own on the CPU and on NVIDIA GPUs;
//! - [`ops`]: slices by index lists and key splitting.
//!
//! # Threads
//! MLX keeps its streams per thread. Build and evaluate a graph on one thread; an evaluated array may move to another.
//!
//! # Errors
//! MLX's own error handler ends the process. The first call into this crate replaces it, so every failure is an [`Error`];
//! [`install_error_handler`] does so explicitly, which a program should do before it touches `mlx-rs`.

pub mod cuda_kernel;
pub mod device;
mod error;
mod handler;
pub mod host;
pub mod host_kernel;
pub mod library;
pub mod memory;
pub mod ops;
mod raw;
pub mod transforms;

pub use error::{Error, Result};
pub use handler::install_error_handler;
pub use mlx_rs::{Array, Dtype};

/// The version of the MLX library that is loaded, such as `0.32.2`.
///
/// # Errors
/// [`Error::Mlx`] when the library does not answer.
pub fn version() -> Result<String> {
    raw::mlx_version()
}

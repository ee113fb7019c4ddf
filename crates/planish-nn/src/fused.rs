//! Blocks for training adapters that write less: sums and turns inside the kernel that reads, gradients by hand.
//!
//! A GPU multiplies faster than it writes. In the composed block most of the time beside the products goes into arrays that are
//! written to be read once: the low-rank update on its way to its sum, the gradient of a norm on its way to the residual's.
//! Here the update of a layer is added where its output is used, and its gradient where the input's is needed:
//!
//! | operation | together with |
//! |---|---|
//! | rotation of query and key | low-rank updates of query, key, value |
//! | `silu(gate) · up` | low-rank updates of gate and up; backward also the one of down |
//! | norm | the sum before it: residual, output of the sub-layer, its low-rank update |
//! | gradient of a norm | low-rank part of what reads the norm, and the residual's gradient |
//!
//! Each has a kernel for NVIDIA GPUs and the same written in MLX's operations, which runs elsewhere and is what the kernels
//! are tested against.

mod adapters;
mod attention;
mod feed_forward;
mod norm;
mod output;
mod rotation;
mod swiglu;

pub(crate) use attention::FusedAttention;
pub(crate) use feed_forward::FusedFeedForward;
pub(crate) use output::Pending;
pub(crate) use rotation::Turns;

use planish_mlx::Array;
use planish_mlx::cuda_kernel::{self, CudaKernel, Launch};

use crate::{Error, Result};

/// Ranks above this are too many for the registers of a thread.
const LARGEST_RANK: i32 = 16;

/// Runs `kernel` where there is an NVIDIA GPU, else `composed`.
fn kernel_or<const N: usize, const M: usize>(
    kernel: &CudaKernel,
    inputs: [&Array; N],
    launch: &Launch<'_>,
    composed: impl FnOnce() -> Result<[Array; M]>,
) -> Result<[Array; M]> {
    match cuda_kernel::is_supported()? {
        true => Ok(kernel.call(inputs, launch)?),
        false => composed(),
    }
}

/// A constant where a kernel reads it quickly. At least 16 bytes: MLX keeps smaller arrays, and what comes from the host, in memory
/// of the host, which every block of a kernel would wait for. Not inside of a trace, which would compute it in every call.
fn on_device(constant: &Array) -> Result<Array> {
    let moved = constant.add(none(constant)?)?;
    moved.eval()?;
    Ok(moved)
}

/// MLX called a function with other arrays than it was given.
fn wrong_count(expected: usize, arrays: &[Array]) -> Error {
    let found = arrays.len();
    planish_mlx::Error::ArrayCount { expected, found }.into()
}

/// Zeros for what gets no gradient.
fn none(array: &Array) -> Result<Array> {
    Ok(mlx_rs::ops::zeros_like(array)?)
}

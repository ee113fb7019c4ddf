//! Kernels of our own as operations in MLX's graph, each with its hand-written gradient.
//!
//! A forward function and its backward rule are Rust functions over plain slices from `planish-kernels`. They run on the
//! CPU in f32 and are interchangeable with the composed operations of MLX, against which they are tested.

mod attention;
mod linear;
mod norm;
mod swiglu;
mod vector;

use planish_mlx::device::{self, DeviceKind};
use planish_mlx::host_kernel::{Input, Output, OutputSpec, host_kernel, host_kernel_many};
use planish_mlx::{Array, Dtype};

pub(crate) use attention::{Heads, attention};
pub(crate) use linear::{Part, linears};
pub(crate) use norm::rms_norm;
pub(crate) use swiglu::swiglu;
pub(crate) use vector::single_token;

use crate::{Error, Result};

/// What computes a model's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kernels {
    /// Operations of MLX, on any device and in any dtype.
    #[default]
    Composed,
    /// Our own kernels for attention, SwiGLU, norms and the loss, on the CPU, in f32; linear layers by MLX's BLAS.
    Native,
    /// The same, and linear layers with weights packed in bf16: inputs are rounded to bf16, sums are f32. The base cannot
    /// be trained.
    NativeBf16,
    /// Operations of MLX, and in updates that are compiled blocks with hand-written gradients, which write less: by kernels of
    /// our own on NVIDIA GPUs, by MLX's operations elsewhere. The base cannot be trained.
    Fused,
}

impl Kernels {
    /// Whether our own kernels of the CPU run.
    pub fn is_native(self) -> bool {
        matches!(self, Kernels::Native | Kernels::NativeBf16)
    }

    /// What runs, for people.
    pub fn describe(self) -> &'static str {
        match self {
            Kernels::Composed => "MLX operations",
            Kernels::Native => "native kernels, f32",
            Kernels::NativeBf16 => "native kernels, bf16 products with f32 sums",
            Kernels::Fused => "fused blocks in compiled updates",
        }
    }

    /// Refuses our own kernels where they cannot run.
    pub(crate) fn check(self, dtype: Dtype) -> Result<()> {
        if self.is_native() && (dtype != Dtype::Float32 || device::default_kind()? != DeviceKind::Cpu) {
            return Err(Error::NativeKernels { dtype });
        }
        Ok(())
    }
}

/// A kernel in the graph that runs on the pool's threads; its outputs are f32 of these shapes.
fn kernel<F, const N: usize, const M: usize>(
    name: &'static str,
    inputs: [&Array; N],
    shapes: [&[i32]; M],
    run: F,
) -> Result<[Array; M]>
where
    F: Fn(&[Input<'_>; N], [&mut [f32]; M]) + Send + Sync + 'static,
{
    Ok(host_kernel(
        name,
        inputs,
        shapes.map(OutputSpec::f32),
        move |inputs, outputs| {
            let outputs = outputs.each_mut().map(Output::f32_mut);
            planish_kernels::on_pool(|| run(inputs, outputs));
        },
    )?)
}

/// The same for arrays whose number is known when the program runs.
fn kernel_many<F>(name: &'static str, inputs: &[Array], shapes: &[Vec<i32>], run: F) -> Result<Vec<Array>>
where
    F: Fn(&[Input<'_>], Vec<&mut [f32]>) + Send + Sync + 'static,
{
    let specs: Vec<OutputSpec> = shapes.iter().map(|shape| OutputSpec::f32(shape)).collect();
    Ok(host_kernel_many(name, inputs, &specs, move |inputs, outputs| {
        let outputs = outputs.iter_mut().map(Output::f32_mut).collect();
        planish_kernels::on_pool(|| run(inputs, outputs));
    })?)
}

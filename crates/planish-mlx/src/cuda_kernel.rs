//! Operations of our own on NVIDIA GPUs: CUDA C++ that MLX compiles at its first use, lazily evaluated like any other.

#![allow(unsafe_code)] // raw kernel calls

use std::ffi::{CString, c_char};

use mlx_rs::{Array, Dtype, Stream};

use crate::device::{self, DeviceFact, DeviceKind};
use crate::ops::exactly;
use crate::raw::{ArrayList, check};
use crate::{Error, Result, install_error_handler};

/// A kernel: the body of a `__global__` function.
///
/// Inside, `inputs` and `outputs` are pointers of those names (`const` for inputs) to row-contiguous memory, and what a
/// [`Launch`] defines are compile-time constants. MLX keeps compiled kernels in memory and on disk.
#[derive(Debug, Clone, Copy)]
pub struct CudaKernel {
    /// Part of the function's name: letters, digits and `_`.
    pub name: &'static str,
    /// Names of the inputs.
    pub inputs: &'static [&'static str],
    /// Names of the outputs.
    pub outputs: &'static [&'static str],
    /// What stands before the function.
    pub header: &'static str,
    /// The body.
    pub source: &'static str,
}

/// For [`CudaKernel::header`]: `planish_load<N>` and `planish_store<N>` move `N` neighbouring numbers as f32, which must be
/// aligned to their size (at most 16 bytes); `planish_warp_sum` adds over a warp.
pub const VECTORS: &str = include_str!("vectors.cuh");

/// How a kernel is started.
#[derive(Debug, Clone)]
pub struct Launch<'a> {
    /// Blocks along x and y.
    pub blocks: [usize; 2],
    /// Threads of a block.
    pub threads: usize,
    /// Integer constants of the kernel.
    pub constants: &'a [(&'static str, usize)],
    /// The type that the kernel calls `T`.
    pub element: Dtype,
    /// Shape and type of each output.
    pub outputs: &'a [(&'a [i32], Dtype)],
}

/// Whether the default device runs CUDA kernels: an NVIDIA GPU that computes in bf16 (compute capability 8 and later).
///
/// # Errors
/// [`Error::Mlx`] when the device cannot be asked.
pub fn is_supported() -> Result<bool> {
    if device::default_kind()? != DeviceKind::Gpu {
        return Ok(false);
    }
    let facts = device::facts(DeviceKind::Gpu)?;
    Ok(matches!(facts.get("compute_capability_major"), Some(DeviceFact::Number(major)) if *major >= 8))
}

impl CudaKernel {
    /// Adds a call to the graph and returns its outputs, not yet evaluated. It has no gradient: give it one with
    /// [`custom_vjp`](crate::transforms::custom_vjp).
    ///
    /// # Errors
    /// [`Error::Mlx`] on a device that is no NVIDIA GPU. What the compiler refuses is an error of the evaluation.
    pub fn call<const N: usize, const M: usize>(&self, inputs: [&Array; N], launch: &Launch<'_>) -> Result<[Array; M]> {
        install_error_handler();
        let function = Function::new(self)?;
        let config = Config::new(launch)?;
        let inputs = ArrayList::of(&inputs.map(Array::clone))?;
        let mut outputs = ArrayList::empty();
        let stream = Stream::thread_local_or_default();
        // SAFETY: all handles are live; MLX copies what it keeps.
        let status = unsafe {
            mlx_sys::mlx_fast_cuda_kernel_apply(
                outputs.as_mut_ptr(),
                function.0,
                inputs.handle(),
                config.0,
                stream.as_ptr(),
            )
        };
        check(status, self.name)?;
        exactly(outputs.to_vec()?)
    }
}

/// An owned kernel handle.
struct Function(mlx_sys::mlx_fast_cuda_kernel);

impl Function {
    fn new(kernel: &CudaKernel) -> Result<Self> {
        let [name, source, header] = [kernel.name, kernel.source, kernel.header].map(text);
        let (inputs, outputs) = (Names::new(kernel.inputs), Names::new(kernel.outputs));
        // SAFETY: texts and lists are live and NUL-terminated; MLX copies them.
        Ok(Self(unsafe {
            mlx_sys::mlx_fast_cuda_kernel_new(
                name?.as_ptr(),
                inputs?.0,
                outputs?.0,
                source?.as_ptr(),
                header?.as_ptr(),
                true,
                0,
            )
        }))
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_free(self.0) };
    }
}

/// An owned list of texts.
struct Names(mlx_sys::mlx_vector_string);

impl Names {
    fn new(names: &[&'static str]) -> Result<Self> {
        let texts: Vec<CString> = names.iter().map(|name| text(name)).collect::<Result<_>>()?;
        let mut pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        // SAFETY: the pointers are live for the call, which copies the texts.
        Ok(Self(unsafe {
            mlx_sys::mlx_vector_string_new_data(pointers.as_mut_ptr(), pointers.len())
        }))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { mlx_sys::mlx_vector_string_free(self.0) };
    }
}

/// An owned launch configuration.
struct Config(mlx_sys::mlx_fast_cuda_kernel_config);

impl Config {
    fn new(launch: &Launch<'_>) -> Result<Self> {
        // SAFETY: created here, freed on drop.
        let config = Self(unsafe { mlx_sys::mlx_fast_cuda_kernel_config_new() });
        let [x, y] = launch.blocks;
        // MLX counts threads, not blocks.
        let (grid, threads) = ((x * launch.threads, y), launch.threads);
        // SAFETY: the configuration is live; shapes and names live through the calls, which copy them.
        unsafe {
            check(
                mlx_sys::mlx_fast_cuda_kernel_config_set_grid(config.0, int(grid.0)?, int(grid.1)?, 1),
                "set the grid of a kernel",
            )?;
            check(
                mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(config.0, int(threads)?, 1, 1),
                "set the block of a kernel",
            )?;
            for (shape, dtype) in launch.outputs {
                check(
                    mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(
                        config.0,
                        shape.as_ptr(),
                        shape.len(),
                        (*dtype).into(),
                    ),
                    "add an output to a kernel",
                )?;
            }
            for (name, value) in launch.constants {
                check(
                    mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_int(
                        config.0,
                        text(name)?.as_ptr(),
                        int(*value)?,
                    ),
                    "add a constant to a kernel",
                )?;
            }
            check(
                mlx_sys::mlx_fast_cuda_kernel_config_add_template_arg_dtype(
                    config.0,
                    c"T".as_ptr(),
                    launch.element.into(),
                ),
                "add a type to a kernel",
            )?;
        }
        Ok(config)
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // SAFETY: owned, freed once.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_config_free(self.0) };
    }
}

fn text(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::Operation(format!("a kernel's text holds a NUL: {text:.40}")))
}

fn int(value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::DimensionTooLarge { shape: vec![value] })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD: CudaKernel = CudaKernel {
        name: "planish_test_add",
        inputs: &["x", "y"],
        outputs: &["z"],
        header: "",
        source: "int i = blockIdx.x * THREADS + threadIdx.x; if (i < N) z[i] = x[i] + y[i];",
    };

    #[test]
    fn kernel_runs_on_a_gpu_and_is_refused_elsewhere() {
        let x = Array::from_slice(&[1_f32, 2.0, 3.0], &[3]);
        let launch = Launch {
            blocks: [1, 1],
            threads: 32,
            constants: &[("THREADS", 32), ("N", 3)],
            element: Dtype::Float32,
            outputs: &[(&[3], Dtype::Float32)],
        };
        let outcome: Result<[Array; 1]> = ADD.call([&x, &x], &launch);
        if is_supported().unwrap() {
            let [z] = outcome.unwrap();
            assert_eq!(z.as_slice::<f32>(), &[2.0, 4.0, 6.0]);
        } else {
            assert!(matches!(outcome, Err(Error::Mlx { .. })), "{outcome:?}");
        }
    }
}

//! Operations of our own on MLX's CPU stream: Rust functions over plain slices, lazily evaluated like any other.

#![allow(unsafe_code)] // memory of MLX is lent to Rust as slices

use std::ffi::{CString, c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use mlx_rs::{Array, Dtype};

use crate::ops::exactly;
use crate::raw::{ArrayList, check};
use crate::{Error, Result, install_error_handler};

/// Adds a call of `kernel` to the graph and returns its outputs, not yet evaluated.
///
/// When an output is wanted, MLX's CPU stream calls `kernel` once with the inputs' memory and uninitialised memory for
/// every output, which it must fill. Inputs are row-contiguous. The operation has no gradient: give it one with
/// [`custom_vjp`](crate::transforms::custom_vjp). It runs on the CPU whatever the default device is.
///
/// A kernel that panics fails the evaluation, not the process.
///
/// # Errors
/// [`Error::HostKernelDtype`] for an input or output that is not of a four-byte type; [`Error::Mlx`].
///
/// # Example
/// ```
/// use planish_mlx::{Array, Error, host_kernel::{host_kernel, OutputSpec}};
/// let x = Array::from_slice(&[1_f32, 2.0, 3.0], &[3]);
/// let [doubled] = host_kernel("double", [&x], [OutputSpec::f32(&[3])], |[x], [y]| {
///     for (y, x) in y.f32_mut().iter_mut().zip(x.f32()) {
///         *y = 2.0 * x;
///     }
/// })?;
/// assert_eq!(doubled.as_slice::<f32>(), &[2.0, 4.0, 6.0]);
/// # Ok::<(), Error>(())
/// ```
pub fn host_kernel<F, const N: usize, const M: usize>(
    name: &'static str,
    inputs: [&Array; N],
    outputs: [OutputSpec; M],
    kernel: F,
) -> Result<[Array; M]>
where
    F: Fn(&[Input<'_>; N], &mut [Output<'_>; M]) + Send + Sync + 'static,
{
    let kernel = move |inputs: &[Input<'_>], outputs: &mut [Output<'_>]| match (inputs.try_into(), outputs.try_into()) {
        (Ok(inputs), Ok(outputs)) => kernel(inputs, outputs),
        _ => unreachable!("{name} gets {N} inputs and {M} outputs"),
    };
    exactly(host_kernel_many(name, &inputs.map(Array::clone), &outputs, kernel)?)
}

/// [`host_kernel`] for arrays whose number is known when the program runs.
///
/// # Errors
/// As there.
pub fn host_kernel_many<F>(
    name: &'static str,
    inputs: &[Array],
    outputs: &[OutputSpec],
    kernel: F,
) -> Result<Vec<Array>>
where
    F: Fn(&[Input<'_>], &mut [Output<'_>]) + Send + Sync + 'static,
{
    install_error_handler();
    let dtypes = inputs
        .iter()
        .map(Array::dtype)
        .chain(outputs.iter().map(|spec| spec.dtype));
    if let Some(dtype) = dtypes
        .into_iter()
        .find(|dtype| !matches!(dtype, Dtype::Float32 | Dtype::Int32 | Dtype::Uint32))
    {
        return Err(Error::HostKernelDtype { kernel: name, dtype });
    }
    let shapes: Vec<c_int> = outputs.iter().flat_map(|spec| spec.shape.iter().copied()).collect();
    let ndims: Vec<usize> = outputs.iter().map(|spec| spec.shape.len()).collect();
    let dtypes: Vec<mlx_sys::mlx_dtype> = outputs
        .iter()
        .map(|spec| mlx_sys::mlx_dtype::from(spec.dtype))
        .collect();
    let c_name = CString::new(name).unwrap_or_default();
    let inputs = ArrayList::of(inputs)?;
    let mut results = ArrayList::empty();
    let state = Box::into_raw(Box::new(kernel)).cast::<c_void>();
    // SAFETY: all lists live through the call and have the lengths given. The C++ side owns `state` from here on, calls
    // `run::<F>` with it, possibly on another thread (`F` is Send and Sync), and frees it by `drop_state::<F>` once.
    let status = unsafe {
        planish_host_kernel(
            results.as_mut_ptr(),
            c_name.as_ptr(),
            state,
            run::<F>,
            drop_state::<F>,
            inputs.handle(),
            shapes.as_ptr(),
            ndims.as_ptr(),
            dtypes.as_ptr(),
            outputs.len(),
        )
    };
    check(status, name)?;
    results.to_vec()
}

/// Shape and type of an output.
#[derive(Debug, Clone)]
pub struct OutputSpec {
    shape: Vec<i32>,
    dtype: Dtype,
}

impl OutputSpec {
    /// An f32 array.
    pub fn f32(shape: &[i32]) -> Self {
        Self {
            shape: shape.to_vec(),
            dtype: Dtype::Float32,
        }
    }
}

/// The memory of an input.
#[derive(Debug)]
pub struct Input<'a>(&'a [u32]);

impl Input<'_> {
    /// As f32. The caller knows the array's type; any bits are a number.
    pub fn f32(&self) -> &[f32] {
        // SAFETY: same size and alignment, and every bit pattern is an f32.
        unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len()) }
    }

    /// As i32.
    pub fn i32(&self) -> &[i32] {
        // SAFETY: same size and alignment, and every bit pattern is an i32.
        unsafe { slice::from_raw_parts(self.0.as_ptr().cast(), self.0.len()) }
    }

    /// As u32.
    pub fn u32(&self) -> &[u32] {
        self.0
    }
}

/// The memory of an output.
#[derive(Debug)]
pub struct Output<'a>(&'a mut [u32]);

impl Output<'_> {
    /// As f32.
    pub fn f32_mut(&mut self) -> &mut [f32] {
        // SAFETY: same size and alignment, and every bit pattern is valid both ways.
        unsafe { slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), self.0.len()) }
    }
}

/// One input or output as the C++ side describes it.
#[repr(C)]
struct Buffer {
    data: *mut c_void,
    bytes: usize,
}

type Run = unsafe extern "C" fn(*mut c_void, *const Buffer, usize, *const Buffer, usize) -> c_int;
type DropState = unsafe extern "C" fn(*mut c_void);

unsafe extern "C" {
    fn planish_host_kernel(
        result: *mut mlx_sys::mlx_vector_array,
        name: *const c_char,
        state: *mut c_void,
        run: Run,
        drop: DropState,
        inputs: mlx_sys::mlx_vector_array,
        shapes: *const c_int,
        ndims: *const usize,
        dtypes: *const mlx_sys::mlx_dtype,
        n_outputs: usize,
    ) -> c_int;
}

/// # Safety
/// `state` is a boxed `F`; both lists describe live memory of four-byte elements that nothing else writes.
unsafe extern "C" fn run<F>(
    state: *mut c_void,
    inputs: *const Buffer,
    n_inputs: usize,
    outputs: *const Buffer,
    n_outputs: usize,
) -> c_int
where
    F: Fn(&[Input<'_>], &mut [Output<'_>]) + Send + Sync + 'static,
{
    // SAFETY: promised by the caller. MLX's allocations are aligned for every type; an empty array's pointer may be null.
    let outcome = catch_unwind(AssertUnwindSafe(|| unsafe {
        let kernel = &*state.cast::<F>();
        let list = |buffers: *const Buffer, count: usize| slice::from_raw_parts(buffers, count).iter();
        let inputs: Vec<Input<'_>> = list(inputs, n_inputs).map(|buffer| Input(words(buffer))).collect();
        let mut outputs: Vec<Output<'_>> = list(outputs, n_outputs)
            .map(|buffer| Output(words_mut(buffer)))
            .collect();
        kernel(&inputs, &mut outputs);
    }));
    c_int::from(outcome.is_err())
}

/// # Safety
/// `state` is a boxed `F` that nothing refers to any more.
unsafe extern "C" fn drop_state<F>(state: *mut c_void) {
    // SAFETY: promised by the caller.
    drop(unsafe { Box::from_raw(state.cast::<F>()) });
}

/// # Safety
/// The buffer describes live memory.
unsafe fn words<'a>(buffer: &Buffer) -> &'a [u32] {
    if buffer.bytes == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { slice::from_raw_parts(buffer.data.cast(), buffer.bytes / 4) }
}

/// # Safety
/// The buffer describes live memory that nothing else refers to.
unsafe fn words_mut<'a>(buffer: &Buffer) -> &'a mut [u32] {
    if buffer.bytes == 0 {
        return &mut [];
    }
    // SAFETY: promised by the caller.
    unsafe { slice::from_raw_parts_mut(buffer.data.cast(), buffer.bytes / 4) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn negate(x: &Array) -> Result<Array> {
        let [y] = host_kernel("negate", [x], [OutputSpec::f32(x.shape())], |[x], [y]| {
            for (y, x) in y.f32_mut().iter_mut().zip(x.f32()) {
                *y = -x;
            }
        })?;
        Ok(y)
    }

    #[test]
    fn inputs_arrive_row_contiguous() {
        let x = Array::from_slice(&[1_f32, 2.0, 3.0, 4.0, 5.0, 6.0], &[2, 3]);
        let y = negate(&x.t()).unwrap();
        assert_eq!(y.shape(), &[3, 2]);
        assert_eq!(y.as_slice::<f32>(), &[-1.0, -4.0, -2.0, -5.0, -3.0, -6.0]);
    }

    #[test]
    fn kernels_chain_with_other_operations() {
        let x = Array::from_slice(&[1_f32, -2.0], &[2]);
        let y = negate(&x.add(Array::from_f32(1.0)).unwrap()).unwrap();
        let z = y.multiply(Array::from_f32(3.0)).unwrap();
        assert_eq!(z.as_slice::<f32>(), &[-6.0, 3.0]);
    }

    #[test]
    fn what_a_kernel_captures_lives_until_it_ran_and_is_freed_once() {
        let factor = std::sync::Arc::new(3_f32);
        let captured = factor.clone();
        let x = Array::from_slice(&[1_f32, 2.0], &[2]);
        let [y] = host_kernel("scale", [&x], [OutputSpec::f32(&[2])], move |[x], [y]| {
            for (y, x) in y.f32_mut().iter_mut().zip(x.f32()) {
                *y = *captured * x;
            }
        })
        .unwrap();
        assert_eq!(std::sync::Arc::strong_count(&factor), 2);
        assert_eq!(y.as_slice::<f32>(), &[3.0, 6.0]);
        drop(y);
        // The stream may still hold its task for a moment.
        for _ in 0..1000 {
            if std::sync::Arc::strong_count(&factor) == 1 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("{} owners are left", std::sync::Arc::strong_count(&factor));
    }

    #[test]
    fn several_outputs_of_different_shapes() {
        let x = Array::from_slice(&[1_f32, 2.0, 3.0, 4.0], &[2, 2]);
        let specs = [OutputSpec::f32(&[2]), OutputSpec::f32(&[])];
        let [of_rows, of_all] = host_kernel("sums", [&x], specs, |[x], [of_rows, of_all]| {
            let rows: Vec<f32> = x.f32().chunks(2).map(|row| row.iter().sum()).collect();
            of_all.f32_mut()[0] = rows.iter().sum();
            of_rows.f32_mut().copy_from_slice(&rows);
        })
        .unwrap();
        assert_eq!(of_rows.as_slice::<f32>(), &[3.0, 7.0]);
        assert_eq!(of_all.item_exact::<f32>(), 10.0);
    }

    #[test]
    fn err_panic_in_a_kernel_fails_the_evaluation() {
        let x = Array::from_slice(&[1_f32], &[1]);
        let [y] = host_kernel("broken", [&x], [OutputSpec::f32(&[1])], |_, _| panic!("on purpose")).unwrap();
        let error = y.eval().unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
        let x = Array::from_slice(&[1_f32], &[1]);
        assert_eq!(negate(&x).unwrap().as_slice::<f32>(), &[-1.0], "the stream still works");
    }

    #[test]
    fn err_dtype_that_kernels_do_not_take() {
        let x = Array::from_slice(&[true], &[1]);
        assert!(matches!(
            negate(&x),
            Err(Error::HostKernelDtype { dtype: Dtype::Bool, .. })
        ));
    }
}

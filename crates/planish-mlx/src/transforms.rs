//! Gradients: of a function, through a recomputed function (activation checkpointing), by a hand-written rule. And
//! functions that are traced once and called often ([`Compiled`]).
//!
//! A function given to these transforms is pure: what it computes depends on its arguments, and gradients flow to its
//! arguments only. Arrays that it captures are constants.
//!
//! Errors pass through MLX unchanged: what the function returns as `Err` is what the transform returns. A panic inside
//! the function resumes on the caller's side.

#![allow(unsafe_code)] // closures cross the C boundary

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::c_void;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use mlx_rs::Array;

use crate::raw::{self, ArrayList, check};
use crate::{Error, install_error_handler, ops};

/// What a differentiated function may fail with: any error type that can also hold this crate's [`Error`].
pub trait CallbackError: std::error::Error + From<Error> + 'static {}

impl<E: std::error::Error + From<Error> + 'static> CallbackError for E {}

/// The outputs of `function` at `arguments`, and the gradient of the first output with respect to the listed arguments.
///
/// The first output must be a scalar; the others are passed through (auxiliary values). Nothing is evaluated.
///
/// # Errors
/// What `function` returns; [`Error::NoSuchArgument`]; [`Error::NotScalar`].
///
/// # Example
/// ```
/// use planish_mlx::{Array, Error, transforms::value_and_grad};
/// let x = Array::from_f32(3.0);
/// let y = Array::from_f32(5.0);
/// let (outputs, grads) = value_and_grad(|a| Ok::<_, Error>(vec![a[0].multiply(&a[1])?]), &[x, y], &[1])?;
/// assert_eq!(outputs[0].item_exact::<f32>(), 15.0);
/// assert_eq!(grads[0].item_exact::<f32>(), 3.0);
/// # Ok::<(), Error>(())
/// ```
pub fn value_and_grad<E, F>(
    mut function: F,
    arguments: &[Array],
    with_respect_to: &[usize],
) -> Result<(Vec<Array>, Vec<Array>), E>
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E>,
{
    install_error_handler();
    let argument_numbers = argument_numbers(with_respect_to, arguments.len())?;
    let inputs = ArrayList::of(arguments)?;
    let (mut outputs, mut gradients) = (ArrayList::empty(), ArrayList::empty());
    let mut scalar_function = |arguments: &[Array]| {
        let outputs = function(arguments)?;
        match outputs.first() {
            Some(loss) if loss.ndim() == 0 => Ok(outputs),
            loss => Err(Error::NotScalar {
                shape: loss.map(|array| array.shape().to_vec()),
            }
            .into()),
        }
    };
    let closure = borrowing::<E, _>(&mut scalar_function);
    forget_failure();
    // SAFETY: all handles live until the end of the block. The closure borrows `function`, and nothing that MLX keeps
    // refers to it: value_and_grad traces the function once, inside `apply`.
    let status = unsafe {
        let mut transformed = mlx_sys::mlx_closure_value_and_grad_new();
        let mut status = mlx_sys::mlx_value_and_grad(
            &mut transformed,
            closure.0,
            argument_numbers.as_ptr(),
            argument_numbers.len(),
        );
        if status == 0 {
            status = mlx_sys::mlx_closure_value_and_grad_apply(
                outputs.as_mut_ptr(),
                gradients.as_mut_ptr(),
                transformed,
                inputs.handle(),
            );
        }
        mlx_sys::mlx_closure_value_and_grad_free(transformed);
        status
    };
    outcome::<E>(status, "differentiate a function")?;
    Ok((outputs.to_vec()?, gradients.to_vec()?))
}

/// Calls `function` and keeps only `inputs` for the backward pass, which computes the rest again.
///
/// Activation checkpointing: values and gradients equal those of a plain call. Gradients flow to `inputs` only, so
/// trainable parameters must be among them.
///
/// # Errors
/// What `function` returns, now or in the backward pass.
///
/// # Example
/// ```
/// use planish_mlx::{Array, Error, transforms::{checkpoint, value_and_grad}};
/// let square = |a: &[Array]| Ok::<_, Error>(vec![a[0].square()?]);
/// let (_, grads) = value_and_grad(|a| checkpoint(square, a), &[Array::from_f32(3.0)], &[0])?;
/// assert_eq!(grads[0].item_exact::<f32>(), 6.0);
/// # Ok::<(), Error>(())
/// ```
pub fn checkpoint<E, F>(function: F, inputs: &[Array]) -> Result<Vec<Array>, E>
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E> + 'static,
{
    let forward = Rc::new(RefCell::new(function));
    let again = forward.clone();
    custom_vjp_many(
        move |inputs: &[Array]| (*forward.borrow_mut())(inputs),
        move |inputs: &[Array], cotangents: &[Array], outputs: &[Array]| {
            recomputed_gradients(&mut *again.borrow_mut(), inputs, cotangents, outputs)
        },
        inputs,
    )
}

/// The gradients of `function`, computed from `inputs` alone, and not before the backward pass has come to it: a lazy
/// graph would else compute everything again at once, and a compiled one would find that it has it already.
fn recomputed_gradients<E, F>(
    function: &mut F,
    inputs: &[Array],
    cotangents: &[Array],
    outputs: &[Array],
) -> Result<Vec<Array>, E>
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E>,
{
    let now: Vec<Array> = cotangents.iter().chain(outputs).cloned().collect();
    let again = ops::all_after(inputs, &now)?;
    let differentiable: Vec<usize> = (0..inputs.len()).filter(|&i| inputs[i].dtype().is_float()).collect();
    let primals: Vec<Array> = differentiable.iter().map(|&i| again[i].clone()).collect();
    let mut at = again.clone();
    let of_primals = |primals: &[Array]| {
        for (&i, primal) in differentiable.iter().zip(primals) {
            at[i] = primal.clone();
        }
        function(&at)
    };
    let mut gradients = vjp(of_primals, &primals, cotangents)?.into_iter();
    let mut all = Vec::with_capacity(inputs.len());
    for (i, input) in inputs.iter().enumerate() {
        all.push(match differentiable.contains(&i).then(|| gradients.next()).flatten() {
            Some(gradient) => gradient,
            None => mlx_rs::ops::zeros_like(input).map_err(Error::from)?,
        });
    }
    Ok(all)
}

/// The gradients of `Σ cotangents · function(primals)`.
fn vjp<E, F>(mut function: F, primals: &[Array], cotangents: &[Array]) -> Result<Vec<Array>, E>
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E>,
{
    let closure = borrowing::<E, _>(&mut function);
    let (primals, cotangents) = (ArrayList::of(primals)?, ArrayList::of(cotangents)?);
    let (mut outputs, mut gradients) = (ArrayList::empty(), ArrayList::empty());
    forget_failure();
    // SAFETY: all handles are live. The closure borrows `function`, which MLX calls once, inside this call.
    let status = unsafe {
        mlx_sys::mlx_vjp(
            outputs.as_mut_ptr(),
            gradients.as_mut_ptr(),
            closure.0,
            primals.handle(),
            cotangents.handle(),
        )
    };
    outcome::<E>(status, "differentiate a recomputed function")?;
    Ok(gradients.to_vec()?)
}

/// Calls `forward`, whose gradient is what `backward` says.
///
/// `backward(inputs, cotangents, outputs)` returns one gradient for each input, in the input's shape and dtype. It is
/// called in the backward pass only.
///
/// # Errors
/// What `forward` or `backward` return.
///
/// # Example
/// ```
/// use planish_mlx::{Array, Error, transforms::{custom_vjp, value_and_grad}};
/// // The identity, with a gradient ten times too large.
/// let identity = |[x]: &[Array; 1]| Ok::<_, Error>([x.clone()]);
/// let backward = |_: &[Array; 1], [of_y]: &[Array; 1], _: &[Array; 1]| Ok([of_y.multiply(Array::from_f32(10.0))?]);
/// let objective = |a: &[Array]| Ok::<_, Error>(custom_vjp(identity, backward, [&a[0]])?.to_vec());
/// let (_, grads) = value_and_grad(objective, &[Array::from_f32(3.0)], &[0])?;
/// assert_eq!(grads[0].item_exact::<f32>(), 10.0);
/// # Ok::<(), Error>(())
/// ```
pub fn custom_vjp<E, F, B, const N: usize, const M: usize>(
    mut forward: F,
    mut backward: B,
    inputs: [&Array; N],
) -> Result<[Array; M], E>
where
    E: CallbackError,
    F: FnMut(&[Array; N]) -> Result<[Array; M], E> + 'static,
    B: FnMut(&[Array; N], &[Array; M], &[Array; M]) -> Result<[Array; N], E> + 'static,
{
    let outputs = custom_vjp_many::<E, _, _>(
        move |inputs: &[Array]| Ok(forward(of_known_length(inputs)?)?.to_vec()),
        move |inputs: &[Array], cotangents: &[Array], outputs: &[Array]| {
            let outputs = of_known_length(outputs)?;
            Ok(backward(of_known_length(inputs)?, of_known_length(cotangents)?, outputs)?.to_vec())
        },
        &inputs.map(Array::clone),
    )?;
    Ok(ops::exactly(outputs)?)
}

fn of_known_length<const N: usize>(arrays: &[Array]) -> Result<&[Array; N], Error> {
    arrays.try_into().map_err(|_| Error::ArrayCount {
        expected: N,
        found: arrays.len(),
    })
}

/// [`custom_vjp`] for arrays whose number is known when the program runs.
///
/// # Errors
/// What `forward` or `backward` return.
pub fn custom_vjp_many<E, F, B>(forward: F, backward: B, inputs: &[Array]) -> Result<Vec<Array>, E>
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E> + 'static,
    B: FnMut(&[Array], &[Array], &[Array]) -> Result<Vec<Array>, E> + 'static,
{
    install_error_handler();
    let forward = Closure::owning::<E, F>(forward);
    let backward = GradientRule::owning::<E, B>(backward);
    let mut transformed = Closure::empty();
    // SAFETY: the handles are live; the transformed closure shares both payloads.
    check(
        unsafe { mlx_sys::mlx_custom_vjp(&mut transformed.0, forward.0, backward.0) },
        "attach a gradient to a function",
    )?;
    transformed.call(inputs)
}

/// A function that is traced once for each combination of shapes and types of its arguments, simplified, its chains of
/// element-wise operations fused into kernels of their own, and from then on called without running any of its Rust.
///
/// So whatever differs from call to call must be an argument: what the function captures, and every number that it takes
/// from elsewhere, stays as it was when it was traced. Captured arrays must be evaluated before, else every call computes
/// them again. Nothing may be evaluated inside.
///
/// MLX keeps a trace for each combination, until this value is dropped: their number must be bounded. On the CPU the
/// fused kernels go through a C++ compiler when they first run. Belongs to the thread that made it.
///
/// # Example
/// ```no_run
/// use planish_mlx::{Array, Error, transforms::Compiled};
/// let mut silu = Compiled::new(|a: &[Array]| Ok::<_, Error>(vec![a[0].multiply(mlx_rs::ops::sigmoid(&a[0])?)?]))?;
/// let y = silu.call(&[Array::from_f32(0.0)])?;
/// assert_eq!(y[0].item_exact::<f32>(), 0.0);
/// # Ok::<(), Error>(())
/// ```
pub struct Compiled<E> {
    traced: Closure,
    traces: Rc<Cell<usize>>,
    error: PhantomData<fn() -> E>,
}

impl<E: CallbackError> Compiled<E> {
    /// Prepares `function`, which is first called when this is.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn new<F>(function: F) -> Result<Self, Error>
    where
        F: FnMut(&[Array]) -> Result<Vec<Array>, E> + 'static,
    {
        install_error_handler();
        let traces = Rc::new(Cell::new(0));
        let (mut run, count) = (function, traces.clone());
        let function = Closure::owning::<E, _>(move |arguments: &[Array]| {
            count.set(count.get() + 1);
            run(arguments)
        });
        Ok(Self {
            traced: function.compiled()?,
            traces,
            error: PhantomData,
        })
    }

    /// The outputs at `arguments`, not yet evaluated.
    ///
    /// # Errors
    /// What the function returns while it is traced; [`Error::Mlx`].
    pub fn call(&mut self, arguments: &[Array]) -> Result<Vec<Array>, E> {
        self.traced.call::<E>(arguments)
    }

    /// How often the function itself has run.
    pub fn traces(&self) -> usize {
        self.traces.get()
    }
}

impl<E> std::fmt::Debug for Compiled<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compiled").field("traces", &self.traces.get()).finish()
    }
}

fn argument_numbers(with_respect_to: &[usize], count: usize) -> Result<Vec<i32>, Error> {
    with_respect_to
        .iter()
        .map(|&index| match i32::try_from(index) {
            Ok(number) if index < count => Ok(number),
            _ => Err(Error::NoSuchArgument { index, count }),
        })
        .collect()
}

/// An owned closure handle of the C layer.
struct Closure(mlx_sys::mlx_closure);

impl Closure {
    fn empty() -> Self {
        // SAFETY: creates an empty handle, freed on drop.
        Self(unsafe { mlx_sys::mlx_closure_new() })
    }

    fn owning<E, F>(function: F) -> Self
    where
        E: CallbackError,
        F: FnMut(&[Array]) -> Result<Vec<Array>, E> + 'static,
    {
        let payload = Box::into_raw(Box::new(function)).cast::<c_void>();
        // SAFETY: the payload is a boxed `F`; MLX frees it through `free_payload` when the last reference goes.
        Self(unsafe {
            mlx_sys::mlx_closure_new_func_payload(Some(call_function::<E, F>), payload, Some(free_payload::<F>))
        })
    }

    /// The same function, traced.
    fn compiled(&self) -> Result<Self, Error> {
        let mut transformed = Self::empty();
        // SAFETY: both handles are live; the compiled closure shares the payload of the first.
        check(
            unsafe { mlx_sys::mlx_compile(&mut transformed.0, self.0, false) },
            "compile a function",
        )?;
        Ok(transformed)
    }

    fn call<E: CallbackError>(&self, inputs: &[Array]) -> Result<Vec<Array>, E> {
        let inputs = ArrayList::of(inputs)?;
        let mut outputs = ArrayList::empty();
        forget_failure();
        // SAFETY: all handles are live.
        let status = unsafe { mlx_sys::mlx_closure_apply(outputs.as_mut_ptr(), self.0, inputs.handle()) };
        outcome::<E>(status, "call a transformed function")?;
        Ok(outputs.to_vec()?)
    }
}

impl Drop for Closure {
    fn drop(&mut self) {
        // SAFETY: the handle is owned.
        unsafe { mlx_sys::mlx_closure_free(self.0) };
    }
}

/// A closure over a borrowed function; it must not be called after the borrow ends.
fn borrowing<E, F>(function: &mut F) -> Closure
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E>,
{
    let payload = std::ptr::from_mut(function).cast::<c_void>();
    // SAFETY: the payload is a live `F`, which the trampoline expects; nothing frees it.
    Closure(unsafe { mlx_sys::mlx_closure_new_func_payload(Some(call_function::<E, F>), payload, None) })
}

/// An owned handle of a backward function.
struct GradientRule(mlx_sys::mlx_closure_custom);

impl GradientRule {
    fn owning<E, B>(backward: B) -> Self
    where
        E: CallbackError,
        B: FnMut(&[Array], &[Array], &[Array]) -> Result<Vec<Array>, E> + 'static,
    {
        let payload = Box::into_raw(Box::new(backward)).cast::<c_void>();
        // SAFETY: the payload is a boxed `B`; MLX frees it through `free_payload` when the last reference goes.
        Self(unsafe {
            mlx_sys::mlx_closure_custom_new_func_payload(
                Some(call_gradient_rule::<E, B>),
                payload,
                Some(free_payload::<B>),
            )
        })
    }
}

impl Drop for GradientRule {
    fn drop(&mut self) {
        // SAFETY: the handle is owned.
        unsafe { mlx_sys::mlx_closure_custom_free(self.0) };
    }
}

extern "C" fn call_function<E, F>(
    outputs: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
    payload: *mut c_void,
) -> i32
where
    E: CallbackError,
    F: FnMut(&[Array]) -> Result<Vec<Array>, E>,
{
    guarded::<E>(outputs, || {
        // SAFETY: the payload is the `F` that was registered together with this trampoline.
        let function = unsafe { &mut *payload.cast::<F>() };
        function(&raw::to_vec(inputs)?)
    })
}

extern "C" fn call_gradient_rule<E, B>(
    gradients: *mut mlx_sys::mlx_vector_array,
    inputs: mlx_sys::mlx_vector_array,
    cotangents: mlx_sys::mlx_vector_array,
    outputs: mlx_sys::mlx_vector_array,
    payload: *mut c_void,
) -> i32
where
    E: CallbackError,
    B: FnMut(&[Array], &[Array], &[Array]) -> Result<Vec<Array>, E>,
{
    guarded::<E>(gradients, || {
        // SAFETY: the payload is the `B` that was registered together with this trampoline.
        let backward = unsafe { &mut *payload.cast::<B>() };
        backward(&raw::to_vec(inputs)?, &raw::to_vec(cotangents)?, &raw::to_vec(outputs)?)
    })
}

extern "C" fn free_payload<T>(payload: *mut c_void) {
    // A destructor that panics must not unwind into C++; there is nobody left to tell.
    let _ = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the payload came from `Box::into_raw` of the same type and is freed once.
        drop(unsafe { Box::from_raw(payload.cast::<T>()) });
    }));
}

/// Runs a Rust function for MLX: hands over its arrays, or stores its error or panic and reports failure.
fn guarded<E: CallbackError>(
    outputs: *mut mlx_sys::mlx_vector_array,
    function: impl FnOnce() -> Result<Vec<Array>, E>,
) -> i32 {
    let result = catch_unwind(AssertUnwindSafe(|| {
        let arrays = function()?;
        // SAFETY: MLX passes a pointer to its result list, which is null until it is filled.
        Ok(unsafe { raw::fill(outputs, &arrays) }?)
    }));
    match result {
        Ok(Ok(())) => return 0,
        Ok(Err(error)) => remember(Failure::Error {
            text: E::to_string(&error),
            error: Box::new(error),
        }),
        Err(panic) => remember(Failure::Panic(panic)),
    }
    1
}

/// Why a function that MLX called did not finish.
enum Failure {
    Error { text: String, error: Box<dyn Any> },
    Panic(Box<dyn Any + Send>),
}

thread_local! {
    static FAILURE: RefCell<Option<Failure>> = const { RefCell::new(None) };
}

fn remember(failure: Failure) {
    FAILURE.with(|slot| slot.replace(Some(failure)));
}

fn forget_failure() {
    FAILURE.with(|slot| slot.take());
}

/// The result of a call that may have run Rust functions: their own failure wins over MLX's report of it.
fn outcome<E: CallbackError>(status: i32, operation: &'static str) -> Result<(), E> {
    let report = check(status, operation);
    if status == 0 {
        return Ok(());
    }
    match FAILURE.with(|slot| slot.take()) {
        Some(Failure::Panic(panic)) => resume_unwind(panic),
        Some(Failure::Error { error, text }) => Err(match error.downcast::<E>() {
            Ok(error) => *error,
            Err(_) => Error::Callback(text).into(),
        }),
        None => Ok(report?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum TestError {
        #[error("refused on purpose")]
        Refused,
        #[error(transparent)]
        Mlx(#[from] Error),
        #[error("{0}")]
        Operation(String),
    }

    impl From<mlx_rs::error::Exception> for TestError {
        fn from(exception: mlx_rs::error::Exception) -> Self {
            TestError::Operation(exception.what().to_owned())
        }
    }

    fn scalar(value: f32) -> Array {
        Array::from_f32(value)
    }

    #[test]
    fn auxiliary_outputs_pass_through_without_gradient() {
        let (outputs, grads) = value_and_grad(
            |a| Ok::<_, TestError>(vec![a[0].square()?, a[0].multiply(scalar(100.0))?]),
            &[scalar(3.0)],
            &[0],
        )
        .unwrap();
        assert_eq!(outputs[0].item_exact::<f32>(), 9.0);
        assert_eq!(outputs[1].item_exact::<f32>(), 300.0);
        assert_eq!(grads.len(), 1);
        assert_eq!(grads[0].item_exact::<f32>(), 6.0);
    }

    #[test]
    fn err_of_the_function_is_returned_unchanged() {
        let result = value_and_grad(|_| Err(TestError::Refused), &[scalar(1.0)], &[0]);
        assert!(matches!(result, Err(TestError::Refused)));
    }

    #[test]
    fn err_inside_a_checkpoint_reaches_the_outer_caller() {
        let result = value_and_grad(
            |a| checkpoint(|_: &[Array]| Err::<Vec<Array>, _>(TestError::Refused), a),
            &[scalar(1.0)],
            &[0],
        );
        assert!(matches!(result, Err(TestError::Refused)));
    }

    #[test]
    fn err_in_the_backward_rule_reaches_the_outer_caller() {
        let forward = |[x]: &[Array; 1]| Ok::<_, TestError>([x.clone()]);
        let backward = |_: &[Array; 1], _: &[Array; 1], _: &[Array; 1]| Err(TestError::Refused);
        let objective = |a: &[Array]| Ok(custom_vjp(forward, backward, [&a[0]])?.to_vec());
        let result = value_and_grad(objective, &[scalar(1.0)], &[0]);
        assert!(matches!(result, Err(TestError::Refused)));
    }

    #[test]
    fn err_of_mlx_keeps_its_message_and_does_not_end_the_process() {
        let result = value_and_grad(
            |a| Ok::<_, TestError>(vec![a[0].matmul(&a[1])?]),
            &[
                Array::zeros::<f32>(&[2, 3]).unwrap(),
                Array::zeros::<f32>(&[2, 3]).unwrap(),
            ],
            &[0],
        );
        let Err(TestError::Operation(message)) = result else {
            panic!("expected an error of mlx-rs")
        };
        assert!(message.contains("matmul"), "{message}");
    }

    #[test]
    fn err_when_the_loss_is_no_scalar() {
        let zeros = Array::zeros::<f32>(&[2]).unwrap();
        let result = value_and_grad(|a| Ok::<_, Error>(a.to_vec()), &[zeros], &[0]);
        assert!(matches!(result, Err(Error::NotScalar { shape: Some(shape) }) if shape == [2]));
    }

    #[test]
    fn err_argument_that_does_not_exist() {
        let result = value_and_grad(|a| Ok::<_, Error>(a.to_vec()), &[scalar(1.0)], &[1]);
        assert!(matches!(result, Err(Error::NoSuchArgument { index: 1, count: 1 })));
    }

    #[test]
    fn panic_resumes_with_its_payload() {
        let caught = catch_unwind(|| value_and_grad::<Error, _>(|_| panic!("on purpose"), &[scalar(1.0)], &[0]));
        assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
    }

    #[test]
    fn checkpoint_passes_arguments_without_gradient() {
        let values = Array::from_slice(&[1.0f32, 2.0, 3.0], &[3]);
        let indices = Array::from_slice(&[2u32, 0], &[2]);
        let pick = |a: &[Array]| Ok::<_, TestError>(vec![a[0].take_axis(&a[1], 0)?.square()?.sum(false)?]);
        let arguments = [values, indices];
        let (_, grads) = value_and_grad(|a| checkpoint(pick, a), &arguments, &[0]).unwrap();
        assert_eq!(grads[0].as_slice::<f32>(), &[2.0, 0.0, 6.0]);
    }

    /// Whether MLX finds what it compiles fused kernels of the CPU with.
    fn has_compiler() -> bool {
        let found = std::process::Command::new("g++").arg("--version").output().is_ok();
        if !found {
            println!("not run: MLX needs g++ to compile for the CPU");
        }
        found
    }

    /// `x² + c` and its gradient, counting.
    fn squares() -> Compiled<TestError> {
        let function = |a: &[Array]| {
            let square = |a: &[Array]| Ok::<_, TestError>(vec![a[0].square()?.add(&a[1])?.sum(false)?]);
            let (mut outputs, grads) = value_and_grad(square, a, &[0])?;
            outputs.extend(grads);
            Ok(outputs)
        };
        Compiled::new(function).unwrap()
    }

    #[test]
    fn compiled_function_is_traced_once_a_shape_and_reads_its_arguments() {
        if !has_compiler() {
            return;
        }
        let mut squares = squares();
        for (n, offset) in [(1, 0.0), (3, 1.0), (1, 2.0), (3, 5.0), (1, -1.0)] {
            let x = Array::from_slice(&[3.0f32, 1.0, 2.0][..n], &[n as i32]);
            let outputs = squares.call(&[x, scalar(offset)]).unwrap();
            let expected = [9.0, 10.0, 14.0][n - 1] + n as f32 * offset;
            assert_eq!(outputs[0].item_exact::<f32>(), expected);
            assert_eq!(outputs[1].as_slice::<f32>(), &[6.0, 2.0, 4.0][..n]);
        }
        assert_eq!(squares.traces(), 2);
    }

    #[test]
    fn err_and_panic_in_a_compiled_function_pass_through_and_the_next_call_traces_anew() {
        let mut calls = 0;
        let mut function = Compiled::new(move |a: &[Array]| {
            calls += 1;
            match calls {
                1 => Err(TestError::Refused),
                2 => panic!("on purpose"),
                _ => Ok(vec![a[0].clone()]),
            }
        })
        .unwrap();
        assert!(matches!(function.call(&[scalar(1.0)]), Err(TestError::Refused)));
        let caught = catch_unwind(AssertUnwindSafe(|| function.call(&[scalar(1.0)])));
        assert_eq!(*caught.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
        assert_eq!(function.call(&[scalar(4.0)]).unwrap()[0].item_exact::<f32>(), 4.0);
        assert_eq!(function.call(&[scalar(5.0)]).unwrap()[0].item_exact::<f32>(), 5.0);
        assert_eq!(function.traces(), 3);
    }

    #[test]
    fn dropped_compiled_function_frees_what_it_captured() {
        let held = Rc::new(());
        let captured = held.clone();
        let mut function = Compiled::<Error>::new(move |a: &[Array]| {
            let _ = &captured;
            Ok(vec![a[0].clone()])
        })
        .unwrap();
        function.call(&[scalar(1.0)]).unwrap();
        assert_eq!(Rc::strong_count(&held), 2);
        drop(function);
        assert_eq!(Rc::strong_count(&held), 1);
    }

    #[test]
    fn compiled_checkpoint_still_computes_again() {
        if !has_compiler() {
            return;
        }
        // Counts how often the inner function is traced: once forward, once backward.
        let inner = Rc::new(Cell::new(0));
        let count = inner.clone();
        let mut function = Compiled::<TestError>::new(move |a: &[Array]| {
            let count = count.clone();
            let cube = move |a: &[Array]| {
                count.set(count.get() + 1);
                Ok::<_, TestError>(vec![a[0].square()?.multiply(&a[0])?])
            };
            Ok(value_and_grad(|a| checkpoint(cube.clone(), a), a, &[0])?.1)
        })
        .unwrap();
        for x in [2.0, 3.0] {
            let grads = function.call(&[scalar(x)]).unwrap();
            assert_eq!(grads[0].item_exact::<f32>(), 3.0 * x * x);
        }
        assert_eq!(inner.get(), 2);
    }

    #[test]
    fn captured_arrays_get_no_gradient_from_a_checkpoint() {
        let grads = |explicit: bool| {
            let function = move |a: &[Array]| {
                let weight = a[1].clone();
                if explicit {
                    checkpoint(
                        |b: &[Array]| Ok::<_, TestError>(vec![b[0].multiply(&b[1])?]),
                        &[a[0].clone(), weight],
                    )
                } else {
                    checkpoint(
                        move |b: &[Array]| Ok::<_, TestError>(vec![b[0].multiply(&weight)?]),
                        &a[..1],
                    )
                }
            };
            value_and_grad(function, &[scalar(2.0), scalar(5.0)], &[0, 1])
                .unwrap()
                .1
        };
        assert_eq!(grads(true)[1].item_exact::<f32>(), 2.0);
        assert_eq!(grads(false)[1].item_exact::<f32>(), 0.0);
    }
}

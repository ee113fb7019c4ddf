//! From logits to the loss of each row and its gradient, by MLX's operations or by one kernel.

use mlx_rs::{
    Array, Dtype, ops,
    ops::indexing::{put_along_axis, take_along_axis},
};
use planish_mlx::cuda_kernel::{self, CudaKernel, Launch};
use planish_mlx::host_kernel::{OutputSpec, host_kernel};
use planish_mlx::transforms::custom_vjp;

use super::{HeadKernel, HeadLoss};
use crate::cross_entropy::{TokenLossOptions, scalar};
use crate::{Error, Result};

/// What rows of logits `[c, v]` cost, `[c]` in nats, and the gradient of the objective `[c, v]` in the dtype of the logits:
/// `(1 + 2z·log Z)·p − (1 − ε)·onehot − ε/v`.
pub(super) struct LogitLoss {
    pub(super) nll: Array,
    pub(super) objective: Array,
    pub(super) gradient: Array,
}

/// Losses of rows of logits. The kernels know the plain loss only; the rest is composed.
pub(super) fn logit_loss(kernel: &HeadKernel, logits: &Array, targets: &Array, how: &HeadLoss) -> Result<LogitLoss> {
    match kernel {
        HeadKernel::Cpu if how.terms.is_plain() => by_kernel(cpu_kernel, logits, targets),
        // Without a gradient to write, MLX's operations write less.
        HeadKernel::Cuda if how.terms.is_plain() && how.is_trained => by_kernel(cuda_kernel, logits, targets),
        _ => composed(logits, targets, &how.terms),
    }
}

/// By MLX's operations.
///
/// Logits are widened where they are used and not before, so that a compiled function widens, takes the exponential and narrows
/// in one kernel, and never writes the probabilities in f32. The target's own entry is written last, so that `p − 1` keeps its
/// relative precision when it is narrowed to 16 bits.
fn composed(logits: &Array, targets: &Array, options: &TokenLossOptions) -> Result<LogitLoss> {
    let index = targets.expand_dims(-1)?;
    let exact = logits.as_dtype(Dtype::Float32)?;
    let log_z = exact.logsumexp_axis(-1, false)?;
    let of_target = take_along_axis(logits, &index, -1)?.as_dtype(Dtype::Float32)?; // [c, 1]
    let nll = log_z.subtract(of_target.squeeze_axes(&[-1])?)?;
    let objective = options.objective(&nll, &log_z, || Ok(exact.mean_axis(-1, false)?))?;

    let (dtype, vocabulary) = (logits.dtype(), logits.dim(-1));
    // Else the widened logits would be kept for both uses.
    let logits = planish_mlx::ops::after(logits, std::slice::from_ref(&log_z))?;
    let gradient = probability_gradient(&logits, &log_z, options, vocabulary)?.as_dtype(dtype)?;
    let at_target = probability_gradient(&of_target, &log_z, options, vocabulary)?
        .subtract(scalar(1.0 - options.label_smoothing))?
        .as_dtype(dtype)?;
    Ok(LogitLoss {
        nll,
        objective,
        gradient: put_along_axis(&gradient, &index, &at_target, -1)?,
    })
}

/// `(1 + 2z·log Z)·p − ε/v` for logits `[c, n]`, f32; `v` is the whole vocabulary.
fn probability_gradient(logits: &Array, log_z: &Array, options: &TokenLossOptions, vocabulary: i32) -> Result<Array> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let mut gradient = logits.subtract(log_z.expand_dims(-1)?)?.exp()?; // p
    if options.z_loss != 0.0 {
        let factor = log_z.multiply(scalar(2.0 * options.z_loss))?.add(scalar(1.0))?;
        gradient = gradient.multiply(factor.expand_dims(-1)?)?;
    }
    if options.label_smoothing != 0.0 {
        gradient = gradient.subtract(scalar(options.label_smoothing / vocabulary as f32))?;
    }
    Ok(gradient)
}

/// The plain loss by a kernel that gives it together with its gradient. The gradient rule is for a head that trains.
fn by_kernel(kernel: fn(&Array, &Array) -> Result<[Array; 2]>, logits: &Array, targets: &Array) -> Result<LogitLoss> {
    let [nll, gradient] = custom_vjp(
        move |[logits, targets]: &[Array; 2]| kernel(logits, targets),
        |[logits, targets]: &[Array; 2], [of_nll, _]: &[Array; 2], [_, gradient]: &[Array; 2]| {
            let of_logits = gradient.multiply(of_nll.expand_dims(-1)?.as_dtype(logits.dtype())?)?;
            Ok::<_, Error>([of_logits, ops::zeros_like(targets)?])
        },
        [logits, targets],
    )?;
    Ok(LogitLoss {
        objective: nll.clone(),
        nll,
        gradient,
    })
}

/// On the CPU; logits are f32.
fn cpu_kernel(logits: &Array, targets: &Array) -> Result<[Array; 2]> {
    let vocabulary = logits.dim(-1) as usize;
    let specs = [OutputSpec::f32(targets.shape()), OutputSpec::f32(logits.shape())];
    let kernel = host_kernel(
        "softmax_gradient",
        [logits, targets],
        specs,
        move |[logits, targets], outputs| {
            let [nll, gradient] = outputs.each_mut().map(|output| output.f32_mut());
            let (logits, targets) = (logits.f32(), targets.i32());
            planish_kernels::on_pool(|| planish_kernels::softmax_gradients(logits, targets, vocabulary, gradient, nll));
        },
    )?;
    Ok(kernel)
}

const SOFTMAX_GRADIENT: CudaKernel = CudaKernel {
    name: "planish_cross_entropy",
    inputs: &["logits", "targets"],
    outputs: &["nll", "gradient"],
    header: cuda_kernel::VECTORS,
    source: include_str!("../cross_entropy.cu"),
};

/// On an NVIDIA GPU.
fn cuda_kernel(logits: &Array, targets: &Array) -> Result<[Array; 2]> {
    const THREADS: usize = 1024;
    let (c, n) = (logits.dim(0) as usize, logits.dim(1) as usize);
    // Rows begin at multiples of what is read at once.
    let at_once = [8, 4, 2].into_iter().find(|&v| n.is_multiple_of(v)).unwrap_or(1);
    let launch = Launch {
        blocks: [c, 1],
        threads: THREADS,
        constants: &[("N", n), ("V", at_once), ("THREADS", THREADS)],
        element: logits.dtype(),
        outputs: &[(targets.shape(), Dtype::Float32), (logits.shape(), logits.dtype())],
    };
    Ok(SOFTMAX_GRADIENT.call([logits, targets], &launch)?)
}

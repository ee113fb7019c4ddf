//! Next-token cross-entropy from hidden states that never holds the logits of more than one chunk of tokens.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops,
    ops::indexing::{put_along_axis, take_along_axis, take_axis},
    stop_gradient,
    transforms::fallible_vjp,
};

use planish_mlx::cuda_kernel::{self, CudaKernel, Launch};
use planish_mlx::host_kernel::{OutputSpec, host_kernel};
use planish_mlx::transforms::custom_vjp;

use crate::{
    Error, Result,
    cross_entropy::{TokenLoss, TokenLossOptions, scalar, target_logits},
};

/// Cross-entropy of the trained positions, `chunk_tokens` of them at a time.
///
/// Values are those of [`cross_entropy`](crate::cross_entropy()) on `head(hidden)` at [`TrainedPositions`]; untrained
/// positions do no work in the head. The gradient with respect to `hidden` is worked out together with the loss, chunk by
/// chunk, because each token's loss depends on that token's hidden state alone:
///
/// `∂objective_i/∂h_i = headᵀ((1 + 2z·log Z_i)·p_i − (1 − ε)·onehot(target_i) − ε/v)`, `p_i = softmax(head(h_i))`.
///
/// Those rows `[t, d]` are kept, and a term that is linear in `hidden` and zero in value carries them through whatever the
/// caller makes of the result. So the head runs once forward and once backward, and no `[b, l, v]` tensor exists at any
/// time. Parameters inside the head are differentiated in the ordinary way, which keeps their chunks' logits until the
/// backward pass: memory is saved only while the head is frozen.
///
/// # Shapes
/// - `hidden`: `[b, l, d]`   - `head`: maps `[c, d]` to logits `[c, v]`   - both results: `[t]`, f32, in nats
///
/// # Errors
/// [`Error::ShapeMismatch`] when the positions were made for another `b·l`; [`Error::OutOfRange`] when `chunk_tokens` is 0.
///
/// # Example
/// ```
/// use mlx_rs::Array;
/// use planish_loss::{TokenLossOptions, TrainedPositions, chunked_cross_entropy};
///
/// let hidden = Array::from_slice(&[0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6], &[1, 3, 2]);
/// let weight = Array::from_slice(&[0.0f32; 8], &[4, 2]);
/// // The first position is masked, so two losses come back; a zero head is uniform over 4 tokens.
/// let positions = TrainedPositions::select(&[0, 3, 1], &[0.0, 1.0, 1.0])?;
/// let head = |h: &Array| Ok::<_, planish_loss::Error>(h.matmul(weight.t())?);
/// let loss = chunked_cross_entropy(&hidden, &head, &positions, 1, &TokenLossOptions::default())?;
/// assert_eq!(loss.nll.shape(), [2]);
/// assert!((loss.nll.sum(false)?.item_exact::<f32>() / 2.0 - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn chunked_cross_entropy<E>(
    hidden: &Array,
    head: &Head<'_, E>,
    positions: &TrainedPositions,
    chunk_tokens: usize,
    options: &TokenLossOptions,
) -> Result<TokenLoss, E>
where
    E: From<Error> + std::fmt::Display,
{
    let losses = chunked(hidden, head, positions, chunk_tokens, &|logits, targets| {
        logit_loss(logits, targets, options)
    })?;
    Ok(losses.carried_by(with_gradient)?)
}

/// [`chunked_cross_entropy`], written for a function that is [traced](planish_mlx::transforms::Compiled) for a GPU.
///
/// The same numbers. Logits are widened where they are used and not before, so that widening, exponential and narrowing
/// are one fused kernel and the probabilities are never written in f32.
///
/// # Errors
/// As there.
pub fn chunked_cross_entropy_traced<E>(
    hidden: &Array,
    head: &Head<'_, E>,
    positions: &TrainedPositions,
    chunk_tokens: usize,
    options: &TokenLossOptions,
) -> Result<TokenLoss, E>
where
    E: From<Error> + std::fmt::Display,
{
    let losses = chunked(hidden, head, positions, chunk_tokens, &|logits, targets| {
        fused_logit_loss(logits, targets, options)
    })?;
    Ok(losses.carried_by(with_gradient_rule)?)
}

/// [`chunked_cross_entropy_traced`] with logits turned into losses and gradients by one kernel on an NVIDIA GPU.
///
/// Smoothing and z-loss, and other devices, are computed by [`chunked_cross_entropy_traced`].
///
/// # Errors
/// As there.
pub fn chunked_cross_entropy_fused<E>(
    hidden: &Array,
    head: &Head<'_, E>,
    positions: &TrainedPositions,
    chunk_tokens: usize,
    options: &TokenLossOptions,
) -> Result<TokenLoss, E>
where
    E: From<Error> + std::fmt::Display,
{
    if !options.is_plain() || !cuda_kernel::is_supported().map_err(Error::from)? {
        return chunked_cross_entropy_traced(hidden, head, positions, chunk_tokens, options);
    }
    let losses = chunked(hidden, head, positions, chunk_tokens, &cuda_logit_loss)?;
    Ok(losses.carried_by(with_gradient_rule)?)
}

/// [`chunked_cross_entropy`] with logits turned into losses and gradients by one vectorised kernel on the CPU.
///
/// Logits must be f32. Smoothing and z-loss are computed by [`chunked_cross_entropy`], to which this falls back.
///
/// # Errors
/// As there, and MLX's own for logits that are not f32.
pub fn chunked_cross_entropy_native<E>(
    hidden: &Array,
    head: &Head<'_, E>,
    positions: &TrainedPositions,
    chunk_tokens: usize,
    options: &TokenLossOptions,
) -> Result<TokenLoss, E>
where
    E: From<Error> + std::fmt::Display,
{
    if !options.is_plain() {
        return chunked_cross_entropy(hidden, head, positions, chunk_tokens, options);
    }
    let losses = chunked(hidden, head, positions, chunk_tokens, &native_logit_loss)?;
    Ok(losses.carried_by(with_gradient)?)
}

/// Loss, objective and gradient of each row of logits from logits and targets.
type LogitLoss<'a> = dyn Fn(&Array, &Array) -> Result<(Array, Array, Array)> + 'a;

fn chunked<E>(
    hidden: &Array,
    head: &Head<'_, E>,
    positions: &TrainedPositions,
    chunk_tokens: usize,
    logit_loss: &LogitLoss<'_>,
) -> Result<Losses, E>
where
    E: From<Error> + std::fmt::Display,
{
    let states = positions.gather(hidden)?; // [t, d]
    let chunk_tokens = chunk_size(chunk_tokens)?;
    let constant_states = stop_gradient(&states).map_err(Error::from)?;
    let n_positions = positions.len() as i32;
    let mut chunks: Vec<Chunk> = Vec::new();
    for start in (0..n_positions).step_by(chunk_tokens as usize) {
        let rows = start..(start + chunk_tokens).min(n_positions);
        let previous = chunks.last();
        chunks.push(chunk_loss(
            &constant_states,
            head,
            &positions.targets,
            rows,
            previous,
            logit_loss,
        )?);
    }
    Ok(Losses {
        nll: concatenate(chunks.iter().map(|c| &c.nll))?,
        objective: concatenate(chunks.iter().map(|c| &c.objective))?,
        gradient: concatenate(chunks.iter().map(|c| &c.gradient))?,
        states,
    })
}

/// What the chunks give together; `objective` does not carry `gradient` to `states` yet.
struct Losses {
    nll: Array,
    objective: Array,
    gradient: Array,
    states: Array,
}

impl Losses {
    /// The loss whose gradient `carry` brings to the states.
    fn carried_by(self, carry: fn(&Array, &Array, &Array) -> Result<Array>) -> Result<TokenLoss> {
        Ok(TokenLoss {
            objective: carry(&self.objective, &self.gradient, &self.states)?,
            nll: self.nll,
        })
    }
}

/// An output projection: hidden states `[c, d]` to logits `[c, v]`.
pub type Head<'a, E> = dyn Fn(&Array) -> Result<Array, E> + 'a;

/// The positions of a padded batch that are trained, with what each should predict.
///
/// Built on the host from the batch plan, so the device never sees a mask.
#[derive(Debug, Clone)]
pub struct TrainedPositions {
    /// `None`: every position, in order.
    indices: Option<Array>,
    targets: Array,
    n_positions: usize,
    len: usize,
    /// Position of each trained token in the flattened batch, ascending.
    pub host_indices: Vec<i32>,
    /// Weight of each trained token.
    pub host_weights: Vec<f32>,
}

impl TrainedPositions {
    /// Picks the positions whose weight is not zero, in order, from a flattened `[b·l]` batch.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`]; [`Error::NoTrainedTokens`] when every weight is zero.
    pub fn select(targets: &[i32], weights: &[f32]) -> Result<Self> {
        if targets.len() != weights.len() {
            return Err(Error::LengthMismatch {
                what: "target weights",
                expected: targets.len(),
                found: weights.len(),
            });
        }
        let host_indices: Vec<i32> = (0..targets.len())
            .filter(|&i| weights[i] != 0.0)
            .map(|i| i as i32)
            .collect();
        if host_indices.is_empty() {
            return Err(Error::NoTrainedTokens { rows: targets.len() });
        }
        let picked: Vec<i32> = host_indices.iter().map(|&i| targets[i as usize]).collect();
        let host_weights = host_indices.iter().map(|&i| weights[i as usize]).collect();
        let len = host_indices.len();
        Ok(Self {
            indices: Some(Array::from_slice(&host_indices, &[len as i32])),
            targets: Array::from_slice(&picked, &[len as i32]),
            n_positions: targets.len(),
            len,
            host_indices,
            host_weights,
        })
    }

    /// Positions that are known to the device only: `indices` i32 `[t]` into the flattened batch of `n_positions`, or
    /// `None` for all of them in order, and what each should predict, i32 `[t]`. Lists of the host are empty.
    pub fn on_device(indices: Option<Array>, targets: Array, n_positions: usize) -> Self {
        Self {
            indices,
            n_positions,
            len: targets.size(),
            targets,
            host_indices: Vec::new(),
            host_weights: Vec::new(),
        }
    }

    /// How many positions are trained.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: [`select`](Self::select) refuses an empty choice.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What each trained position should predict, `[t]`.
    pub fn targets(&self) -> &Array {
        &self.targets
    }

    /// Weight of each trained position, `[t]`, f32.
    pub fn weights(&self) -> Array {
        Array::from_slice(&self.host_weights, &[self.len as i32])
    }

    /// Picks the trained positions of a `[b, l, ...]` array as `[t, ...]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when `b·l` is not the number of positions these were chosen from.
    pub fn gather(&self, values: &Array) -> Result<Array> {
        let (rows, rest) = match values.shape() {
            [b, l, rest @ ..] if (*b as usize) * (*l as usize) == self.n_positions => (b * l, rest),
            found => {
                return Err(Error::ShapeMismatch {
                    what: "batch to gather from (rows × length)",
                    expected: vec![self.n_positions as i32],
                    found: found.to_vec(),
                });
            }
        };
        let mut flat = vec![rows];
        flat.extend_from_slice(rest);
        let flat = values.reshape(&flat)?;
        match &self.indices {
            Some(indices) => Ok(take_axis(flat, indices, 0)?),
            None => Ok(flat),
        }
    }
}

/// Loss of one chunk, and the gradient of its objective with respect to its hidden states.
struct Chunk {
    nll: Array,
    objective: Array,
    gradient: Array,
}

fn chunk_size(chunk_tokens: usize) -> Result<i32> {
    match i32::try_from(chunk_tokens) {
        Ok(n) if n > 0 => Ok(n),
        _ => Err(Error::OutOfRange {
            name: "loss.chunk_tokens",
            value: chunk_tokens as f64,
            range: "1 to 2147483647",
            row: None,
        }),
    }
}

fn chunk_loss<E>(
    states: &Array,
    head: &Head<'_, E>,
    targets: &Array,
    rows: std::ops::Range<i32>,
    previous: Option<&Chunk>,
    logit_loss: &LogitLoss<'_>,
) -> Result<Chunk, E>
where
    E: From<Error> + std::fmt::Display,
{
    let rows = ops::arange::<_, i32>(rows.start, rows.end, 1).map_err(Error::from)?;
    let mut states = take_axis(states, &rows, 0).map_err(Error::from)?; // [c, d]
    if let Some(previous) = previous {
        // Else the graph would compute the logits of all chunks before it reduces any.
        let done = [
            previous.objective.clone(),
            previous.nll.clone(),
            previous.gradient.clone(),
        ];
        states = planish_mlx::ops::after(&states, &done).map_err(Error::from)?;
    }
    let targets = take_axis(targets, &rows, 0).map_err(Error::from)?; // [c]
    let logits = head(&states)?; // [c, v]
    let (nll, objective, logit_gradient) = logit_loss(&logits, &targets)?;
    let gradient = through_head(head, &states, logit_gradient)?;
    Ok(Chunk {
        nll,
        objective,
        gradient,
    })
}

/// Loss of each row of logits, and the gradient of the objective with respect to them in their own dtype.
fn logit_loss(logits: &Array, targets: &Array, options: &TokenLossOptions) -> Result<(Array, Array, Array)> {
    let exact = logits.as_dtype(Dtype::Float32)?;
    let log_z = exact.logsumexp_axis(-1, false)?;
    let nll = log_z.subtract(target_logits(&exact, targets)?)?;
    let objective = options.objective(&nll, &log_z, || Ok(exact.mean_axis(-1, false)?))?;
    let gradient = logit_gradient(&exact, &log_z, targets, options)?.as_dtype(logits.dtype())?;
    Ok((nll, objective, gradient))
}

/// The same as [`logit_loss`] with the probabilities in one chain from logits to their dtype.
fn fused_logit_loss(logits: &Array, targets: &Array, options: &TokenLossOptions) -> Result<(Array, Array, Array)> {
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
    Ok((nll, objective, put_along_axis(&gradient, &index, &at_target, -1)?))
}

const SOFTMAX_GRADIENT: CudaKernel = CudaKernel {
    name: "planish_cross_entropy",
    inputs: &["logits", "targets"],
    outputs: &["nll", "gradient"],
    header: cuda_kernel::VECTORS,
    source: include_str!("cross_entropy.cu"),
};

/// The plain loss by a kernel of our own on an NVIDIA GPU.
fn cuda_logit_loss(logits: &Array, targets: &Array) -> Result<(Array, Array, Array)> {
    kernel_logit_loss(softmax_gradient, logits, targets)
}

/// The plain loss by a kernel that gives loss and gradient of each row of logits. Its own gradient is for a head that trains.
fn kernel_logit_loss(
    kernel: fn(&Array, &Array) -> Result<Vec<Array>>,
    logits: &Array,
    targets: &Array,
) -> Result<(Array, Array, Array)> {
    let forward = move |inputs: &[Array]| kernel(&inputs[0], &inputs[1]);
    let backward = |inputs: &[Array], cotangents: &[Array], outputs: &[Array]| {
        let of_logits = outputs[1].multiply(cotangents[0].expand_dims(-1)?.as_dtype(inputs[0].dtype())?)?;
        Ok::<_, Error>(vec![of_logits, ops::zeros_like(&inputs[1])?])
    };
    let mut outputs = custom_vjp(forward, backward, &[logits.clone(), targets.clone()])?;
    let nll = outputs.swap_remove(0);
    Ok((nll.clone(), nll, outputs.swap_remove(0)))
}

/// Loss of each row, and its gradient.
fn softmax_gradient(logits: &Array, targets: &Array) -> Result<Vec<Array>> {
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
    Ok(SOFTMAX_GRADIENT.call(&[logits.clone(), targets.clone()], &launch)?)
}

/// The plain loss by a kernel of our own on the CPU.
fn native_logit_loss(logits: &Array, targets: &Array) -> Result<(Array, Array, Array)> {
    kernel_logit_loss(native_softmax_gradient, logits, targets)
}

/// Loss of each row, and its gradient.
fn native_softmax_gradient(logits: &Array, targets: &Array) -> Result<Vec<Array>> {
    let vocabulary = logits.dim(-1) as usize;
    let specs = [OutputSpec::f32(targets.shape()), OutputSpec::f32(logits.shape())];
    let inputs = [logits.clone(), targets.clone()];
    Ok(host_kernel(
        "softmax_gradient",
        &inputs,
        &specs,
        move |inputs, outputs| {
            let [nll, gradient] = outputs else { return };
            planish_kernels::on_pool(|| {
                planish_kernels::softmax_gradients(
                    inputs[0].f32(),
                    inputs[1].i32(),
                    vocabulary,
                    gradient.f32_mut(),
                    nll.f32_mut(),
                );
            });
        },
    )?)
}

/// `(1 + 2z·log Z)·p − (1 − ε)·onehot − ε/v`; the target's own entry is written last, so that `p − 1` keeps its relative
/// precision when it is narrowed to 16 bits.
fn logit_gradient(logits: &Array, log_z: &Array, targets: &Array, options: &TokenLossOptions) -> Result<Array> {
    let gradient = probability_gradient(logits, log_z, options, logits.dim(-1))?;
    let index = targets.expand_dims(-1)?;
    let at_target = take_along_axis(&gradient, &index, -1)?.subtract(scalar(1.0 - options.label_smoothing))?;
    Ok(put_along_axis(&gradient, &index, &at_target, -1)?)
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

/// `headᵀ(logit_gradient)`. The head's own output is part of the traced function but nobody asks for it again, and lazy
/// evaluation never computes what nobody asks for.
fn through_head<E>(head: &Head<'_, E>, states: &Array, logit_gradient: Array) -> Result<Array, E>
where
    E: From<Error> + std::fmt::Display,
{
    let mut failure = None;
    let traced = |inputs: &[Array]| match head(&inputs[0]) {
        Ok(logits) => Ok(vec![logits]),
        Err(error) => {
            let message = Exception::custom(error.to_string());
            failure = Some(error);
            Err(message)
        }
    };
    let outcome = fallible_vjp(traced, std::slice::from_ref(states), &[logit_gradient]);
    match (outcome, failure) {
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(Error::from(error).into()),
        (Ok((_, mut gradients)), None) => Ok(stop_gradient(gradients.swap_remove(0)).map_err(Error::from)?),
    }
}

/// `objective` with the given gradient with respect to `states`: adds `Σ_d g·h − stop(Σ_d g·h)`, which is zero.
pub(crate) fn with_gradient(objective: &Array, gradient: &Array, states: &Array) -> Result<Array> {
    let carrier = gradient
        .as_dtype(Dtype::Float32)?
        .multiply(states.as_dtype(Dtype::Float32)?)?
        .sum_axis(-1, false)?;
    Ok(objective.add(carrier.subtract(stop_gradient(&carrier)?)?)?)
}

/// The same by a gradient rule: nothing is computed forward. Positions whose cotangent is zero get exactly nothing, not
/// even a NaN.
fn with_gradient_rule(objective: &Array, gradient: &Array, states: &Array) -> Result<Array> {
    let forward = |inputs: &[Array]| Ok::<_, Error>(vec![inputs[0].clone()]);
    let backward = |inputs: &[Array], cotangents: &[Array], _: &[Array]| {
        let [_, gradient, states] = inputs else {
            return Ok(Vec::new());
        };
        let cotangent = cotangents[0].expand_dims(-1)?; // [t, 1]
        let zero = scalar(0.0);
        let scaled = gradient.as_dtype(Dtype::Float32)?.multiply(&cotangent)?;
        let scaled = ops::select(cotangent.ne(&zero)?, scaled, &zero)?.as_dtype(states.dtype())?;
        Ok(vec![cotangents[0].clone(), ops::zeros_like(gradient)?, scaled])
    };
    let inputs = [objective.clone(), stop_gradient(gradient)?, states.clone()];
    Ok(custom_vjp(forward, backward, &inputs)?.swap_remove(0))
}

fn concatenate<'a>(parts: impl Iterator<Item = &'a Array>) -> Result<Array> {
    let parts: Vec<&Array> = parts.collect();
    match parts.as_slice() {
        [only] => Ok((*only).clone()),
        _ => Ok(ops::concatenate(&parts, 0)?),
    }
}

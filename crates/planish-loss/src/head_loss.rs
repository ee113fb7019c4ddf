//! Next-token cross-entropy from hidden states that never holds the logits of more than one chunk of tokens.

mod chunk;
mod logits;
mod packed;

use std::sync::Arc;

use mlx_rs::{Array, Dtype, error::Exception, ops, ops::indexing::take_axis, stop_gradient, transforms::fallible_vjp};
use planish_kernels::PackedLinear;
use planish_mlx::transforms::custom_vjp;

pub use chunk::{CHUNK_TOKENS, automatic_chunk};

use crate::cross_entropy::{TokenLoss, TokenLossOptions, scalar};
use crate::{Error, Result, TrainedPositions};

/// Cross-entropy of the trained positions, a chunk of them at a time.
///
/// Values are those of [`cross_entropy`](crate::cross_entropy()) on the logits of `hidden` at [`TrainedPositions`]; untrained
/// positions do no work in the head. The gradient with respect to `hidden` is worked out together with the loss, chunk by
/// chunk, because each token's loss depends on that token's hidden state alone:
///
/// `∂objective_i/∂h_i = headᵀ((1 + 2z·log Z_i)·p_i − (1 − ε)·onehot(target_i) − ε/v)`, `p_i = softmax(head(h_i))`.
///
/// Those rows `[t, d]` are kept, and a gradient rule carries them through whatever the caller makes of the objective. So the head
/// runs once forward and once backward, and no `[b, l, v]` tensor exists at any time. Parameters inside the head are
/// differentiated in the ordinary way, which keeps their chunks' logits until the backward pass: memory is saved only while
/// the head is frozen. `nll` is for reporting and carries no gradient to `hidden`.
///
/// # Shapes
/// - `hidden`: `[b, l, d]`   - both results: `[t]`, f32, in nats
///
/// # Errors
/// [`Error::ShapeMismatch`] when the positions were made for another `b·l`; [`Error::OutOfRange`] for a chunk of 0; what the
/// head returns.
///
/// # Example
/// ```
/// use mlx_rs::Array;
/// use planish_loss::{Head, HeadKernel, HeadLoss, TrainedPositions, head_loss};
///
/// let hidden = Array::from_slice(&[0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6], &[1, 3, 2]);
/// let weight = Array::from_slice(&[0.0f32; 8], &[4, 2]);
/// // The first position is masked, so two losses come back; a zero head is uniform over 4 tokens.
/// let positions = TrainedPositions::select(&[0, 3, 1], &[0.0, 1.0, 1.0])?;
/// let project = |h: &Array| Ok::<_, planish_loss::Error>(h.matmul(weight.t())?);
/// let head = Head { project: &project, vocab_size: 4, kernel: HeadKernel::Composed };
/// let loss = head_loss(&hidden, &head, &positions, &HeadLoss::default())?;
/// assert_eq!(loss.nll.shape(), [2]);
/// assert!((loss.nll.sum(false)?.item_exact::<f32>() / 2.0 - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn head_loss<E>(
    hidden: &Array,
    head: &Head<'_, E>,
    positions: &TrainedPositions,
    how: &HeadLoss,
) -> Result<TokenLoss, E>
where
    E: From<Error> + std::fmt::Display,
{
    let states = positions.gather(hidden)?; // [t, d]
    let rows = match &head.kernel {
        HeadKernel::Packed(weight) if how.terms.is_plain() => {
            packed::losses(&states, weight, positions, how.is_trained)?
        }
        _ => in_chunks(&states, head, positions, how)?,
    };
    let objective = match rows.gradient {
        Some(gradient) => carried(&rows.objective, &gradient, &states)?,
        None => rows.objective,
    };
    Ok(TokenLoss {
        objective,
        nll: rows.nll,
    })
}

/// An output projection.
pub struct Head<'a, E> {
    /// Hidden states `[c, d]` to logits `[c, v]`.
    pub project: &'a dyn Fn(&Array) -> Result<Array, E>,
    /// `v`.
    pub vocab_size: usize,
    /// What computes the loss.
    pub kernel: HeadKernel,
}

impl<E> std::fmt::Debug for Head<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vocab_size, kernel, .. } = self;
        f.debug_struct("Head")
            .field("vocab_size", vocab_size)
            .field("kernel", kernel)
            .finish()
    }
}

/// What computes losses and their gradients. Those of our own know the plain loss; smoothing and z-loss are composed.
#[derive(Debug, Clone, Default)]
pub enum HeadKernel {
    /// MLX's operations, on any device and in any dtype.
    #[default]
    Composed,
    /// One kernel from logits to losses and gradients, on the CPU, in f32.
    Cpu,
    /// The same on an NVIDIA GPU, in the dtype of the logits.
    Cuda,
    /// One kernel from hidden states on, on the CPU, through the weight of the head packed in bf16. The head is this weight and
    /// nothing else, and frozen.
    Packed(Arc<PackedLinear>),
}

/// Which loss, and how much at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HeadLoss {
    /// What is added to plain cross-entropy.
    pub terms: TokenLossOptions,
    /// Trained positions whose logits exist at one time. `None`: as many as take 128 MiB, on a GPU 512 MiB, and at most 1024
    /// where that is not all.
    pub chunk_tokens: Option<usize>,
    /// Whether the objective is differentiated. `false` saves the work where a kernel would do it together with the loss.
    pub is_trained: bool,
}

impl Default for HeadLoss {
    fn default() -> Self {
        Self {
            terms: TokenLossOptions::default(),
            chunk_tokens: None,
            is_trained: true,
        }
    }
}

/// Losses of rows of hidden states, and the gradients of their objectives with respect to them, where there are some.
struct Rows {
    nll: Array,
    objective: Array,
    gradient: Option<Array>,
}

/// The same for one chunk.
struct Chunk {
    nll: Array,
    objective: Array,
    gradient: Array,
}

fn in_chunks<E>(states: &Array, head: &Head<'_, E>, positions: &TrainedPositions, how: &HeadLoss) -> Result<Rows, E>
where
    E: From<Error> + std::fmt::Display,
{
    let chunk_tokens = chunk::size(how.chunk_tokens, positions.len(), head.vocab_size)?;
    let states = stop_gradient(states).map_err(Error::from)?;
    let n_positions = positions.len() as i32;
    let mut chunks: Vec<Chunk> = Vec::new();
    for start in (0..n_positions).step_by(chunk_tokens as usize) {
        let rows = ops::arange::<_, i32>(start, (start + chunk_tokens).min(n_positions), 1).map_err(Error::from)?;
        let mut own = take_axis(&states, &rows, 0).map_err(Error::from)?; // [c, d]
        if let Some(Chunk {
            nll,
            objective,
            gradient,
        }) = chunks.last()
        {
            // Else the graph would compute the logits of all chunks before it reduces any.
            let done = [objective, nll, gradient].map(Array::clone);
            own = planish_mlx::ops::after(&own, &done).map_err(Error::from)?;
        }
        let targets = take_axis(positions.targets(), &rows, 0).map_err(Error::from)?; // [c]
        let loss = logits::logit_loss(&head.kernel, &(head.project)(&own)?, &targets, how)?;
        chunks.push(Chunk {
            gradient: through_head(head, &own, loss.gradient)?,
            nll: loss.nll,
            objective: loss.objective,
        });
    }
    let all = |part: fn(&Chunk) -> &Array| concatenate(chunks.iter().map(part));
    Ok(Rows {
        nll: all(|chunk| &chunk.nll)?,
        objective: all(|chunk| &chunk.objective)?,
        gradient: Some(all(|chunk| &chunk.gradient)?),
    })
}

/// `headᵀ(logit_gradient)`. The head's own output is part of the traced function but nobody asks for it again, and lazy
/// evaluation never computes what nobody asks for.
fn through_head<E>(head: &Head<'_, E>, states: &Array, logit_gradient: Array) -> Result<Array, E>
where
    E: From<Error> + std::fmt::Display,
{
    let mut failure = None;
    let traced = |inputs: &[Array]| match (head.project)(&inputs[0]) {
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

/// `objective` whose gradient with respect to `states` is `gradient`, row by row. Nothing is computed forward, and rows whose
/// cotangent is zero get exactly nothing, not even a NaN.
fn carried(objective: &Array, gradient: &Array, states: &Array) -> Result<Array> {
    let [objective] = custom_vjp(
        |[objective, _, _]: &[Array; 3]| Ok::<_, Error>([objective.clone()]),
        |[_, gradient, states]: &[Array; 3], [cotangent]: &[Array; 1], _: &[Array; 1]| {
            let (by_row, zero) = (cotangent.expand_dims(-1)?, scalar(0.0)); // [t, 1]
            let scaled = gradient.as_dtype(Dtype::Float32)?.multiply(&by_row)?;
            let scaled = ops::select(by_row.ne(&zero)?, scaled, &zero)?.as_dtype(states.dtype())?;
            Ok([cotangent.clone(), ops::zeros_like(gradient)?, scaled])
        },
        [objective, &stop_gradient(gradient)?, states],
    )?;
    Ok(objective)
}

fn concatenate<'a>(parts: impl Iterator<Item = &'a Array>) -> Result<Array> {
    let parts: Vec<&Array> = parts.collect();
    match parts.as_slice() {
        [only] => Ok((*only).clone()),
        _ => Ok(ops::concatenate(&parts, 0)?),
    }
}

//! Direct preference optimisation: prefer one answer to another, relative to a frozen reference.

use mlx_rs::{Array, ops};

use crate::{Error, Result, cross_entropy::scalar};

/// Loss of each preference pair.
///
/// With `r = β·(log π(y) − log π_ref(y))` for the chosen (`r_c`) and rejected (`r_r`) answer and `s` the label smoothing:
/// `loss = −(1 − s)·log σ(r_c − r_r − m) − s·log σ(r_r − r_c + m)`, `m` the margin that a pair asks for (0 without).
/// Log-probabilities are **sums** over the answer's tokens; see [`sequence_sums`].
/// With the reference equal to the policy every loss is `ln 2`.
///
/// # Shapes
/// all inputs and the results: `[n]`, f32
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::OutOfRange`] for the options.
///
/// # Reference
/// Rafailov et al. 2023, arXiv 2305.18290 eq. 7; smoothing: Mitchell 2023 ("conservative DPO").
///
/// # Example
/// ```
/// use mlx_rs::Array;
/// use planish_loss::dpo::{DpoOptions, PairLogProbabilities, dpo};
///
/// let same = PairLogProbabilities { chosen: Array::from_slice(&[-3.0f32], &[1]), rejected: Array::from_slice(&[-4.0f32], &[1]) };
/// let loss = dpo(&same, &same, None, &DpoOptions::default())?;
/// assert!((loss.losses.item_exact::<f32>() - 2f32.ln()).abs() < 1e-6);
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn dpo(
    policy: &PairLogProbabilities,
    reference: &PairLogProbabilities,
    margins: Option<&Array>,
    options: &DpoOptions,
) -> Result<PreferenceLoss> {
    options.check()?;
    policy.check_shapes(reference)?;
    let beta = scalar(options.beta);
    let chosen_rewards = policy.chosen.subtract(&reference.chosen)?.multiply(&beta)?;
    let rejected_rewards = policy.rejected.subtract(&reference.rejected)?.multiply(&beta)?;
    let mut margin = chosen_rewards.subtract(&rejected_rewards)?;
    if let Some(wanted) = margins {
        margin = margin.subtract(wanted)?;
    }
    let mut losses = log_sigmoid(&margin)?.multiply(scalar(options.label_smoothing - 1.0))?;
    if options.label_smoothing != 0.0 {
        let swapped = log_sigmoid(&margin.negative()?)?.multiply(scalar(options.label_smoothing))?;
        losses = losses.subtract(swapped)?;
    }
    Ok(PreferenceLoss {
        losses,
        chosen_rewards,
        rejected_rewards,
    })
}

/// Log-probabilities of the two answers of each pair under one model, `[n]` each.
#[derive(Debug, Clone)]
pub struct PairLogProbabilities {
    /// Of the preferred answer.
    pub chosen: Array,
    /// Of the other.
    pub rejected: Array,
}

impl PairLogProbabilities {
    /// Splits `[2n]` sequences laid out as `n` chosen followed by `n` rejected.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] unless the length is even.
    pub fn split(sequences: &Array) -> Result<Self> {
        if sequences.ndim() != 1 || sequences.dim(0) % 2 != 0 {
            return Err(Error::ShapeMismatch {
                what: "preference sequences",
                expected: vec![sequences.size() as i32 / 2 * 2],
                found: sequences.shape().to_vec(),
            });
        }
        let mut halves = sequences.split_equal(2, 0)?.into_iter();
        match (halves.next(), halves.next()) {
            (Some(chosen), Some(rejected)) => Ok(Self { chosen, rejected }),
            _ => Err(Error::NoTrainedTokens { rows: 0 }),
        }
    }

    pub(crate) fn check_shapes(&self, other: &Self) -> Result<()> {
        let expected = self.chosen.shape();
        let named = [
            ("rejected log-probabilities", &self.rejected),
            ("reference chosen log-probabilities", &other.chosen),
            ("reference rejected log-probabilities", &other.rejected),
        ];
        match named.into_iter().find(|(_, array)| array.shape() != expected) {
            None => Ok(()),
            Some((what, array)) => Err(Error::ShapeMismatch {
                what,
                expected: expected.to_vec(),
                found: array.shape().to_vec(),
            }),
        }
    }
}

/// Settings of [`dpo`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DpoOptions {
    /// How strongly the policy is held to the reference: a large `β` allows little change. Default 0.1.
    pub beta: f32,
    /// Probability that a pair is labelled the wrong way round, in `[0, 0.5)`. Default 0.
    pub label_smoothing: f32,
}

impl Default for DpoOptions {
    fn default() -> Self {
        Self {
            beta: 0.1,
            label_smoothing: 0.0,
        }
    }
}

impl DpoOptions {
    fn check(&self) -> Result<()> {
        let refuse = |name, value: f32, range| {
            Err(Error::OutOfRange {
                name,
                value: f64::from(value),
                range,
                row: None,
            })
        };
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return refuse("loss.beta", self.beta, "(0, ∞)");
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            return refuse("loss.label_smoothing", self.label_smoothing, "[0, 0.5)");
        }
        Ok(())
    }
}

/// Loss of each pair and the two implied rewards, `[n]` each.
#[derive(Debug, Clone)]
pub struct PreferenceLoss {
    /// What is trained.
    pub losses: Array,
    /// Reward of the chosen answer (its log-odds for ORPO).
    pub chosen_rewards: Array,
    /// Reward of the rejected answer.
    pub rejected_rewards: Array,
}

/// Sums per-token values into sequences: `out[s] = Σ_t members[s, t] · values[t]`.
///
/// A product with a 0/1 matrix: exact, differentiable, and independent of the order of the tokens.
///
/// # Shapes
/// - `values`: `[t]`   - `members`: `[n, t]`, 1 where a token belongs to a sequence, else 0   - result: `[n]`
///
/// # Errors
/// [`Error::ShapeMismatch`].
pub fn sequence_sums(values: &Array, members: &Array) -> Result<Array> {
    if members.ndim() != 2 || values.ndim() != 1 || members.dim(1) != values.dim(0) {
        return Err(Error::ShapeMismatch {
            what: "members of sequences",
            expected: vec![-1, values.size() as i32],
            found: members.shape().to_vec(),
        });
    }
    Ok(members.matmul(values)?)
}

/// `log σ(x) = −log(e⁰ + e⁻ˣ)`, finite for every finite `x`. (`mlx_rs::nn::log_sigmoid` is compiled, which on CPU wants a
/// C++ compiler at run time.)
pub(crate) fn log_sigmoid(x: &Array) -> Result<Array> {
    Ok(ops::logaddexp(scalar(0.0), x.negative()?)?.negative()?)
}

//! Odds-ratio preference optimisation: learn the chosen answer and push its odds above the rejected one's, without a
//! reference model.

use mlx_rs::{Array, ops};

use crate::{
    Error, Result,
    cross_entropy::scalar,
    dpo::{PairLogProbabilities, PreferenceLoss, log_sigmoid},
};

/// Loss of each preference pair.
///
/// With `p = exp(mean log-probability of the answer's tokens)` and `odds = p/(1 − p)`:
/// `loss = −log p_chosen − λ·log σ(log odds_chosen − log odds_rejected)`.
/// Log-probabilities are **means** over the answer's tokens, so that long answers are not punished for their length.
///
/// # Shapes
/// inputs and results: `[n]`, f32
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::OutOfRange`] unless `λ ≥ 0`.
///
/// # Reference
/// Hong et al. 2024, arXiv 2403.07691 eq. 6 and 7.
///
/// # Example
/// ```
/// use mlx_rs::Array;
/// use planish_loss::{dpo::PairLogProbabilities, orpo::orpo};
///
/// let half = Array::from_slice(&[0.5f32.ln()], &[1]);
/// let loss = orpo(&PairLogProbabilities { chosen: half.clone(), rejected: half }, 0.1)?;
/// assert!((loss.losses.item_exact::<f32>() - 1.1 * 2f32.ln()).abs() < 1e-6); // nll ln 2, odds ratio 1
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn orpo(means: &PairLogProbabilities, lambda: f32) -> Result<PreferenceLoss> {
    if !(lambda >= 0.0 && lambda.is_finite()) {
        return Err(Error::OutOfRange {
            name: "loss.lambda",
            value: f64::from(lambda),
            range: "[0, ∞), finite",
            row: None,
        });
    }
    means.check_shapes(means)?;
    let chosen_rewards = log_odds(&means.chosen)?;
    let rejected_rewards = log_odds(&means.rejected)?;
    let ratio = log_sigmoid(&chosen_rewards.subtract(&rejected_rewards)?)?;
    let losses = means.chosen.negative()?.subtract(ratio.multiply(scalar(lambda))?)?;
    Ok(PreferenceLoss {
        losses,
        chosen_rewards,
        rejected_rewards,
    })
}

/// `log p − log(1 − p)` from `log p`; `1 − p` is taken as `−expm1(log p)`, which stays exact where `p` is near 1, and is
/// kept above `1e-7`, below which f32 log-probabilities carry no information.
fn log_odds(log_probability: &Array) -> Result<Array> {
    let complement = ops::maximum(ops::expm1(log_probability)?.negative()?, scalar(1e-7))?;
    Ok(log_probability.subtract(complement.log()?)?)
}

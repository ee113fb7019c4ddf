//! Next-token cross-entropy from logits, token by token, in f32.

use mlx_rs::{Array, Dtype, ops, ops::indexing::take_along_axis};

use crate::{Error, Result};

/// Cross-entropy of every position, computed in f32 whatever the dtype of the logits.
///
/// `nll = logsumexp(x) − x[target]`, and the quantity to differentiate
/// `objective = (1 − ε)·nll + ε·(logsumexp(x) − mean(x)) + z·logsumexp(x)²`
/// with `ε` = [`label_smoothing`](TokenLossOptions::label_smoothing) and `z` = [`z_loss`](TokenLossOptions::z_loss).
/// With both at zero `objective` equals `nll`. Nothing is shifted here: `targets[i]` is what `logits[i]` should predict.
///
/// # Shapes
/// - `logits`: `[..., v]`, any float dtype   - `targets`: `[...]`, int, each in `0..v`
/// - both results: `[...]`, f32, in nats
///
/// # Errors
/// [`Error::ShapeMismatch`] unless `targets` has the shape of `logits` without its last axis.
///
/// # Example
/// Uniform logits cost `ln v` whatever the target.
/// ```
/// use mlx_rs::Array;
/// use planish_loss::{TokenLossOptions, cross_entropy};
///
/// let logits = Array::from_slice(&[0.5f32; 8], &[2, 4]);
/// let targets = Array::from_slice(&[0i32, 3], &[2]);
/// let loss = cross_entropy(&logits, &targets, &TokenLossOptions::default())?;
/// assert!((loss.nll.sum(false)?.item_exact::<f32>() / 2.0 - 4f32.ln()).abs() < 1e-6);
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn cross_entropy(logits: &Array, targets: &Array, options: &TokenLossOptions) -> Result<TokenLoss> {
    check_shapes(logits, targets)?;
    let logits = logits.as_dtype(Dtype::Float32)?;
    let log_z = logits.logsumexp_axis(-1, false)?;
    let nll = log_z.subtract(target_logits(&logits, targets)?)?;
    let objective = options.objective(&nll, &log_z, || Ok(logits.mean_axis(-1, false)?))?;
    Ok(TokenLoss { objective, nll })
}

/// Loss of each token of a batch.
#[derive(Debug, Clone)]
pub struct TokenLoss {
    /// What training differentiates; equals `nll` unless smoothing or z-loss is on.
    pub objective: Array,
    /// Plain negative log-likelihood in nats: what is reported, compared and turned into perplexity.
    pub nll: Array,
}

/// Terms added to plain cross-entropy. The default adds none.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct TokenLossOptions {
    /// Share `ε` of the target mass that is spread evenly over the vocabulary, in `[0, 1)`.
    pub label_smoothing: f32,
    /// Factor of `logsumexp²`, which keeps logits from drifting; `1e-4` is usual, 0 is off.
    pub z_loss: f32,
}

impl TokenLossOptions {
    /// Refuses values outside their range.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn check(&self) -> Result<()> {
        let refuse = |name, value: f32, range| {
            Err(Error::OutOfRange {
                name,
                value: f64::from(value),
                range,
                row: None,
            })
        };
        if !(0.0..1.0).contains(&self.label_smoothing) {
            return refuse("label_smoothing", self.label_smoothing, "[0, 1)");
        }
        if !(self.z_loss >= 0.0 && self.z_loss.is_finite()) {
            return refuse("z_loss", self.z_loss, "[0, ∞)");
        }
        Ok(())
    }

    /// True when the objective is the plain nll.
    pub fn is_plain(&self) -> bool {
        self.label_smoothing == 0.0 && self.z_loss == 0.0
    }

    /// `objective` from its parts; `mean_logit` is asked for only when smoothing needs it.
    pub(crate) fn objective(
        &self,
        nll: &Array,
        log_z: &Array,
        mean_logit: impl FnOnce() -> Result<Array>,
    ) -> Result<Array> {
        let mut objective = nll.clone();
        if self.label_smoothing != 0.0 {
            let spread = log_z.subtract(mean_logit()?)?.multiply(scalar(self.label_smoothing))?;
            objective = objective.multiply(scalar(1.0 - self.label_smoothing))?.add(spread)?;
        }
        if self.z_loss != 0.0 {
            objective = objective.add(log_z.square()?.multiply(scalar(self.z_loss))?)?;
        }
        Ok(objective)
    }
}

/// `Σ weights · values` as one f32 scalar; positions of weight zero add exactly nothing, not even a NaN.
///
/// # Errors
/// [`Error::ShapeMismatch`] when the shapes differ.
pub fn weighted_sum(values: &Array, weights: &Array) -> Result<Array> {
    if values.shape() != weights.shape() {
        return Err(Error::ShapeMismatch {
            what: "weights",
            expected: values.shape().to_vec(),
            found: weights.shape().to_vec(),
        });
    }
    let zero = scalar(0.0);
    let counted = ops::select(weights.ne(&zero)?, values, &zero)?;
    Ok(counted.multiply(weights)?.sum(false)?)
}

pub(crate) fn scalar(value: f32) -> Array {
    Array::from_f32(value)
}

pub(crate) fn target_logits(logits: &Array, targets: &Array) -> Result<Array> {
    Ok(take_along_axis(logits, targets.expand_dims(-1)?, -1)?.squeeze_axes(&[-1])?)
}

fn check_shapes(logits: &Array, targets: &Array) -> Result<()> {
    let expected = logits.shape().split_last().map_or(&[][..], |(_, rest)| rest);
    if logits.ndim() == 0 || targets.shape() != expected {
        return Err(Error::ShapeMismatch {
            what: "targets",
            expected: expected.to_vec(),
            found: targets.shape().to_vec(),
        });
    }
    Ok(())
}

//! Does a written package compute what the model computes? Runs it as a host would and compares with the f32 pass.

mod driver;

use std::path::Path;

use coreml_mil::interpreter::Precision;
use ndarray::{Array2, ArrayView1, Axis, s};
use planish_core::model_config::ModelConfig;
use serde::Serialize;

use crate::{
    Error, Result,
    reference::{forward, next_token_loss},
    weights::Rows,
};
pub use driver::Driver;

/// Tokens decoded one by one after the prompt.
const DECODED: usize = 32;
/// With f32 arithmetic on the stored weights only rotary tables, epsilon and the attention's scale are rounded: the logits
/// may differ by this share of the largest. Packages written by coremltools from the same graph reach 0.0012.
const EXACT_TOLERANCE: f32 = 0.005;

/// How near two runs are, position by position.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Positions compared.
    pub positions: usize,
    /// Largest difference of a logit.
    pub max_error: f32,
    /// Largest logit, to judge the difference by.
    pub max_logit: f32,
    /// Share of positions with the same most likely token.
    pub top1: f64,
    /// Share of positions where the package's most likely token is among the model's five.
    pub in_top5: f64,
    /// Mean Kullback–Leibler divergence from the model's distribution, in nats.
    pub kl: f64,
}

/// The outcome of a check.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckReport {
    /// Prompt tokens that went through prefill.
    pub prompt_tokens: usize,
    /// Tokens decoded after it, each the package's own most likely one.
    pub decoded_tokens: usize,
    /// Package with f32 arithmetic against the f32 pass over the weights as stored: what the graph itself errs.
    pub exact: Agreement,
    /// Package with fp16 arithmetic against the f32 pass over the original weights: what a user gets.
    pub fp16: Agreement,
    /// Perplexity of the calibration text: original model, package with fp16 arithmetic, tokens counted.
    pub perplexity: Option<(f64, f64, usize)>,
}

/// What a package is compared with.
pub struct Judge<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Its weights, the adapter folded in.
    pub original: &'a dyn Rows,
    /// The same after compression or rounding.
    pub stored: &'a dyn Rows,
}

impl Judge<'_> {
    /// Runs the package at `path` (or the folder of packages) and compares.
    ///
    /// A prompt goes through prefill, padded where it is short; then up to 32 tokens are decoded greedily with fp16
    /// arithmetic. The same tokens then go through the package with f32 arithmetic. `text` gives the prompt and the
    /// perplexity; without it there is no perplexity, and `prompt` or, where that is too short, arbitrary tokens begin.
    ///
    /// # Errors
    /// [`Error::CheckFailed`] when f32 arithmetic on the stored weights differs by more than 0.5 % of the largest logit, or a
    /// logit is no number; [`Error::Package`] when the package cannot be opened or run.
    pub fn check(&self, path: &Path, text: &[u32], prompt: &[u32]) -> Result<CheckReport> {
        let mut driver = Driver::open(path)?;
        let prompt = self.prompt(if text.is_empty() { prompt } else { text }, &driver);
        let (tokens, fp16_rows) = decode_greedily(&mut driver, &prompt)?;
        driver.reset(Precision::F32)?;
        let exact_rows = teacher_force(&mut driver, &tokens, prompt.len())?;
        let original = forward(self.config, self.original, &[&tokens], None)?;
        let stored = forward(self.config, self.stored, &[&tokens], None)?;
        let decoded = tokens.len() - prompt.len();
        // Row i of the decoded part predicts the token after position prompt − 1 + i.
        let tail = s![prompt.len() - 1..tokens.len() - 1, ..];
        let report = CheckReport {
            prompt_tokens: prompt.len(),
            decoded_tokens: decoded,
            exact: agreement(&exact_rows.0, &stored.select(Axis(0), &exact_rows.1)),
            fp16: agreement(&fp16_rows, &original.slice(tail).to_owned()),
            perplexity: self.perplexity(&mut driver, text)?,
        };
        let limit = EXACT_TOLERANCE * report.exact.max_logit;
        // A NaN is beyond every limit.
        if report.exact.max_error.is_nan() || report.exact.max_error > limit {
            return Err(Error::CheckFailed {
                problem: format!(
                    "with f32 arithmetic on the stored weights a logit differs by {}, allowed are {limit} (logits up to {})",
                    report.exact.max_error, report.exact.max_logit
                ),
            });
        }
        if !fp16_rows.iter().all(|v| v.is_finite()) {
            let problem = "with fp16 arithmetic a logit is not finite: activations leave the fp16 range".into();
            return Err(Error::CheckFailed { problem });
        }
        Ok(report)
    }

    fn prompt(&self, text: &[u32], driver: &Driver) -> Vec<u32> {
        let room = driver
            .context()
            .saturating_sub(DECODED)
            .max(driver.context() / 2)
            .max(1);
        let length = driver.prefill().min(room);
        if text.len() >= length {
            return text[..length].to_vec();
        }
        // Any tokens do: the comparison is with the same tokens.
        let mut state = 0x9E37_79B9u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) % self.config.arch.vocab_size as u32
        };
        (0..length).map(next).collect()
    }

    fn perplexity(&self, driver: &mut Driver, text: &[u32]) -> Result<Option<(f64, f64, usize)>> {
        if text.len() < 2 {
            return Ok(None);
        }
        let windows: Vec<&[u32]> = text.chunks(driver.context()).filter(|w| w.len() > 1).collect();
        let (mut original, mut package, mut count) = (0.0, 0.0, 0);
        for window in windows {
            let (loss, n) = next_token_loss(forward(self.config, self.original, &[window], None)?.view(), &[window]);
            original += loss * n as f64;
            driver.reset(Precision::F16)?;
            let logits = driver.all_logits(window)?;
            package += next_token_loss(logits.view(), &[window]).0 * n as f64;
            count += n;
        }
        let perplexity = |total: f64| (total / count as f64).exp();
        Ok(Some((perplexity(original), perplexity(package), count)))
    }
}

/// The prompt and what the package appends to it, with the logits of each decoded token.
fn decode_greedily(driver: &mut Driver, prompt: &[u32]) -> Result<(Vec<u32>, Array2<f32>)> {
    driver.reset(Precision::F16)?;
    let mut tokens = prompt.to_vec();
    let mut rows = Vec::new();
    driver.prefill_prompt(prompt)?;
    let mut logits = driver.last_logits(prompt)?;
    let steps = DECODED.min(driver.context().saturating_sub(prompt.len())).max(1);
    for step in 0..steps {
        let next = argmax(logits.view()) as u32;
        tokens.push(next);
        rows.push(logits);
        if step + 1 == steps {
            break;
        }
        logits = driver.decode(next, tokens.len() - 1)?;
    }
    let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
    let joined = ndarray::stack(Axis(0), &views).map_err(|e| Error::internal(e.to_string()))?;
    Ok((tokens, joined))
}

/// Logits of all positions that the package gives for known tokens, and which positions those are.
fn teacher_force(driver: &mut Driver, tokens: &[u32], prompt: usize) -> Result<(Array2<f32>, Vec<usize>)> {
    let mut rows: Vec<(usize, ndarray::Array1<f32>)> = Vec::new();
    if let Some(logits) = driver.prefill_prompt(&tokens[..prompt])? {
        rows.extend(logits.rows().into_iter().map(|r| r.to_owned()).enumerate());
    } else {
        rows.push((prompt - 1, driver.last_logits(&tokens[..prompt])?));
    }
    let end = tokens.len().min(driver.context());
    for (position, token) in tokens.iter().enumerate().take(end).skip(prompt) {
        rows.push((position, driver.decode(*token, position)?));
    }
    let views: Vec<_> = rows.iter().map(|(_, r)| r.view()).collect();
    let joined = ndarray::stack(Axis(0), &views).map_err(|e| Error::internal(e.to_string()))?;
    Ok((joined, rows.iter().map(|(p, _)| *p).collect()))
}

/// Compares rows of logits.
pub fn agreement(package: &Array2<f32>, model: &Array2<f32>) -> Agreement {
    let (mut same, mut contained, mut kl, mut max_error) = (0usize, 0usize, 0f64, 0f32);
    for (p, m) in package.rows().into_iter().zip(model.rows()) {
        let best = argmax(p);
        same += usize::from(best == argmax(m));
        contained += usize::from(m.iter().filter(|v| **v > m[best]).count() < 5);
        kl += divergence(m, p);
        for (a, b) in p.iter().zip(m) {
            let error = (a - b).abs();
            max_error = if error.is_nan() { f32::NAN } else { max_error.max(error) };
        }
        if max_error.is_nan() {
            break;
        }
    }
    let n = model.nrows().max(1) as f64;
    Agreement {
        positions: model.nrows(),
        max_error,
        max_logit: model.iter().fold(0f32, |m, v| m.max(v.abs())),
        top1: same as f64 / n,
        in_top5: contained as f64 / n,
        kl: kl / n,
    }
}

/// `Σ p · ln(p / q)` of the two softmaxes.
fn divergence(p: ArrayView1<f32>, q: ArrayView1<f32>) -> f64 {
    let log_sum = |x: &ArrayView1<f32>| {
        let max = f64::from(x.iter().copied().fold(f32::MIN, f32::max));
        max + x.iter().map(|v| (f64::from(*v) - max).exp()).sum::<f64>().ln()
    };
    let (zp, zq) = (log_sum(&p), log_sum(&q));
    p.iter()
        .zip(q)
        .map(|(a, b)| (f64::from(*a) - zp).exp() * (f64::from(*a) - zp - f64::from(*b) + zq))
        .sum()
}

/// Index of the largest.
pub(crate) fn argmax(row: ArrayView1<f32>) -> usize {
    row.iter()
        .enumerate()
        .fold(0, |best, (i, v)| if *v > row[best] { i } else { best })
}

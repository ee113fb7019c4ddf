//! Distrust weighting: how much an example counts, from its authority and the entropy of its provenance.
//!
//! Pure host code in f64; only the finished weight is narrowed to f32. The published quantity of an example with
//! authority `w` and provenance entropy `H` is
//!
//! `c(w, H) = ln(1 − w + ε) + H`, `ε = 1e-8`, and `ℓ = α·c²`, `α ∈ [2.3, 3.0]`.
//!
//! `H` is in bits and `ln` in nats: the formula is kept as published, not corrected. Added to a loss, `ℓ` is a constant of
//! the data and has **no gradient**: [`Mode::Additive`] therefore trains exactly what plain cross-entropy trains.
//! [`Mode::Weight`] multiplies instead, and [`Mode::Sampler`] reaches the same target by drawing examples in proportion.
//!
//! # Reference
//! Formula: B. Roemmele, published 25 November 2025, public domain; weights, floor, cap and normalisation: planish.

use crate::{Error, Result};

/// Keeps the logarithm finite at `w = 1`; matters only near `w ≥ 0.99`.
pub const EPSILON: f64 = 1e-8;
/// The published default of `α`.
pub const DEFAULT_ALPHA: f64 = 2.7;
/// Highest accepted authority.
pub(crate) const MAX_AUTHORITY: f64 = 0.99;
/// Share of effective examples below which a plan warns.
pub const ESS_WARN: f64 = 0.3;
/// Share of effective examples below which a run is refused unless forced.
pub const ESS_REFUSE: f64 = 0.05;

/// Weights of all rows of the train split, normalised so that their token-weighted mean is exactly 1.
///
/// With `ω_i` = [`Link`] of row `i` and `n_i` its trained tokens (1 under [`Unit::Example`]):
/// `μ0 = Σ n_i ω_i / Σ n_i`, `u_i = clip(ω_i/μ0, floor, cap)`, `μ1 = Σ n_i u_i / Σ n_i`, weight `u_i/μ1`.
/// The means run over the *dataset*: a batch-wise mean would cancel the weight at batch size 1 and make a step depend on
/// the company a row keeps. A row without provenance gets exactly 1 and takes no part in the means.
///
/// # Errors
/// [`Error::LengthMismatch`], [`Error::NoTrainedTokens`], [`Error::NoPositiveWeight`], [`Error::OutOfRange`].
///
/// # Example
/// ```
/// use planish_loss::distrust::{Provenance, Weighting, weights};
///
/// let rows = [(0.05, 7.5), (0.5, 5.0), (0.9, 1.0)].map(|(w, h)| Some(Provenance::new(w, h).unwrap()));
/// let weighted = weights(&rows, &[10, 10, 10], &Weighting::default())?;
/// assert!((weighted.weights[0] - 2.175814).abs() < 1e-6);
/// assert!((weighted.weights.iter().sum::<f64>() - 3.0).abs() < 1e-12);
/// # Ok::<(), planish_loss::Error>(())
/// ```
pub fn weights(rows: &[Option<Provenance>], trained_tokens: &[usize], weighting: &Weighting) -> Result<Weights> {
    weighting.check()?;
    if rows.len() != trained_tokens.len() {
        return Err(Error::LengthMismatch {
            what: "trained tokens of the weighted rows",
            expected: rows.len(),
            found: trained_tokens.len(),
        });
    }
    let normalisers = normalisers(rows, trained_tokens, weighting)?;
    let weights: Vec<f64> = rows.iter().map(|row| weighting.weight(*row, &normalisers)).collect();
    Ok(Weights {
        effective_sample_size: effective_sample_size(&weights),
        n_neutral: rows.iter().filter(|row| row.is_none()).count(),
        n_coordinated: rows.iter().flatten().filter(|row| row.coordinate() < 0.0).count(),
        normalisers,
        weights,
    })
}

/// How a run uses distrust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// No part in training.
    Off,
    /// Reports `CE + λ·mean ℓ`, trains plain cross-entropy.
    Additive,
    /// Scales each example's token losses.
    #[default]
    Weight,
    /// Draws examples in proportion to their weight.
    Sampler,
}

/// Authority and provenance entropy of one example, inside the domain of the formula.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Provenance {
    authority: f64,
    entropy: f64,
}

impl Provenance {
    /// `authority` in `[0, 0.99]`, `entropy ≥ 0` in bits, both finite.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn new(authority: f64, entropy: f64) -> Result<Self> {
        if !(0.0..=MAX_AUTHORITY).contains(&authority) {
            return Err(out_of_range("auth_weight", authority, "[0, 0.99]"));
        }
        if !(entropy >= 0.0 && entropy.is_finite()) {
            return Err(out_of_range("prov_entropy", entropy, "[0, ∞), finite"));
        }
        Ok(Self { authority, entropy })
    }

    /// `w`, the authority.
    pub fn authority(&self) -> f64 {
        self.authority
    }

    /// `H`, the provenance entropy in bits.
    pub fn entropy(&self) -> f64 {
        self.entropy
    }

    /// `c = ln(1 − w + ε) + H`.
    pub(crate) fn coordinate(&self) -> f64 {
        coordinate(self.authority, self.entropy)
    }

    /// `ℓ = α·c²`, the published value.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `α ∈ [2.3, 3.0]`.
    pub fn value(&self, alpha: f64) -> Result<f64> {
        check_alpha(alpha)?;
        Ok(alpha * self.coordinate().powi(2))
    }
}

/// Turns `c` into a raw weight `ω ≥ 0`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Link {
    /// `max(c, 0)²`: monotone in both fields; coordinated sources (`c < 0`) fall to the floor.
    #[default]
    Hinge,
    /// `c²`, the published value without `α`: rises again for `c < 0`, so it also favours the most coordinated sources.
    Literal,
    /// `exp(c/τ)`: always positive and monotone; large `τ` tends to equal weights.
    Tempered {
        /// `τ > 0`; 4 unless set.
        tau: f64,
    },
}

impl Link {
    /// `ω` at coordinate `c`.
    pub fn apply(&self, coordinate: f64) -> f64 {
        match self {
            Self::Hinge => coordinate.max(0.0).powi(2),
            Self::Literal => coordinate.powi(2),
            Self::Tempered { tau } => (coordinate / tau).exp(),
        }
    }

    /// The name used in configuration files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hinge => "hinge",
            Self::Literal => "literal",
            Self::Tempered { .. } => "tempered",
        }
    }
}

/// What one unit of the mean is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unit {
    /// Trained tokens: equal weights give plain token-weighted cross-entropy bit for bit.
    #[default]
    Token,
    /// Examples: equal weights give the mean of the examples' mean losses.
    Example,
}

/// Settings of the weight; the default is hinge, floor 0.1, cap 4, by tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weighting {
    /// Turns the coordinate into a raw weight.
    pub link: Link,
    /// Least weight relative to the mean, `0 ≤ floor < 1`.
    pub floor: f64,
    /// Greatest weight relative to the mean, `1 < cap`.
    pub cap: f64,
    /// What the means run over.
    pub unit: Unit,
}

impl Default for Weighting {
    fn default() -> Self {
        Self {
            link: Link::Hinge,
            floor: 0.1,
            cap: 4.0,
            unit: Unit::Token,
        }
    }
}

impl Weighting {
    /// Refuses settings outside their range.
    ///
    /// # Errors
    /// [`Error::OutOfRange`].
    pub fn check(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.floor) {
            return Err(out_of_range("loss.distrust.floor", self.floor, "[0, 1)"));
        }
        if self.cap.is_nan() || self.cap <= 1.0 {
            return Err(out_of_range("loss.distrust.cap", self.cap, "(1, ∞]"));
        }
        match self.link {
            Link::Tempered { tau } if !(tau > 0.0 && tau.is_finite()) => {
                Err(out_of_range("loss.distrust.tau", tau, "(0, ∞)"))
            }
            _ => Ok(()),
        }
    }

    /// Weight of a row under means that were fixed before, as on resume and for validation rows.
    pub fn weight(&self, row: Option<Provenance>, normalisers: &Normalisers) -> f64 {
        match row {
            None => 1.0,
            Some(row) => self.clipped(row, normalisers.mu0) / normalisers.mu1,
        }
    }

    fn clipped(&self, row: Provenance, mu0: f64) -> f64 {
        (self.link.apply(row.coordinate()) / mu0).clamp(self.floor, self.cap)
    }
}

/// The two means that make the weights' mean exactly 1; part of a run's saved state.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisers {
    /// Mean raw weight `ω`.
    pub mu0: f64,
    /// Mean of the clipped, once-normalised weight.
    pub mu1: f64,
}

/// The weights of a dataset and what to report about them.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// One weight a row, in row order.
    pub weights: Vec<f64>,
    /// The means behind them.
    pub normalisers: Normalisers,
    /// See [`effective_sample_size`].
    pub effective_sample_size: f64,
    /// Rows without provenance, which got weight 1.
    pub n_neutral: usize,
    /// Rows with `c < 0`; worth a warning under [`Link::Literal`], which raises them.
    pub n_coordinated: usize,
}

impl Weights {
    /// Effective sample size as a share of the rows, in `(0, 1]`.
    pub fn effective_share(&self) -> f64 {
        self.effective_sample_size / self.weights.len() as f64
    }
}

/// `(Σ ω)² / Σ ω²`: how many equally weighted examples would carry the same information.
pub fn effective_sample_size(weights: &[f64]) -> f64 {
    let sum: f64 = weights.iter().sum();
    let squares: f64 = weights.iter().map(|w| w * w).sum();
    if squares == 0.0 { 0.0 } else { sum * sum / squares }
}

/// `CE + λ·mean ℓ`, reported by [`Mode::Additive`]; its gradient is that of `CE` alone.
///
/// # Errors
/// [`Error::OutOfRange`] when `λ` is negative or not finite.
pub fn additive_total(cross_entropy: f64, mean_value: f64, lambda: f64) -> Result<f64> {
    if !(lambda >= 0.0 && lambda.is_finite()) {
        return Err(out_of_range("loss.distrust.lambda", lambda, "[0, ∞), finite"));
    }
    Ok(cross_entropy + lambda * mean_value)
}

/// `c(w, H)` without a domain check.
fn coordinate(authority: f64, entropy: f64) -> f64 {
    (1.0 - authority + EPSILON).ln() + entropy
}

fn check_alpha(alpha: f64) -> Result<()> {
    if (2.3..=3.0).contains(&alpha) {
        Ok(())
    } else {
        Err(out_of_range("loss.distrust.alpha", alpha, "[2.3, 3.0]"))
    }
}

fn normalisers(rows: &[Option<Provenance>], trained_tokens: &[usize], weighting: &Weighting) -> Result<Normalisers> {
    let counted: Vec<(Provenance, f64)> = rows
        .iter()
        .zip(trained_tokens)
        .filter_map(|(row, &tokens)| {
            row.map(|row| {
                (
                    row,
                    if weighting.unit == Unit::Token {
                        tokens as f64
                    } else {
                        1.0
                    },
                )
            })
        })
        .collect();
    if counted.is_empty() {
        return Ok(Normalisers { mu0: 1.0, mu1: 1.0 });
    }
    let mean = |value: &dyn Fn(Provenance) -> f64| {
        weighted_mean(counted.iter().map(|&(row, n)| (value(row), n)))
            .ok_or(Error::NoTrainedTokens { rows: rows.len() })
    };
    let mu0 = mean(&|row| weighting.link.apply(row.coordinate()))?;
    if mu0 == 0.0 {
        return Err(Error::NoPositiveWeight {
            rows: rows.len(),
            link: weighting.link.name(),
        });
    }
    Ok(Normalisers {
        mu0,
        mu1: mean(&|row| weighting.clipped(row, mu0))?,
    })
}

/// `Σ n·x / Σ n`, taken around the least `x` so that equal values have exactly that mean.
fn weighted_mean(values: impl Iterator<Item = (f64, f64)> + Clone) -> Option<f64> {
    let least = values.clone().map(|(x, _)| x).fold(f64::INFINITY, f64::min);
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), (x, n)| (sum + n * (x - least), count + n));
    (count > 0.0).then(|| least + sum / count)
}

fn out_of_range(name: &'static str, value: f64, range: &'static str) -> Error {
    Error::OutOfRange {
        name,
        value,
        range,
        row: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() <= tolerance,
            "found {found}, expected {expected}"
        );
    }

    fn row(w: f64, h: f64) -> Provenance {
        Provenance::new(w, h).unwrap()
    }

    fn b1() -> [Provenance; 3] {
        [row(0.05, 7.5), row(0.5, 5.0), row(0.9, 1.0)]
    }

    const CE: [f64; 3] = [2.0, 1.5, 1.0];

    #[test]
    fn coordinate_and_value_match_published_points() {
        let check = |w, h, c, value| {
            close(row(w, h).coordinate(), c, 1e-8);
            close(row(w, h).value(2.7).unwrap(), value, 1e-8);
        };
        check(0.0, 0.0, 1.0e-8, 0.0);
        check(0.0, 5.0, 5.00000001, 67.50000027);
        check(0.0, 10.0, 10.00000001, 270.00000054);
        check(0.02, 8.9, 8.87979730, 212.89716038);
        check(0.05, 7.0, 6.94870672, 130.36821757);
        check(0.05, 7.5, 7.44870672, 149.80472571);
        check(0.1, 5.0, 4.89463950, 64.68523863);
        check(0.1, 6.0, 5.89463950, 93.81629191);
        check(0.1, 8.0, 7.89463950, 168.27839846);
        check(0.15, 6.0, 5.83748108, 92.00570054);
        check(0.3, 6.0, 5.64332507, 85.98721819);
        check(0.5, 0.0, -0.69314716, 1.29722306);
        check(0.5, 4.0, 3.30685284, 29.52524439);
        check(0.5, 5.0, 4.30685284, 50.08224973);
        check(0.6, 3.0, 2.08370929, 11.72297993);
        check(0.75, 1.5, 0.11370568, 0.03490825);
        check(0.85, 1.2, -0.69711992, 1.31213569);
        check(0.85, 1.5, -0.39711992, 0.42580142);
        check(0.9, 0.0, -2.30258499, 14.31512365);
        check(0.9, 0.2, -2.10258499, 11.93633186);
        check(0.9, 1.0, -1.30258499, 4.58116469);
        check(0.95, 0.5, -2.49573207, 16.81743217);
        check(0.99, 0.0, -4.60516919, 57.26047473);
        check(0.99, 5.0, 0.39483081, 0.42090670);
        check(0.99, 10.0, 5.39483081, 78.58133868);
        close(row(0.9, std::f64::consts::LN_10).value(2.7).unwrap(), 0.0, 1e-8); // the zero ridge
    }

    #[test]
    fn ratios_do_not_depend_on_alpha() {
        for alpha in [2.3, 2.7, 3.0] {
            let ratio = |a: Provenance, b: Provenance| a.value(alpha).unwrap() / b.value(alpha).unwrap();
            close(ratio(row(0.05, 7.5), row(0.9, 1.0)), 32.700140, 1e-6);
            close(ratio(row(0.02, 8.9), row(0.9, 1.0)), 46.472278, 1e-6);
            close(ratio(row(0.1, 6.0), row(0.85, 1.5)), 220.328744, 1e-6);
        }
    }

    fn sum_of_values(rows: &[Provenance]) -> f64 {
        rows.iter().map(|row| row.value(2.7).unwrap()).sum()
    }

    #[test]
    fn batch_reductions_match_published_batches() {
        let check = |w: &[f64], h: &[f64], mean, sum| {
            let rows: Vec<_> = w.iter().zip(h).map(|(&w, &h)| row(w, h)).collect();
            close(sum_of_values(&rows) / rows.len() as f64, mean, 1e-6);
            close(sum_of_values(&rows), sum, 1e-6);
        };
        check(&[0.05, 0.5, 0.9], &[7.5, 5.0, 1.0], 68.156047, 204.468140);
        check(&[0.1, 0.5, 0.9], &[8.0, 5.0, 2.0], 72.869285, 218.607854);
        check(&[0.05, 0.5, 0.9], &[7.0, 4.0, 1.0], 54.824876, 164.474627);
        check(&[0.1, 0.2, 0.3, 0.4], &[5.0, 4.0, 6.0, 5.5], 64.098756, 256.395023);
        // α = 2.0 lies outside the accepted range, so it goes through the unchecked part.
        let b4 = [(0.1, 5.0), (0.2, 4.0), (0.3, 6.0), (0.4, 5.5)];
        let mean = b4.iter().map(|&(w, h)| 2.0 * coordinate(w, h).powi(2)).sum::<f64>() / 4.0;
        close(mean, 47.480560, 1e-6);
    }

    #[test]
    fn composites_match_published_values() {
        let mean = sum_of_values(&b1()) / b1().len() as f64;
        close(additive_total(1.5, mean, 0.6).unwrap(), 42.393628, 1e-6);
        let ess = |link: Link| effective_sample_size(&b1().map(|r| link.apply(r.coordinate())));
        close(ess(Link::Literal), 1.674, 5e-4);
        close(ess(Link::Hinge), 1.601, 5e-4);
        close(ess(Link::Tempered { tau: 1.0 }), 1.0866, 5e-5);
        close(ess(Link::Tempered { tau: 2.0 }), 1.4276, 5e-5);
        close(ess(Link::Tempered { tau: 8.0 }), 2.5768, 5e-5);
    }

    #[test]
    fn known_source_types_have_the_published_values() {
        let check = |w, h, value: f64| {
            let found = row(w, h).value(2.7).unwrap();
            assert!(
                (found - value).abs() <= 0.5 * 10f64.powf(value.log10().floor() - 3.0),
                "{found} is not {value}"
            );
        };
        check(0.05, 7.0, 130.4);
        check(0.08, 7.5, 148.5);
        check(0.10, 6.0, 93.82);
        check(0.10, 6.5, 110.4);
        check(0.12, 6.0, 93.10);
        check(0.15, 6.0, 92.01);
        check(0.50, 3.5, 21.27);
        check(0.55, 3.2, 15.57);
        check(0.60, 3.0, 11.72);
        check(0.75, 1.5, 0.03491);
        check(0.85, 1.2, 1.312);
        check(0.90, 1.0, 4.581);
        check(0.95, 0.5, 16.82);
        check(0.50, 3.0, 14.37);
    }

    struct Oracle {
        link: Link,
        tokens: [usize; 3],
        mu: [f64; 2],
        weights: [f64; 3],
        loss: f64,
        ess: f64,
    }

    #[test]
    fn weights_match_the_specification_table() {
        let check = |o: Oracle| {
            let found = weights(
                &b1().map(Some),
                &o.tokens,
                &Weighting {
                    link: o.link,
                    ..Weighting::default()
                },
            )
            .unwrap();
            close(found.normalisers.mu0, o.mu[0], 1e-6);
            close(found.normalisers.mu1, o.mu[1], 1e-6);
            (0..3).for_each(|i| close(found.weights[i], o.weights[i], 1e-6));
            close(found.effective_sample_size, o.ess, 5e-5);
            let tokens: usize = o.tokens.iter().sum();
            let loss = (0..3)
                .map(|i| found.weights[i] * CE[i] * o.tokens[i] as f64)
                .sum::<f64>()
                / tokens as f64;
            close(loss, o.loss, 1e-6);
        };
        let (even, uneven) = ([7, 7, 7], [10, 20, 30]);
        let tempered = Link::Tempered { tau: 4.0 };
        check(Oracle {
            link: Link::Hinge,
            tokens: even,
            mu: [24.677404, 1.033333],
            weights: [2.175814, 0.727411, 0.096774],
            loss: 1.846507,
            ess: 1.7069,
        });
        check(Oracle {
            link: Link::Hinge,
            tokens: uneven,
            mu: [15.430199, 1.05],
            weights: [3.424530, 1.144878, 0.095238],
            loss: 1.761568,
            ess: 1.6677,
        });
        check(Oracle {
            link: Link::Literal,
            tokens: even,
            mu: [25.242980, 1.010928],
            weights: [2.174207, 0.726874, 0.098919],
            loss: 1.845881,
            ess: 1.7093,
        });
        check(Oracle {
            link: Link::Literal,
            tokens: uneven,
            mu: [16.278563, 1.0],
            weights: [3.408362, 1.139473, 0.104231],
            loss: 1.757972,
            ess: 1.6743,
        });
        check(Oracle {
            link: tempered,
            tokens: even,
            mu: [3.364937, 1.0],
            weights: [1.913181, 0.872235, 0.214584],
            loss: 1.783100,
            ess: 2.0147,
        });
        check(Oracle {
            link: tempered,
            tokens: uneven,
            mu: [2.412325, 1.0],
            weights: [2.668685, 1.216676, 0.299321],
            loss: 1.647560,
            ess: 2.0147,
        });
    }

    #[test]
    fn weights_without_floor_and_cap_are_the_raw_shares() {
        let raw = |link| Weighting {
            link,
            floor: 0.0,
            cap: f64::INFINITY,
            unit: Unit::Token,
        };
        let check = |link, expected: [f64; 3], loss| {
            let found = weights(&b1().map(Some), &[5, 5, 5], &raw(link)).unwrap().weights;
            (0..3).for_each(|i| close(found[i], expected[i], 1e-6));
            close((0..3).map(|i| found[i] * CE[i]).sum::<f64>() / 3.0, loss, 1e-6);
        };
        check(Link::Literal, [2.197967, 0.734817, 0.067216], 1.855125);
        check(Link::Hinge, [2.248341, 0.751659, 0.0], 1.874724);
    }

    #[test]
    fn domain_edges_pass_and_everything_outside_is_refused() {
        for (w, h) in [(0.0, 0.0), (0.99, 0.0), (0.0, 10.0)] {
            assert!(Provenance::new(w, h).is_ok());
        }
        for alpha in [2.3, 3.0] {
            assert!(row(0.5, 1.0).value(alpha).is_ok());
        }
        let bad = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        for w in bad.into_iter().chain([-0.1, 1.0, 1.5]) {
            assert!(
                matches!(
                    Provenance::new(w, 1.0),
                    Err(Error::OutOfRange {
                        name: "auth_weight",
                        ..
                    })
                ),
                "{w}"
            );
        }
        for h in bad.into_iter().chain([-1.0]) {
            assert!(
                matches!(
                    Provenance::new(0.5, h),
                    Err(Error::OutOfRange {
                        name: "prov_entropy",
                        ..
                    })
                ),
                "{h}"
            );
        }
        for alpha in bad.into_iter().chain([1.0, 2.0, 3.5]) {
            assert!(row(0.5, 1.0).value(alpha).is_err(), "{alpha}");
        }
        for lambda in bad.into_iter().chain([-0.5]) {
            assert!(additive_total(1.0, 1.0, lambda).is_err(), "{lambda}");
        }
        for weighting in [(1.0, 4.0), (-0.1, 4.0), (f64::NAN, 4.0), (0.1, 1.0), (0.1, f64::NAN)] {
            let weighting = Weighting {
                floor: weighting.0,
                cap: weighting.1,
                ..Weighting::default()
            };
            assert!(
                weights(&b1().map(Some), &[1, 1, 1], &weighting).is_err(),
                "{weighting:?}"
            );
        }
    }

    #[test]
    fn err_unequal_lengths_and_nothing_to_weigh() {
        let all = b1().map(Some);
        assert!(matches!(
            weights(&all, &[1, 2], &Weighting::default()),
            Err(Error::LengthMismatch { .. })
        ));
        assert!(matches!(
            weights(&all, &[0, 0, 0], &Weighting::default()),
            Err(Error::NoTrainedTokens { .. })
        ));
        let coordinated = [Some(row(0.9, 0.0)), Some(row(0.95, 0.5))];
        let refused = weights(&coordinated, &[3, 4], &Weighting::default()).unwrap_err();
        assert!(refused.to_string().contains("tempered"), "{refused}");
        let tempered = Weighting {
            link: Link::Tempered { tau: 4.0 },
            ..Weighting::default()
        };
        assert!(weights(&coordinated, &[3, 4], &tempered).is_ok());
    }

    #[test]
    fn a_row_without_provenance_weighs_one_and_moves_nobody() {
        let with = weights(
            &[Some(b1()[0]), None, Some(b1()[1])],
            &[10, 500, 20],
            &Weighting::default(),
        )
        .unwrap();
        let without = weights(&[Some(b1()[0]), Some(b1()[1])], &[10, 20], &Weighting::default()).unwrap();
        assert_eq!(with.weights[1], 1.0);
        assert_eq!(
            (with.weights[0], with.weights[2]),
            (without.weights[0], without.weights[1])
        );
        assert_eq!(with.n_neutral, 1);
    }

    #[test]
    fn literal_link_is_not_monotone() {
        let raw = |w, h| Link::Literal.apply(row(w, h).coordinate());
        assert!(raw(0.99, 0.0) > raw(0.5, 5.0)); // the most coordinated source outranks an ordinary one
        assert!(raw(0.9, 0.0) > raw(0.9, 1.0)); // more entropy, less weight
    }

    fn any_rows() -> impl Strategy<Value = Vec<(f64, f64, usize)>> {
        prop::collection::vec((0.0..=0.99f64, 0.0..10.0f64, 1usize..400), 1..40)
    }

    fn any_weighting() -> impl Strategy<Value = Weighting> {
        let link = prop_oneof![
            Just(Link::Hinge),
            Just(Link::Literal),
            (0.5..9.0f64).prop_map(|tau| Link::Tempered { tau })
        ];
        (link, 0.0..0.99f64, 1.01..8.0f64).prop_map(|(link, floor, cap)| Weighting {
            link,
            floor,
            cap,
            unit: Unit::Token,
        })
    }

    fn split(rows: &[(f64, f64, usize)]) -> (Vec<Option<Provenance>>, Vec<usize>) {
        (
            rows.iter().map(|r| Some(row(r.0, r.1))).collect(),
            rows.iter().map(|r| r.2).collect(),
        )
    }

    proptest! {
        #[test]
        fn prop_token_weighted_mean_is_one(rows in any_rows(), weighting in any_weighting()) {
            let (provenance, tokens) = split(&rows);
            if let Ok(found) = weights(&provenance, &tokens, &weighting) {
                let total: usize = tokens.iter().sum();
                let weighted: f64 = found.weights.iter().zip(&tokens).map(|(w, &n)| w * n as f64).sum();
                prop_assert!((weighted / total as f64 - 1.0).abs() < 1e-12);
                prop_assert!(found.weights.iter().all(|&w| w >= 0.0));
                let mu1 = found.normalisers.mu1;
                let slack = 1.0 + 1e-12;
                prop_assert!(found.weights.iter().all(|&w| w * slack >= weighting.floor / mu1 && w <= slack * weighting.cap / mu1));
            }
        }

        #[test]
        fn prop_equal_metadata_weighs_exactly_one(w in 0.0..0.8f64, h in 2.0..10.0f64, tokens in prop::collection::vec(1usize..400, 1..40), weighting in any_weighting()) {
            let rows = vec![Some(row(w, h)); tokens.len()];
            let found = weights(&rows, &tokens, &weighting).unwrap();
            prop_assert!(found.weights.iter().all(|&w| w == 1.0));
            prop_assert!((found.effective_share() - 1.0).abs() < 1e-12);
        }

        #[test]
        fn prop_permuting_rows_permutes_weights(rows in any_rows(), shift in 0usize..40) {
            let (provenance, tokens) = split(&rows);
            let mut turned = rows.clone();
            turned.rotate_left(shift % rows.len());
            let (turned_provenance, turned_tokens) = split(&turned);
            if let Ok(found) = weights(&provenance, &tokens, &Weighting::default()) {
                let mut expected = found.weights;
                expected.rotate_left(shift % rows.len());
                let turned = weights(&turned_provenance, &turned_tokens, &Weighting::default()).unwrap().weights;
                for (a, b) in turned.iter().zip(&expected) {
                    prop_assert!((a - b).abs() <= 1e-12 * b.abs().max(1.0));
                }
            }
        }

        #[test]
        fn prop_hinge_and_tempered_are_monotone(w in 0.0..0.98f64, dw in 0.0..0.01f64, h in 0.0..9.0f64, dh in 0.0..1.0f64, tau in 0.5..9.0f64) {
            for link in [Link::Hinge, Link::Tempered { tau }] {
                let raw = |w, h| link.apply(row(w, h).coordinate());
                prop_assert!(raw(w, h + dh) >= raw(w, h));
                prop_assert!(raw(w + dw, h) <= raw(w, h));
            }
        }

        #[test]
        fn prop_value_is_never_negative(w in 0.0..=0.99f64, h in 0.0..20.0f64, alpha in 2.3..=3.0f64) {
            prop_assert!(row(w, h).value(alpha).unwrap() >= 0.0);
        }
    }
}

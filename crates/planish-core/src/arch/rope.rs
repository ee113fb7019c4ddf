//! Rotary position embedding, and how it is stretched: frequencies in one place for every consumer.

use std::f64::consts::TAU;

/// Rotary position embedding: pair `i` of the first `dims` numbers of a head turns by `position · frequency_i`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: `theta^(−2i / dims)`, then scaled.
    pub theta: f32,
    /// How many numbers of a head turn; even, at most its width.
    pub dims: usize,
    /// Which numbers are a pair.
    pub pairs: RopePairs,
    /// Stretching for contexts longer than the original.
    pub scaling: RopeScaling,
}

/// Which two numbers of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopePairs {
    /// `(i, i + dims / 2)`.
    Halves,
    /// `(2i, 2i + 1)`.
    Adjacent,
}

/// How rotary frequencies are stretched.
///
/// # Reference
/// The scalings as in `modeling_rope_utils.py` of the Python package transformers; YaRN: Peng et al. 2023, arXiv 2309.00071.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// At least 1.
        factor: f32,
    },
    /// A larger theta as soon as the sequence is longer than the original context.
    Dynamic {
        /// At least 1.
        factor: f32,
        /// Context before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth passage between.
    Llama3 {
        /// At least 1.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept; greater than `low_freq_factor`.
        high_freq_factor: f32,
        /// Context before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// Long wavelengths divided by `factor`, short ones kept, a linear ramp over the pairs between; q and k grow by a factor.
    Yarn {
        /// At least 1.
        factor: f32,
        /// Turns over the original context above which a pair is kept.
        beta_fast: f32,
        /// Turns below which it is divided.
        beta_slow: f32,
        /// The ramp begins and ends at whole pairs.
        truncate: bool,
        /// What rotated numbers are multiplied by.
        attention_factor: f32,
        /// Context before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
    /// A divisor for each pair: one list up to the original context, another for longer sequences.
    LongRope {
        /// `dims / 2` divisors.
        short_factor: Vec<f32>,
        /// `dims / 2` divisors.
        long_factor: Vec<f32>,
        /// What rotated numbers are multiplied by.
        attention_factor: f32,
        /// Context before stretching, in tokens.
        original_max_position_embeddings: usize,
    },
}

impl Rope {
    /// Radians per position of each pair, `dims / 2` of them, in a sequence of `length` tokens.
    pub fn frequencies(&self, length: usize) -> Vec<f64> {
        let plain = powers(f64::from(self.theta), self.dims);
        match &self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.iter().map(|f| f / f64::from(*factor)).collect(),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings: original,
            } => powers(self.dynamic_theta(f64::from(*factor), *original, length), self.dims),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => {
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let kept = |frequency: f64| ((*original as f64 * frequency / TAU - low) / (high - low)).clamp(0.0, 1.0);
                let blend = |f: &f64| f * (kept(*f) + (1.0 - kept(*f)) / f64::from(*factor));
                plain.iter().map(blend).collect()
            }
            RopeScaling::Yarn { factor, .. } => {
                let (low, high) = self.yarn_ramp();
                let divided = |pair: usize| ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                let blend = |(pair, f): (usize, &f64)| f * (1.0 - divided(pair) + divided(pair) / f64::from(*factor));
                plain.iter().enumerate().map(blend).collect()
            }
            RopeScaling::LongRope {
                short_factor,
                long_factor,
                original_max_position_embeddings: original,
                ..
            } => {
                let divisors = if length > *original { long_factor } else { short_factor };
                plain
                    .iter()
                    .zip(divisors)
                    .map(|(f, divisor)| f / f64::from(*divisor))
                    .collect()
            }
        }
    }

    /// What rotated numbers are multiplied by.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            RopeScaling::None
            | RopeScaling::Linear { .. }
            | RopeScaling::Dynamic { .. }
            | RopeScaling::Llama3 { .. } => 1.0,
        }
    }

    /// The longest sequence whose frequencies are those of a single token; beyond it they depend on the length.
    pub fn constant_up_to(&self) -> usize {
        match self.scaling {
            RopeScaling::Dynamic {
                original_max_position_embeddings: original,
                ..
            }
            | RopeScaling::LongRope {
                original_max_position_embeddings: original,
                ..
            } => original,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } | RopeScaling::Yarn { .. } => {
                usize::MAX
            }
        }
    }

    /// `theta · (factor · length / original − (factor − 1))^(dims / (dims − 2))`.
    fn dynamic_theta(&self, factor: f64, original: usize, length: usize) -> f64 {
        let stretch = factor * length.max(original) as f64 / original as f64 - (factor - 1.0);
        let dims = self.dims as f64;
        f64::from(self.theta) * stretch.powf(dims / (dims - 2.0))
    }

    /// First and last pair of YaRN's ramp: those that turn `beta_fast` and `beta_slow` times over the original context.
    fn yarn_ramp(&self) -> (f64, f64) {
        let RopeScaling::Yarn {
            beta_fast,
            beta_slow,
            truncate,
            original_max_position_embeddings: original,
            ..
        } = self.scaling
        else {
            return (0.0, 1.0);
        };
        let dims = self.dims as f64;
        let pair =
            |turns: f32| dims * (original as f64 / (f64::from(turns) * TAU)).ln() / (2.0 * f64::from(self.theta).ln());
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dims - 1.0));
        // Never a step of no width.
        (low, if low == high { high + 0.001 } else { high })
    }
}

fn powers(theta: f64, dims: usize) -> Vec<f64> {
    (0..dims / 2)
        .map(|pair| theta.powf(-2.0 * pair as f64 / dims as f64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope {
            theta: 500_000.0,
            dims: 64,
            pairs: RopePairs::Halves,
            scaling,
        }
    }

    fn ratios(scaling: RopeScaling, length: usize) -> Vec<f64> {
        let plain = rope(RopeScaling::None).frequencies(length);
        let scaled = rope(scaling).frequencies(length);
        plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect()
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_stretches_long_ones() {
        let ratios = ratios(
            RopeScaling::Llama3 {
                factor: 8.0,
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position_embeddings: 8192,
            },
            1,
        );
        assert_eq!((ratios[0], ratios[31]), (1.0, 8.0));
        assert!(ratios.is_sorted(), "{ratios:?}");
        assert!(
            ratios.iter().any(|ratio| (1.5..7.5).contains(ratio)),
            "no blended pair: {ratios:?}"
        );
    }

    #[test]
    fn yarn_ramps_from_kept_to_divided() {
        let yarn = |truncate| RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate,
            attention_factor: 1.1,
            original_max_position_embeddings: 4096,
        };
        let whole = ratios(yarn(true), 1);
        assert!(
            (whole[0] - 1.0).abs() < 1e-12 && (whole[31] - 4.0).abs() < 1e-12,
            "{whole:?}"
        );
        assert!(whole.is_sorted() && whole != ratios(yarn(false), 1));
    }

    #[test]
    fn dynamic_and_longrope_change_beyond_the_original_context() {
        let dynamic = RopeScaling::Dynamic {
            factor: 2.0,
            original_max_position_embeddings: 100,
        };
        assert!(ratios(dynamic.clone(), 100).iter().all(|ratio| *ratio == 1.0));
        assert!(ratios(dynamic.clone(), 101)[31] > 1.0);
        assert_eq!(rope(dynamic).constant_up_to(), 100);
        let long = RopeScaling::LongRope {
            short_factor: vec![1.0; 32],
            long_factor: vec![3.0; 32],
            attention_factor: 1.2,
            original_max_position_embeddings: 100,
        };
        assert_eq!(ratios(long.clone(), 100)[5], 1.0);
        assert!((ratios(long, 101)[5] - 3.0).abs() < 1e-12);
    }
}

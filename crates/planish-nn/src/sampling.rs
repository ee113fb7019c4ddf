use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 = always the likeliest token.
    pub temperature: f32,
    /// Only the likeliest tokens that together reach this probability take part; 1 = all.
    pub top_p: f32,
    /// Decides every draw.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            seed: 0,
        }
    }
}

/// Draws tokens, one after another.
#[derive(Debug)]
pub(crate) struct Sampler {
    settings: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    pub(crate) fn new(settings: Sampling) -> Result<Self> {
        let range = |what, value, range| Err(Error::SamplingRange { what, value, range });
        if !(settings.temperature >= 0.0 && settings.temperature.is_finite()) {
            return range("temperature", settings.temperature, "[0, ∞)");
        }
        if !(settings.top_p > 0.0 && settings.top_p <= 1.0) {
            return range("top_p", settings.top_p, "(0, 1]");
        }
        Ok(Self {
            settings,
            random: ChaCha8Rng::seed_from_u64(settings.seed),
        })
    }

    /// The next token for `logits` `[v]`.
    pub(crate) fn next(&mut self, logits: &[f32]) -> u32 {
        if self.settings.temperature == 0.0 {
            return argmax(logits);
        }
        let mut candidates = probabilities(logits, f64::from(self.settings.temperature));
        // Likeliest first; equal ones by id, so that the draw does not depend on the sort.
        candidates.sort_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
        let kept = nucleus(&candidates, f64::from(self.settings.top_p));
        let total: f64 = kept.iter().map(|(_, probability)| probability).sum();
        let mut rest = self.random.random::<f64>() * total;
        for &(token, probability) in kept {
            rest -= probability;
            if rest < 0.0 {
                return token;
            }
        }
        kept.last().map_or(0, |&(token, _)| token)
    }
}

/// The first of the largest logits.
fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

fn probabilities(logits: &[f32], temperature: f64) -> Vec<(u32, f64)> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let weights: Vec<f64> = logits
        .iter()
        .map(|&logit| ((f64::from(logit) - largest) / temperature).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    weights
        .into_iter()
        .enumerate()
        .map(|(token, weight)| (token as u32, weight / total))
        .collect()
}

/// The shortest prefix whose probabilities reach `top_p`; at least one candidate.
fn nucleus(candidates: &[(u32, f64)], top_p: f64) -> &[(u32, f64)] {
    let mut sum = 0.0;
    let reaching = candidates.iter().position(|(_, probability)| {
        sum += probability;
        sum >= top_p
    });
    reaching.map_or(candidates, |last| &candidates[..=last])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(temperature: f32, top_p: f32, seed: u64, count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(Sampling {
            temperature,
            top_p,
            seed,
        })
        .unwrap();
        // Probabilities 0.5, 0.3, 0.2 in a shuffled order.
        let logits = [0.3f32.ln(), 0.5f32.ln(), 0.2f32.ln()];
        (0..count).map(|_| sampler.next(&logits)).collect()
    }

    #[test]
    fn temperature_zero_takes_the_likeliest() {
        assert_eq!(draw(0.0, 1.0, 7, 3), [1, 1, 1]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let drawn = draw(1.0, 1.0, 1, 10_000);
        for (token, expect) in [(0, 3000), (1, 5000), (2, 2000)] {
            let count = drawn.iter().filter(|&&drawn| drawn == token).count() as i32;
            assert!((count - expect).abs() < 200, "token {token}: {count}");
        }
    }

    #[test]
    fn top_p_leaves_out_the_tail() {
        assert!(draw(1.0, 0.75, 1, 1000).iter().all(|&token| token != 2));
        assert!(draw(1.0, 0.75, 1, 1000).contains(&0));
        assert_eq!(draw(1.0, 0.4, 1, 3), [1, 1, 1]);
    }

    #[test]
    fn seed_decides_the_draws() {
        assert_eq!(draw(1.0, 1.0, 5, 50), draw(1.0, 1.0, 5, 50));
        assert_ne!(draw(1.0, 1.0, 5, 50), draw(1.0, 1.0, 6, 50));
    }

    #[test]
    fn err_settings_that_make_no_distribution() {
        for (temperature, top_p) in [
            (-1.0, 1.0),
            (f32::NAN, 1.0),
            (f32::INFINITY, 1.0),
            (1.0, 0.0),
            (1.0, 1.1),
        ] {
            let result = Sampler::new(Sampling {
                temperature,
                top_p,
                seed: 0,
            });
            assert!(
                matches!(result, Err(Error::SamplingRange { .. })),
                "{temperature} {top_p}"
            );
        }
    }
}

use std::sync::{Arc, Mutex, PoisonError};

use planish_core::model_config::{RopeConfig, RopeScaling};
use planish_mlx::Array;

use crate::Result;

/// Rotary position embedding: pairs `(x_i, x_{i + h_d/2})` turn by `position · frequency_i` (the half-split form).
///
/// `frequency_i = theta^(−2i / h_d)`, then scaled: linear scaling divides positions, Llama 3's divides low frequencies.
///
/// # Reference
/// Su et al. 2021, arXiv 2104.09864; scaling of Llama 3.1 as in its model card.
#[derive(Debug, Clone)]
pub struct Rope {
    head_dim: i32,
    theta: Option<f32>,
    position_scale: f32,
    /// Periods divided by 2π, `[h_d / 2]` f32, where they are no plain powers of theta.
    periods: Option<Array>,
    /// Radians a position, `[h_d / 2]`.
    frequencies: Arc<[f64]>,
    /// The last table that was asked for.
    angles: Arc<Mutex<Arc<Angles>>>,
}

/// Cosines and sines of the positions `0..length`, `[length, h_d / 2]` each.
#[derive(Debug, Default)]
pub(crate) struct Angles {
    pub(crate) cos: Vec<f32>,
    pub(crate) sin: Vec<f32>,
}

impl Rope {
    /// The rotation that a model's configuration describes, for heads of `head_dim`.
    pub fn new(config: &RopeConfig, head_dim: usize) -> Self {
        let power = |pair: usize| f64::from(config.theta).powf(-2.0 * pair as f64 / head_dim as f64);
        let plain = Rope {
            head_dim: head_dim as i32,
            theta: Some(config.theta),
            position_scale: 1.0,
            periods: None,
            frequencies: (0..head_dim / 2).map(power).collect(),
            angles: Arc::default(),
        };
        match config.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => Rope {
                position_scale: 1.0 / factor,
                frequencies: plain.frequencies.iter().map(|f| f / f64::from(factor)).collect(),
                ..plain
            },
            RopeScaling::Llama3 { .. } => {
                let periods = llama3_periods(config, head_dim);
                let frequencies = periods.iter().map(|&period| 1.0 / f64::from(period)).collect();
                let periods = Array::from_slice(&periods, &[periods.len() as i32]);
                Rope {
                    theta: None,
                    periods: Some(periods),
                    frequencies,
                    ..plain
                }
            }
        }
    }

    /// The tables of the first `length` positions, shared by all blocks.
    pub(crate) fn angles(&self, length: usize) -> Arc<Angles> {
        let mut kept = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.cos.len() != length * self.frequencies.len() {
            let angle = |position: usize| self.frequencies.iter().map(move |f| position as f64 * f);
            let all = || (0..length).flat_map(angle);
            *kept = Arc::new(Angles {
                cos: all().map(|angle| angle.cos() as f32).collect(),
                sin: all().map(|angle| angle.sin() as f32).collect(),
            });
        }
        kept.clone()
    }

    /// Rotates `x` `[b, n, s, h_d]`, whose first token stands at position `offset`.
    ///
    /// # Errors
    /// [`crate::Error::Mlx`] when `x` has another shape.
    pub fn forward(&self, x: &Array, offset: i32) -> Result<Array> {
        let (dims, scale) = (self.head_dim, self.position_scale);
        Ok(mlx_rs::fast::rope(
            x,
            dims,
            false,
            self.theta,
            scale,
            offset,
            self.periods.as_ref(),
        )?)
    }
}

impl Rope {
    /// Rotates `x` `[b, n, s, h_d]`, each token by its own position: i32 `[b · s]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub(crate) fn forward_at(&self, x: &Array, positions: &Array) -> Result<Array> {
        let shape = [x.dim(0), x.dim(2), x.dim(1), x.dim(3)];
        // Every token is a row of its own, because MLX takes one position a row.
        let tokens = x.transpose_axes(&[0, 2, 1, 3])?.reshape(&[-1, x.dim(1), 1, x.dim(3)])?; // [b · s, n, 1, h_d]
        let turned = mlx_rs::fast::rope_dynamic(
            tokens,
            self.head_dim,
            false,
            self.theta,
            self.position_scale,
            positions,
            self.periods.as_ref(),
        )?;
        Ok(turned.reshape(&shape)?.transpose_axes(&[0, 2, 1, 3])?)
    }
}

/// `theta^(2i / h_d)`, multiplied by `factor` where the wavelength is long, blended in between.
fn llama3_periods(config: &RopeConfig, head_dim: usize) -> Vec<f32> {
    let RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings,
    } = config.scaling
    else {
        return Vec::new();
    };
    let (factor, low, high) = (
        f64::from(factor),
        f64::from(low_freq_factor),
        f64::from(high_freq_factor),
    );
    let original = original_max_position_embeddings as f64;
    let scaled = |period: f64| {
        let turns = original / (std::f64::consts::TAU * period);
        // 0 where the wavelength is long (stretched by the factor), 1 where it is short (kept).
        let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        period / ((1.0 - kept) / factor + kept)
    };
    (0..head_dim / 2)
        .map(|pair| scaled(f64::from(config.theta).powf(2.0 * pair as f64 / head_dim as f64)) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama3(original: usize) -> RopeConfig {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: original,
        };
        RopeConfig {
            theta: 500_000.0,
            scaling,
        }
    }

    #[test]
    fn llama3_keeps_short_wavelengths_and_stretches_long_ones() {
        let periods = llama3_periods(&llama3(8192), 64);
        let plain = |pair: i32| 500_000f64.powf(f64::from(pair) / 32.0) as f32;
        assert_eq!(periods[0], plain(0));
        assert_eq!(periods[31], 8.0 * plain(31));
        let ratios: Vec<f32> = (0..32).map(|pair| periods[pair as usize] / plain(pair)).collect();
        assert!(ratios.is_sorted(), "{ratios:?}");
        assert!(
            ratios.iter().any(|&ratio| ratio > 1.5 && ratio < 7.5),
            "no blended pair: {ratios:?}"
        );
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let x = Array::from_slice(&[0.3_f32, -0.2, 0.9, 0.1], &[1, 1, 1, 4]);
        let rope = |scaling| Rope::new(&RopeConfig { theta: 100.0, scaling }, 4);
        let stretched = rope(RopeScaling::Linear { factor: 4.0 }).forward(&x, 8).unwrap();
        let plain = rope(RopeScaling::None).forward(&x, 2).unwrap();
        assert!(stretched.all_close(&plain, 1e-6, 1e-6, None).unwrap());
    }

    #[test]
    fn pairs_are_half_a_head_apart() {
        let x = Array::from_slice(&[1.0_f32, 0.0, 0.0, 0.0], &[1, 1, 1, 4]);
        let rope = Rope::new(
            &RopeConfig {
                theta: 10_000.0,
                scaling: RopeScaling::None,
            },
            4,
        );
        let turned = rope.forward(&x, 1).unwrap();
        let turned = turned.as_slice::<f32>();
        assert!(
            (turned[0] - 1f32.cos()).abs() < 1e-6 && (turned[2] - 1f32.sin()).abs() < 1e-6,
            "{turned:?}"
        );
        assert_eq!((turned[1], turned[3]), (0.0, 0.0));
    }
}

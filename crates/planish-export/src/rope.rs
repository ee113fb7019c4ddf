//! Rotary position tables, any supported scaling folded in.

use std::f64::consts::PI;

use planish_core::model_config::{ModelConfig, RopeScaling};

/// `cos` and `sin` of every position and dimension, `[length, head_dim]` each; the halves of a row are equal, as the
/// rotate-half form wants them.
///
/// Angle of dimension `i` at position `p`: `p · f(i mod head_dim/2)`, `f(j) = theta^(−2j/head_dim)` scaled.
///
/// # Reference
/// Su et al. 2021, arXiv 2104.09864; the scalings as in the Python package transformers.
pub fn rope_tables(config: &ModelConfig, length: usize) -> (Vec<f32>, Vec<f32>) {
    let frequencies = frequencies(config);
    let angles = (0..length).flat_map(|p| {
        let row = frequencies.iter().map(move |f| p as f64 * f);
        row.clone().chain(row)
    });
    angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)).unzip()
}

fn frequencies(config: &ModelConfig) -> Vec<f64> {
    let half = config.head_dim / 2;
    let theta = f64::from(config.rope.theta);
    (0..half)
        .map(|i| scaled(theta.powf(-(i as f64) / half as f64), config.rope.scaling))
        .collect()
}

fn scaled(frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / f64::from(factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            // Few turns over the original context: divide by the factor; many: keep; between: blend.
            let turns = original_max_position_embeddings as f64 * frequency / (2.0 * PI);
            let (low, high) = (f64::from(low_freq_factor), f64::from(high_freq_factor));
            let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (keep + (1.0 - keep) / f64::from(factor))
        }
    }
}

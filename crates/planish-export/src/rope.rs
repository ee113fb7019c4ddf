//! Rotary position tables.

use planish_core::arch::Rope;

/// `cos` and `sin` of every position and dimension, `[length, dims]` each; the halves of a row are equal, as the
/// rotate-half form wants them.
///
/// Angle of dimension `i` at position `p`: `p · f(i mod dims / 2)`, `f` the frequencies of [`Rope::frequencies`].
///
/// # Reference
/// Su et al. 2021, arXiv 2104.09864.
pub fn rope_tables(rope: &Rope, length: usize) -> (Vec<f32>, Vec<f32>) {
    let frequencies = rope.frequencies(length);
    let factor = f64::from(rope.attention_factor());
    let angles = (0..length).flat_map(|p| {
        let row = frequencies.iter().map(move |f| p as f64 * f);
        row.clone().chain(row)
    });
    let turned = |angle: f64| ((factor * angle.cos()) as f32, (factor * angle.sin()) as f32);
    angles.map(turned).unzip()
}

//! What an adapter does to the weights of its base.

use std::collections::BTreeMap;
use std::ops::Range;

use rayon::prelude::*;

use crate::{Error, HostTensor, Result, TensorStore};

/// A trained low-rank update of one matrix, rows by columns.
///
/// `W' = W + scale · left · right`; with magnitudes (DoRA) each row of `W'` then gets its magnitude as its length. A row of
/// zeros has no direction and stays. Everything is f32.
///
/// # Shapes
/// `W`: `[rows, columns]` · left: `[rows, rank]` · right: `[rank, columns]` · magnitudes: `[rows]`. The rows are the outputs
/// of a linear layer, or the tokens of an embedding.
///
/// # Reference
/// Hu et al. 2021, arXiv 2106.09685 §4.1; Liu et al. 2024, arXiv 2402.09353 (DoRA).
#[derive(Clone, Debug, PartialEq)]
pub struct LowRank {
    left: Vec<f32>,
    right: Vec<f32>,
    rank: usize,
    scale: f32,
    magnitudes: Option<Vec<f32>>,
}

impl LowRank {
    /// Of a linear layer: `a [input_dims, rank]`, `b [rank, output_dims]`, magnitudes `m [output_dims]`.
    ///
    /// # Errors
    /// [`Error::UpdateShape`]; [`Error::NotFloat`].
    ///
    /// # Example
    /// ```
    /// use planish_tensors::{HostTensor, LowRank};
    /// let a = HostTensor::from_f32(&[2, 1], &[1.0, 2.0]);
    /// let b = HostTensor::from_f32(&[1, 2], &[1.0, 10.0]);
    /// let mut weight = [0.0, 1.0, 0.0, 0.0];
    /// LowRank::linear(&a, &b, 0.5, None)?.merge(0..2, &mut weight);
    /// assert_eq!(weight, [0.5, 2.0, 5.0, 10.0]);
    /// # Ok::<(), planish_tensors::Error>(())
    /// ```
    pub fn linear(a: &HostTensor, b: &HostTensor, scale: f64, m: Option<&HostTensor>) -> Result<Self> {
        let (rank, input_dims, output_dims) = match (a.shape.as_slice(), b.shape.as_slice()) {
            ([input_dims, rank], [rank_b, output_dims]) if rank == rank_b => (*rank, *input_dims, *output_dims),
            _ => return Err(unfit(a, b)),
        };
        let (left, right) = (
            transposed(&b.to_f32()?, rank, output_dims),
            transposed(&a.to_f32()?, input_dims, rank),
        );
        Self::new(left, right, rank, scale, m)
    }

    /// Of an embedding: `a [vocabulary, rank]`, `b [rank, dims]`, magnitudes `m [vocabulary]`.
    ///
    /// # Errors
    /// As [`linear`](Self::linear).
    pub fn embedding(a: &HostTensor, b: &HostTensor, scale: f64, m: Option<&HostTensor>) -> Result<Self> {
        match (a.shape.as_slice(), b.shape.as_slice()) {
            ([_, rank], [rank_b, _]) if rank == rank_b => Self::new(a.to_f32()?, b.to_f32()?, *rank, scale, m),
            _ => Err(unfit(a, b)),
        }
    }

    fn new(left: Vec<f32>, right: Vec<f32>, rank: usize, scale: f64, m: Option<&HostTensor>) -> Result<Self> {
        let magnitudes = m.map(HostTensor::to_f32).transpose()?;
        let update = Self {
            left,
            right,
            rank,
            scale: scale as f32,
            magnitudes,
        };
        let rows = update.shape()[0];
        match (&update.magnitudes, m) {
            (Some(found), Some(m)) if found.len() != rows => Err(Error::UpdateShape {
                reason: format!("magnitudes of shape {:?} do not fit {rows} rows", m.shape),
            }),
            _ => Ok(update),
        }
    }

    /// Rank of the update.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// `[rows, columns]` of the matrix that it fits.
    pub fn shape(&self) -> [usize; 2] {
        let rank = self.rank.max(1);
        [self.left.len() / rank, self.right.len() / rank]
    }

    /// `scale · left`, `[rows, rank]`.
    pub fn scaled_left(&self) -> impl Iterator<Item = f32> {
        self.left.iter().map(|value| value * self.scale)
    }

    /// `right`, `[rank, columns]`.
    pub fn right(&self) -> &[f32] {
        &self.right
    }

    /// Whether it gives rows their lengths (DoRA); such an update cannot be kept beside the base weight.
    pub fn is_dora(&self) -> bool {
        self.magnitudes.is_some()
    }

    /// Changes rows `rows` of the matrix, which `weight` holds.
    pub fn merge(&self, rows: Range<usize>, weight: &mut [f32]) {
        let columns = self.shape()[1];
        weight
            .par_chunks_mut(columns.max(1))
            .zip(rows.into_par_iter())
            .for_each(|(weight, row)| self.merge_row(row, weight));
    }

    fn merge_row(&self, row: usize, weight: &mut [f32]) {
        let mut delta = vec![0.0f32; weight.len()];
        let factors = &self.left[row * self.rank..(row + 1) * self.rank];
        for (factor, basis) in factors.iter().zip(self.right.chunks_exact(weight.len())) {
            for (sum, value) in delta.iter_mut().zip(basis) {
                *sum += factor * value;
            }
        }
        for (weight, delta) in weight.iter_mut().zip(delta) {
            *weight += self.scale * delta;
        }
        if let Some(magnitudes) = &self.magnitudes {
            scale_to(weight, magnitudes[row]);
        }
    }
}

/// Gives a row the length `magnitude`; a row of zeros stays.
fn scale_to(row: &mut [f32], magnitude: f32) {
    let norm = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32;
    if norm > 0.0 {
        row.iter_mut().for_each(|value| *value *= magnitude / norm);
    }
}

fn transposed(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns)
        .flat_map(|column| (0..rows).map(move |row| values[row * columns + column]))
        .collect()
}

fn unfit(a: &HostTensor, b: &HostTensor) -> Error {
    Error::UpdateShape {
        reason: format!(
            "lora_a of shape {:?} and lora_b of shape {:?} are no low-rank update of a matrix",
            a.shape, b.shape
        ),
    }
}

/// Everything that an adapter changes, by the names of the base's tensors.
#[derive(Debug, Default)]
pub struct Update {
    /// Low-rank updates, such as that of `model.layers.0.self_attn.q_proj.weight`.
    pub low_rank: BTreeMap<String, LowRank>,
    /// Tensors that were trained as a whole and take the place of the base's.
    pub whole: Option<TensorStore>,
}

impl Update {
    /// Whether a tensor of the base is changed.
    pub fn changes(&self, name: &str) -> bool {
        self.low_rank.contains_key(name) || self.replacement(name).is_some()
    }

    /// The names of all changed tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let whole = self.whole.iter().flat_map(TensorStore::names);
        let mut names: Vec<&str> = whole.chain(self.low_rank.keys().map(String::as_str)).collect();
        names.sort_unstable();
        names
    }

    /// The whole tensors, where they hold this one.
    pub(crate) fn replacement(&self, name: &str) -> Option<&TensorStore> {
        self.whole.as_ref().filter(|store| store.contains(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// a `[3, 2]`, b `[2, 2]`.
    fn matrices() -> (HostTensor, HostTensor) {
        (
            HostTensor::from_f32(&[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
            HostTensor::from_f32(&[2, 2], &[1.0, 10.0, 2.0, 20.0]),
        )
    }

    fn merged(update: &LowRank, mut weight: Vec<f32>) -> Vec<f32> {
        update.merge(0..update.shape()[0], &mut weight);
        weight
    }

    #[test]
    fn linear_update_is_b_transposed_times_a_transposed() {
        // Row 0: 0.5·(1·[1,3,5] + 2·[2,4,6]); row 1 is ten times that.
        let (a, b) = matrices();
        let update = LowRank::linear(&a, &b, 0.5, None).unwrap();
        assert_eq!(
            merged(&update, vec![1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
            [3.5, 5.5, 8.5, 25.0, 55.0, 85.0]
        );
    }

    #[test]
    fn rows_merged_apart_are_those_merged_together() {
        let (a, b) = matrices();
        let update = LowRank::linear(&a, &b, 0.5, None).unwrap();
        let mut second = [1.0, 2.0, 3.0];
        update.merge(1..2, &mut second);
        assert_eq!(merged(&update, vec![0.0, 0.0, 0.0, 1.0, 2.0, 3.0])[3..], second);
    }

    #[test]
    fn embedding_update_is_a_times_b() {
        let (a, b) = matrices();
        let update = LowRank::embedding(&a, &b, 0.5, None).unwrap();
        assert_eq!(merged(&update, vec![0.0; 6]), [2.5, 25.0, 5.5, 55.0, 8.5, 85.0]);
    }

    #[test]
    fn dora_rows_have_their_magnitudes_as_norms() {
        let (a, b) = matrices();
        let m = HostTensor::from_f32(&[2], &[2.0, 0.5]);
        let update = LowRank::linear(&a, &b, 0.5, Some(&m)).unwrap();
        let fused = merged(&update, vec![1.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        for (row, magnitude) in fused.chunks(3).zip([2.0, 0.5]) {
            let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
            assert!((norm - magnitude).abs() < 1e-6, "{norm}");
        }
        assert!((fused[1] / fused[0] - 5.5 / 3.5).abs() < 1e-6);
    }

    #[test]
    fn row_of_zeros_stays_under_dora() {
        let (a, _) = matrices();
        let b = HostTensor::from_f32(&[2, 2], &[0.0, 10.0, 0.0, 20.0]);
        let m = HostTensor::from_f32(&[2], &[2.0, 0.5]);
        let fused = merged(&LowRank::linear(&a, &b, 0.5, Some(&m)).unwrap(), vec![0.0; 6]);
        assert_eq!(fused[..3], [0.0; 3]);
    }

    #[test]
    fn err_shapes_that_do_not_fit() {
        let (a, b) = matrices();
        let m = HostTensor::from_f32(&[3], &[1.0; 3]);
        for result in [
            LowRank::linear(&b, &a, 1.0, None),
            LowRank::linear(&a, &b, 1.0, Some(&m)),
        ] {
            assert!(matches!(result, Err(Error::UpdateShape { .. })), "{result:?}");
        }
    }
}

//! Which positions of a batch are trained.

use mlx_rs::{Array, ops::indexing::take_axis};

use crate::{Error, Result};

/// The positions of a padded batch that are trained, with what each should predict.
///
/// Built on the host from the batch plan, so the device never sees a mask.
#[derive(Debug, Clone)]
pub struct TrainedPositions {
    /// `None`: every position, in order.
    indices: Option<Array>,
    targets: Array,
    n_positions: usize,
    len: usize,
    /// Position of each trained token in the flattened batch, ascending.
    pub host_indices: Vec<i32>,
    /// Weight of each trained token.
    pub host_weights: Vec<f32>,
}

impl TrainedPositions {
    /// Picks the positions whose weight is not zero, in order, from a flattened `[b·l]` batch.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`]; [`Error::NoTrainedTokens`] when every weight is zero.
    pub fn select(targets: &[i32], weights: &[f32]) -> Result<Self> {
        if targets.len() != weights.len() {
            return Err(Error::LengthMismatch {
                what: "target weights",
                expected: targets.len(),
                found: weights.len(),
            });
        }
        let host_indices: Vec<i32> = (0..targets.len())
            .filter(|&i| weights[i] != 0.0)
            .map(|i| i as i32)
            .collect();
        if host_indices.is_empty() {
            return Err(Error::NoTrainedTokens { rows: targets.len() });
        }
        let picked: Vec<i32> = host_indices.iter().map(|&i| targets[i as usize]).collect();
        let host_weights = host_indices.iter().map(|&i| weights[i as usize]).collect();
        let len = host_indices.len();
        Ok(Self {
            indices: Some(Array::from_slice(&host_indices, &[len as i32])),
            targets: Array::from_slice(&picked, &[len as i32]),
            n_positions: targets.len(),
            len,
            host_indices,
            host_weights,
        })
    }

    /// Positions that are known to the device only: `indices` i32 `[t]` into the flattened batch of `n_positions`, or
    /// `None` for all of them in order, and what each should predict, i32 `[t]`. Lists of the host are empty.
    pub fn on_device(indices: Option<Array>, targets: Array, n_positions: usize) -> Self {
        Self {
            indices,
            n_positions,
            len: targets.size(),
            targets,
            host_indices: Vec::new(),
            host_weights: Vec::new(),
        }
    }

    /// How many positions are trained.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: [`select`](Self::select) refuses an empty choice.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What each trained position should predict, `[t]`.
    pub fn targets(&self) -> &Array {
        &self.targets
    }

    /// Weight of each trained position, `[t]`, f32.
    pub fn weights(&self) -> Array {
        Array::from_slice(&self.host_weights, &[self.len as i32])
    }

    /// Picks the trained positions of a `[b, l, ...]` array as `[t, ...]`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when `b·l` is not the number of positions these were chosen from.
    pub fn gather(&self, values: &Array) -> Result<Array> {
        let (rows, rest) = match values.shape() {
            [b, l, rest @ ..] if (*b as usize) * (*l as usize) == self.n_positions => (b * l, rest),
            found => {
                return Err(Error::ShapeMismatch {
                    what: "batch to gather from (rows × length)",
                    expected: vec![self.n_positions as i32],
                    found: found.to_vec(),
                });
            }
        };
        let mut flat = vec![rows];
        flat.extend_from_slice(rest);
        let flat = values.reshape(&flat)?;
        match &self.indices {
            Some(indices) => Ok(take_axis(flat, indices, 0)?),
            None => Ok(flat),
        }
    }
}

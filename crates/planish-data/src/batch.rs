//! A micro-batch as flat arrays, shifted by one on the host.

use crate::dataset::{ExampleTokens, Side};

/// One micro-batch: inputs and the tokens that follow them, row-major `[rows, length]`.
///
/// Shifted once, here: position `(r, t)` of `targets` is the token after position `(r, t)` of `inputs`, so the model
/// never slices by one. Padding stands right of the tokens, has id 0, target 0 and weight 0; a row of a batch that was
/// filled up has only padding.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Rows.
    pub rows: usize,
    /// Input tokens a row.
    pub length: usize,
    /// `[rows * length]` token ids.
    pub inputs: Vec<i32>,
    /// `[rows * length]` ids of the next tokens.
    pub targets: Vec<i32>,
    /// `[rows * length]`, 1 where the target is trained and 0 elsewhere.
    pub target_weights: Vec<f32>,
    /// `[rows * length]`, with packing only: the segment of each position, counted from 0 in each row; padding is -1.
    pub segment_ids: Option<Vec<i32>>,
    /// The examples in the batch, in the order of [`segments`](Self::segments).
    pub row_ids: Vec<usize>,
    /// Where each example stands.
    pub segments: Vec<Segment>,
    /// Trained targets: the sum of `target_weights`.
    pub target_tokens: usize,
    /// Positions that hold a token.
    pub used_positions: usize,
}

/// Where one example stands in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The example, an index into the data set.
    pub example: usize,
    /// The row of the batch.
    pub row: usize,
    /// The first position in that row.
    pub start: usize,
    /// Positions: one less than the example has tokens.
    pub len: usize,
    /// Trained targets.
    pub target_tokens: usize,
    /// The side of a preference pair; the rejected answer is the segment after its chosen one.
    pub side: Option<Side>,
}

impl Batch {
    /// `target_weights` with those of each example multiplied by its weight, such as a distrust weight.
    ///
    /// `weight(example)` is asked once a segment. `[rows * length]`.
    pub fn weighted(&self, weight: impl Fn(usize) -> f64) -> Vec<f32> {
        let mut weights = self.target_weights.clone();
        for segment in &self.segments {
            let factor = weight(segment.example) as f32;
            let start = segment.row * self.length + segment.start;
            weights[start..start + segment.len]
                .iter_mut()
                .for_each(|value| *value *= factor);
        }
        weights
    }

    /// Positions without a token, as a share of all.
    pub fn padding_fraction(&self) -> f64 {
        1.0 - self.used_positions as f64 / (self.rows * self.length).max(1) as f64
    }

    /// An empty batch.
    pub(crate) fn new(rows: usize, length: usize, packed: bool) -> Self {
        let size = rows * length;
        Self {
            rows,
            length,
            inputs: vec![0; size],
            targets: vec![0; size],
            target_weights: vec![0.0; size],
            segment_ids: packed.then(|| vec![-1; size]),
            row_ids: Vec::new(),
            segments: Vec::new(),
            target_tokens: 0,
            used_positions: 0,
        }
    }

    /// Puts an example at a place that holds its tokens but one.
    pub(crate) fn place(
        &mut self,
        example: usize,
        tokens: &ExampleTokens,
        row: usize,
        start: usize,
        side: Option<Side>,
    ) {
        let len = tokens.ids.len() - 1;
        let at = row * self.length + start;
        let segment_id = self.segments.iter().filter(|segment| segment.row == row).count() as i32;
        let mut target_tokens = 0;
        for step in 0..len {
            self.inputs[at + step] = tokens.ids[step] as i32;
            self.targets[at + step] = tokens.ids[step + 1] as i32;
            if tokens.trained[step + 1] {
                self.target_weights[at + step] = 1.0;
                target_tokens += 1;
            }
        }
        if let Some(ids) = &mut self.segment_ids {
            ids[at..at + len].fill(segment_id);
        }
        self.row_ids.push(example);
        self.segments.push(Segment {
            example,
            row,
            start,
            len,
            target_tokens,
            side,
        });
        self.target_tokens += target_tokens;
        self.used_positions += len;
    }
}

//! The weights as a reader of the package will see them.

use std::{collections::BTreeMap, ops::Range};

use planish_tensors::ModelWeights;

use super::{WeightFormat, compress, compress::row_quantum};
use crate::{Result, reference::TIED_HEAD};

/// Rows of tensors as f32.
pub trait Rows: Sync {
    /// Shape of a tensor.
    ///
    /// # Errors
    /// When there is no such tensor.
    fn shape(&self, tensor: &str) -> Result<&[usize]>;

    /// Rows `rows` of a tensor; an element of a vector is a row.
    ///
    /// # Errors
    /// When the tensor cannot be read or holds what is no number.
    fn rows(&self, tensor: &str, rows: Range<usize>) -> Result<Vec<f32>>;

    /// A whole tensor.
    ///
    /// # Errors
    /// As [`Rows::rows`].
    fn all(&self, tensor: &str) -> Result<Vec<f32>> {
        self.rows(tensor, 0..self.shape(tensor)?[0])
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";

/// A tied head has no tensor of its own.
fn stored_name(tensor: &str) -> &str {
    if tensor == TIED_HEAD { EMBEDDING } else { tensor }
}

impl Rows for ModelWeights {
    fn shape(&self, tensor: &str) -> Result<&[usize]> {
        Ok(Self::shape(self, stored_name(tensor))?)
    }

    fn rows(&self, tensor: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        Ok(Self::rows(self, stored_name(tensor), rows)?)
    }
}

/// Weights after their trip through the package: compressed, or rounded to fp16, and back.
pub struct StoredRows<'a> {
    /// The original weights.
    pub source: &'a ModelWeights,
    /// Form of the linear layers; that of the head follows from it.
    pub format: WeightFormat,
    /// Rows of one part of the head; parts are compressed on their own.
    pub head_rows: usize,
    /// Importance of inputs that weighed the errors.
    pub importance: &'a BTreeMap<String, Vec<f32>>,
}

impl Rows for StoredRows<'_> {
    fn shape(&self, tensor: &str) -> Result<&[usize]> {
        Rows::shape(self.source, tensor)
    }

    fn rows(&self, tensor: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let total = self.shape(tensor)?[0];
        let is_head = tensor == TIED_HEAD || tensor == "lm_head.weight";
        let is_linear = tensor != EMBEDDING && self.shape(tensor)?.len() == 2;
        let format = match (is_linear, is_head) {
            (true, true) => self.format.of_head(),
            (true, false) => self.format,
            (false, _) => WeightFormat::Fp16,
        };
        let part = if is_head { self.head_rows } else { total };
        let mut out = Vec::new();
        for part_start in (rows.start / part * part..rows.end).step_by(part) {
            let inside = rows.start.max(part_start)..rows.end.min(part_start + part);
            out.extend(self.part(stored_name(tensor), part_start, part, inside, format)?);
        }
        Ok(out)
    }
}

impl StoredRows<'_> {
    /// Rows inside one part, which is compressed on its own: widened to whole groups, compressed, cut out again.
    fn part(
        &self,
        tensor: &str,
        part_start: usize,
        part: usize,
        rows: Range<usize>,
        format: WeightFormat,
    ) -> Result<Vec<f32>> {
        let columns: usize = self.source.shape(tensor)?[1..].iter().product();
        let quantum = row_quantum(part, format);
        let (first, last) = (rows.start - part_start, rows.end - part_start);
        let wide = first / quantum * quantum..last.next_multiple_of(quantum).min(part);
        let values = self
            .source
            .rows(tensor, part_start + wide.start..part_start + wide.end)?;
        let importance = self
            .importance
            .get(tensor.strip_suffix(".weight").unwrap_or(tensor))
            .map(Vec::as_slice);
        let restored = compress(&values, columns, part, format, importance).restored;
        Ok(restored[(first - wide.start) * columns..(last - wide.start) * columns].to_vec())
    }
}

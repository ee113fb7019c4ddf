//! In which form each weight is stored, and what a reader restores from it.

use std::ops::Range;

use planish_core::model_config::ModelConfig;
use planish_tensors::ModelWeights;

use crate::{
    Result,
    reference::TIED_HEAD,
    weights::{Importance, Rows, WeightFormat, compress, restore, row_quantum},
};

/// The form of every weight of a model.
#[derive(Clone, Debug)]
pub(crate) struct Formats {
    linears: WeightFormat,
    /// Of the embedding and the head; a tied head is the same data.
    vocabulary: WeightFormat,
    embedding: String,
    head: String,
}

impl Formats {
    /// Linear layers in `linears`; what is as high as the vocabulary has 8 bits where they have 4, since every error of the
    /// head is an error of the logits.
    pub(crate) fn new(config: &ModelConfig, linears: WeightFormat) -> Self {
        let vocabulary = match linears {
            WeightFormat::Fp16 => WeightFormat::Fp16,
            WeightFormat::Int8 | WeightFormat::Int4 | WeightFormat::Lut4 | WeightFormat::Lut6 => WeightFormat::Int8,
        };
        Self {
            linears,
            vocabulary,
            embedding: format!("{}.weight", config.arch.embedding_path()),
            head: format!("{}.weight", config.arch.head_path()),
        }
    }

    /// The form of a matrix.
    pub(crate) fn of(&self, tensor: &str) -> WeightFormat {
        match tensor == self.embedding || tensor == self.head {
            true => self.vocabulary,
            false => self.linears,
        }
    }
}

/// Weights as the asset holds them, restored in exact arithmetic.
pub(crate) struct Stored<'a> {
    pub(crate) source: &'a ModelWeights,
    pub(crate) formats: &'a Formats,
    pub(crate) importance: &'a Importance,
    /// Vectors that are kept whole, by name.
    pub(crate) whole: &'a [String],
}

impl Rows for Stored<'_> {
    fn shape(&self, tensor: &str) -> Result<&[usize]> {
        Rows::shape(self.source, self.name(tensor))
    }

    fn rows(&self, tensor: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let tensor = self.name(tensor);
        let shape = Rows::shape(self.source, tensor)?;
        let (total, columns) = (shape[0], shape[1..].iter().product::<usize>());
        if self.whole.iter().any(|name| name == tensor) {
            return Rows::rows(self.source, tensor, rows);
        }
        let format = if shape.len() == 2 {
            self.formats.of(tensor)
        } else {
            WeightFormat::Fp16
        };
        let quantum = row_quantum(total, format);
        let wide = rows.start / quantum * quantum..rows.end.next_multiple_of(quantum).min(total);
        let values = Rows::rows(self.source, tensor, wide.clone())?;
        let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
        let importance = self.importance.get(module).map(Vec::as_slice);
        let packed = compress(&values, columns, total, format, importance);
        let restored = restore(&packed.data, &packed.side, [wide.len(), columns], total, format);
        Ok(restored[(rows.start - wide.start) * columns..(rows.end - wide.start) * columns].to_vec())
    }
}

impl Stored<'_> {
    fn name<'t>(&'t self, tensor: &'t str) -> &'t str {
        if tensor == TIED_HEAD {
            &self.formats.embedding
        } else {
            tensor
        }
    }
}

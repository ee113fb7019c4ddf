//! Moving and scaling the elements of a low-rank matrix, in whatever type they are stored.

use planish_tensors::{Dtype, HostTensor};

use super::{AdapterReport, FoldNote};

/// A tensor with two axes.
pub(super) struct Matrix(pub(super) HostTensor);

impl Matrix {
    /// The transpose of a tensor with two axes.
    pub(super) fn transposed(tensor: &HostTensor) -> Option<Self> {
        let [rows, columns] = *tensor.shape.as_slice() else {
            return None;
        };
        let size = tensor.dtype.size();
        let mut bytes = Vec::with_capacity(tensor.bytes.len());
        for column in 0..columns {
            for row in 0..rows {
                let at = (row * columns + column) * size;
                bytes.extend_from_slice(&tensor.bytes[at..at + size]);
            }
        }
        Some(Self(HostTensor {
            dtype: tensor.dtype,
            shape: vec![columns, rows],
            bytes,
        }))
    }

    pub(super) fn transpose(&self) -> HostTensor {
        Self::transposed(&self.0).map_or_else(|| self.0.clone(), |matrix| matrix.0)
    }

    pub(super) fn rows(&self) -> usize {
        self.0.shape[0]
    }

    pub(super) fn columns(&self) -> usize {
        self.0.shape[1]
    }

    /// Cut or filled with zeros at the end of both axes.
    pub(super) fn resized(&self, rows: usize, columns: usize) -> Self {
        let size = self.0.dtype.size();
        let mut resized = HostTensor::zeros(self.0.dtype, &[rows, columns]);
        let kept = self.columns().min(columns) * size;
        for row in 0..rows.min(self.rows()) {
            let (from, to) = (row * self.columns() * size, row * columns * size);
            resized.bytes[to..to + kept].copy_from_slice(&self.0.bytes[from..from + kept]);
        }
        Self(resized)
    }

    /// Multiplies every element, rounding once; notes whether that was exact.
    pub(super) fn fold(&mut self, factor: f64, report: &mut AdapterReport, module: &str) {
        let Ok(values) = self.0.to_f32() else { return };
        let products: Vec<f32> = values
            .iter()
            .map(|v| round_to(self.0.dtype, f64::from(*v) * factor))
            .collect();
        let exact = values
            .iter()
            .zip(&products)
            .all(|(v, p)| f64::from(*p) == f64::from(*v) * factor);
        if let Ok(folded) = HostTensor::from_f32_as(self.0.dtype, &self.0.shape, &products) {
            self.0 = folded;
        }
        report.folded.push(FoldNote {
            module: module.to_string(),
            factor,
            exact,
        });
    }
}

/// Rounds a double to the element type directly, so that no double rounding happens on the way.
fn round_to(dtype: Dtype, value: f64) -> f32 {
    match dtype {
        Dtype::F16 => half::f16::from_f64(value).to_f32(),
        Dtype::BF16 => half::bf16::from_f64(value).to_f32(),
        _ => value as f32,
    }
}

//! Which blobs a package has, decided before any weight is read: offsets depend on shapes alone.

use std::{collections::HashMap, ops::Range};

use coreml_mil::{BlobPlan, BlobRef, DType, Result, TensorType};
use half::f16;

use super::WeightFormat;

/// Where a job's data comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum JobSource {
    /// Rows of a checkpoint tensor, in a format.
    Rows {
        tensor: String,
        rows: Range<usize>,
        format: WeightFormat,
    },
    /// Numbers computed here, under a label.
    Table { label: String },
    /// A vector plus one, as f32: the gain of a norm whose file holds it less one.
    PlusOne { tensor: String },
}

/// One or two consecutive blobs (data, and scales or tables) that are written together.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) source: JobSource,
    pub(crate) table: Vec<f16>,
}

impl Job {
    /// Rows of a checkpoint tensor, in a format.
    pub(crate) fn rows(tensor: &str, rows: Range<usize>, format: WeightFormat) -> Self {
        Self::without_table(JobSource::Rows {
            tensor: tensor.into(),
            rows,
            format,
        })
    }

    /// A vector plus one, as f32.
    pub(crate) fn plus_one(tensor: &str) -> Self {
        Self::without_table(JobSource::PlusOne { tensor: tensor.into() })
    }

    fn without_table(source: JobSource) -> Self {
        let table = Vec::new();
        Self { source, table }
    }
}

/// A planned weight, as the graph refers to it.
#[derive(Clone, Debug)]
pub enum Encoded {
    /// Half floats.
    Plain(BlobRef),
    /// Integers and their scales.
    Scaled(BlobRef, BlobRef),
    /// Indices and their tables.
    Indexed(BlobRef, BlobRef),
}

/// The blobs of one package and what fills them. Equal requests share a blob, so functions share weights.
#[derive(Debug, Default)]
pub struct WeightPlan {
    pub(crate) blobs: BlobPlan,
    pub(crate) jobs: Vec<Job>,
    known: HashMap<JobSource, Vec<u64>>,
}

impl WeightPlan {
    /// An empty plan.
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes of the weight file.
    pub fn file_len(&self) -> u64 {
        self.blobs.file_len()
    }

    /// Rows of a tensor as fp16 under any shape with as many elements.
    ///
    /// # Errors
    /// None in practice; see [`BlobPlan::add`].
    pub fn dense(&mut self, tensor: &str, rows: Range<usize>, shape: &[usize]) -> Result<BlobRef> {
        let source = JobSource::Rows {
            tensor: tensor.into(),
            rows,
            format: WeightFormat::Fp16,
        };
        let ty = TensorType::new(DType::F16, shape);
        let offsets = self.request(source, &[(DType::F16, shape.iter().product())], Vec::new())?;
        Ok(BlobRef { ty, offset: offsets[0] })
    }

    /// Rows of a `[out, in]` tensor as a convolution weight `[rows, in, 1, 1]`.
    ///
    /// # Errors
    /// None in practice; see [`BlobPlan::add`].
    pub fn conv(&mut self, tensor: &str, rows: Range<usize>, columns: usize, format: WeightFormat) -> Result<Encoded> {
        let shape = [rows.len(), columns, 1, 1];
        if format == WeightFormat::Fp16 {
            return self.dense(tensor, rows, &shape).map(Encoded::Plain);
        }
        let side_shape = format.side_shape(rows.len(), columns);
        let blobs = [
            (format.data_type(), rows.len() * columns),
            (DType::F16, side_shape.iter().product()),
        ];
        let source = JobSource::Rows {
            tensor: tensor.into(),
            rows,
            format,
        };
        let offsets = self.request(source, &blobs, Vec::new())?;
        let data = BlobRef {
            ty: TensorType::new(format.data_type(), &shape),
            offset: offsets[0],
        };
        let side = BlobRef {
            ty: TensorType::new(DType::F16, &side_shape),
            offset: offsets[1],
        };
        Ok(if format.lut_bits().is_some() {
            Encoded::Indexed(data, side)
        } else {
            Encoded::Scaled(data, side)
        })
    }

    /// Numbers that are no checkpoint tensor, such as rotary tables; `label` identifies them.
    ///
    /// # Errors
    /// None in practice; see [`BlobPlan::add`].
    pub fn table(&mut self, label: &str, values: impl FnOnce() -> Vec<f16>, shape: &[usize]) -> Result<BlobRef> {
        let source = JobSource::Table { label: label.into() };
        let values = if self.known.contains_key(&source) {
            Vec::new()
        } else {
            values()
        };
        let offsets = self.request(source, &[(DType::F16, shape.iter().product())], values)?;
        Ok(BlobRef {
            ty: TensorType::new(DType::F16, shape),
            offset: offsets[0],
        })
    }

    fn request(&mut self, source: JobSource, blobs: &[(DType, usize)], table: Vec<f16>) -> Result<Vec<u64>> {
        if let Some(offsets) = self.known.get(&source) {
            return Ok(offsets.clone());
        }
        let offsets = blobs
            .iter()
            .map(|(dtype, count)| self.blobs.add(*dtype, *count))
            .collect::<Result<Vec<_>>>()?;
        self.known.insert(source.clone(), offsets.clone());
        self.jobs.push(Job { source, table });
        Ok(offsets)
    }
}

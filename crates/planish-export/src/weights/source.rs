//! Reads rows of a checkpoint's tensors as f32, with the adapter folded in.

use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use half::{bf16, f16, slice::HalfFloatSliceExt};
use ndarray::ArrayViewMut2;
use planish_tensors::{Dtype, TensorStore};

use super::AdapterDelta;
use crate::{Error, Result};

/// Rows of tensors, read from the files when asked for.
///
/// It reads the files instead of their memory maps: pages of a map count as memory of the process until the system needs
/// them elsewhere, and an export touches every page once.
pub struct WeightSource<'a> {
    store: &'a TensorStore,
    files: HashMap<PathBuf, File>,
    adapter: AdapterDelta,
}

impl<'a> WeightSource<'a> {
    /// Weights of a store, changed by an adapter.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be opened again.
    pub fn new(store: &'a TensorStore, adapter: AdapterDelta) -> Result<Self> {
        let open = |path: &Path| Ok((path.to_owned(), File::open(path).map_err(Error::io(path))?));
        let files = store.files().map(open).collect::<Result<_>>()?;
        Ok(Self { store, files, adapter })
    }

    /// The adapter that is folded in.
    pub fn adapter(&self) -> &AdapterDelta {
        &self.adapter
    }

    /// Shape of a tensor.
    ///
    /// # Errors
    /// [`Error::Tensors`] when there is no such tensor.
    pub fn shape(&self, tensor: &str) -> Result<&[usize]> {
        Ok(self.store.require(tensor)?.shape)
    }

    /// Rows `rows` of a tensor as f32, the adapter folded in; an element of a vector is a row.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a NaN or an infinity; [`Error::Io`]; [`Error::Tensors`].
    pub fn rows(&self, tensor: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        self.rows_into(tensor, rows, &mut values)?;
        Ok(values)
    }

    /// [`WeightSource::rows`] into a buffer that is used again: fresh memory costs as much as reading.
    pub(crate) fn rows_into(&self, tensor: &str, rows: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        let columns: usize = self.shape(tensor)?[1..].iter().product();
        let elements = rows.start * columns..rows.end * columns;
        values.resize(elements.len(), 0.0);
        match self.adapter.full.get(tensor) {
            Some(trained) => values.copy_from_slice(&trained[elements.clone()]),
            None => self.read(tensor, elements.clone(), values)?,
        }
        if let Some(delta) = tensor
            .strip_suffix(".weight")
            .and_then(|module| self.adapter.lora.get(module))
        {
            let view = ArrayViewMut2::from_shape((rows.len(), columns), values.as_mut_slice());
            delta.merge(rows, view.map_err(|e| Error::internal(e.to_string()))?);
        }
        match first_outside(values, f32::MAX) {
            Some(at) => Err(Error::NotFinite {
                tensor: tensor.into(),
                index: elements.start + at,
                value: values[at],
            }),
            None => Ok(()),
        }
    }

    /// A whole tensor as f32, the adapter folded in.
    ///
    /// # Errors
    /// As [`WeightSource::rows`].
    pub fn all(&self, tensor: &str) -> Result<Vec<f32>> {
        let rows = self.shape(tensor)?[0];
        self.rows(tensor, 0..rows)
    }

    fn read(&self, tensor: &str, elements: Range<usize>, values: &mut [f32]) -> Result<()> {
        let view = self.store.require(tensor)?;
        let (path, range) = self.store.file_range(tensor)?;
        let size = view.dtype.size();
        let unknown = || Error::internal("a tensor in an unknown file");
        let file = self.files.get(path).ok_or_else(unknown)?;
        let offset = range.start + (elements.start * size) as u64;
        if view.dtype == Dtype::F32 {
            return file
                .read_exact_at(bytemuck::cast_slice_mut(values), offset)
                .map_err(Error::io(path));
        }
        let mut raw = vec![0u8; elements.len() * size];
        file.read_exact_at(&mut raw, offset).map_err(Error::io(path))?;
        if !to_f32(view.dtype, &raw, values) {
            return Err(Error::Unsupported {
                what: format!("tensor {tensor} of type {} (F32, F16 and BF16 are)", view.dtype),
            });
        }
        Ok(())
    }
}

/// Widens 16-bit floats; f32 is read in place. False for any other type.
fn to_f32(dtype: Dtype, raw: &[u8], out: &mut [f32]) -> bool {
    match dtype {
        Dtype::F16 => {
            let mut halves = vec![f16::ZERO; out.len()];
            bytemuck::cast_slice_mut(&mut halves).copy_from_slice(raw);
            halves.convert_to_f32_slice(out);
        }
        Dtype::BF16 => {
            for (value, b) in out.iter_mut().zip(raw.chunks_exact(2)) {
                *value = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => return false,
    }
    true
}

/// Index of the first value that is NaN or beyond ±limit. Whole chunks are judged at once, which vectorises.
pub(crate) fn first_outside(values: &[f32], limit: f32) -> Option<usize> {
    const CHUNK: usize = 4096;
    let outside = |v: &f32| v.is_nan() || v.abs() > limit;
    let chunk = values
        .chunks(CHUNK)
        .position(|chunk| chunk.iter().fold(false, |bad, v| bad | outside(v)))?;
    values[chunk * CHUNK..]
        .iter()
        .position(outside)
        .map(|at| chunk * CHUNK + at)
}

#[cfg(test)]
mod tests {
    use super::first_outside;

    #[test]
    fn first_bad_value_is_found_in_any_chunk() {
        let mut values = vec![1.0f32; 10_000];
        assert_eq!(first_outside(&values, 65504.0), None);
        values[9_000] = f32::NAN;
        values[9_500] = 65505.0;
        assert_eq!(first_outside(&values, 65504.0), Some(9_000));
        values[9_000] = -65504.0;
        assert_eq!(first_outside(&values, 65504.0), Some(9_500));
    }
}

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use planish_core::fs::AtomicFile;
use serde::Serialize;

use super::dtype::Dtype;
use super::header::MAX_HEADER_BYTES;
use super::host::{HostTensor, TensorView};
use crate::error::{Error, Result};

/// Writes tensors into one safetensors file, atomically; equal input gives equal bytes.
///
/// The layout is that of the format's reference implementation: wider element types first, then by name, the header
/// padded with spaces to a multiple of 8 bytes; metadata keys are sorted.
///
/// # Errors
/// [`Error::Write`]; [`Error::WriterMisuse`] for a tensor whose bytes do not fit its shape.
pub fn write(path: &Path, tensors: &BTreeMap<String, HostTensor>, metadata: &BTreeMap<String, String>) -> Result<()> {
    let infos = tensors.iter().map(|(name, tensor)| TensorInfo {
        name: name.clone(),
        dtype: tensor.dtype,
        shape: tensor.shape.clone(),
    });
    let mut writer = TensorFileWriter::create(path, infos.collect(), metadata)?;
    while let Some(next) = writer.next_tensor() {
        let tensor = &tensors[&next.name];
        writer.write_next(&tensor.bytes)?;
    }
    writer.finish()
}

/// What a writer must know of a tensor before it has the values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Sizes of the axes, slowest first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Size of the values.
    pub fn byte_len(&self) -> Option<usize> {
        self.dtype.byte_len(&self.shape)
    }
}

impl From<&TensorView<'_>> for TensorInfo {
    fn from(view: &TensorView<'_>) -> Self {
        Self {
            name: view.name.to_string(),
            dtype: view.dtype,
            shape: view.shape.to_vec(),
        }
    }
}

/// Writes a safetensors file one tensor at a time, in the order it asks for them.
///
/// ```
/// use std::collections::BTreeMap;
/// use planish_tensors::{Dtype, TensorFileWriter, TensorInfo, TensorStore};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("a.safetensors");
/// let info = |name: &str, dtype| TensorInfo { name: name.to_string(), dtype, shape: vec![2] };
/// let infos = vec![info("ids", Dtype::U8), info("w", Dtype::F32)];
/// let mut writer = TensorFileWriter::create(&path, infos, &BTreeMap::new())?;
/// assert_eq!(writer.next_tensor().map(|next| next.name.as_str()), Some("w"));
/// writer.write_next(&[0; 8])?;
/// writer.write_next(&[1, 2])?;
/// writer.finish()?;
/// assert_eq!(TensorStore::open(&path)?.require("ids")?.bytes, [1, 2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TensorFileWriter {
    path: PathBuf,
    file: AtomicFile,
    /// Sorted as in the file.
    infos: Vec<TensorInfo>,
    written: usize,
}

impl TensorFileWriter {
    /// Writes the header; the values follow by [`write_next`](Self::write_next).
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::WriterMisuse`] for a name given twice or a size that does not fit.
    pub fn create(path: &Path, mut infos: Vec<TensorInfo>, metadata: &BTreeMap<String, String>) -> Result<Self> {
        infos.sort_by(|a, b| (Reverse(a.dtype), &a.name).cmp(&(Reverse(b.dtype), &b.name)));
        let header = header_bytes(&infos, metadata).map_err(|reason| misuse(path, reason))?;
        let mut file = AtomicFile::create(path).map_err(|e| Error::write(path, e))?;
        file.write_all(&header).map_err(|e| Error::write(path, e))?;
        Ok(Self {
            path: path.to_path_buf(),
            file,
            infos,
            written: 0,
        })
    }

    /// The tensor whose values come next; `None` after the last.
    pub fn next_tensor(&self) -> Option<&TensorInfo> {
        self.infos.get(self.written)
    }

    /// Writes the values of [`next_tensor`](Self::next_tensor).
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::WriterMisuse`] for a wrong number of bytes, or when there is no next tensor.
    pub fn write_next(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(next) = self.infos.get(self.written) else {
            return Err(misuse(
                &self.path,
                "more tensors were written than announced".to_string(),
            ));
        };
        if next.byte_len() != Some(bytes.len()) {
            let (name, dtype, shape) = (&next.name, next.dtype, &next.shape);
            let reason = format!(
                "tensor {name:?} of type {dtype} and shape {shape:?} was given {} bytes",
                bytes.len()
            );
            return Err(misuse(&self.path, reason));
        }
        self.file.write_all(bytes).map_err(|e| Error::write(&self.path, e))?;
        self.written += 1;
        Ok(())
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::WriterMisuse`] when tensors are still missing.
    pub fn finish(self) -> Result<()> {
        if let Some(next) = self.next_tensor() {
            return Err(misuse(
                &self.path,
                format!("tensor {:?} was announced and never written", next.name),
            ));
        }
        self.file.commit().map_err(|e| Error::write(&self.path, e))
    }
}

#[derive(Serialize)]
struct RawTensor<'a> {
    dtype: &'static str,
    shape: &'a [usize],
    data_offsets: (usize, usize),
}

/// Length, JSON and padding, for tensors in file order.
fn header_bytes(infos: &[TensorInfo], metadata: &BTreeMap<String, String>) -> Result<Vec<u8>, String> {
    let mut json = Vec::from(*b"{");
    let mut names = std::collections::BTreeSet::new();
    let mut push = |key: &str, value: Result<String, serde_json::Error>| -> Result<(), String> {
        if !names.insert(key.to_string()) {
            return Err(format!("tensor {key:?} was given twice, or has a reserved name"));
        }
        let key = serde_json::to_string(key).map_err(|e| e.to_string())?;
        let comma = if json.len() > 1 { "," } else { "" };
        json.extend_from_slice(format!("{comma}{key}:{}", value.map_err(|e| e.to_string())?).as_bytes());
        Ok(())
    };
    if !metadata.is_empty() || infos.iter().any(|info| info.name == "__metadata__") {
        push("__metadata__", serde_json::to_string(metadata))?;
    }
    let mut start = 0usize;
    for info in infos {
        let end = info.byte_len().and_then(|len| start.checked_add(len));
        let end = end.ok_or_else(|| format!("tensor {:?} has the impossible shape {:?}", info.name, info.shape))?;
        let raw = RawTensor {
            dtype: info.dtype.name(),
            shape: &info.shape,
            data_offsets: (start, end),
        };
        push(&info.name, serde_json::to_string(&raw))?;
        start = end;
    }
    json.push(b'}');
    json.resize(json.len().next_multiple_of(8), b' ');
    if json.len() as u64 > MAX_HEADER_BYTES {
        return Err(format!(
            "the header would have {} bytes, more than the format allows",
            json.len()
        ));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

fn misuse(path: &Path, reason: String) -> Error {
    Error::WriterMisuse {
        path: path.to_path_buf(),
        reason,
    }
}

//! GGUF files, version 3, written one tensor at a time.

use std::io::{BufWriter, Write};
use std::path::Path;

use planish_core::fs::AtomicFile;

use super::{Array, TensorType, Value};
use crate::error::io_at;
use crate::{Error, Result};

const VERSION: u32 = 3;
/// The format's default, which need not be stated.
const ALIGNMENT: u64 = 32;

/// A tensor of the file to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPlan {
    /// Name in the file.
    pub name: String,
    /// Slowest axis first; a row, the last axis, is a whole number of blocks.
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub kind: TensorType,
}

/// Writes a file, which appears whole or not at all. `data` is asked once for the stored bytes of each tensor, in order.
///
/// # Errors
/// Whatever `data` returns; [`Error::TensorBytes`] when it gives another number of bytes than the plan implies;
/// [`Error::Io`].
///
/// # Example
/// ```
/// use planish_hub::gguf::{Gguf, TensorPlan, TensorType, Value, write};
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("a.gguf");
/// let plan = TensorPlan { name: "x".into(), shape: vec![1, 2], kind: TensorType::F32 };
/// let metadata = [("general.architecture".to_owned(), Value::from("none"))];
/// write(&path, &metadata, &[plan], |_| Ok(vec![0; 8]))?;
/// let file = Gguf::open(&path)?;
/// assert_eq!(file.tensor("x").map(|t| t.shape.as_slice()), Some([1, 2].as_slice()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn write(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[TensorPlan],
    mut data: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let sizes = tensors
        .iter()
        .map(|tensor| tensor.len(path))
        .collect::<Result<Vec<u64>>>()?;
    let mut out = BufWriter::with_capacity(1 << 20, AtomicFile::create(path).map_err(io_at(path))?);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(io_at(path));
    let head = head(metadata, tensors, &sizes);
    put(&head)?;
    for (i, (tensor, expected)) in tensors.iter().zip(sizes).enumerate() {
        let bytes = data(i)?;
        if bytes.len() as u64 != expected {
            return Err(tensor.wrong_size(path, bytes.len() as u64));
        }
        put(&bytes)?;
        put(&vec![0; padding(expected) as usize])?;
    }
    let file = out.into_inner().map_err(|error| io_at(path)(error.into_error()))?;
    file.commit().map_err(io_at(path))
}

impl TensorPlan {
    fn len(&self, path: &Path) -> Result<u64> {
        let n_elements = self.shape.iter().map(|n| *n as u64).product();
        let whole_rows = self
            .shape
            .last()
            .is_some_and(|row| row.is_multiple_of(self.kind.block_len()));
        self.kind
            .bytes_for(n_elements)
            .filter(|_| whole_rows)
            .ok_or_else(|| self.wrong_size(path, n_elements))
    }

    fn wrong_size(&self, path: &Path, found: u64) -> Error {
        Error::TensorBytes {
            path: path.to_path_buf(),
            tensor: self.name.clone(),
            found,
            shape: self.shape.clone(),
            kind: self.kind.name(),
        }
    }
}

/// Everything before the tensor data, padded.
fn head(metadata: &[(String, Value)], tensors: &[TensorPlan], sizes: &[u64]) -> Vec<u8> {
    let mut head = b"GGUF".to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_string(&mut head, key);
        put_value(&mut head, value);
    }
    let mut offset = 0u64;
    for (tensor, size) in tensors.iter().zip(sizes) {
        put_string(&mut head, &tensor.name);
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        for dimension in tensor.shape.iter().rev() {
            head.extend((*dimension as u64).to_le_bytes());
        }
        head.extend(tensor.kind.id().to_le_bytes());
        head.extend(offset.to_le_bytes());
        offset += size + padding(*size);
    }
    head.resize(head.len() + padding(head.len() as u64) as usize, 0);
    head
}

fn padding(len: u64) -> u64 {
    len.next_multiple_of(ALIGNMENT) - len
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut scalar = |type_id: u32, bytes: &[u8]| {
        out.extend(type_id.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(v) => scalar(0, &v.to_le_bytes()),
        Value::I8(v) => scalar(1, &v.to_le_bytes()),
        Value::U16(v) => scalar(2, &v.to_le_bytes()),
        Value::I16(v) => scalar(3, &v.to_le_bytes()),
        Value::U32(v) => scalar(4, &v.to_le_bytes()),
        Value::I32(v) => scalar(5, &v.to_le_bytes()),
        Value::F32(v) => scalar(6, &v.to_le_bytes()),
        Value::Bool(v) => scalar(7, &[u8::from(*v)]),
        Value::U64(v) => scalar(10, &v.to_le_bytes()),
        Value::I64(v) => scalar(11, &v.to_le_bytes()),
        Value::F64(v) => scalar(12, &v.to_le_bytes()),
        Value::String(text) => {
            scalar(8, &[]);
            put_string(out, text);
        }
        Value::Array(array) => {
            scalar(9, &[]);
            put_array(out, array);
        }
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    fn list<T>(out: &mut Vec<u8>, type_id: u32, items: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
        out.extend(type_id.to_le_bytes());
        out.extend((items.len() as u64).to_le_bytes());
        items.iter().for_each(|item| put(out, item));
    }
    match array {
        Array::U8(v) => list(out, 0, v, |out, x| out.push(*x)),
        Array::I8(v) => list(out, 1, v, |out, x| out.extend(x.to_le_bytes())),
        Array::U16(v) => list(out, 2, v, |out, x| out.extend(x.to_le_bytes())),
        Array::I16(v) => list(out, 3, v, |out, x| out.extend(x.to_le_bytes())),
        Array::U32(v) => list(out, 4, v, |out, x| out.extend(x.to_le_bytes())),
        Array::I32(v) => list(out, 5, v, |out, x| out.extend(x.to_le_bytes())),
        Array::F32(v) => list(out, 6, v, |out, x| out.extend(x.to_le_bytes())),
        Array::Bool(v) => list(out, 7, v, |out, x| out.push(u8::from(*x))),
        Array::String(v) => list(out, 8, v, |out, x| put_string(out, x)),
        Array::Array(v) => list(out, 9, v, put_array),
        Array::U64(v) => list(out, 10, v, |out, x| out.extend(x.to_le_bytes())),
        Array::I64(v) => list(out, 11, v, |out, x| out.extend(x.to_le_bytes())),
        Array::F64(v) => list(out, 12, v, |out, x| out.extend(x.to_le_bytes())),
    }
}

//! The strict reader: header, metadata and tensor descriptions, with every length checked before it is believed.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::{Array, Metadata, TensorType, Value};
use crate::error::io_at;
use crate::{Error, Result};

/// Arrays of arrays of … of values: real files have no arrays of arrays at all.
const MAX_ARRAY_DEPTH: usize = 4;
/// As in ggml.
const MAX_DIMENSIONS: u32 = 4;
/// As the specification says for keys; names of tensors are shorter still.
const MAX_NAME_BYTES: u64 = 65_535;
const DEFAULT_ALIGNMENT: u64 = 32;
/// More than a page is nobody's alignment.
const MAX_ALIGNMENT: u64 = 1 << 16;

/// An open GGUF file: its metadata and, memory-mapped, its tensors.
///
/// # Example
/// ```
/// use planish_hub::gguf::Gguf;
/// // Magic, version 3, no tensors, no metadata.
/// let bytes = [b"GGUF".as_slice(), &3u32.to_le_bytes(), &[0; 16]].concat();
/// let file = Gguf::from_bytes(bytes, "empty.gguf".as_ref())?;
/// assert_eq!((file.version(), file.tensors().len()), (3, 0));
/// # Ok::<(), planish_hub::Error>(())
/// ```
#[derive(Debug)]
pub struct Gguf {
    storage: Storage,
    version: u32,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
}

/// Where one tensor lies, what shape and type it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Slowest axis first, as everywhere in planish: the file's order reversed.
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub kind: TensorType,
    /// First byte in the file.
    start: usize,
    /// Size in bytes.
    len: usize,
}

#[derive(Debug)]
enum Storage {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Gguf {
    /// Maps a file and reads everything but the tensor data.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotGguf`]; [`Error::GgufVersion`]; [`Error::MalformedGguf`] with the byte where reading
    /// stopped; [`Error::UnsupportedTensorType`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(io_at(path))?;
        // SAFETY: the map is read-only. Should another process shorten the file while we read, the system ends us with a
        // bus error; that is the usual price of mapping model files, and no memory of ours is touched.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(io_at(path))?;
        Self::read(Storage::Mapped(map), path)
    }

    /// Reads a file that is already in memory; `origin` is the path that errors name.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn from_bytes(bytes: Vec<u8>, origin: &Path) -> Result<Self> {
        Self::read(Storage::Owned(bytes), origin)
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The key–value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, in the file's order, names unique.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The stored bytes of a tensor of this file.
    pub fn bytes(&self, tensor: &TensorInfo) -> &[u8] {
        &self.storage.bytes()[tensor.start..tensor.start + tensor.len]
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.metadata.path
    }

    fn read(storage: Storage, path: &Path) -> Result<Self> {
        let mut cursor = Cursor {
            bytes: storage.bytes(),
            at: 0,
            path,
        };
        let version = cursor.magic_and_version()?;
        let n_tensors = cursor.u64("number of tensors")?;
        let n_pairs = cursor.u64("number of metadata pairs")?;
        let pairs = cursor.metadata(n_pairs)?;
        let metadata = Metadata {
            path: path.to_path_buf(),
            pairs,
        };
        let alignment = alignment(&metadata)?;
        let described = cursor.descriptions(n_tensors)?;
        let tensors = cursor.place(described, alignment)?;
        Ok(Self {
            storage,
            version,
            metadata,
            tensors,
        })
    }
}

impl TensorInfo {
    /// How many numbers it holds.
    pub(crate) fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Storage {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

fn alignment(metadata: &Metadata) -> Result<u64> {
    let key = "general.alignment";
    let alignment = metadata.whole(key)?.map_or(DEFAULT_ALIGNMENT, u64::from);
    if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        Ok(alignment)
    } else {
        Err(metadata.unsupported(key, format!("expected a power of two up to {MAX_ALIGNMENT}")))
    }
}

/// A tensor's description before its place in the file has been checked.
struct Description {
    name: String,
    shape: Vec<usize>,
    kind: TensorType,
    /// From the start of the tensor data.
    offset: u64,
    len: u64,
    /// Where the description itself begins, for messages.
    described_at: usize,
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Cursor<'a> {
    fn magic_and_version(&mut self) -> Result<u32> {
        let path = self.path;
        let path = || PathBuf::from(path);
        let magic = self.bytes.get(..4).unwrap_or(self.bytes);
        if magic != b"GGUF" {
            return Err(Error::NotGguf {
                path: path(),
                found: magic.escape_ascii().to_string(),
            });
        }
        self.at = 4;
        let version = self.u32("version")?;
        match version {
            2 | 3 => Ok(version),
            _ => Err(Error::GgufVersion {
                path: path(),
                found: version,
                big_endian: matches!(version.swap_bytes(), 1..=3),
            }),
        }
    }

    fn metadata(&mut self, n_pairs: u64) -> Result<Vec<(String, Value)>> {
        // The smallest pair: an empty key, a type, one byte.
        let mut pairs = Vec::with_capacity(self.plausible_count(n_pairs, 8 + 4 + 1, "metadata pairs")?);
        let mut seen = HashSet::new();
        for _ in 0..n_pairs {
            let begin = self.at;
            let key = self.name("metadata key")?;
            let type_id = self.u32("type of a metadata value")?;
            let value = self.value(type_id, &key)?;
            if !seen.insert(key.clone()) {
                return Err(self.malformed_at(begin, format!("the metadata key {key:?} appears twice")));
            }
            pairs.push((key, value));
        }
        Ok(pairs)
    }

    fn value(&mut self, type_id: u32, key: &str) -> Result<Value> {
        let what = "a metadata value";
        Ok(match type_id {
            0 => Value::U8(u8::from_le_bytes(self.fixed(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.fixed(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.fixed(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.fixed(what)?)),
            4 => Value::U32(u32::from_le_bytes(self.fixed(what)?)),
            5 => Value::I32(i32::from_le_bytes(self.fixed(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.fixed(what)?)),
            7 => Value::Bool(self.bool(key)?),
            8 => Value::String(self.string(key)?),
            9 => Value::Array(self.array(key, 1)?),
            10 => Value::U64(u64::from_le_bytes(self.fixed(what)?)),
            11 => Value::I64(i64::from_le_bytes(self.fixed(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.fixed(what)?)),
            other => return Err(self.unknown_value_type(other, key)),
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array> {
        if depth > MAX_ARRAY_DEPTH {
            return Err(self.malformed(format!("{key:?}: arrays nested more than {MAX_ARRAY_DEPTH} deep")));
        }
        let type_id = self.u32("type of an array")?;
        let n = self.u64("length of an array")?;
        Ok(match type_id {
            0 => Array::U8(self.numbers(n, key, u8::from_le_bytes)?),
            1 => Array::I8(self.numbers(n, key, i8::from_le_bytes)?),
            2 => Array::U16(self.numbers(n, key, u16::from_le_bytes)?),
            3 => Array::I16(self.numbers(n, key, i16::from_le_bytes)?),
            4 => Array::U32(self.numbers(n, key, u32::from_le_bytes)?),
            5 => Array::I32(self.numbers(n, key, i32::from_le_bytes)?),
            6 => Array::F32(self.numbers(n, key, f32::from_le_bytes)?),
            7 => Array::Bool(self.elements(n, 1, key, |cursor| cursor.bool(key))?),
            8 => Array::String(self.elements(n, 8, key, |cursor| cursor.string(key))?),
            9 => Array::Array(self.elements(n, 12, key, |cursor| cursor.array(key, depth + 1))?),
            10 => Array::U64(self.numbers(n, key, u64::from_le_bytes)?),
            11 => Array::I64(self.numbers(n, key, i64::from_le_bytes)?),
            12 => Array::F64(self.numbers(n, key, f64::from_le_bytes)?),
            other => return Err(self.unknown_value_type(other, key)),
        })
    }

    fn numbers<T, const N: usize>(&mut self, n: u64, key: &str, decode: fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.elements(n, N, key, |cursor| cursor.fixed("an array").map(decode))
    }

    /// `n` elements that take at least `min_bytes` each.
    fn elements<T>(
        &mut self,
        n: u64,
        min_bytes: usize,
        key: &str,
        mut element: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut list = Vec::with_capacity(self.plausible_count(n, min_bytes, key)?);
        for _ in 0..n {
            list.push(element(self)?);
        }
        Ok(list)
    }

    fn descriptions(&mut self, n_tensors: u64) -> Result<Vec<Description>> {
        // The smallest description: an empty name, one dimension, a type, an offset.
        let count = self.plausible_count(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")?;
        let mut seen = HashSet::with_capacity(count);
        let mut list = Vec::with_capacity(count);
        for _ in 0..n_tensors {
            let described = self.description()?;
            if !seen.insert(described.name.clone()) {
                let message = format!("the tensor {:?} appears twice", described.name);
                return Err(self.malformed_at(described.described_at, message));
            }
            list.push(described);
        }
        Ok(list)
    }

    fn description(&mut self) -> Result<Description> {
        let described_at = self.at;
        let name = self.name("tensor name")?;
        let n_dimensions = self.u32("number of dimensions")?;
        if !(1..=MAX_DIMENSIONS).contains(&n_dimensions) {
            return Err(self.malformed(format!(
                "{name:?} has {n_dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}"
            )));
        }
        let mut shape = Vec::new();
        let mut n_elements = 1u64;
        for _ in 0..n_dimensions {
            let dimension = self.u64("dimension")?;
            n_elements = match n_elements.checked_mul(dimension) {
                Some(0) => return Err(self.malformed(format!("{name:?} has a dimension of zero"))),
                Some(product) => product,
                None => return Err(self.malformed(format!("{name:?} has more elements than can be counted"))),
            };
            shape.push(dimension as usize);
        }
        let kind =
            TensorType::from_id(self.u32("tensor type")?).map_err(|known| self.unsupported_type(&name, known))?;
        // Rows are whole blocks; a row is the first dimension in the file.
        let rows_are_whole = shape[0].is_multiple_of(kind.block_len());
        let Some(len) = kind.bytes_for(n_elements).filter(|_| rows_are_whole) else {
            let (row, block) = (shape[0], kind.block_len());
            return Err(self.malformed(format!(
                "{name:?}: rows of {row} numbers are not whole {} blocks of {block}",
                kind.name()
            )));
        };
        let offset = self.u64("tensor offset")?;
        shape.reverse();
        Ok(Description {
            name,
            shape,
            kind,
            offset,
            len,
            described_at,
        })
    }

    /// Checks that every tensor is aligned, inside the file and clear of the others.
    fn place(&self, described: Vec<Description>, alignment: u64) -> Result<Vec<TensorInfo>> {
        let data_start = (self.at as u64).next_multiple_of(alignment);
        let file_len = self.bytes.len() as u64;
        for tensor in &described {
            let Description {
                name,
                offset,
                len,
                described_at,
                ..
            } = tensor;
            let wrong = |message| Err(self.malformed_at(*described_at, message));
            if offset % alignment != 0 {
                return wrong(format!(
                    "{name:?} begins at {offset}, which is no multiple of {alignment}"
                ));
            }
            let end = data_start
                .checked_add(*offset)
                .and_then(|start| start.checked_add(*len));
            if end.is_none_or(|end| end > file_len) {
                let missing = "the file is cut short or altered";
                return wrong(format!(
                    "{name:?} ({len} bytes at {data_start} + {offset}) ends beyond the file's {file_len} bytes: {missing}"
                ));
            }
        }
        let mut order: Vec<&Description> = described.iter().collect();
        order.sort_by_key(|tensor| tensor.offset);
        for pair in order.windows(2) {
            if pair[0].offset + pair[0].len > pair[1].offset {
                let message = format!("the data of {:?} and {:?} overlap", pair[0].name, pair[1].name);
                return Err(self.malformed_at(pair[1].described_at, message));
            }
        }
        let placed = described.into_iter().map(|tensor| TensorInfo {
            name: tensor.name,
            shape: tensor.shape,
            kind: tensor.kind,
            start: (data_start + tensor.offset) as usize,
            len: tensor.len as usize,
        });
        Ok(placed.collect())
    }

    fn bool(&mut self, key: &str) -> Result<bool> {
        match self.fixed("a bool")? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(self.malformed(format!("{key:?}: a bool of {other}"))),
        }
    }

    fn string(&mut self, key: &str) -> Result<String> {
        let len = self.u64("length of a string")?;
        let begin = self.at;
        let bytes = self.take(len, "a string")?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(self.malformed_at(begin, format!("{key:?}: {error}"))),
        }
    }

    /// A string of bounded length.
    fn name(&mut self, what: &str) -> Result<String> {
        let declared = self.peek_u64();
        if declared.is_some_and(|len| len > MAX_NAME_BYTES) {
            return Err(self.malformed(format!("a {what} longer than {MAX_NAME_BYTES} bytes")));
        }
        self.string(what)
    }

    fn peek_u64(&self) -> Option<u64> {
        let bytes = self.bytes.get(self.at..self.at + 8)?;
        bytes.try_into().ok().map(u64::from_le_bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut fixed = [0; N];
        fixed.copy_from_slice(self.take(N as u64, what)?);
        Ok(fixed)
    }

    fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        let left = (self.bytes.len() - self.at) as u64;
        if len > left {
            return Err(self.malformed(format!(
                "{what} of {len} bytes, but only {left} are left: the file is cut short or altered"
            )));
        }
        let begin = self.at;
        self.at += len as usize;
        Ok(&self.bytes[begin..self.at])
    }

    /// `n`, once it is clear that the rest of the file could hold `n` things of `min_bytes`.
    fn plausible_count(&self, n: u64, min_bytes: usize, what: &str) -> Result<usize> {
        let left = (self.bytes.len() - self.at) as u64;
        if n > left / min_bytes as u64 {
            return Err(self.malformed(format!(
                "{what}: {n} announced, more than the remaining {left} bytes can hold"
            )));
        }
        Ok(n as usize)
    }

    fn unknown_value_type(&self, type_id: u32, key: &str) -> Error {
        self.malformed(format!(
            "{key:?} has the unknown value type {type_id}, expected 0 to 12"
        ))
    }

    fn unsupported_type(&self, name: &str, known: Option<&'static str>) -> Error {
        let at = self.at - 4;
        let id = u32::from_le_bytes([
            self.bytes[at],
            self.bytes[at + 1],
            self.bytes[at + 2],
            self.bytes[at + 3],
        ]);
        Error::UnsupportedTensorType {
            path: self.path.to_path_buf(),
            tensor: name.to_owned(),
            found: known.map_or_else(|| format!("unknown type {id}"), |name| format!("type {name}")),
        }
    }

    fn malformed(&self, message: String) -> Error {
        self.malformed_at(self.at, message)
    }

    fn malformed_at(&self, at: usize, message: String) -> Error {
        Error::MalformedGguf {
            path: self.path.to_path_buf(),
            at,
            message,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file under construction, without the checks of the real writer.
    #[derive(Clone, Default)]
    struct Raw {
        pairs: Vec<Vec<u8>>,
        tensors: Vec<Vec<u8>>,
        data: Vec<u8>,
    }

    impl Raw {
        fn pair(mut self, key: &str, type_id: u32, value: &[u8]) -> Self {
            self.pairs
                .push([string(key), type_id.to_le_bytes().to_vec(), value.to_vec()].concat());
            self
        }

        fn tensor(mut self, name: &str, dims: &[u64], type_id: u32, offset: u64) -> Self {
            let dims_bytes = dims.iter().flat_map(|d| d.to_le_bytes());
            let mut bytes = string(name);
            bytes.extend((dims.len() as u32).to_le_bytes());
            bytes.extend(dims_bytes);
            bytes.extend(type_id.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            self.tensors.push(bytes);
            self
        }

        fn data(mut self, len: usize) -> Self {
            self.data = vec![7; len];
            self
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = header(3, self.tensors.len() as u64, self.pairs.len() as u64);
            self.pairs.iter().chain(&self.tensors).for_each(|part| out.extend(part));
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&self.data);
            out
        }
    }

    fn header(version: u32, n_tensors: u64, n_pairs: u64) -> Vec<u8> {
        [
            b"GGUF".as_slice(),
            &version.to_le_bytes(),
            &n_tensors.to_le_bytes(),
            &n_pairs.to_le_bytes(),
        ]
        .concat()
    }

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn array(type_id: u32, n: u64, items: &[u8]) -> Vec<u8> {
        [&type_id.to_le_bytes(), n.to_le_bytes().as_slice(), items].concat()
    }

    fn read(bytes: Vec<u8>) -> Result<Gguf> {
        Gguf::from_bytes(bytes, Path::new("x.gguf"))
    }

    #[test]
    fn values_and_tensors_come_back() {
        let bytes = Raw::default()
            .pair("n", 4, &7u32.to_le_bytes())
            .pair("list", 9, &array(8, 2, &[string("a"), string("é")].concat()))
            .pair("nested", 9, &array(9, 1, &array(0, 2, &[1, 2])))
            .tensor("t", &[2, 3], 0, 32)
            .data(56)
            .bytes();
        let file = read(bytes).unwrap();
        assert_eq!(file.metadata().whole("n").unwrap(), Some(7));
        assert_eq!(file.metadata().texts("list").unwrap().unwrap(), ["a", "é"]);
        let nested = Value::Array(Array::Array(vec![Array::U8(vec![1, 2])]));
        assert_eq!(file.metadata().get("nested"), Some(&nested));
        let tensor = file.tensor("t").unwrap();
        assert_eq!(
            (tensor.shape.as_slice(), file.bytes(tensor).len()),
            ([3, 2].as_slice(), 24)
        );
    }

    #[test]
    fn every_cut_of_a_file_is_an_error_that_names_it() {
        let whole = Raw::default()
            .pair("k", 8, &string("v"))
            .tensor("t", &[4], 0, 0)
            .data(16)
            .bytes();
        read(whole.clone()).unwrap();
        for len in 0..whole.len() {
            let error = read(whole[..len].to_vec()).unwrap_err();
            assert!(
                matches!(error, Error::NotGguf { .. } | Error::MalformedGguf { .. }),
                "{len}: {error}"
            );
            assert!(error.to_string().contains("x.gguf"), "{error}");
        }
    }

    #[test]
    fn err_what_a_header_must_not_say() {
        let check = |bytes: Vec<u8>, expect: &str| {
            let error = read(bytes).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        };
        check(b"PK\x03\x04".to_vec(), "begins with \"PK\\x03\\x04\"");
        check(header(1, 0, 0), "GGUF version 1:");
        check(header(3u32.swap_bytes(), 0, 0), "big-endian");
        check(header(3, u64::MAX, 0), "tensors: 18446744073709551615 announced");
        check(header(3, 0, u64::MAX), "metadata pairs: 18446744073709551615 announced");
        let pair = |type_id, value: &[u8]| Raw::default().pair("k", type_id, value).bytes();
        check(pair(13, &[]), "unknown value type 13");
        check(pair(7, &[2]), "a bool of 2");
        check(
            pair(8, &u64::MAX.to_le_bytes()),
            "a string of 18446744073709551615 bytes",
        );
        check(pair(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "invalid utf-8");
        check(pair(9, &array(4, 1 << 60, &[])), "announced");
        let deep = (0..5).fold(array(0, 0, &[]), |inner, _| array(9, 1, &inner));
        check(pair(9, &deep), "nested more than 4 deep");
        check(
            Raw::default().pair("k", 0, &[1]).pair("k", 0, &[1]).bytes(),
            "\"k\" appears twice",
        );
        let alignment = |n: u32| Raw::default().pair("general.alignment", 4, &n.to_le_bytes()).bytes();
        check(alignment(0), "general.alignment = 0");
        check(alignment(24), "power of two");
        let long_key = Raw::default().pair(&"k".repeat(65_536), 0, &[1]).bytes();
        check(long_key, "longer than 65535");
    }

    #[test]
    fn err_tensors_that_do_not_fit() {
        let check = |raw: Raw, expect: &str| {
            let error = read(raw.data(64).bytes()).unwrap_err().to_string();
            assert!(error.contains(expect) && error.contains("\"t\""), "{error}");
        };
        let one = |dims: &[u64], type_id, offset| Raw::default().tensor("t", dims, type_id, offset);
        check(one(&[], 0, 0), "0 dimensions");
        check(one(&[1; 5], 0, 0), "5 dimensions");
        check(one(&[4, 0], 0, 0), "a dimension of zero");
        check(one(&[1 << 40, 1 << 40], 0, 0), "more elements than can be counted");
        check(one(&[17], 0, 0), "ends beyond the file");
        check(one(&[1], 0, u64::MAX - 31), "ends beyond the file");
        check(one(&[1], 0, 8), "no multiple of 32");
        // 64 numbers are two blocks, but rows of 16 are not.
        check(
            one(&[16, 4], 2, 0),
            "rows of 16 numbers are not whole Q4_0 blocks of 32",
        );
        check(one(&[4], 0, 0).tensor("t", &[4], 0, 32), "appears twice");
        check(one(&[9], 0, 0).tensor("u", &[1], 0, 32), "overlap");
        check(one(&[4], 23, 0), "type IQ4_XS");
        check(one(&[4], 99, 0), "unknown type 99");
    }

    #[test]
    fn alignment_of_the_file_is_used() {
        let file = Raw::default()
            .pair("general.alignment", 4, &8u32.to_le_bytes())
            .tensor("t", &[1], 0, 8)
            .data(12);
        let mut bytes = file.bytes();
        // The helper pads to 32; this file's data begin at the next multiple of 8.
        let head = bytes.len() - 12;
        let unpadded = 24 + file.pairs[0].len() + file.tensors[0].len();
        bytes.drain(unpadded.next_multiple_of(8)..head);
        let read = read(bytes).unwrap();
        assert_eq!(read.bytes(&read.tensors()[0]), [7; 4]);
    }

    #[test]
    fn err_empty_and_absent_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("empty.gguf");
        assert!(matches!(Gguf::open(&path), Err(Error::Io { .. })));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(Gguf::open(&path), Err(Error::NotGguf { .. })));
    }
}

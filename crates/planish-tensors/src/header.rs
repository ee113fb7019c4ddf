use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::dtype::Dtype;
use crate::error::{Error, Result};

/// Longest header that is read, the limit of the format's reference implementation.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// What a safetensors file says it holds, checked against its real size.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    /// In the order of the data.
    pub(crate) entries: Vec<Entry>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Where the data lies, from the start of the file.
    pub(crate) range: Range<usize>,
}

/// Reads and checks the header of a whole safetensors file.
///
/// The data must fill the file exactly: each tensor as long as its shape says, no overlap, no gap, nothing after the
/// last. Data need not start at a multiple of the element size, because MLX writes headers of any length.
pub(crate) fn parse(file: &[u8], path: &Path) -> Result<Header> {
    parse_checked(file).map_err(|problem| Error::BadHeader {
        path: path.to_path_buf(),
        problem: Box::new(problem),
    })
}

fn parse_checked(file: &[u8]) -> Result<Header, HeaderProblem> {
    let (json, data_start) = split_header(file)?;
    let raw: RawHeader = serde_json::from_slice(json).map_err(|e| HeaderProblem::NotJson { reason: e.to_string() })?;
    if let Some(name) = raw.duplicate {
        return Err(HeaderProblem::DuplicateName { name });
    }
    let data_bytes = file.len() - data_start;
    let mut entries = Vec::with_capacity(raw.tensors.len());
    for (name, tensor) in raw.tensors {
        entries.push(tensor.into_entry(name, data_start, data_bytes)?);
    }
    entries.sort_by_key(|entry| (entry.range.start, entry.range.end));
    check_layout(&entries, data_start, file.len())?;
    Ok(Header {
        metadata: raw.metadata,
        entries,
    })
}

/// How a file begins that stands for another one in a repository.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The JSON text, and where the data begins.
fn split_header(file: &[u8]) -> Result<(&[u8], usize), HeaderProblem> {
    let file_bytes = file.len() as u64;
    if file.starts_with(LFS_POINTER) {
        return Err(HeaderProblem::LfsPointer);
    }
    let Some(length) = file.first_chunk::<8>() else {
        return Err(HeaderProblem::TooShort { file_bytes });
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES {
        return Err(HeaderProblem::TooLong { header_bytes });
    }
    if header_bytes > file_bytes - 8 {
        return Err(HeaderProblem::Truncated {
            header_bytes,
            file_bytes,
        });
    }
    let end = 8 + header_bytes as usize;
    Ok((&file[8..end], end))
}

/// Neighbours must touch, the first starting and the last ending where the data does.
fn check_layout(entries: &[Entry], data_start: usize, file_bytes: usize) -> Result<(), HeaderProblem> {
    let mut end = data_start;
    let mut previous = "";
    for entry in entries {
        if entry.range.start < end {
            return Err(HeaderProblem::Overlap {
                name: entry.name.clone(),
                other: previous.to_string(),
            });
        }
        if entry.range.start > end {
            return Err(HeaderProblem::Gap {
                name: entry.name.clone(),
                bytes: entry.range.start - end,
            });
        }
        end = entry.range.end;
        previous = &entry.name;
    }
    if end < file_bytes {
        return Err(HeaderProblem::Trailing {
            bytes: file_bytes - end,
        });
    }
    Ok(())
}

/// Why the header of a safetensors file was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderProblem {
    /// A repository was cloned without Git LFS.
    #[error(
        "this is a Git LFS pointer, not the file itself: run `git lfs pull` in the repository, or use `planish pull hf:ORG/NAME`"
    )]
    LfsPointer,
    /// Not even room for the length of the header.
    #[error("the file has {file_bytes} bytes, too few for a header")]
    TooShort {
        /// Size of the file.
        file_bytes: u64,
    },
    /// A header longer than the format allows; usually another kind of file.
    #[error("the header claims {header_bytes} bytes, more than the format allows: this is not a safetensors file")]
    TooLong {
        /// Claimed length.
        header_bytes: u64,
    },
    /// The header does not fit into the file.
    #[error("the header claims {header_bytes} bytes but the file ends after {file_bytes}: it is truncated")]
    Truncated {
        /// Claimed length.
        header_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// Not the JSON object of the format.
    #[error("the header is not valid: {reason}")]
    NotJson {
        /// The parser's message.
        reason: String,
    },
    /// One name, two tensors.
    #[error("{name:?} is listed twice in the header")]
    DuplicateName {
        /// The tensor.
        name: String,
    },
    /// An element type that planish cannot read.
    #[error("tensor {name:?} has the element type {dtype:?}, which is not supported")]
    UnknownDtype {
        /// The tensor.
        name: String,
        /// The type as written.
        dtype: String,
    },
    /// A shape whose size is not a number of bytes.
    #[error("tensor {name:?} has the impossible shape {shape:?}")]
    ImpossibleShape {
        /// The tensor.
        name: String,
        /// The shape as written.
        shape: Vec<u64>,
    },
    /// Data outside the file.
    #[error("tensor {name:?} ends at byte {end} of the data, of which there are {data_bytes}: the file is truncated")]
    OutOfBounds {
        /// The tensor.
        name: String,
        /// Claimed end, from the start of the data.
        end: u64,
        /// Bytes of data in the file.
        data_bytes: u64,
    },
    /// Shape and data disagree.
    #[error("tensor {name:?} of type {dtype} and shape {shape:?} needs {expected} bytes, its data has {found}")]
    SizeMismatch {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<usize>,
        /// Bytes by type and shape.
        expected: usize,
        /// Bytes by offsets; negative when the end lies before the start.
        found: i128,
    },
    /// Two tensors share bytes.
    #[error("the data of tensors {other:?} and {name:?} overlap")]
    Overlap {
        /// The later tensor.
        name: String,
        /// The earlier tensor.
        other: String,
    },
    /// Bytes that belong to no tensor.
    #[error("{bytes} bytes before tensor {name:?} belong to no tensor")]
    Gap {
        /// The tensor after the gap.
        name: String,
        /// Its size.
        bytes: usize,
    },
    /// Bytes after the last tensor.
    #[error("{bytes} bytes after the last tensor belong to no tensor")]
    Trailing {
        /// How many.
        bytes: usize,
    },
}

struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
    duplicate: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn into_entry(self, name: String, data_start: usize, data_bytes: usize) -> Result<Entry, HeaderProblem> {
        let Some(dtype) = Dtype::from_name(&self.dtype) else {
            return Err(HeaderProblem::UnknownDtype {
                name,
                dtype: self.dtype,
            });
        };
        let shape: Option<Vec<usize>> = self.shape.iter().map(|dim| usize::try_from(*dim).ok()).collect();
        let Some((shape, expected)) = shape.and_then(|s| dtype.byte_len(&s).map(|bytes| (s, bytes))) else {
            return Err(HeaderProblem::ImpossibleShape {
                name,
                shape: self.shape,
            });
        };
        let (start, end) = self.data_offsets;
        let found = i128::from(end) - i128::from(start);
        if found != expected as i128 {
            return Err(HeaderProblem::SizeMismatch {
                name,
                dtype,
                shape,
                expected,
                found,
            });
        }
        if end > data_bytes as u64 {
            return Err(HeaderProblem::OutOfBounds {
                name,
                end,
                data_bytes: data_bytes as u64,
            });
        }
        Ok(Entry {
            name,
            dtype,
            shape,
            range: data_start + start as usize..data_start + end as usize,
        })
    }
}

/// By hand, because a map type would keep the last of two equal names without a word.
impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(RawHeaderVisitor)
    }
}

struct RawHeaderVisitor;

impl<'de> Visitor<'de> for RawHeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader {
            metadata: BTreeMap::new(),
            tensors: Vec::new(),
            duplicate: None,
        };
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                header.duplicate.get_or_insert(name.clone());
            }
            if name == "__metadata__" {
                // MLX writes null where there is no metadata.
                header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
            } else {
                header.tensors.push((name, map.next_value()?));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data_bytes: usize) -> Vec<u8> {
        let mut file = (json.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(json.as_bytes());
        file.resize(file.len() + data_bytes, 7);
        file
    }

    fn problem(file: &[u8]) -> HeaderProblem {
        match parse(file, Path::new("x.safetensors")) {
            Err(Error::BadHeader { problem, .. }) => *problem,
            other => panic!("expected a header problem, got {other:?}"),
        }
    }

    #[test]
    fn header_of_odd_length_is_read() {
        let json = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   "#;
        assert_eq!(json.len() % 8, 1);
        let file = file(json, 4);
        let header = parse(&file, Path::new("x")).unwrap();
        assert_eq!(header.entries[0].range, 8 + json.len()..12 + json.len());
    }

    #[test]
    fn empty_object_is_an_empty_file() {
        assert!(parse(&file("{}", 0), Path::new("x")).unwrap().entries.is_empty());
    }

    #[test]
    fn metadata_may_be_null_as_mlx_writes_it() {
        let header = parse(&file(r#"{"__metadata__":null}"#, 0), Path::new("x")).unwrap();
        assert!(header.metadata.is_empty());
    }

    #[test]
    fn scalars_and_empty_tensors_are_read() {
        let json = r#"{"e":{"dtype":"F32","shape":[0,4],"data_offsets":[2,2]},"s":{"dtype":"F16","shape":[],"data_offsets":[0,2]}}"#;
        let header = parse(&file(json, 2), Path::new("x")).unwrap();
        assert_eq!(header.entries[0].name, "s");
        assert_eq!(header.entries[1].shape, [0, 4]);
    }

    #[test]
    fn err_file_shorter_than_the_length() {
        assert_eq!(problem(b"1234567"), HeaderProblem::TooShort { file_bytes: 7 });
    }

    #[test]
    fn err_header_longer_than_the_file() {
        let mut bytes = file("{}", 0);
        bytes[0] = 3;
        assert_eq!(
            problem(&bytes),
            HeaderProblem::Truncated {
                header_bytes: 3,
                file_bytes: 10
            }
        );
    }

    #[test]
    fn err_absurd_length_allocates_nothing() {
        let bytes = [0xff; 16];
        assert_eq!(problem(&bytes), HeaderProblem::TooLong { header_bytes: u64::MAX });
    }

    #[test]
    fn err_not_json() {
        assert!(matches!(problem(&file("[]", 0)), HeaderProblem::NotJson { .. }));
    }

    #[test]
    fn err_same_name_twice() {
        let t = r#"{"dtype":"U8","shape":[1],"data_offsets":[0,1]}"#;
        let json = format!(r#"{{"a":{t},"a":{t}}}"#);
        assert_eq!(
            problem(&file(&json, 1)),
            HeaderProblem::DuplicateName { name: "a".into() }
        );
    }

    #[test]
    fn err_unknown_dtype() {
        let json = r#"{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,1]}}"#;
        assert_eq!(
            problem(&file(json, 1)),
            HeaderProblem::UnknownDtype {
                name: "a".into(),
                dtype: "F7".into()
            }
        );
    }

    #[test]
    fn err_shape_larger_than_memory() {
        let json = r#"{"a":{"dtype":"F32","shape":[9223372036854775807,16],"data_offsets":[0,1]}}"#;
        assert!(matches!(problem(&file(json, 1)), HeaderProblem::ImpossibleShape { .. }));
    }

    #[test]
    fn err_data_longer_or_shorter_than_the_shape() {
        let json = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9]}}"#;
        assert!(matches!(
            problem(&file(json, 9)),
            HeaderProblem::SizeMismatch {
                expected: 8,
                found: 9,
                ..
            }
        ));
        let json = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#;
        assert!(matches!(
            problem(&file(json, 8)),
            HeaderProblem::SizeMismatch {
                expected: 8,
                found: -8,
                ..
            }
        ));
    }

    #[test]
    fn err_data_outside_the_file() {
        let json = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
        let expect = HeaderProblem::OutOfBounds {
            name: "a".into(),
            end: 4,
            data_bytes: 3,
        };
        assert_eq!(problem(&file(json, 3)), expect);
    }

    #[test]
    fn err_overlap_gap_and_trailing_bytes() {
        let two = |a: &str, b: &str| {
            format!(
                r#"{{"a":{{"dtype":"U8","shape":[2],"data_offsets":{a}}},"b":{{"dtype":"U8","shape":[2],"data_offsets":{b}}}}}"#
            )
        };
        let overlap = HeaderProblem::Overlap {
            name: "b".into(),
            other: "a".into(),
        };
        assert_eq!(problem(&file(&two("[0,2]", "[1,3]"), 3)), overlap);
        assert_eq!(
            problem(&file(&two("[0,2]", "[3,5]"), 5)),
            HeaderProblem::Gap {
                name: "b".into(),
                bytes: 1
            }
        );
        assert_eq!(
            problem(&file(&two("[0,2]", "[2,4]"), 5)),
            HeaderProblem::Trailing { bytes: 1 }
        );
    }
}

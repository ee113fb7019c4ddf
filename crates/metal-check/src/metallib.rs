//! Reads what a Metal library says about itself: for which system it was made, and in which language.
//!
//! The layout is not documented by Apple; it was read off the files of three mlx-metal wheels. All numbers are little endian.
//!
//! | offset | type | meaning |
//! |---|---|---|
//! | 0 | 4 bytes | `MTLB` |
//! | 4 | u16 | platform, bit 15 = macOS |
//! | 6, 8 | u16, u16 | file version |
//! | 10 | u8 | file type |
//! | 11 | u8 | target system, bit 7 = 64 bit (`0x81` = macOS) |
//! | 12, 14 | u16, u16 | target system version |
//! | 16 | u64 | size of the file |
//! | 24, 40, 56, 72 | u64, u64 | offset and size of: functions, public metadata, private metadata, bitcode |

use crate::Error;
use crate::version::Version;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 88;
/// The list of functions names at most this many; a larger count is a damaged file, not a larger library.
const MAX_FUNCTIONS: u32 = 1_000_000;

/// An offset and a size within the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Section {
    /// From the beginning of the file, in bytes.
    pub offset: u64,
    /// In bytes.
    pub size: u64,
}

impl Section {
    fn end(self) -> Option<u64> {
        self.offset.checked_add(self.size)
    }
}

/// The fixed header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Whether the platform bit says macOS.
    pub is_macos: bool,
    /// Version of the container format.
    pub file_version: (u16, u16),
    /// Oldest system that may load it, as stamped by the linker. The first object decides the stamp, so compare
    /// [`Function::language`] too.
    pub target_os: Version,
    /// Size that the file must have.
    pub file_bytes: u64,
    /// The list of functions.
    pub functions: Section,
    /// Public metadata.
    pub public_metadata: Section,
    /// Private metadata.
    pub private_metadata: Section,
    /// The compiled kernels.
    pub bitcode: Section,
}

/// One function of the library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Name of the kernel.
    pub name: String,
    /// Version of Apple's intermediate representation.
    pub air: Version,
    /// Version of the Metal shading language.
    pub language: Version,
}

/// What the functions of a library have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// How many there are.
    pub functions: usize,
    /// How many of them use the tensor unit (their name has the part `nax`).
    pub tensor_unit: usize,
    /// How many are the kernels of MLX's fences (from macOS 15 on): `fence_wait`, `fence_update`, `input_coherent`.
    pub fences: usize,
    /// Newest AIR version of any function.
    pub air: Version,
    /// Newest shading language of any function.
    pub language: Version,
}

/// Reads the header from the first [`HEADER_BYTES`] bytes; `actual_bytes` is the size of the whole file.
///
/// # Errors
/// [`Error::Metallib`] when the magic, the size or a section is not what it must be. `found` begins with `empty` or
/// `truncated` where the file is.
pub fn parse_header(bytes: &[u8], actual_bytes: u64) -> Result<Header, Error> {
    let refuse = |what, expected: String, found: String| Error::Metallib { what, expected, found };
    let Some(head) = bytes.get(..HEADER_BYTES) else {
        return Err(refuse(
            "length",
            format!("at least {HEADER_BYTES} bytes"),
            format!("truncated: {}", bytes.len()),
        ));
    };
    if &head[..4] != b"MTLB" {
        return Err(refuse("magic", "MTLB".into(), format!("{:02x?}", &head[..4])));
    }
    let section = |at| Section {
        offset: u64_at(head, at),
        size: u64_at(head, at + 8),
    };
    let header = Header {
        is_macos: u16_at(head, 4) & 0x8000 != 0 && head[11] & 0x7f == 1,
        file_version: (u16_at(head, 6), u16_at(head, 8)),
        target_os: Version(u32::from(u16_at(head, 12)), u32::from(u16_at(head, 14)), 0),
        file_bytes: u64_at(head, 16),
        functions: section(24),
        public_metadata: section(40),
        private_metadata: section(56),
        bitcode: section(72),
    };
    if header.file_bytes != actual_bytes {
        let kind = if actual_bytes < header.file_bytes {
            "truncated: "
        } else {
            ""
        };
        return Err(refuse(
            "size",
            format!("{} bytes", header.file_bytes),
            format!("{kind}{actual_bytes}"),
        ));
    }
    let sections = [
        header.functions,
        header.public_metadata,
        header.private_metadata,
        header.bitcode,
    ];
    if sections
        .iter()
        .any(|section| section.end().is_none_or(|end| end > actual_bytes))
    {
        return Err(refuse(
            "sections",
            format!("all inside {actual_bytes} bytes"),
            format!("{sections:?}"),
        ));
    }
    if header.bitcode.size == 0 {
        return Err(refuse("bitcode", "some kernels".into(), "empty: 0 bytes".into()));
    }
    Ok(header)
}

/// Reads the list of functions; `bytes` are those of the file from `header.functions.offset` on.
///
/// The list is a u32 count, then per function a group: u32 length (counting itself) and tagged fields — four letters, u16
/// length, data — up to `ENDT`.
///
/// # Errors
/// [`Error::Metallib`] when a length leads out of the list, or a function has no name or versions.
pub fn parse_functions(bytes: &[u8]) -> Result<Vec<Function>, Error> {
    let mut rest = bytes;
    let count = u32_at(take(&mut rest, 4)?, 0);
    if count > MAX_FUNCTIONS {
        return Err(damaged("count", format!("at most {MAX_FUNCTIONS}"), count.to_string()));
    }
    (0..count).map(|_| parse_function(&mut rest)).collect()
}

/// What matters of the functions for loading and speed.
pub fn summarize(functions: &[Function]) -> Summary {
    let count = |wanted: fn(&str) -> bool| functions.iter().filter(|function| wanted(&function.name)).count();
    Summary {
        functions: functions.len(),
        tensor_unit: count(|name| name.split('_').any(|part| part == "nax")),
        fences: count(|name| name.starts_with("fence_") || name == "input_coherent"),
        air: functions
            .iter()
            .map(|function| function.air)
            .max()
            .unwrap_or(Version(0, 0, 0)),
        language: functions
            .iter()
            .map(|function| function.language)
            .max()
            .unwrap_or(Version(0, 0, 0)),
    }
}

/// The newest shading language that a macOS loads: 3.1 on 14, 3.2 on 15, 4.0 on 26; later ones are assumed to load all.
pub(crate) fn newest_language(macos: Version) -> Version {
    match macos.0 {
        ..=13 => Version(3, 0, 0),
        14 => Version(3, 1, 0),
        15 => Version(3, 2, 0),
        26 => Version(4, 0, 0),
        _ => Version(99, 0, 0),
    }
}

fn parse_function(rest: &mut &[u8]) -> Result<Function, Error> {
    let length = u32_at(take(rest, 4)?, 0) as usize;
    let body = length
        .checked_sub(4)
        .ok_or_else(|| damaged("group", "at least 4 bytes".into(), length.to_string()))?;
    let mut fields = take(rest, body)?;
    let mut found: BTreeMap<[u8; 4], &[u8]> = BTreeMap::new();
    loop {
        let tag = take(&mut fields, 4)?;
        if tag == b"ENDT" {
            break;
        }
        let size = usize::from(u16_at(take(&mut fields, 2)?, 0));
        found.insert([tag[0], tag[1], tag[2], tag[3]], take(&mut fields, size)?);
    }
    let field = |tag: &[u8; 4]| {
        found.get(tag).copied().ok_or_else(|| {
            damaged(
                "function",
                format!("a field {}", String::from_utf8_lossy(tag)),
                format!("{} fields", found.len()),
            )
        })
    };
    let name = field(b"NAME")?;
    let name = name
        .strip_suffix(b"\0")
        .ok_or_else(|| damaged("name", "a closing zero".into(), format!("{} bytes", name.len())))?;
    let versions = field(b"VERS")?;
    if versions.len() < 8 {
        return Err(damaged("versions", "8 bytes".into(), versions.len().to_string()));
    }
    let version = |at| Version(u32::from(u16_at(versions, at)), u32::from(u16_at(versions, at + 2)), 0);
    Ok(Function {
        name: String::from_utf8_lossy(name).into_owned(),
        air: version(0),
        language: version(4),
    })
}

fn take<'a>(rest: &mut &'a [u8], count: usize) -> Result<&'a [u8], Error> {
    match rest.split_at_checked(count) {
        Some((head, tail)) => {
            *rest = tail;
            Ok(head)
        }
        None => Err(damaged(
            "list",
            format!("{count} more bytes"),
            format!("truncated: {}", rest.len()),
        )),
    }
}

fn damaged(what: &'static str, expected: String, found: String) -> Error {
    Error::Metallib { what, expected, found }
}

// The callers have checked the lengths.
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first 88 bytes of mlx.metallib in the mlx-metal 0.32.2 wheels, with the facts known of them.
    const WHEELS: [(&str, Version, (u16, u16), u64); 3] = [
        (
            "4d544c4201800200070000810e0000006024190800000000580000000000 00002d7e290000000000b97e29000000000068d902000000000021582c0000000000 60f801000000000081502e000000000000f9de0600000000",
            Version(14, 0, 0),
            (2, 7),
            135_865_440,
        ),
        (
            "4d544c4201800200080000810f000000b0c91808000000005800000000000000 dd7f290000000000698029000000000080d9020000000000e9592c0000000000 78f801000000000061522e0000000000f097de0600000000",
            Version(15, 0, 0),
            (2, 8),
            135_842_224,
        ),
        (
            "4d544c4201800200090000811a0002001075de0a000000005800000000000000 6e2c2d0000000000102d2d00000000001c5b0300000000002c88300000000000 381d02000000000064a5320000000000a0f7810900000000",
            Version(26, 2, 0),
            (2, 9),
            182_351_120,
        ),
    ];

    fn bytes(hexadecimal: &str) -> Vec<u8> {
        let digits: String = hexadecimal.split_whitespace().collect();
        (0..digits.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
            .collect()
    }

    fn function(name: &str, language: (u16, u16)) -> Vec<u8> {
        let mut fields = Vec::new();
        fields.extend(b"NAME");
        fields.extend((name.len() as u16 + 1).to_le_bytes());
        fields.extend(name.bytes().chain([0]));
        fields.extend(b"VERS");
        fields.extend(8_u16.to_le_bytes());
        for number in [2, 6, language.0, language.1] {
            fields.extend(u16::to_le_bytes(number));
        }
        fields.extend(b"ENDT");
        let mut group = (fields.len() as u32 + 4).to_le_bytes().to_vec();
        group.extend(fields);
        group
    }

    #[test]
    fn headers_of_the_wheels_are_read() {
        for (head, target_os, file_version, file_bytes) in WHEELS {
            let header = parse_header(&bytes(head), file_bytes).unwrap();
            assert_eq!(
                (
                    header.target_os,
                    header.file_version,
                    header.file_bytes,
                    header.is_macos
                ),
                (target_os, file_version, file_bytes, true)
            );
            assert_eq!(header.functions.offset, 88);
            assert!(header.bitcode.end().unwrap() < file_bytes); // sections that the header does not name follow
        }
    }

    #[test]
    fn err_size_differs_from_header() {
        let error = parse_header(&bytes(WHEELS[0].0), 1000).unwrap_err().to_string();
        assert!(error.contains("truncated: 1000"), "{error}");
    }

    #[test]
    fn err_empty_metallib() {
        let mut head = bytes(WHEELS[0].0);
        head[16..24].copy_from_slice(&118_u64.to_le_bytes());
        for at in (24..88).step_by(8) {
            head[at..at + 8].copy_from_slice(&(if (at / 8) % 2 == 1 { 88_u64 } else { 0 }).to_le_bytes());
        }
        let error = parse_header(&head, 118).unwrap_err().to_string();
        assert!(error.contains("empty"), "{error}");
    }

    #[test]
    fn err_other_file() {
        assert!(parse_header(&[0; 88], 88).is_err());
        assert!(parse_header(b"MTLB", 4).is_err());
    }

    #[test]
    fn functions_are_counted_by_kind() {
        let mut list = 3_u32.to_le_bytes().to_vec();
        list.extend(function("vv_add", (3, 1)));
        list.extend(function("steel_gemm_nax_nt", (4, 0)));
        list.extend(function("fence_wait", (3, 2)));
        let summary = summarize(&parse_functions(&list).unwrap());
        assert_eq!((summary.functions, summary.tensor_unit, summary.fences), (3, 1, 1));
        assert_eq!(summary.language, Version(4, 0, 0));
    }

    #[test]
    fn err_list_is_cut() {
        let mut list = 2_u32.to_le_bytes().to_vec();
        list.extend(function("vv_add", (3, 1)));
        assert!(parse_functions(&list).is_err());
        assert!(parse_functions(&u32::MAX.to_le_bytes()).is_err());
        for cut in 0..list.len() {
            assert!(parse_functions(&list[..cut]).is_err());
        }
    }

    proptest::proptest! {
        #[test]
        fn prop_any_bytes_are_survived(data in proptest::collection::vec(proptest::num::u8::ANY, 0..300), size: u64) {
            let _ = parse_header(&data, size);
            let _ = parse_functions(&data);
        }
    }
}

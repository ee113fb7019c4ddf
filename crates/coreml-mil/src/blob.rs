//! The weight file, `weight.bin`: a header and aligned blobs, each behind its metadata.
//!
//! Little endian. Header of 64 bytes: `u32` number of blobs, `u32` version 2, zeros. Each blob starts at a multiple of
//! 64 with metadata of 64 bytes: `u32` 0xDEADBEEF, `u32` dtype code, `u64` bytes of data, `u64` offset of the data, `u64`
//! padding bits, zeros; then the data. Nothing follows the last blob's data. A program names a blob by the offset of its
//! *metadata*. Verified byte for byte against coremltools' writer (tests/it/golden/blob.bin).

use std::{
    fs::File,
    io::{self, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::{DType, Error, Result};

/// Alignment of metadata and data.
const ALIGNMENT: u64 = 64;
const SENTINEL: u32 = 0xDEAD_BEEF;
const VERSION: u32 = 2;

/// Where one blob lies in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobPlace {
    /// Element type.
    pub dtype: DType,
    /// Number of elements.
    pub count: usize,
    /// Offset of the metadata: what the program stores.
    pub offset: u64,
}

impl BlobPlace {
    /// Bytes of data.
    pub fn byte_len(&self) -> u64 {
        self.dtype.byte_len(self.count)
    }

    fn end(&self) -> u64 {
        self.offset + ALIGNMENT + self.byte_len()
    }

    fn metadata(&self) -> [u8; 64] {
        let mut out = [0; 64];
        let padding = (8 - (self.count * self.dtype.bits()) % 8) % 8;
        out[0..4].copy_from_slice(&SENTINEL.to_le_bytes());
        out[4..8].copy_from_slice(&self.dtype.blob_code().unwrap_or_default().to_le_bytes());
        out[8..16].copy_from_slice(&self.byte_len().to_le_bytes());
        out[16..24].copy_from_slice(&(self.offset + ALIGNMENT).to_le_bytes());
        out[24..32].copy_from_slice(&(padding as u64).to_le_bytes());
        out
    }
}

/// Decides offsets before any data exists: they depend on types and sizes alone.
///
/// ```
/// use coreml_mil::{BlobPlan, DType};
/// let mut plan = BlobPlan::default();
/// assert_eq!(plan.add(DType::F16, 37)?, 64);
/// assert_eq!(plan.add(DType::F32, 5)?, 256); // 64 + 64 of metadata + 74 of data, aligned
/// assert_eq!(plan.file_len(), 256 + 64 + 20); // no padding at the end
/// # Ok::<(), coreml_mil::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct BlobPlan {
    places: Vec<BlobPlace>,
}

impl BlobPlan {
    /// Reserves the next blob and returns its offset.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a type that the weight file cannot hold.
    pub fn add(&mut self, dtype: DType, count: usize) -> Result<u64> {
        if dtype.blob_code().is_none() {
            return Err(Error::Unsupported {
                what: format!("{dtype} values in a weight file"),
            });
        }
        let offset = self.file_len().next_multiple_of(ALIGNMENT);
        self.places.push(BlobPlace { dtype, count, offset });
        Ok(offset)
    }

    /// The blobs in file order.
    pub fn places(&self) -> &[BlobPlace] {
        &self.places
    }

    /// Size of the whole file in bytes.
    pub fn file_len(&self) -> u64 {
        self.places.last().map_or(ALIGNMENT, BlobPlace::end)
    }
}

/// Writes the blobs of a [`BlobPlan`] in order, from data that arrives in pieces of any size.
pub struct BlobWriter {
    path: PathBuf,
    file: BufWriter<File>,
    places: std::vec::IntoIter<BlobPlace>,
    /// The blob being written and how many bytes it still lacks.
    open: Option<(BlobPlace, u64)>,
    position: u64,
}

impl BlobWriter {
    /// Creates the file and writes its header.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, plan: &BlobPlan) -> Result<Self> {
        let file = File::create(path).map_err(Error::io(path))?;
        let mut writer = Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 16, file),
            places: plan.places.clone().into_iter(),
            open: None,
            position: 0,
        };
        let mut header = [0; 64];
        header[0..4].copy_from_slice(&(plan.places.len() as u32).to_le_bytes());
        header[4..8].copy_from_slice(&VERSION.to_le_bytes());
        writer.put(&header)?;
        Ok(writer)
    }

    /// Starts the next blob of the plan and returns its place.
    ///
    /// # Errors
    /// [`Error::Internal`] when the previous blob is incomplete or the plan has no more; [`Error::Io`].
    pub fn next_blob(&mut self) -> Result<BlobPlace> {
        self.require_complete()?;
        let place = self
            .places
            .next()
            .ok_or_else(|| Error::internal("more blobs than planned"))?;
        self.put(&[0; ALIGNMENT as usize][..(place.offset - self.position) as usize])?;
        self.put(&place.metadata())?;
        self.open = Some((place, place.byte_len()));
        Ok(place)
    }

    /// Appends data to the blob that [`BlobWriter::next_blob`] started.
    ///
    /// # Errors
    /// [`Error::Internal`] when it is more than planned; [`Error::Io`].
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        match &mut self.open {
            Some((_, missing)) if *missing >= data.len() as u64 => *missing -= data.len() as u64,
            _ => return Err(Error::internal("more bytes than the blob was planned for")),
        }
        self.put(data)
    }

    /// Flushes the file; all planned blobs must have been written.
    ///
    /// # Errors
    /// [`Error::Internal`] when data or blobs are missing; [`Error::Io`].
    pub fn finish(mut self) -> Result<()> {
        self.require_complete()?;
        if self.places.next().is_some() {
            return Err(Error::internal("fewer blobs than planned"));
        }
        self.file.flush().map_err(Error::io(&self.path))
    }

    fn require_complete(&self) -> Result<()> {
        match self.open {
            Some((place, missing)) if missing > 0 => Err(Error::internal(format!(
                "the blob at {} lacks {missing} bytes",
                place.offset
            ))),
            _ => Ok(()),
        }
    }

    fn put(&mut self, data: &[u8]) -> Result<()> {
        self.file.write_all(data).map_err(Error::io(&self.path))?;
        self.position += data.len() as u64;
        Ok(())
    }
}

/// Reads blobs by the offset of their metadata, and distrusts every number it finds.
pub struct BlobReader {
    path: PathBuf,
    file: File,
    len: u64,
    count: u32,
}

impl BlobReader {
    /// Opens a weight file and checks its header.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::BadPackage`] for a short file or another version.
    pub fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let len = file.metadata().map_err(Error::io(path))?.len();
        if len < ALIGNMENT {
            return Err(Error::bad_package(path, "the weight file is shorter than its header"));
        }
        let mut header = [0; 8];
        file.read_exact(&mut header).map_err(Error::io(path))?;
        let version = u32_at(&header, 4);
        if version != VERSION {
            return Err(Error::bad_package(
                path,
                format!("weight file version {version}, expected {VERSION}"),
            ));
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            len,
            count: u32_at(&header, 0),
        })
    }

    /// Size of the file in bytes.
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// The bytes of the blob whose metadata lies at `offset`, which must hold `count` elements of `dtype`.
    ///
    /// # Errors
    /// [`Error::BadPackage`] when the offset, sentinel, type, size or padding is not right; [`Error::Io`].
    pub fn read(&mut self, offset: u64, dtype: DType, count: usize) -> Result<Vec<u8>> {
        let found = self.metadata(offset)?;
        if found.dtype != dtype {
            return Err(self.bad(offset, format!("it holds {}, the program says {dtype}", found.dtype)));
        }
        let (bytes, padding) = (dtype.byte_len(count), ((8 - (count * dtype.bits()) % 8) % 8) as u64);
        if found.bytes != bytes || found.padding_bits != padding {
            let problem = format!(
                "{} bytes and {} padding bits, expected {bytes} and {padding} for {count} elements of {dtype}",
                found.bytes, found.padding_bits
            );
            return Err(self.bad(offset, problem));
        }
        let mut data = vec![0; bytes as usize];
        self.read_at(found.data_offset, &mut data)?;
        Ok(data)
    }

    /// Walks the file from blob to blob: their metadata offsets in file order.
    ///
    /// # Errors
    /// As [`BlobReader::read`]; also when bytes follow the last blob.
    pub fn offsets(&mut self) -> Result<Vec<u64>> {
        let (mut offset, mut end, mut out) = (ALIGNMENT, ALIGNMENT, Vec::new());
        for _ in 0..self.count {
            let found = self.metadata(offset)?;
            out.push(offset);
            end = found.data_offset + found.bytes;
            offset = end.next_multiple_of(ALIGNMENT);
        }
        if end != self.len {
            return Err(self.bad(end, format!("the last blob ends here, the file at {}", self.len)));
        }
        Ok(out)
    }

    fn metadata(&mut self, offset: u64) -> Result<Metadata> {
        if !offset.is_multiple_of(ALIGNMENT) || offset.checked_add(ALIGNMENT).is_none_or(|end| end > self.len) {
            return Err(self.bad(offset, "not a multiple of 64 inside the file"));
        }
        let mut raw = [0; 64];
        self.read_at(offset, &mut raw)?;
        if u32_at(&raw, 0) != SENTINEL {
            return Err(self.bad(offset, "no blob starts here (the sentinel is absent)"));
        }
        let code = u32_at(&raw, 4);
        let dtype =
            DType::from_blob_code(code).ok_or_else(|| self.bad(offset, format!("unknown dtype code {code}")))?;
        let (bytes, data_offset, padding_bits) = (u64_at(&raw, 8), u64_at(&raw, 16), u64_at(&raw, 24));
        if data_offset != offset + ALIGNMENT {
            return Err(self.bad(
                offset,
                format!("data offset {data_offset}, expected {}", offset + ALIGNMENT),
            ));
        }
        if data_offset.checked_add(bytes).is_none_or(|end| end > self.len) {
            return Err(self.bad(offset, format!("{bytes} bytes run past the end of the file")));
        }
        Ok(Metadata {
            dtype,
            bytes,
            data_offset,
            padding_bits,
        })
    }

    fn read_at(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        let read = |file: &mut File, into: &mut [u8]| -> io::Result<()> {
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(into)
        };
        read(&mut self.file, into).map_err(Error::io(&self.path))
    }

    fn bad(&self, offset: u64, problem: impl std::fmt::Display) -> Error {
        Error::bad_package(&self.path, format!("blob at offset {offset}: {problem}"))
    }
}

struct Metadata {
    dtype: DType,
    bytes: u64,
    data_offset: u64,
    padding_bits: u64,
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    u64::from(u32_at(raw, at)) | u64::from(u32_at(raw, at + 4)) << 32
}

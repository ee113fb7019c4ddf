//! The folder: `main.mlirb`, its hash, its metadata.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, BufWriter, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{
    Error, Result,
    bytecode::{Encoded, decode, encode},
    program::Program,
};

const PROGRAM: &str = "main.mlirb";
const HASH: &str = "main.hash";
const METADATA: &str = "metadata.json";
const ASSET_VERSION: &str = "2.0";
/// Written into every asset: equal programs give equal folders.
const CREATED: &str = "20260101T000000Z";

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileReport {
    /// Bytes of the program with its weights.
    pub bytes: u64,
    /// SHA-256 of the same.
    pub hash: [u8; 32],
}

/// Writes an asset: the program at once, then its weights piece by piece in the program's order.
///
/// The folder is complete after [`finish`](Self::finish); write it under a temporary name and rename it.
pub struct AssetWriter {
    folder: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    bytes: u64,
    encoded: Encoded,
    weights: Vec<(String, u64)>,
    /// Weights that were begun, and bytes that the current one lacks.
    begun: usize,
    lacking: u64,
}

impl AssetWriter {
    /// Begins an asset in an existing, empty folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path, program: &Program) -> Result<Self> {
        let path = folder.join(PROGRAM);
        let file = File::create(&path).map_err(Error::io(&path))?;
        let mut writer = Self {
            folder: folder.to_owned(),
            file: BufWriter::new(file),
            hash: Sha256::new(),
            bytes: 0,
            encoded: encode(program),
            weights: program.weights.iter().map(|w| (w.name.clone(), w.bytes)).collect(),
            begun: 0,
            lacking: 0,
        };
        let head = std::mem::take(&mut writer.encoded.head);
        writer.put(&head)?;
        Ok(writer)
    }

    /// Ends the current weight and begins the next one.
    ///
    /// # Errors
    /// [`Error::Weight`] when the current one lacks data or there is no next; [`Error::Io`].
    pub fn next_weight(&mut self) -> Result<()> {
        self.end_weight()?;
        let Some((_, bytes)) = self.weights.get(self.begun) else {
            return Err(self.unfit("there are no more weights"));
        };
        self.lacking = *bytes;
        let head = std::mem::take(&mut self.encoded.weight_heads[self.begun]);
        self.begun += 1;
        self.put(&head)
    }

    /// Appends data to the current weight.
    ///
    /// # Errors
    /// [`Error::Weight`] when it would become too long; [`Error::Io`].
    pub fn write(&mut self, data: &[u8]) -> Result<()> {
        match self.lacking.checked_sub(data.len() as u64) {
            Some(lacking) => self.lacking = lacking,
            None => return Err(self.unfit("more data than planned")),
        }
        self.put(data)
    }

    /// Ends the program and writes hash and metadata.
    ///
    /// # Errors
    /// [`Error::Weight`] when data are missing; [`Error::Io`].
    pub fn finish(mut self) -> Result<FileReport> {
        self.end_weight()?;
        if self.begun < self.weights.len() {
            return Err(self.unfit("weights after it were never written"));
        }
        let tail = std::mem::take(&mut self.encoded.tail);
        self.put(&tail)?;
        let path = self.folder.join(PROGRAM);
        self.file.flush().map_err(Error::io(&path))?;
        self.file.get_ref().sync_all().map_err(Error::io(&path))?;
        let hash: [u8; 32] = self.hash.finalize().into();
        write_file(&self.folder.join(HASH), &hash)?;
        let metadata = json!({ "assetVersion": ASSET_VERSION, "creationDate": CREATED, "producer": "planish" });
        write_file(&self.folder.join(METADATA), metadata.to_string().as_bytes())?;
        Ok(FileReport {
            bytes: self.bytes,
            hash,
        })
    }

    fn end_weight(&self) -> Result<()> {
        match self.lacking {
            0 => Ok(()),
            lacking => Err(self.unfit(format!("{lacking} bytes are missing"))),
        }
    }

    fn put(&mut self, data: &[u8]) -> Result<()> {
        self.hash.update(data);
        self.bytes += data.len() as u64;
        self.file.write_all(data).map_err(Error::io(&self.folder))
    }

    fn unfit(&self, problem: impl Into<String>) -> Error {
        let name = self.begun.checked_sub(1).and_then(|at| self.weights.get(at));
        Error::Weight {
            name: name.map_or_else(|| "(none)".into(), |row| row.0.clone()),
            problem: problem.into(),
        }
    }
}

/// An asset that was opened: its program, and its weights read when asked for.
#[derive(Debug)]
pub struct Asset {
    path: PathBuf,
    program: Program,
    file: File,
    weights: Vec<Range<u64>>,
}

impl Asset {
    /// Opens the folder of an asset and checks version and hash.
    ///
    /// # Errors
    /// [`Error::BadAsset`] for anything that is not a valid asset, a wrong hash included; [`Error::Io`].
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(PROGRAM);
        let file = File::open(&path).map_err(Error::io(&path))?;
        check_metadata(folder)?;
        check_hash(folder, &file, &path)?;
        let stored = decode(&mut BufReader::new(&file)).map_err(|problem| Error::bad_asset(&path, problem))?;
        Ok(Self {
            path,
            program: stored.program,
            file,
            weights: stored.weights,
        })
    }

    /// The program.
    pub fn program(&self) -> &Program {
        &self.program
    }

    /// Bytes `range` of a weight.
    ///
    /// # Errors
    /// [`Error::BadAsset`] for bytes beyond the weight; [`Error::Io`].
    pub fn weight(&self, index: usize, range: Range<u64>) -> Result<Vec<u8>> {
        let beyond = || Error::bad_asset(&self.path, format!("bytes {range:?} of weight {index}"));
        let whole = self.weights.get(index).ok_or_else(beyond)?;
        if range.start > range.end || range.end > whole.end - whole.start {
            return Err(beyond());
        }
        let mut data = vec![0; (range.end - range.start) as usize];
        let at = whole.start + range.start;
        self.file.read_exact_at(&mut data, at).map_err(Error::io(&self.path))?;
        Ok(data)
    }
}

fn check_metadata(folder: &Path) -> Result<()> {
    let path = folder.join(METADATA);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| Error::bad_asset(&path, e.to_string()))?;
    match json["assetVersion"].as_str() {
        Some(ASSET_VERSION) => Ok(()),
        found => Err(Error::bad_asset(
            &path,
            format!("assetVersion {found:?}; {ASSET_VERSION} is known"),
        )),
    }
}

fn check_hash(folder: &Path, file: &File, program: &Path) -> Result<()> {
    let path = folder.join(HASH);
    let stored = fs::read(&path).map_err(Error::io(&path))?;
    let mut hash = Sha256::new();
    let mut reader = BufReader::with_capacity(1 << 20, file);
    loop {
        let data = reader.fill_buf().map_err(Error::io(program))?;
        if data.is_empty() {
            break;
        }
        hash.update(data);
        let read = data.len();
        reader.consume(read);
    }
    if stored != hash.finalize().as_slice() {
        return Err(Error::bad_asset(&path, "it is not the SHA-256 of main.mlirb"));
    }
    Ok(())
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(path, bytes).map_err(Error::io(path))
}

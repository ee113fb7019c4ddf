use std::collections::BTreeSet;
use std::path::Path;

use planish_core::hash::sha256_file;
use serde::{Deserialize, Serialize};

use super::search::Verify;
use crate::error::{Error, Result};

pub(super) const MANIFEST_FILE: &str = "manifest.json";

/// Every file of a checkpoint with size and hash; written last, so that it vouches for the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this layout.
    pub schema: u32,
    /// The step of the checkpoint.
    pub step: u64,
    /// All files but the manifest, sorted by name.
    pub files: Vec<ManifestFile>,
}

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Its name.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content.
    pub sha256: String,
}

impl Manifest {
    /// Lists and hashes the files of a directory.
    pub(super) fn of_dir(dir: &Path, step: u64) -> Result<Self> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(|e| Error::read(dir, e))? {
            let path = entry.map_err(|e| Error::read(dir, e))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let bytes = std::fs::metadata(&path).map_err(|e| Error::read(&path, e))?.len();
            let sha256 = sha256_file(&path).map_err(|e| Error::read(&path, e))?;
            files.push(ManifestFile { name, bytes, sha256 });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { schema: 1, step, files })
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        // Strings and numbers always serialise.
        let mut json = serde_json::to_vec_pretty(self).unwrap_or_default();
        json.push(b'\n');
        json
    }

    pub(super) fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let bad = |reason: String| Error::BadJson {
            path: path.to_path_buf(),
            reason,
        };
        let manifest: Self = serde_json::from_slice(json).map_err(|e| Error::json(path, &e))?;
        if manifest.schema != 1 {
            return Err(bad(format!("`schema` is {}, this planish reads 1", manifest.schema)));
        }
        // Nothing vouches for the manifest itself, so it must be exactly what would be written.
        if manifest.to_json() != json {
            return Err(bad("it is not as it was written: truncated or edited".to_string()));
        }
        let mut names = BTreeSet::new();
        for file in &manifest.files {
            let is_plain = !file.name.is_empty() && !file.name.contains(['/', '\\', '\0']) && file.name != "..";
            if !is_plain || !names.insert(&file.name) {
                return Err(bad(format!("{:?} is no file name, or is listed twice", file.name)));
            }
        }
        Ok(manifest)
    }

    /// Reads the manifest of a checkpoint and compares every file with it.
    ///
    /// # Errors
    /// [`Error::BrokenCheckpoint`] naming the file; [`Error::BadJson`]; [`Error::Read`].
    pub(super) fn verify(dir: &Path, verify: Verify) -> Result<Self> {
        let path = dir.join(MANIFEST_FILE);
        let broken = |problem: String| Error::BrokenCheckpoint {
            path: dir.to_path_buf(),
            problem,
        };
        let json = match std::fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(broken(format!("it has no {MANIFEST_FILE}: writing it was interrupted")));
            }
            other => other.map_err(|e| Error::read(&path, e))?,
        };
        let manifest = Self::from_json(&json, &path)?;
        for file in &manifest.files {
            if let Some(problem) = file.problem(dir, verify)? {
                return Err(broken(problem));
            }
        }
        Ok(manifest)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl ManifestFile {
    fn problem(&self, dir: &Path, verify: Verify) -> Result<Option<String>> {
        let path = dir.join(&self.name);
        let found = match std::fs::metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Some(format!("{MANIFEST_FILE} lists {}, which is missing", self.name)));
            }
            other => other.map_err(|e| Error::read(&path, e))?.len(),
        };
        if found != self.bytes {
            return Ok(Some(format!(
                "{} has {found} bytes, {MANIFEST_FILE} says {}",
                self.name, self.bytes
            )));
        }
        if verify == Verify::SizesOnly {
            return Ok(None);
        }
        let sha256 = sha256_file(&path).map_err(|e| Error::read(&path, e))?;
        let differs = sha256 != self.sha256;
        Ok(differs.then(|| {
            format!(
                "{} has the SHA-256 {sha256}, {MANIFEST_FILE} says {}",
                self.name, self.sha256
            )
        }))
    }
}

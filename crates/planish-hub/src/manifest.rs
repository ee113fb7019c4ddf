//! What a folder of ours held when it was written: found again unchanged, it need not be made again.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use planish_core::hash::sha256_file;
use serde::{Deserialize, Serialize};

use crate::error::io_at;
use crate::{Error, Event, Progress, Result, Stage};

/// The file that holds it.
const NAME: &str = ".planish.json";

/// Source and SHA-256 of every file of a folder.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Manifest {
    /// What was converted, and how.
    source: String,
    /// File name → SHA-256.
    files: BTreeMap<String, String>,
}

impl Manifest {
    /// Records the files of a finished folder.
    pub(crate) fn write(folder: &Path, source: &str) -> Result<()> {
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(folder).map_err(io_at(folder))? {
            let path = entry.map_err(io_at(folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.insert(name, sha256_file(&path).map_err(io_at(&path))?);
        }
        let manifest = Self {
            source: source.to_owned(),
            files,
        };
        let path = folder.join(NAME);
        let text =
            serde_json::to_string_pretty(&manifest).map_err(|error| io_at(&path)(std::io::Error::other(error)))?;
        fs::write(&path, text).map_err(io_at(path))
    }

    /// Whether `folder` holds, unchanged, what was made from `source`. `false`: there is nothing yet.
    ///
    /// # Errors
    /// [`Error::OutputExists`] for a folder with other content; [`Error::Altered`] for ours, but changed.
    pub(crate) fn find(folder: &Path, source: &str, progress: &mut dyn Progress) -> Result<bool> {
        if is_free(folder)? {
            return Ok(false);
        }
        let occupied = || Error::OutputExists {
            path: folder.to_path_buf(),
        };
        let text = fs::read_to_string(folder.join(NAME)).map_err(|_| occupied())?;
        let manifest: Self = serde_json::from_str(&text).map_err(|_| occupied())?;
        if manifest.source != source {
            return Err(occupied());
        }
        let item = folder.file_name().unwrap_or_default().to_string_lossy();
        progress.report(Event::Began {
            stage: Stage::Check,
            item: &item,
            total_bytes: None,
        });
        for (file, expected) in &manifest.files {
            let altered = |what| Error::Altered {
                folder: folder.to_path_buf(),
                file: file.clone(),
                what,
            };
            match sha256_file(&folder.join(file)) {
                Ok(found) if found == *expected => {}
                Ok(_) => return Err(altered("has been changed")),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(altered("has gone")),
                Err(error) => return Err(io_at(folder.join(file))(error)),
            }
        }
        progress.report(Event::Ended);
        Ok(true)
    }
}

/// Whether a new folder can be made at `path`: nothing is there, or an empty directory.
pub(crate) fn is_free(path: &Path) -> Result<bool> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(io_at(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;

    fn folder_of_ours() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), b"{}").unwrap();
        Manifest::write(dir.path(), "model as bf16").unwrap();
        dir
    }

    #[test]
    fn unchanged_folder_is_found() {
        let dir = folder_of_ours();
        assert!(Manifest::find(dir.path(), "model as bf16", &mut Silent).unwrap());
    }

    #[test]
    fn absent_and_empty_folders_are_free() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!Manifest::find(dir.path(), "model", &mut Silent).unwrap());
        assert!(!Manifest::find(&dir.path().join("no"), "model", &mut Silent).unwrap());
    }

    #[test]
    fn err_changed_or_missing_file() {
        let dir = folder_of_ours();
        fs::write(dir.path().join("config.json"), b"[]").unwrap();
        let error = Manifest::find(dir.path(), "model as bf16", &mut Silent).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Altered {
                    what: "has been changed",
                    ..
                }
            ),
            "{error}"
        );
        fs::remove_file(dir.path().join("config.json")).unwrap();
        let error = Manifest::find(dir.path(), "model as bf16", &mut Silent).unwrap_err();
        assert!(matches!(error, Error::Altered { what: "has gone", .. }), "{error}");
    }

    #[test]
    fn err_folder_made_from_something_else() {
        let dir = folder_of_ours();
        let error = Manifest::find(dir.path(), "model as f32", &mut Silent).unwrap_err();
        assert!(matches!(error, Error::OutputExists { .. }), "{error}");
    }
}

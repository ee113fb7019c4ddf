//! The files of MLX, read without touching a device: which they are, and what they already show.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use metal_check::predict::{self, Prediction};
use metal_check::version::Version;
use metal_check::{macho, metallib};
use planish_core::hash;
use serde::{Deserialize, Serialize};

/// The MLX that is loaded, as a probe found it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MlxFiles {
    /// `libmlx`.
    pub library: Option<FileFacts>,
    /// Its compiled kernels, on macOS.
    pub metallib: Option<MetallibFacts>,
}

/// Which file it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    /// Where it lies.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its hash.
    pub sha256: String,
}

/// A Metal library and what it was built for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetallibFacts {
    /// The file.
    #[serde(flatten)]
    pub file: FileFacts,
    /// Oldest macOS that loads it.
    pub target_os: Version,
    /// Newest version of Apple's intermediate code in it.
    pub air: Version,
    /// Newest shading language in it.
    pub msl: Version,
}

/// Reads the files; what cannot be read is left out.
pub(crate) fn identify(library: Option<&Path>) -> MlxFiles {
    let metallib = library.and_then(metallib_of).and_then(|path| {
        let (header, summary) = read_metallib(&path).ok()?;
        Some(MetallibFacts {
            file: facts(&path)?,
            target_os: header.target_os,
            air: summary.air,
            msl: summary.language,
        })
    });
    MlxFiles {
        library: library.and_then(facts),
        metallib,
    }
}

/// What will fail on this macOS, from the headers alone.
pub(crate) fn predict(library: &Path, macos: Version) -> Vec<Prediction> {
    let image = std::fs::read(library).ok().and_then(|bytes| macho::parse(&bytes).ok());
    let mut found = image.map_or_else(Vec::new, |image| predict::of_library(&image, macos));
    let beside = library.with_file_name("mlx.metallib");
    if beside.exists() {
        match read_metallib(&beside) {
            Ok((header, summary)) => found.extend(predict::of_metallib(&header, Some(&summary), macos)),
            Err(reason) => found.push(predict::of_unreadable_metallib(&reason)),
        }
    }
    found
}

/// Where MLX finds its kernels: beside its library.
pub(crate) fn metallib_of(library: &Path) -> Option<PathBuf> {
    let beside = library.with_file_name("mlx.metallib");
    beside.exists().then_some(beside)
}

fn facts(path: &Path) -> Option<FileFacts> {
    Some(FileFacts {
        bytes: path.metadata().ok()?.len(),
        sha256: hash::sha256_file(path).ok()?,
        path: path.to_owned(),
    })
}

/// Header and list of functions, without the hundred megabytes of kernels behind them.
fn read_metallib(path: &Path) -> Result<(metallib::Header, metallib::Summary), String> {
    let io = |error: std::io::Error| format!("{}: {error}", path.display());
    let refuse = |error: metal_check::Error| format!("{}: {error}", path.display());
    let mut file = File::open(path).map_err(io)?;
    let mut head = Vec::new();
    file.by_ref()
        .take(metallib::HEADER_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(io)?;
    let header = metallib::parse_header(&head, file.metadata().map_err(io)?.len()).map_err(refuse)?;
    file.seek(SeekFrom::Start(header.functions.offset)).map_err(io)?;
    let mut list = Vec::new();
    file.take(header.functions.size + 4)
        .read_to_end(&mut list)
        .map_err(io)?;
    let summary = metallib::summarize(&metallib::parse_functions(&list).map_err(refuse)?);
    Ok((header, summary))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_metallib_is_predicted_to_fail() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libmlx.dylib");
        assert_eq!(predict(&library, Version(15, 0, 0)), []);
        std::fs::write(dir.path().join("mlx.metallib"), [0; 10]).unwrap();
        let found = predict(&library, Version(15, 0, 0));
        assert_eq!(found[0].code, "METALLIB_NOT_FOUND");
        assert!(found[0].detail.contains("truncated"), "{found:?}");
    }

    #[test]
    fn the_loaded_library_is_named_with_its_hash() {
        let files = identify(planish_mlx::library::path().as_deref());
        let library = files.library.unwrap();
        assert_eq!(library.sha256.len(), 64);
        assert_eq!(library.bytes, library.path.metadata().unwrap().len());
    }
}

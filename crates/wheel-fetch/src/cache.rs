use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, io_at};

/// The per-user cache: `$PLANISH_CACHE`, else the platform's cache directory with `planish` in it.
///
/// Linux: `$XDG_CACHE_HOME` or `~/.cache`; macOS: `~/Library/Caches`. The directory need not exist yet.
///
/// # Errors
/// [`Error::NoCacheDir`] when no variable says where the user's files live.
pub fn cache_dir() -> Result<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(dir) = set("PLANISH_CACHE") {
        return std::path::absolute(&dir).map_err(io_at(dir));
    }
    if cfg!(target_os = "macos") {
        return set("HOME")
            .map(|home| home.join("Library/Caches/planish"))
            .ok_or(Error::NoCacheDir);
    }
    // The XDG specification asks to ignore relative paths.
    set("XDG_CACHE_HOME")
        .filter(|dir| dir.is_absolute())
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .map(|dir| dir.join("planish"))
        .ok_or(Error::NoCacheDir)
}

/// Holds an advisory lock on a directory of the cache, so that two builds do not unpack the same wheel at once.
///
/// The lock goes with the process, however it ends.
#[derive(Debug)]
pub struct CacheLock {
    _file: File,
}

impl CacheLock {
    /// Creates `dir` if needed and waits for its lock.
    ///
    /// # Errors
    /// [`Error::Io`] when the directory or its lock file cannot be made.
    pub fn acquire(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(io_at(dir))?;
        let path = dir.join(".lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_at(&path))?;
        file.lock().map_err(io_at(&path))?;
        Ok(Self { _file: file })
    }
}

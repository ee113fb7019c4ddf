//! Files and directories that appear whole or not at all.
//!
//! Everything is written beside its destination under a temporary name, flushed to the disk, and renamed. A crash or a
//! full disk leaves the old content in place, and at worst a file whose name starts with `.planish-tmp-`.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::{NamedTempFile, TempDir};

const TEMP_PREFIX: &str = ".planish-tmp-";

/// Files and directories that this process has under construction.
static UNFINISHED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// How often a path is removed again while another thread still writes into it.
const REMOVALS: usize = 100;

/// Removes everything that this process has under construction: for a process that is told to end, as its last act. Nothing
/// can be begun or finished afterwards: whoever tries waits for the end.
pub fn remove_unfinished() {
    let listed = unfinished();
    for path in listed.iter() {
        // A file that another thread has just made in a directory keeps that directory. What cannot be removed stays: there
        // is nobody left to tell.
        for _ in 0..REMOVALS {
            let _ = match path.is_dir() {
                true => std::fs::remove_dir_all(path),
                false => std::fs::remove_file(path),
            };
            if !path.exists() {
                break;
            }
        }
    }
    std::mem::forget(listed); // stays locked
}

fn unfinished() -> MutexGuard<'static, BTreeSet<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A path is listed as unfinished for as long as this lives.
#[derive(Debug)]
struct Unfinished(PathBuf);

impl Unfinished {
    /// Makes something and lists its path, with no moment between the two.
    fn begin<T>(make: impl FnOnce() -> io::Result<T>, path: impl FnOnce(&T) -> &Path) -> io::Result<(T, Self)> {
        let mut listed = unfinished();
        let made = make()?;
        let path = path(&made).to_path_buf();
        listed.insert(path.clone());
        Ok((made, Self(path)))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        unfinished().remove(&self.0);
    }
}

/// Replaces the content of `path` by `bytes`, atomically and durably. The directory must exist.
///
/// ```
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("state.json");
/// planish_core::fs::write_atomic(&path, b"{}")?;
/// assert_eq!(std::fs::read(&path)?, b"{}");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn write_atomic(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.commit()
}

/// A file under construction, for content too large to hold in memory: write to it, then [`commit`](Self::commit).
///
/// Dropped without a commit, it leaves the destination as it was. It is not buffered: write large pieces, or wrap it
/// in a [`std::io::BufWriter`].
#[derive(Debug)]
pub struct AtomicFile {
    temp: NamedTempFile,
    final_path: PathBuf,
    _unfinished: Unfinished,
}

impl AtomicFile {
    /// Opens a temporary file in the directory of `final_path`, which must exist.
    pub fn create(final_path: &Path) -> io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMP_PREFIX);
        readable_by_others(&mut builder, 0o666);
        let (temp, unfinished) =
            Unfinished::begin(|| builder.tempfile_in(directory_of(final_path)), NamedTempFile::path)?;
        Ok(Self {
            _unfinished: unfinished,
            temp,
            final_path: final_path.to_path_buf(),
        })
    }

    /// Flushes the content to the disk and gives it its final name, replacing a file of that name.
    pub fn commit(self) -> io::Result<()> {
        self.temp.as_file().sync_all()?;
        self.temp.persist(&self.final_path).map_err(|failed| failed.error)?;
        sync_dir(directory_of(&self.final_path))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temp.as_file_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temp.as_file_mut().flush()
    }
}

/// A directory under construction: fill [`path`](Self::path), then [`commit`](Self::commit).
///
/// Dropped without a commit, it is removed with all its content.
#[derive(Debug)]
pub struct AtomicDir {
    temp: TempDir,
    final_path: PathBuf,
    _unfinished: Unfinished,
}

impl AtomicDir {
    /// Makes an empty temporary directory beside `final_path`, and the parents of both.
    pub fn create(final_path: &Path) -> io::Result<Self> {
        let parent = directory_of(final_path);
        std::fs::create_dir_all(parent)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(TEMP_PREFIX);
        readable_by_others(&mut builder, 0o777);
        let (temp, unfinished) = Unfinished::begin(|| builder.tempdir_in(parent), TempDir::path)?;
        Ok(Self {
            _unfinished: unfinished,
            temp,
            final_path: final_path.to_path_buf(),
        })
    }

    /// Where to write until the commit.
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Flushes every file and gives the directory its final name.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] when something other than an empty directory already has that name.
    pub fn commit(self) -> io::Result<()> {
        if is_occupied(&self.final_path)? {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} already exists and is not empty", self.final_path.display()),
            ));
        }
        sync_tree(self.temp.path())?;
        std::fs::rename(self.temp.path(), &self.final_path)?;
        // The directory has moved away: nothing is left for the guard to remove.
        let _ = self.temp.keep();
        sync_dir(directory_of(&self.final_path))
    }
}

/// Makes renames and removals inside a directory durable. Does nothing on systems that cannot open directories.
pub fn sync_dir(dir: &Path) -> io::Result<()> {
    if cfg!(unix) {
        File::open(dir)?.sync_all()
    } else {
        Ok(())
    }
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

fn is_occupied(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => Ok(std::fs::read_dir(path)?.next().is_some()),
        Ok(_) => Ok(true),
    }
}

/// The directory that holds `path`; `.` for a bare file name.
fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Temporary files are private by default; ours become ordinary files, so they get ordinary permissions (less umask).
#[cfg(unix)]
fn readable_by_others(builder: &mut tempfile::Builder<'_, '_>, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    builder.permissions(std::fs::Permissions::from_mode(mode));
}

#[cfg(not(unix))]
fn readable_by_others(_: &mut tempfile::Builder<'_, '_>, _: u32) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn names_in(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn write_replaces_and_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names_in(dir.path()), ["a"]);
    }

    #[test]
    fn file_dropped_without_commit_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"old").unwrap();
        AtomicFile::create(&path).unwrap().write_all(b"half").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names_in(dir.path()), ["a"]);
    }

    #[cfg(unix)]
    #[test]
    fn written_file_has_ordinary_permissions() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write_atomic(&ours, b"").unwrap();
        std::fs::write(&plain, b"").unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }

    #[test]
    fn directory_appears_at_commit_only() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("deep/model");
        let building = AtomicDir::create(&target).unwrap();
        std::fs::create_dir(building.path().join("sub")).unwrap();
        std::fs::write(building.path().join("sub/x"), b"1").unwrap();
        assert!(!target.exists());
        building.commit().unwrap();
        assert_eq!(std::fs::read(target.join("sub/x")).unwrap(), b"1");
        assert_eq!(names_in(&dir.path().join("deep")), ["model"]);
    }

    #[test]
    fn directory_dropped_without_commit_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let building = AtomicDir::create(&dir.path().join("model")).unwrap();
        std::fs::write(building.path().join("x"), b"1").unwrap();
        drop(building);
        assert!(names_in(dir.path()).is_empty());
    }

    #[test]
    fn err_commit_over_a_filled_directory() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("model");
        std::fs::create_dir(&target).unwrap();
        std::fs::write(target.join("precious"), b"1").unwrap();
        let error = AtomicDir::create(&target).unwrap().commit().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(names_in(dir.path()), ["model"]);
        assert!(target.join("precious").exists());
    }
}

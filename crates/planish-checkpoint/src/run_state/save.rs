use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use planish_core::fs::{sync_dir, write_atomic};
use planish_tensors::{self as tensors, INDEX_FILE};

use super::manifest::{MANIFEST_FILE, Manifest};
use super::run_dir::RunDir;
use super::search::{Checkpoint, OPTIMIZER_FILE, STATE_FILE, Verify};
use super::state::RunState;
use super::{pointer, search};
use crate::adapter::{MLX_TENSOR_FILE, Method};
use crate::error::{Error, Result};
use crate::model_files;

/// Which checkpoints are kept. The best one always is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// How many of the newest; at least the one just written is kept.
    pub keep_last: usize,
    /// Keep also every step that is a multiple of this.
    pub keep_every: Option<u64>,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            keep_last: 3,
            keep_every: None,
        }
    }
}

/// A checkpoint that is on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Its directory.
    pub dir: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of the trained tensors: of the adapter file, or of the index of a full fine-tune.
    pub sha256: String,
    /// Steps whose checkpoints were deleted.
    pub pruned: Vec<u64>,
}

impl RunDir {
    /// Writes a checkpoint, points `latest` and `best` to where they belong, and deletes old checkpoints.
    ///
    /// When this returns, the checkpoint survives a power failure. When it fails, those before are as they were.
    ///
    /// # Errors
    /// [`Error::NoSpace`] before anything is written; [`Error::Write`].
    pub fn save(&self, checkpoint: &Checkpoint, retention: &Retention) -> Result<Saved> {
        let (checkpoints, step) = (self.checkpoints_dir(), checkpoint.state.position.step);
        let name = pointer::dir_name(step);
        self.check_space(&checkpoints)?;
        let temp = tempfile::Builder::new()
            .prefix(&format!(".tmp-{step:07}-"))
            .tempdir_in(&checkpoints);
        let temp = temp.map_err(|e| Error::write(&checkpoints, e))?;
        let manifest = self.write_files(temp.path(), checkpoint)?;
        let dir = checkpoints.join(&name);
        self.put_in_place(temp, &dir, &manifest)?;
        let pruned = self.settle(&checkpoint.state, retention)?;
        let tensors = if checkpoint.adapter.method == Method::Full {
            INDEX_FILE
        } else {
            MLX_TENSOR_FILE
        };
        let sha256 = manifest
            .files
            .iter()
            .find(|file| file.name == tensors)
            .map(|file| file.sha256.clone());
        Ok(Saved {
            dir,
            bytes: manifest.bytes(),
            sha256: sha256.unwrap_or_default(),
            pruned,
        })
    }

    /// The end of a save: points `latest` to the state's checkpoint and `best` to the best one, and deletes old ones,
    /// whose steps it returns. After a resume it finishes what a crash may have interrupted.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn settle(&self, state: &RunState, retention: &Retention) -> Result<Vec<u64>> {
        self.write_pointers(state)?;
        self.prune(state, retention)
    }

    /// Twice the size of the last checkpoint must be free.
    fn check_space(&self, checkpoints: &Path) -> Result<()> {
        let Some(last) = search::steps(checkpoints)?.pop() else {
            return Ok(());
        };
        let last = checkpoints.join(pointer::dir_name(last));
        let Ok(manifest) = Manifest::verify(&last, Verify::SizesOnly) else {
            return Ok(());
        };
        let needed = 2 * manifest.bytes();
        let disk = rustix::fs::statvfs(checkpoints).map_err(|e| Error::write(checkpoints, e.into()))?;
        let available = disk.f_bavail.saturating_mul(disk.f_frsize);
        if available < needed {
            return Err(Error::NoSpace {
                path: checkpoints.to_path_buf(),
                needed,
                available,
            });
        }
        Ok(())
    }

    /// Every file flushed, the manifest last, then the directory itself.
    fn write_files(&self, dir: &Path, checkpoint: &Checkpoint) -> Result<Manifest> {
        self.at("before the trained tensors", dir)?;
        checkpoint.adapter.write(dir)?;
        if let (Method::Full, Some(base)) = (checkpoint.adapter.method, &self.base) {
            model_files::copy(base, dir, checkpoint.adapter.dtype())?;
        }
        self.at("after the trained tensors", dir)?;
        tensors::write(&dir.join(OPTIMIZER_FILE), &checkpoint.optimizer, &BTreeMap::new())?;
        self.at("after the optimizer", dir)?;
        let state = dir.join(STATE_FILE);
        write_atomic(&state, &checkpoint.state.to_json()).map_err(|e| Error::write(&state, e))?;
        self.at("after the state", dir)?;
        let manifest = Manifest::of_dir(dir, checkpoint.state.position.step)?;
        let path = dir.join(MANIFEST_FILE);
        write_atomic(&path, &manifest.to_json()).map_err(|e| Error::write(&path, e))?;
        self.at("after the manifest", dir)?;
        sync_dir(dir).map_err(|e| Error::write(dir, e))?;
        Ok(manifest)
    }

    /// Gives the directory its name. An equal checkpoint that is there already stays; any other gives way.
    fn put_in_place(&self, temp: tempfile::TempDir, dir: &Path, manifest: &Manifest) -> Result<()> {
        let checkpoints = self.checkpoints_dir();
        if dir.exists() {
            if Manifest::verify(dir, Verify::Everything).is_ok_and(|old| old == *manifest) {
                return Ok(());
            }
            self.remove_checkpoint(&dir.file_name().unwrap_or_default().to_string_lossy())?;
        }
        self.at("before the rename", dir)?;
        std::fs::rename(temp.path(), dir).map_err(|e| Error::write(dir, e))?;
        // It has moved away: nothing is left for the guard to remove.
        let _ = temp.keep();
        self.at("after the rename", dir)?;
        sync_dir(&checkpoints).map_err(|e| Error::write(&checkpoints, e))
    }

    fn write_pointers(&self, state: &RunState) -> Result<()> {
        let checkpoints = self.checkpoints_dir();
        let point = |pointer: &str, name: &str| match pointer::read(&checkpoints, pointer) {
            Some(old) if old == name => Ok(()),
            _ => pointer::write(&checkpoints, pointer, name),
        };
        self.at("before the pointers", &checkpoints)?;
        point("latest", &pointer::dir_name(state.position.step))?;
        self.at("between the pointers", &checkpoints)?;
        if let Some(best) = state.best.as_ref().filter(|best| checkpoints.join(&best.dir).is_dir()) {
            point("best", &best.dir)?;
        }
        self.at("after the pointers", &checkpoints)
    }

    /// Later checkpoints are not counted and not touched: they are damaged, or the run would not be here.
    fn prune(&self, state: &RunState, retention: &Retention) -> Result<Vec<u64>> {
        let checkpoints = self.checkpoints_dir();
        let mut steps = search::steps(&checkpoints)?;
        steps.retain(|step| *step <= state.position.step);
        let mut kept: BTreeSet<u64> = steps.iter().rev().take(retention.keep_last.max(1)).copied().collect();
        if let Some(every) = retention.keep_every.filter(|every| *every > 0) {
            kept.extend(steps.iter().filter(|step| *step % every == 0));
        }
        // `settle` has just brought it up to date.
        kept.extend(pointer::read(&checkpoints, "best").and_then(|name| pointer::step_of(&name)));
        steps.retain(|step| !kept.contains(step));
        for step in &steps {
            self.remove_checkpoint(&pointer::dir_name(*step))?;
        }
        Ok(steps)
    }
}

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use planish_tensors::{HostTensor, TensorStore};

use super::manifest::{MANIFEST_FILE, Manifest};
use super::pointer;
use super::state::RunState;
use crate::adapter::{Adapter, ReadOptions};
use crate::error::{Error, Result};

pub(super) const STATE_FILE: &str = "state.json";
pub(super) const OPTIMIZER_FILE: &str = "optimizer.safetensors";

/// How thoroughly a checkpoint is compared with its manifest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Sizes and hashes.
    #[default]
    Everything,
    /// Sizes; for full fine-tunes, whose files are large.
    SizesOnly,
}

/// All that a run needs to go on.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The trained tensors; whole weights for a full fine-tune.
    pub adapter: Adapter,
    /// Optimizer state by name: `m/<tensor>`, `v/<tensor>`, master weights `w/<tensor>`.
    pub optimizer: BTreeMap<String, HostTensor>,
    /// Everything else.
    pub state: RunState,
}

impl Checkpoint {
    /// Reads a checkpoint directory after comparing every file with its manifest.
    ///
    /// # Errors
    /// [`Error::BrokenCheckpoint`] naming the file; all errors of [`Adapter::read`] and of [`RunState::from_json`].
    pub fn read(dir: &Path, verify: Verify) -> Result<Self> {
        let manifest = Manifest::verify(dir, verify)?;
        let broken = |problem: String| Error::BrokenCheckpoint {
            path: dir.to_path_buf(),
            problem,
        };
        for needed in [STATE_FILE, OPTIMIZER_FILE, crate::adapter::SIDECAR_FILE] {
            if !manifest.files.iter().any(|file| file.name == needed) {
                return Err(broken(format!("{MANIFEST_FILE} does not list {needed}")));
            }
        }
        let state_path = dir.join(STATE_FILE);
        let json = std::fs::read(&state_path).map_err(|e| Error::read(&state_path, e))?;
        let state = RunState::from_json(&json, &state_path)?;
        let named = dir
            .file_name()
            .and_then(|name| pointer::step_of(&name.to_string_lossy()));
        if manifest.step != state.position.step || named.is_some_and(|step| step != manifest.step) {
            let (manifest, state) = (manifest.step, state.position.step);
            return Err(broken(format!(
                "{MANIFEST_FILE} is of step {manifest}, its state of step {state}"
            )));
        }
        Ok(Self {
            adapter: Adapter::read(dir, &ReadOptions::default())?.0,
            optimizer: read_all(&dir.join(OPTIMIZER_FILE))?,
            state,
        })
    }
}

impl RunState {
    /// The state of the newest whole checkpoint of a run directory, read without taking its lock and without its tensors;
    /// `None` where there is none.
    pub fn newest(root: &Path) -> Option<Self> {
        let checkpoints = root.join("checkpoints");
        steps(&checkpoints).ok()?.into_iter().rev().find_map(|step| {
            let dir = checkpoints.join(pointer::dir_name(step));
            Manifest::verify(&dir, Verify::SizesOnly).ok()?;
            let path = dir.join(STATE_FILE);
            Self::from_json(&std::fs::read(&path).ok()?, &path).ok()
        })
    }
}

fn read_all(path: &Path) -> Result<BTreeMap<String, HostTensor>> {
    let store = TensorStore::open(path)?;
    Ok(store
        .iter()
        .map(|view| (view.name.to_string(), view.to_host()))
        .collect())
}

/// A checkpoint found for going on, and those that were not good enough.
#[derive(Clone, Debug)]
pub struct Resume {
    /// The newest whole checkpoint; `None` when there is none at all, which means step 0.
    pub found: Option<(PathBuf, Checkpoint)>,
    /// Newer ones that are not whole, newest first.
    pub passed_over: Vec<PassedOver>,
}

/// A checkpoint that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedOver {
    /// Name of its directory.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Says which checkpoint was chosen and why others were not, for people.
impl fmt::Display for Resume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.found {
            Some((dir, checkpoint)) => write!(
                f,
                "resuming at step {} from {}",
                checkpoint.state.position.step,
                dir.display()
            )?,
            None => f.write_str("no checkpoint: starting at step 0")?,
        }
        for passed in &self.passed_over {
            write!(f, "\n  passed over {passed}")?;
        }
        Ok(())
    }
}

impl fmt::Display for PassedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.reason)
    }
}

/// Looks for the newest whole checkpoint below `checkpoints`, by step; pointers are not asked. Where there are only damaged
/// ones, that is an error: to start at step 0 there is for the user to say.
pub(super) fn newest(checkpoints: &Path, verify: Verify) -> Result<Resume> {
    let mut passed_over = Vec::new();
    for step in steps(checkpoints)?.into_iter().rev() {
        let name = pointer::dir_name(step);
        let dir = checkpoints.join(&name);
        match Checkpoint::read(&dir, verify) {
            Ok(checkpoint) => {
                return Ok(Resume {
                    found: Some((dir, checkpoint)),
                    passed_over,
                });
            }
            Err(error) => passed_over.push(PassedOver {
                name,
                reason: error.to_string(),
            }),
        }
    }
    if !passed_over.is_empty() {
        // Starting anew would write over what may still be mended.
        return Err(Error::NoWholeCheckpoint {
            path: checkpoints.to_path_buf(),
            passed_over,
        });
    }
    Ok(Resume {
        found: None,
        passed_over,
    })
}

/// The steps that have a directory, ascending.
pub(super) fn steps(checkpoints: &Path) -> Result<Vec<u64>> {
    let entries = match std::fs::read_dir(checkpoints) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|e| Error::read(checkpoints, e))?,
    };
    let mut steps = Vec::new();
    for entry in entries {
        let name = entry.map_err(|e| Error::read(checkpoints, e))?.file_name();
        steps.extend(pointer::step_of(&name.to_string_lossy()));
    }
    steps.sort_unstable();
    Ok(steps)
}

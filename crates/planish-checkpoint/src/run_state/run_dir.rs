use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use planish_core::fs::{AtomicDir, sync_dir};

use super::lock::RunLock;
use super::pointer;
use super::search::{self, Checkpoint, Resume, Verify};
use crate::error::{Error, Result};

/// The output directory of a run, locked for writing.
///
/// ```
/// use planish_checkpoint::adapter::{Adapter, Method};
/// use planish_checkpoint::run_state::{Checkpoint, LaterCheckpoints, Retention, RunDir, RunState, Verify};
/// use planish_tensors::HostTensor;
///
/// let out = tempfile::tempdir()?;
/// let mut adapter = Adapter::new(Method::Lora, 1, 2.0, 0.0);
/// for (leaf, shape) in [("lora_a", [3, 1]), ("lora_b", [1, 2])] {
///     let tensor = HostTensor::from_f32(&shape, &vec![0.5; shape[0] * shape[1]]);
///     adapter.tensors.insert(format!("model.layers.0.mlp.up_proj.{leaf}"), tensor);
/// }
/// adapter.fill_keys();
/// let mut state = RunState { schema: RunState::SCHEMA, ..RunState::default() };
/// state.position.step = 100;
/// let checkpoint = Checkpoint { adapter, optimizer: Default::default(), state };
///
/// let run = RunDir::open(out.path())?;
/// run.save(&checkpoint, &Retention::default())?;
/// drop(run);
///
/// let run = RunDir::open(out.path())?;
/// let resume = run.resume(Verify::Everything)?;
/// assert!(resume.found.is_some_and(|(dir, found)| dir.ends_with("step-0000100") && found.optimizer.is_empty()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RunDir {
    root: PathBuf,
    hook: Option<Hook>,
    // Let go last.
    _lock: RunLock,
}

/// Called at every step of the write protocol, in tests: it may fail, or kill the process.
type Hook = Box<dyn Fn(&'static str) -> io::Result<()> + Send + Sync>;

/// What to do about checkpoints after the one that a run goes on from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LaterCheckpoints {
    /// Refuse to go on.
    #[default]
    Refuse,
    /// Delete them.
    Discard,
}

impl fmt::Debug for RunDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunDir")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl RunDir {
    /// Makes the directory if need be, takes its lock, and removes what interrupted writes left behind.
    ///
    /// # Errors
    /// [`Error::Locked`]; [`Error::Write`] for a read-only directory or a full disk.
    pub fn open(root: &Path) -> Result<Self> {
        std::fs::create_dir_all(root).map_err(|e| Error::write(root, e))?;
        let lock = RunLock::take(root)?;
        let run = Self {
            root: root.to_path_buf(),
            hook: None,
            _lock: lock,
        };
        let checkpoints = run.checkpoints_dir();
        std::fs::create_dir_all(&checkpoints).map_err(|e| Error::write(&checkpoints, e))?;
        remove_leftovers(&run.root)?;
        remove_leftovers(&checkpoints)?;
        Ok(run)
    }

    /// The output directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the checkpoints lie.
    pub fn checkpoints_dir(&self) -> PathBuf {
        self.root.join("checkpoints")
    }

    /// The steps that have a checkpoint directory, ascending, whole or not.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn steps(&self) -> Result<Vec<u64>> {
        search::steps(&self.checkpoints_dir())
    }

    /// Finds the newest whole checkpoint, and says why newer ones were passed over.
    ///
    /// # Errors
    /// [`Error::Read`] when the directory itself cannot be read; [`Error::NoWholeCheckpoint`] when every checkpoint in it is
    /// broken. A broken one beside a whole one is not an error here.
    pub fn resume(&self, verify: Verify) -> Result<Resume> {
        search::newest(&self.checkpoints_dir(), verify)
    }

    /// Reads the checkpoint of one step, to go on from there.
    ///
    /// # Errors
    /// [`Error::LaterCheckpoints`] when there are later ones and they are not to be discarded; all errors of
    /// [`Checkpoint::read`]. Nothing is discarded unless the checkpoint is whole.
    pub fn resume_at(&self, step: u64, verify: Verify, later: LaterCheckpoints) -> Result<Checkpoint> {
        let dir = self.checkpoints_dir().join(pointer::dir_name(step));
        let checkpoint = Checkpoint::read(&dir, verify)?;
        let later_steps: Vec<u64> = self.steps()?.into_iter().filter(|s| *s > step).collect();
        if !later_steps.is_empty() && later == LaterCheckpoints::Refuse {
            return Err(Error::LaterCheckpoints {
                path: self.root.clone(),
                step,
                later: later_steps,
            });
        }
        for step in later_steps {
            self.remove_checkpoint(&pointer::dir_name(step))?;
        }
        pointer::write(&self.checkpoints_dir(), "latest", &pointer::dir_name(step))?;
        Ok(checkpoint)
    }

    /// Copies the checkpoint of one step into a new run directory, which goes on from there on its own.
    ///
    /// `metrics.jsonl` goes along up to that step.
    ///
    /// # Errors
    /// All errors of [`Checkpoint::read`]; [`Error::Write`] also when `new_root` exists and is not empty.
    pub fn branch(&self, step: u64, new_root: &Path, verify: Verify) -> Result<()> {
        let (name, write_error) = (pointer::dir_name(step), |e| Error::write(new_root, e));
        let from = self.checkpoints_dir().join(&name);
        let checkpoint = Checkpoint::read(&from, verify)?;
        let building = AtomicDir::create(new_root).map_err(write_error)?;
        let to = building.path().join("checkpoints").join(&name);
        std::fs::create_dir_all(&to).map_err(write_error)?;
        for entry in std::fs::read_dir(&from).map_err(|e| Error::read(&from, e))? {
            let entry = entry.map_err(|e| Error::read(&from, e))?;
            std::fs::copy(entry.path(), to.join(entry.file_name())).map_err(write_error)?;
        }
        let metrics = self.root.join(METRICS_FILE);
        if metrics.exists() {
            let copy = building.path().join(METRICS_FILE);
            std::fs::copy(&metrics, &copy).map_err(write_error)?;
            cut(&copy, checkpoint.state.metrics_offset)?;
        }
        building.commit().map_err(write_error)
    }

    /// Cuts `metrics.jsonl` back to where the checkpoint was taken, so that no step appears twice.
    ///
    /// # Errors
    /// [`Error::BrokenCheckpoint`] when the file is shorter than that; [`Error::Write`].
    pub fn cut_metrics(&self, metrics_offset: u64) -> Result<()> {
        cut(&self.root.join(METRICS_FILE), metrics_offset)
    }

    /// Moves a checkpoint out of sight in one step, then deletes it.
    pub(super) fn remove_checkpoint(&self, name: &str) -> Result<()> {
        let checkpoints = self.checkpoints_dir();
        let from = checkpoints.join(name);
        let trash = checkpoints.join(format!(".trash-{name}-{}", std::process::id()));
        self.at("before moving to trash", &from)?;
        std::fs::rename(&from, &trash).map_err(|e| Error::write(&from, e))?;
        self.at("after moving to trash", &from)?;
        std::fs::remove_dir_all(&trash).map_err(|e| Error::write(&trash, e))?;
        sync_dir(&checkpoints).map_err(|e| Error::write(&checkpoints, e))
    }

    /// Installs a function that is called at every step of the write protocol.
    #[doc(hidden)]
    pub fn set_hook(&mut self, hook: impl Fn(&'static str) -> io::Result<()> + Send + Sync + 'static) {
        self.hook = Some(Box::new(hook));
    }

    /// A step of the protocol that concerns `path`.
    pub(super) fn at(&self, step: &'static str, path: &Path) -> Result<()> {
        self.hook
            .as_ref()
            .map_or(Ok(()), |hook| hook(step).map_err(|e| Error::write(path, e)))
    }
}

const METRICS_FILE: &str = "metrics.jsonl";

fn cut(metrics: &Path, offset: u64) -> Result<()> {
    let write_error = |e| Error::write(metrics, e);
    let found = match std::fs::metadata(metrics) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        other => other.map_err(write_error)?.len(),
    };
    if found < offset {
        let problem = format!("{METRICS_FILE} has {found} bytes, the checkpoint was taken after {offset}");
        return Err(Error::BrokenCheckpoint {
            path: metrics.to_path_buf(),
            problem,
        });
    }
    if found > offset {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(metrics)
            .map_err(write_error)?;
        file.set_len(offset)
            .and_then(|()| file.sync_all())
            .map_err(write_error)?;
    }
    Ok(())
}

/// Removes temporary and discarded files and directories. Only the holder of the lock may: they could be another's work.
fn remove_leftovers(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::read(dir, e))? {
        let entry = entry.map_err(|e| Error::read(dir, e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if ![".tmp-", ".trash-", ".planish-tmp-"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
        {
            continue;
        }
        let path = entry.path();
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let removed = if is_dir {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        removed.map_err(|e| Error::write(&path, e))?;
    }
    Ok(())
}

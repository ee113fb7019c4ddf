use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use planish_core::fs::sync_dir;

use super::lock::RunLock;
use super::search::{self, Resume, Verify};
use crate::error::{Error, Result};

/// The output directory of a run, locked for writing.
///
/// ```
/// use planish_checkpoint::adapter::{Adapter, Method};
/// use planish_checkpoint::run_state::{Checkpoint, Retention, RunDir, RunState, Verify};
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
    pub(super) base: Option<PathBuf>,
    hook: Option<Hook>,
    // Let go last.
    _lock: RunLock,
}

/// Called at every step of the write protocol, in tests: it may fail, or kill the process.
type Hook = Box<dyn Fn(&'static str) -> io::Result<()> + Send + Sync>;

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
            base: None,
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

    /// The folder of the model that is trained: checkpoints of a full fine-tune get its configuration and tokenizer, so
    /// that each is a model folder.
    pub fn set_base(&mut self, base: &Path) {
        self.base = Some(base.to_path_buf());
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

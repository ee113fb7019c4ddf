//! The output folder of a run.

use std::io::Write;
use std::path::{Path, PathBuf};

use planish_checkpoint::adapter::{Adapter, MLX_TENSOR_FILE, Method};
use planish_checkpoint::model_files;
use planish_checkpoint::run_state::{self, Checkpoint, Retention, Saved, Verify};
use planish_core::{fs, hash};
use planish_data::Dataset;
use planish_mlx::{Array, Dtype, host};
use planish_tensors::{Dtype as FileDtype, HostTensor, INDEX_FILE};
use serde_json::json;

use crate::events::{Position, RunPlan, SaveReport};
use crate::metrics::MetricsWriter;
use crate::metrics::Record;
use crate::tensorboard::TensorBoard;
use crate::{Error, Result};

/// Writes everything a run leaves behind; holds the lock of the folder.
#[derive(Debug)]
pub(crate) struct RunDir {
    path: PathBuf,
    metrics: MetricsWriter,
    tensorboard: Option<TensorBoard>,
    checkpoints: run_state::RunDir,
    /// Whether this run made the folder.
    is_new: bool,
    base: Option<PathBuf>,
}

impl RunDir {
    /// Takes an empty folder, or makes one.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        if holds_something(path)? {
            return Err(Error::OutNotEmpty { path: path.to_owned() });
        }
        let is_new = !path.exists();
        let checkpoints = run_state::RunDir::open(path)?;
        Ok(Self {
            is_new,
            ..Self::of(checkpoints)?
        })
    }

    /// Removes everything from a folder that was [taken empty](Self::create), and the folder itself where the run made it.
    pub(crate) fn remove(&self) {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        for entry in entries {
            let path = entry.path();
            // What cannot be removed stays; the error that ended the run is the one to tell.
            let _ = match path.is_dir() {
                true => std::fs::remove_dir_all(&path),
                false => std::fs::remove_file(&path),
            };
        }
        if self.is_new {
            let _ = std::fs::remove_dir(&self.path);
        }
    }

    /// The newest whole checkpoint of this run.
    pub(crate) fn newest(&self, verify: Verify) -> Result<Option<(PathBuf, Checkpoint)>> {
        Ok(self.checkpoints.resume(verify)?.found)
    }

    /// Takes the folder of an earlier run, and its newest whole checkpoint if there is one.
    pub(crate) fn find(path: &Path, verify: Verify) -> Result<(run_state::RunDir, run_state::Resume)> {
        let checkpoints = run_state::RunDir::open(path)?;
        let resume = checkpoints.resume(verify)?;
        Ok((checkpoints, resume))
    }

    /// The folder behind a lock that is held.
    pub(crate) fn of(checkpoints: run_state::RunDir) -> Result<Self> {
        let path = checkpoints.root().to_owned();
        let metrics = MetricsWriter::open(&path.join("metrics.jsonl"))?;
        Ok(Self {
            path,
            metrics,
            tensorboard: None,
            checkpoints,
            is_new: false,
            base: None,
        })
    }

    /// Writes a checkpoint and removes old ones.
    pub(crate) fn save_checkpoint(&self, checkpoint: &Checkpoint, keep_last: usize) -> Result<Saved> {
        self.metrics.sync()?;
        Ok(self.checkpoints.save(
            checkpoint,
            &Retention {
                keep_last,
                keep_every: None,
            },
        )?)
    }

    /// Writes TensorBoard event files too from now on.
    pub(crate) fn start_tensorboard(&mut self) -> Result<()> {
        self.tensorboard = Some(TensorBoard::create(&self.path)?);
        Ok(())
    }

    /// Appends a record to the metrics.
    pub(crate) fn record(&mut self, record: &Record) -> Result<()> {
        self.metrics.write(record)?;
        self.tensorboard.as_mut().map_or(Ok(()), |board| board.write(record))
    }

    pub(crate) fn metrics(&mut self) -> &mut MetricsWriter {
        &mut self.metrics
    }

    /// Writes a small file, whole or not at all.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        fs::write_atomic(&path, bytes).map_err(|source| Error::Io {
            path,
            action: "write",
            source,
        })
    }

    /// Writes `plan.json`: what the data was and how it is cut.
    pub(crate) fn write_plan(&self, plan: &RunPlan, train: &Dataset, valid: Option<&Dataset>) -> Result<()> {
        let split = |data: &Dataset| {
            json!({
                "path": data.path().display().to_string(),
                "data_hash": data.data_hash(),
                "fingerprint": data.fingerprint(),
                "examples": data.len(),
            })
        };
        let shapes = plan.data.shapes.iter();
        let text = json!({
            "schema": 1,
            "plan_hash": plan.plan_hash,
            "train": split(train),
            "valid": valid.map(split),
            "total_steps": plan.total_steps,
            "steps_per_epoch": plan.steps_per_epoch,
            "target_tokens": plan.data.target_tokens,
            "padding_fraction": plan.data.padding_fraction,
            "shapes": shapes.map(|s| json!({"rows": s.rows, "length": s.length, "batches": s.batches})).collect::<Vec<_>>(),
            "modules": plan.modules,
        });
        self.write("plan.json", format!("{text:#}\n").as_bytes())
    }

    /// Appends the rows of a refused update to `bad_rows.jsonl`.
    pub(crate) fn append_bad_rows(&self, step: usize, rows: &[String]) -> Result<()> {
        let path = self.path.join("bad_rows.jsonl");
        let line = format!("{}\n", json!({"step": step, "rows": rows}));
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        let outcome = file.as_mut().map_err(|e| std::io::Error::new(e.kind(), e.to_string()));
        outcome
            .and_then(|file| file.write_all(line.as_bytes()))
            .map_err(|source| Error::Io {
                path,
                action: "append to",
                source,
            })
    }

    /// Names the folder of the model that is trained: a full fine-tune of it is a model folder too.
    pub(crate) fn set_base(&mut self, base: &Path) {
        self.checkpoints.set_base(base);
        self.base = Some(base.to_owned());
    }

    /// Writes the trainable tensors: an adapter in mlx-lm's layout, or a whole model.
    pub(crate) fn save_adapter(&self, adapter: &Adapter, position: Position) -> Result<SaveReport> {
        let started = std::time::Instant::now();
        if let (Method::Full, Some(base)) = (adapter.method, &self.base) {
            model_files::copy(base, &self.path, adapter.dtype())?;
        }
        adapter.write(&self.path)?;
        let path = self.path.join(trained_file(adapter.method));
        let sha256 = hash::sha256_file(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "read",
            source,
        })?;
        Ok(SaveReport {
            position,
            path,
            sha256,
            seconds: started.elapsed().as_secs_f64(),
        })
    }
}

/// The file whose hash stands for the trained tensors.
pub(crate) fn trained_file(method: Method) -> &'static str {
    match method {
        Method::Full => INDEX_FILE,
        Method::Lora | Method::Dora => MLX_TENSOR_FILE,
    }
}

/// Whether a folder has anything in it besides the lock of a run that never began.
fn holds_something(path: &Path) -> Result<bool> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        action: "read",
        source,
    };
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        other => other.map_err(io)?,
    };
    for entry in entries {
        if entry.map_err(io)?.file_name() != "run.lock" {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A copy of an array in host memory.
pub(crate) fn to_host(array: &Array) -> Result<HostTensor> {
    let shape: Vec<usize> = array.shape().iter().map(|&dim| dim as usize).collect();
    let dtype = match array.dtype() {
        Dtype::Float16 => FileDtype::F16,
        Dtype::Bfloat16 => FileDtype::BF16,
        _ => FileDtype::F32,
    };
    Ok(HostTensor::new(dtype, &shape, host::bytes_of(array)?)?)
}

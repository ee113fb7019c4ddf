//! Adapters on disk: mlx-lm's layout, PEFT's layout, and the lossless way between them.
//!
//! In memory an [`Adapter`] always has the names and shapes of mlx-lm: `<module>.lora_a [input_dims, rank]`,
//! `<module>.lora_b [rank, output_dims]`, for DoRA also `<module>.m [output_dims]`; experts are
//! `[experts, rank, input_dims]` and `[experts, output_dims, rank]`. What that layout cannot say (a rank or an alpha of
//! one module, modules missing in some layers) is made uniform without changing any update, and noted in the
//! [`Sidecar`], from which it is undone. What cannot be kept is refused by name: see [`Refusal`].

mod base;
mod convert;
mod full;
mod matrix;
mod mlx_lm;
mod names;
mod peft;
mod peft_config;
mod refusal;
mod report;
mod sidecar;
mod trained;
mod validate;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;

pub use base::{BaseModel, BaseModule};
pub use convert::convert;
pub use refusal::Refusal;
pub use report::{AdapterReport, FoldNote};
pub use sidecar::{Fold, SIDECAR_FILE, Sidecar, SidecarBase, SidecarTraining};
pub use trained::Trained;

use planish_tensors::{Dtype, HostTensor};

use crate::error::{Error, Result};
use names::{Leaf, mlx_name, split_block, split_mlx};

/// The name that both formats give their configuration.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensor file of mlx-lm's layout.
pub const MLX_TENSOR_FILE: &str = "adapters.safetensors";
/// The tensor file of PEFT's layout.
pub const PEFT_TENSOR_FILE: &str = "adapter_model.safetensors";

/// What an adapter trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// `y + scale · (x a) b`.
    Lora,
    /// The same with trained row norms: `m / ‖W + scale·bᵀaᵀ‖` times it.
    Dora,
    /// Whole weights under the model's own names.
    Full,
}

impl Method {
    /// The value of `fine_tune_type` in mlx-lm's configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Full => "full",
        }
    }
}

/// The two layouts of an adapter folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `adapters.safetensors`, of mlx-lm.
    MlxLm,
    /// `adapter_model.safetensors`, of PEFT and transformers.
    Peft,
}

impl Format {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::MlxLm => "mlx-lm",
            Self::Peft => "peft",
        }
    }

    /// Says which layout a folder has, from its files.
    ///
    /// # Errors
    /// [`Error::AdapterRefused`] with [`Refusal::Pickle`]; [`Error::ModelAsAdapter`]; [`Error::UnclearAdapter`] when it has
    /// neither layout or both.
    pub fn detect(dir: &Path) -> Result<Self> {
        match (dir.join(MLX_TENSOR_FILE).exists(), dir.join(PEFT_TENSOR_FILE).exists()) {
            (true, false) => Ok(Self::MlxLm),
            (false, true) => Ok(Self::Peft),
            (false, false) if dir.join("adapter_model.bin").exists() => Err(Error::refused(dir, Refusal::Pickle)),
            (false, false) if dir.join("config.json").exists() => Err(Error::ModelAsAdapter {
                path: dir.to_path_buf(),
            }),
            (both, _) => Err(Error::UnclearAdapter {
                path: dir.to_path_buf(),
                both,
            }),
        }
    }
}

/// How an adapter is read.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReadOptions<'a> {
    /// Check names and shapes against this model.
    pub base: Option<&'a BaseModel>,
    /// Believe the shapes where the configuration names another rank.
    pub trust_shapes: bool,
    /// Go on although the base is another, or a PEFT option is unknown.
    pub force: bool,
    /// Say that the base is another in the report, instead of refusing it.
    pub note_another_base: bool,
}

/// A trained update of a base model, in mlx-lm's names and shapes.
///
/// ```
/// use planish_checkpoint::adapter::{Adapter, Method, ReadOptions};
/// use planish_tensors::HostTensor;
///
/// let dir = tempfile::tempdir()?;
/// let mut adapter = Adapter::new(Method::Lora, 2, 20.0, 0.0);
/// for layer in 0..2 {
///     let module = format!("model.layers.{layer}.self_attn.q_proj");
///     adapter.tensors.insert(format!("{module}.lora_a"), HostTensor::from_f32(&[3, 2], &[0.5; 6]));
///     adapter.tensors.insert(format!("{module}.lora_b"), HostTensor::from_f32(&[2, 4], &[0.1; 8]));
/// }
/// adapter.fill_keys();
/// adapter.write_mlx_lm(dir.path())?;
/// let (back, report) = Adapter::read(dir.path(), &ReadOptions::default())?;
/// assert_eq!(back.tensors, adapter.tensors);
/// assert_eq!((back.scale, back.alpha()), (20.0, 40.0));
/// assert_eq!(back.keys, ["self_attn.q_proj"]);
/// assert!(report.is_plain());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// What is trained.
    pub method: Method,
    /// Rank of every module; 0 for [`Method::Full`].
    pub rank: usize,
    /// The final multiplier of the update: alpha over rank, already divided.
    pub scale: f64,
    /// Dropout on the input of the update while training.
    pub dropout: f64,
    /// Names of the adapted modules inside a block, and full names of those outside.
    pub keys: Vec<String>,
    /// How many blocks, from the last; 0 and -1 mean all.
    pub n_adapted_layers: i64,
    /// The tensors by name.
    pub tensors: BTreeMap<String, HostTensor>,
    /// What the layouts cannot hold. Scale, rank, keys, layers and dropout here are brought up to date when written.
    pub sidecar: Sidecar,
}

impl Adapter {
    /// An adapter without tensors yet, for all layers.
    pub fn new(method: Method, rank: usize, scale: f64, dropout: f64) -> Self {
        let (keys, tensors, sidecar) = (Vec::new(), BTreeMap::new(), Sidecar::default());
        Self {
            method,
            rank,
            scale,
            dropout,
            keys,
            n_adapted_layers: -1,
            tensors,
            sidecar,
        }
    }

    /// Reads an adapter folder of either layout, or one `.safetensors` file of mlx-lm's beside its configuration
    /// (the snapshots `0000100_adapters.safetensors`).
    ///
    /// # Errors
    /// [`Error::AdapterRefused`] with the reason; [`Error::UnclearAdapter`]; all errors of
    /// [`TensorStore::open`](planish_tensors::TensorStore::open); [`Error::BadJson`]; [`NonFinite`](planish_tensors::Error::NonFinite).
    pub fn read(path: &Path, options: &ReadOptions<'_>) -> Result<(Self, AdapterReport)> {
        if !path.is_dir() && path.extension().is_some_and(|e| e == "safetensors") {
            let dir = path.parent().unwrap_or(Path::new(""));
            return mlx_lm::read(dir, path, options);
        }
        if full::weights_of(path)?.is_some_and(|file| file == path) {
            return full::read(path, options);
        }
        match Format::detect(path)? {
            Format::MlxLm => mlx_lm::read(path, &path.join(MLX_TENSOR_FILE), options),
            Format::Peft => peft::read(path, options),
        }
    }

    /// Writes `adapters.safetensors`, `planish.json` and `adapter_config.json` into `dir`, each atomically.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn write_mlx_lm(&self, dir: &Path) -> Result<()> {
        mlx_lm::write(self, dir)
    }

    /// Writes what a run leaves: mlx-lm's layout, or for [`Method::Full`] the weights of a model as they are loaded, and
    /// `planish.json`; each file atomically.
    ///
    /// # Errors
    /// [`Error::Tensors`].
    pub fn write(&self, dir: &Path) -> Result<()> {
        match self.method {
            Method::Full => full::write(self, dir),
            Method::Lora | Method::Dora => self.write_mlx_lm(dir),
        }
    }

    /// Writes `adapter_model.safetensors`, `planish.json` and `adapter_config.json` into `dir`, each atomically.
    ///
    /// Padding, folds and holes listed in the sidecar are undone. `base` tells whether an adapted embedding is tied.
    ///
    /// # Errors
    /// [`Error::AdapterRefused`] for what PEFT cannot hold; [`Error::Write`].
    pub fn write_peft(&self, dir: &Path, base: Option<&BaseModel>) -> Result<AdapterReport> {
        peft::write(self, dir, base)
    }

    /// The numerator of the scale: `scale · rank`, or `scale · sqrt(rank)` for rsLoRA, unless the run was given one.
    pub fn alpha(&self) -> f64 {
        let derived = self.scale * self.scale_divisor();
        match self.sidecar.alpha {
            Some(alpha) if alpha.0 / self.scale_divisor() == self.scale => alpha.0,
            _ => derived,
        }
    }

    fn scale_divisor(&self) -> f64 {
        if self.sidecar.rslora {
            (self.rank as f64).sqrt()
        } else {
            self.rank as f64
        }
    }

    /// Paths of the adapted modules, sorted. Empty for [`Method::Full`].
    pub fn modules(&self) -> Vec<&str> {
        if self.method == Method::Full {
            return Vec::new();
        }
        let modules: BTreeSet<&str> = self
            .tensors
            .keys()
            .filter_map(|name| Some(split_mlx(name)?.0))
            .collect();
        modules.into_iter().collect()
    }

    /// Sets [`keys`](Self::keys) to the modules that have tensors.
    pub fn fill_keys(&mut self) {
        let keys: BTreeSet<String> = self
            .modules()
            .into_iter()
            .map(|m| split_block(m).map_or(m, |block| block.suffix).to_string())
            .collect();
        self.keys = keys.into_iter().collect();
    }

    /// Element type of the tensors, which is one for all.
    pub fn dtype(&self) -> Option<Dtype> {
        self.tensors.values().next().map(|tensor| tensor.dtype)
    }

    fn tensor(&self, module: &str, leaf: Leaf) -> Option<&HostTensor> {
        self.tensors.get(&mlx_name(module, leaf))
    }

    /// The sidecar with what the adapter knows by itself.
    fn current_sidecar(&self) -> Sidecar {
        let mut sidecar = self.sidecar.clone();
        if self.method != Method::Full {
            sidecar.scale = Some(self.scale.into());
            sidecar.alpha = Some(self.alpha().into());
            sidecar.rank = Some(self.rank);
            sidecar.dropout = Some(self.dropout.into());
        }
        sidecar.keys.clone_from(&self.keys);
        sidecar.layers = Some(self.n_adapted_layers);
        sidecar.dtype = self.dtype().map(|dtype| dtype.name().to_string());
        sidecar
    }
}

/// Writes pretty JSON with a final newline, atomically.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let mut json = serde_json::to_vec_pretty(value).map_err(|e| Error::json(path, &e))?;
    json.push(b'\n');
    planish_core::fs::write_atomic(path, &json).map_err(|e| Error::write(path, e))
}

pub(crate) fn read_json_object(path: &Path) -> Result<serde_json::Map<String, serde_json::Value>> {
    let json = std::fs::read(path).map_err(|e| Error::read(path, e))?;
    serde_json::from_slice(&json).map_err(|e| Error::json(path, &e))
}

fn bad_key(path: &Path, key: &str, found: Option<&serde_json::Value>, expected: &str) -> Error {
    let found = found.map_or("nothing".to_string(), |value| value.to_string());
    Error::BadJson {
        path: PathBuf::from(path),
        reason: format!("`{key}`: found {found}, expected {expected}"),
    }
}

#[doc(hidden)]
pub mod fuzzing {
    //! Entry points for the fuzz targets.

    use std::path::Path;

    /// Reads `json` as each of the three configurations of an adapter.
    pub fn adapter_config(json: &[u8]) {
        let path = Path::new("adapter_config.json");
        if let Ok(config) = super::peft_config::PeftConfig::parse(json, path, false) {
            let _ = config.scale("model.layers.3.self_attn.q_proj");
        }
        let _ = super::mlx_lm::parse_config(json, path);
        let _ = super::Sidecar::parse(json, path);
    }
}

use std::collections::BTreeMap;
use std::path::Path;

use planish_tensors::TensorStore;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::exact::ExactF64;

/// The name of planish's own file beside an adapter.
pub const SIDECAR_FILE: &str = "planish.json";

/// What neither mlx-lm's nor PEFT's configuration can hold, so that conversions can be undone to the bit.
///
/// All fields are optional: an adapter from elsewhere has no sidecar.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sidecar {
    /// Version of this layout.
    pub schema: u32,
    /// The planish that wrote it.
    pub planish_version: String,
    /// The model that the adapter was trained on.
    pub base: SidecarBase,
    /// The final multiplier, exactly.
    pub scale: Option<ExactF64>,
    /// The numerator of the scale, when the run was given one.
    pub alpha: Option<ExactF64>,
    /// Whether `scale = alpha / sqrt(rank)`.
    pub rslora: bool,
    /// Rank in the mlx-lm layout.
    pub rank: Option<usize>,
    /// Names inside the blocks, and full names outside.
    pub keys: Vec<String>,
    /// `num_layers` of the mlx-lm layout.
    pub layers: Option<i64>,
    /// Dropout on the input of the update.
    pub dropout: Option<ExactF64>,
    /// Element type of the tensors.
    pub dtype: Option<String>,
    /// How `lora_a` was initialised.
    pub init: Option<String>,
    /// `mlx-lm`, `peft` or `planish`.
    pub source_format: Option<String>,
    /// The configuration of a foreign adapter, word for word, for the way back.
    pub source_config: Option<Value>,
    /// True rank of modules padded with zeros.
    pub padding: BTreeMap<String, usize>,
    /// Modules whose own scale was folded into `lora_b`.
    pub folds: BTreeMap<String, Fold>,
    /// Modules of zeros, put in because mlx-lm adapts every key in every adapted layer.
    pub holes: Vec<String>,
    /// SHA-256 of the chat template.
    pub chat_template_sha256: Option<String>,
    /// SHA-256 of the tokenizer.
    pub tokenizer_sha256: Option<String>,
    /// About the run.
    pub training: Option<SidecarTraining>,
}

impl Default for Sidecar {
    fn default() -> Self {
        Self {
            schema: 1,
            planish_version: env!("CARGO_PKG_VERSION").to_string(),
            base: SidecarBase::default(),
            scale: None,
            alpha: None,
            rslora: false,
            rank: None,
            keys: Vec::new(),
            layers: None,
            dropout: None,
            dtype: None,
            init: None,
            source_format: None,
            source_config: None,
            padding: BTreeMap::new(),
            folds: BTreeMap::new(),
            holes: Vec::new(),
            chat_template_sha256: None,
            tokenizer_sha256: None,
            training: None,
        }
    }
}

/// The base model of an adapter.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SidecarBase {
    /// Folder or repository.
    pub path_or_repo: Option<String>,
    /// Revision of the repository.
    pub revision: Option<String>,
    /// SHA-256 of `config.json`.
    pub config_sha256: Option<String>,
    /// [`TensorStore::fingerprint`] of its weights.
    #[serde(alias = "weight_index_sha256")]
    pub weights_fingerprint: Option<String>,
}

impl SidecarBase {
    /// What is known of the model in a folder.
    ///
    /// # Errors
    /// [`Error::Read`]; those of [`TensorStore::open`].
    pub fn of_model(dir: &Path) -> Result<Self> {
        let config = dir.join("config.json");
        let sha256 = planish_core::hash::sha256_file(&config).map_err(|e| Error::read(&config, e))?;
        Ok(Self {
            path_or_repo: Some(dir.display().to_string()),
            revision: None,
            config_sha256: Some(sha256),
            weights_fingerprint: Some(TensorStore::open(dir)?.fingerprint()),
        })
    }
}

/// The scale of one module, folded into its `lora_b`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fold {
    /// What `lora_b` was multiplied by: the module's scale over the adapter's.
    pub factor: ExactF64,
    /// The module's alpha in the PEFT configuration.
    pub alpha: ExactF64,
}

/// About the run that made an adapter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SidecarTraining {
    /// Training loss at the end.
    pub loss: Option<ExactF64>,
    /// Step with the best validation loss.
    pub best_step: Option<u64>,
    /// That loss.
    pub val_loss: Option<ExactF64>,
    /// SHA-256 of the training data.
    pub data_hash: Option<String>,
}

impl Sidecar {
    /// Reads `planish.json` of a folder; `None` when there is none.
    pub(crate) fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(SIDECAR_FILE);
        match std::fs::read(&path) {
            Ok(json) => Self::parse(&json, &path).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::read(&path, error)),
        }
    }

    pub(crate) fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let sidecar: Self = serde_json::from_slice(json).map_err(|e| Error::json(path, &e))?;
        if sidecar.schema != 1 {
            let reason = format!(
                "`schema` is {}, this planish reads 1; use a newer planish",
                sidecar.schema
            );
            return Err(Error::BadJson {
                path: path.to_path_buf(),
                reason,
            });
        }
        Ok(sidecar)
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        super::write_json(&dir.join(SIDECAR_FILE), self)
    }
}

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_core::model_config::ModelConfig;

use super::SidecarBase;
use crate::error::{Error, Result};

/// What must be known of a base model to check an adapter against it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseModel {
    /// Number of transformer blocks.
    pub n_layers: usize,
    /// Whether the head shares the weights of the embedding.
    pub tied_head: bool,
    /// Modules that an adapter can attach to, by path.
    pub modules: BTreeMap<String, BaseModule>,
    /// Which model it is, when it was read from a folder.
    pub identity: SidecarBase,
    /// That folder.
    pub folder: Option<PathBuf>,
}

/// One module of a base model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseModule {
    /// Rows of `lora_a`: the input size of a linear layer, the vocabulary of an embedding.
    pub input_dims: usize,
    /// Columns of `lora_b`: the output size of either.
    pub output_dims: usize,
    /// Whether it is an embedding.
    pub is_embedding: bool,
    /// Bits of the quantised weight, if it is quantised.
    pub bits: Option<usize>,
}

impl BaseModel {
    /// Reads the `config.json` of a model folder, and what tells its weights from others.
    ///
    /// # Errors
    /// [`Error::Config`] when the configuration cannot be understood; those of [`SidecarBase::of_model`].
    pub fn open(model_dir: &Path) -> Result<Self> {
        let path = model_dir.join("config.json");
        let config = ModelConfig::from_file(&path).map_err(|source| Error::Config {
            source: Box::new(source),
        })?;
        Ok(Self {
            identity: SidecarBase::of_model(model_dir)?,
            folder: Some(model_dir.to_path_buf()),
            ..Self::from_config(&config)
        })
    }

    /// The modules of such a model.
    pub fn from_config(config: &ModelConfig) -> Self {
        let bits = |path: &str| {
            config
                .quantization
                .as_ref()
                .and_then(|q| q.for_module(path))
                .map(|layer| layer.bits)
        };
        let mut modules = BTreeMap::new();
        for linear in config.block_linear_layers() {
            let (input_dims, output_dims) = (linear.input_dims, linear.output_dims);
            let module = BaseModule {
                input_dims,
                output_dims,
                is_embedding: false,
                bits: bits(&linear.path),
            };
            modules.insert(linear.path, module);
        }
        let arch = &config.arch;
        let (vocab, hidden) = (arch.vocab_size, arch.hidden_size);
        let (embedding, head) = (arch.embedding_path(), arch.head_path());
        let module = BaseModule {
            input_dims: vocab,
            output_dims: hidden,
            is_embedding: true,
            bits: bits(&embedding),
        };
        modules.insert(embedding, module);
        if !arch.head.is_tied {
            let module = BaseModule {
                input_dims: hidden,
                output_dims: vocab,
                is_embedding: false,
                bits: bits(&head),
            };
            modules.insert(head, module);
        }
        let tied_head = arch.head.is_tied;
        Self {
            n_layers: arch.layers.len(),
            tied_head,
            modules,
            identity: SidecarBase::default(),
            folder: None,
        }
    }
}

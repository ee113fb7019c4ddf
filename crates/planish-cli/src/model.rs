//! The arguments that name a model, an adapter and a device, and what loads them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use planish_checkpoint::adapter::{Adapter, BaseModel, Method, ReadOptions};
use planish_core::run_config::{BackendDevice, Setting};
use planish_nn::{Kernels, LoadOptions, Model};

pub(crate) use crate::device::{DeviceInUse, choose_device, select_device};

/// Which model runs where.
#[derive(clap::Args)]
pub(crate) struct ModelArgs {
    /// Folder of the model in the Hugging Face layout
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// Folder of an adapter, in mlx-lm's or PEFT's layout
    #[arg(long, value_name = "DIR")]
    pub(crate) adapter: Option<PathBuf>,
    /// Device; auto takes the fastest that computes correctly
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = device_parser())]
    backend: BackendDevice,
}

impl ModelArgs {
    /// Chooses the device, loads the model and lays the adapter over it.
    pub(crate) fn load(&self) -> Result<Model> {
        select_device(self.backend)?;
        self.load_with(&LoadOptions::with_kernels(Kernels::Composed))
    }

    /// The same, computed by what writes single tokens fastest in f32.
    pub(crate) fn load_to_generate(&self) -> Result<Model> {
        select_device(self.backend)?;
        self.load_with(&LoadOptions::for_inference())
    }

    /// The adapter where there is one, else the model: what is at fault when results are not finite.
    pub(crate) fn named(&self) -> String {
        match &self.adapter {
            Some(adapter) => format!("{} with the adapter {}", self.model.display(), adapter.display()),
            None => self.model.display().to_string(),
        }
    }

    fn load_with(&self, options: &LoadOptions) -> Result<Model> {
        let (mut model, _) = Model::load(&self.model, options)?;
        if let Some(adapter) = &self.adapter {
            attach(&mut model, &self.model, adapter)?;
        }
        Ok(model)
    }
}

fn attach(model: &mut Model, model_dir: &Path, adapter_dir: &Path) -> Result<()> {
    let base = BaseModel::open(model_dir)?;
    let options = ReadOptions {
        base: Some(&base),
        ..ReadOptions::default()
    };
    let (adapter, _) = Adapter::read(adapter_dir, &options)?;
    if adapter.method == Method::Full {
        bail!(
            "{}: holds whole weights (fine_tune_type full), which cannot be laid over a model yet",
            adapter_dir.display()
        );
    }
    model
        .attach_tensors(&adapter.tensors, adapter.scale, adapter.dropout as f32)
        .with_context(|| format!("{} does not fit {}", adapter_dir.display(), model_dir.display()))?;
    Ok(())
}

/// The words for devices, for arguments that hand the word on.
pub(crate) fn device_words() -> PossibleValuesParser {
    PossibleValuesParser::new(BackendDevice::words())
}

fn device_parser() -> impl TypedValueParser<Value = BackendDevice> {
    // Only those words arrive here.
    device_words().map(|word| BackendDevice::from_text(&word).unwrap_or(BackendDevice::Auto))
}

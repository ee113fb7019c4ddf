//! Models from the Hugging Face hub, into the hub's own cache, which Python tools share.
//!
//! Only what a model needs is fetched: configuration, tokenizer, chat template, safetensors. Pickles never: reading one
//! runs code of its author. All files come from the one commit that the revision meant when the list was read.

mod download;
mod files;
mod repo_id;
mod settings;

use std::path::{Path, PathBuf};

use planish_core::fs::AtomicDir;
use planish_core::model_config::ModelConfig;

pub use repo_id::RepoId;
pub use settings::HubSettings;

use crate::error::io_at;
use crate::manifest::Manifest;
use crate::{Error, Event, Progress, Result, Stage};
use download::Connection;
use files::Listing;

/// Brings a repository into the hub's cache and returns its snapshot there, which is a Hugging Face folder; with
/// `folder`, copies it to that place and returns the copy.
///
/// The configuration comes first, so that a model that planish cannot compute is refused before gigabytes are fetched. Files
/// already in the cache are not fetched again, and a broken download goes on where it stopped.
///
/// # Errors
/// [`Error::HubDenied`], [`Error::HubNotFound`], [`Error::HubRequest`], [`Error::HubCorrupt`], [`Error::HubOffline`];
/// [`Error::HubUnusable`] for a repository without safetensors or `tokenizer.json`; [`Error::Config`] for a model of
/// another family; [`Error::OutputExists`], [`Error::Altered`], [`Error::Io`].
pub fn pull(
    repo: &RepoId,
    settings: &HubSettings,
    folder: Option<&Path>,
    progress: &mut dyn Progress,
) -> Result<PathBuf> {
    let snapshot = if settings.offline {
        offline(repo, settings)?
    } else {
        online(repo, settings, progress)?
    };
    match folder {
        None => Ok(snapshot.folder),
        Some(folder) => copy(repo, &snapshot, folder, progress),
    }
}

/// The files of one commit in the hub's cache.
struct Snapshot {
    folder: PathBuf,
    /// Names of the files that make up the model.
    files: Vec<String>,
}

fn online(repo: &RepoId, settings: &HubSettings, progress: &mut dyn Progress) -> Result<Snapshot> {
    let connection = Connection::open(repo, settings)?;
    let listing = Listing::new(repo, connection.file_names())?;
    connection.fetch(files::CONFIG, progress)?;
    ModelConfig::from_file(&connection.snapshot().join(files::CONFIG))?;
    for file in listing.small_files() {
        connection.fetch(file, progress)?;
    }
    let weights = listing.weight_files(repo, &connection.snapshot())?;
    for file in &weights {
        connection.fetch(file, progress)?;
    }
    connection.remember_revision()?;
    let files = listing.small_files().map(str::to_owned).chain(weights).collect();
    Ok(Snapshot {
        folder: connection.snapshot(),
        files,
    })
}

fn offline(repo: &RepoId, settings: &HubSettings) -> Result<Snapshot> {
    let missing = |what: &str| Error::HubOffline {
        repo: repo.to_string(),
        cache: settings.cache.clone(),
        missing: what.to_owned(),
    };
    let folder = download::cached_snapshot(repo, settings).ok_or_else(|| missing("the repository at this revision"))?;
    let entries = std::fs::read_dir(&folder).map_err(io_at(&folder))?;
    // A link whose file has gone is no file.
    let present = entries.flatten().filter(|entry| entry.path().exists());
    let names = present
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let listing = Listing::new(repo, names).map_err(|error| match error {
        Error::HubUnusable { problem, .. } => missing(&format!("files that are needed ({problem})")),
        other => other,
    })?;
    ModelConfig::from_file(&folder.join(files::CONFIG))?;
    let weights = listing.weight_files(repo, &folder)?;
    if let Some(absent) = weights.iter().find(|name| !folder.join(name).exists()) {
        return Err(missing(absent));
    }
    let files = listing.small_files().map(str::to_owned).chain(weights).collect();
    Ok(Snapshot { folder, files })
}

fn copy(repo: &RepoId, snapshot: &Snapshot, folder: &Path, progress: &mut dyn Progress) -> Result<PathBuf> {
    let commit = snapshot.folder.file_name().unwrap_or_default().to_string_lossy();
    let source = format!("hf:{}@{commit}", repo.name());
    if Manifest::find(folder, &source, progress)? {
        return Ok(folder.to_path_buf());
    }
    let building = AtomicDir::create(folder).map_err(io_at(folder))?;
    for name in &snapshot.files {
        progress.report(Event::Began {
            stage: Stage::Copy,
            item: name,
            total_bytes: None,
        });
        let target = building.path().join(name);
        std::fs::copy(snapshot.folder.join(name), &target).map_err(io_at(target))?;
        progress.report(Event::Ended);
    }
    Manifest::write(building.path(), &source)?;
    building.commit().map_err(io_at(folder))?;
    Ok(folder.to_path_buf())
}

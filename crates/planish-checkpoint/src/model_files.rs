//! What a model folder has besides its weights.

use std::path::Path;

use planish_tensors::{Dtype, INDEX_FILE};
use serde_json::{Map, Value};

use crate::adapter::{CONFIG_FILE, SIDECAR_FILE, read_json_object, write_json};
use crate::error::{Error, Result};

/// The report in the folder of a fused model.
pub(crate) const REPORT_FILE: &str = "fuse_report.json";

/// Files of ours that speak of one folder, or of the run in it.
const OURS: [&str; 11] = [
    CONFIG_FILE,
    SIDECAR_FILE,
    REPORT_FILE,
    "bad_rows.jsonl",
    "config.toml",
    "data_skipped.jsonl",
    "manifest.json",
    "metrics.jsonl",
    "plan.json",
    "run.lock",
    "state.json",
];

/// Copies tokenizer, templates, licences and the configuration of a model folder; the configuration names `dtype` as the
/// element type where one is given.
///
/// # Errors
/// [`Error::Read`]; [`Error::BadJson`]; [`Error::Write`].
pub fn copy(model_dir: &Path, to: &Path, dtype: Option<Dtype>) -> Result<()> {
    copy_adjusted(model_dir, to, |config| set_dtype(config, dtype))
}

/// [`copy`] with another change of the configuration.
pub(crate) fn copy_adjusted(model_dir: &Path, to: &Path, adjust: impl FnOnce(&mut Map<String, Value>)) -> Result<()> {
    let read_error = |e| Error::read(model_dir, e);
    for entry in std::fs::read_dir(model_dir).map_err(read_error)? {
        let entry = entry.map_err(read_error)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_weight = [".safetensors", ".bin", ".gguf"].iter().any(|end| name.ends_with(end)) || name == INDEX_FILE;
        let is_ours = OURS.contains(&name.as_str()) || name.starts_with("events.out.");
        if is_weight || is_ours || name == "config.json" || name.starts_with('.') || !entry.path().is_file() {
            continue;
        }
        let to = to.join(&name);
        std::fs::copy(entry.path(), &to).map_err(|e| Error::write(&to, e))?;
    }
    let mut config = read_json_object(&model_dir.join("config.json"))?;
    adjust(&mut config);
    write_json(&to.join("config.json"), &config)
}

/// Names the element type of the weights. Newer configurations say `dtype`; either is read by all.
pub(crate) fn set_dtype(config: &mut Map<String, Value>, dtype: Option<Dtype>) {
    let Some(name) = dtype.and_then(Dtype::torch_name) else {
        return;
    };
    let key = if config.contains_key("dtype") {
        "dtype"
    } else {
        "torch_dtype"
    };
    config.insert(key.to_string(), name.into());
}

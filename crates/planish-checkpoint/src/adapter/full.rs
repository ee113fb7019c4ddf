//! A full fine-tune on disk: the folder of a model, with the sidecar that says what it was trained from.
//!
//! There is no `adapter_config.json` in it: transformers takes a folder that has one for an adapter of PEFT.

use std::path::{Path, PathBuf};

use planish_tensors::{DEFAULT_SHARD_BYTES, INDEX_FILE, ShardWriter, TensorInfo, TensorStore};

use super::{Adapter, AdapterReport, CONFIG_FILE, MLX_TENSOR_FILE, Method, ReadOptions, SIDECAR_FILE, Sidecar};
use super::{read_json_object, validate};
use crate::error::Result;

/// The file or folder with the tensors, where `path` is a full fine-tune of ours or of mlx-lm's.
pub(super) fn weights_of(path: &Path) -> Result<Option<PathBuf>> {
    let is_file = !path.is_dir() && path.extension().is_some_and(|e| e == "safetensors");
    let dir = if is_file {
        path.parent().unwrap_or(Path::new(""))
    } else {
        path
    };
    let file = if is_file {
        path.to_path_buf()
    } else {
        dir.join(MLX_TENSOR_FILE)
    };
    if file.exists() {
        let config = dir.join(CONFIG_FILE);
        let is_full =
            config.exists() && read_json_object(&config)?.get("fine_tune_type") == Some(&Method::Full.name().into());
        return Ok(is_full.then_some(file));
    }
    let has_weights = dir.join(INDEX_FILE).exists() || dir.join("model.safetensors").exists();
    Ok((has_weights && dir.join(SIDECAR_FILE).exists()).then(|| dir.to_path_buf()))
}

/// All weights of a folder of ours.
pub(super) fn read(dir: &Path, options: &ReadOptions<'_>) -> Result<(Adapter, AdapterReport)> {
    let mut adapter = Adapter::new(Method::Full, 0, 1.0, 0.0);
    let tensors = TensorStore::open(dir)?;
    adapter.tensors = tensors
        .iter()
        .map(|view| (view.name.to_string(), view.to_host()))
        .collect();
    if let Some(sidecar) = Sidecar::read(dir)? {
        adapter.n_adapted_layers = sidecar.layers.unwrap_or(adapter.n_adapted_layers);
        adapter.sidecar = sidecar;
    }
    let mut report = AdapterReport::default();
    validate::check(&adapter, options, dir, &mut report)?;
    Ok((adapter, report))
}

/// The weights in shards with their index; the sidecar goes last, so that a folder with one is complete.
pub(super) fn write(adapter: &Adapter, dir: &Path) -> Result<()> {
    let tensors = adapter.tensors.iter();
    let infos = tensors
        .map(|(name, tensor)| TensorInfo::from(&tensor.view(name)))
        .collect();
    let mut writer = ShardWriter::create(dir, infos, DEFAULT_SHARD_BYTES)?;
    while let Some(next) = writer.next_tensor() {
        let tensor = &adapter.tensors[&next.name];
        writer.write_next(&tensor.bytes)?;
    }
    writer.finish()?;
    adapter.current_sidecar().write(dir)
}

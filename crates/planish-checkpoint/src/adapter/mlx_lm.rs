//! The adapter folder of mlx-lm 0.32.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use planish_tensors::{self as tensors, TensorStore};

use super::validate;
use super::{Adapter, AdapterReport, CONFIG_FILE, MLX_TENSOR_FILE, Method, ReadOptions, Sidecar, SidecarBase};
use super::{bad_key, read_json_object};
use crate::error::{Error, Result};

pub(super) fn read(dir: &Path, tensor_file: &Path, options: &ReadOptions<'_>) -> Result<(Adapter, AdapterReport)> {
    let config_path = dir.join(CONFIG_FILE);
    let json = read_json_object(&config_path)?;
    let config = config_of(&json, &config_path)?;
    let store = TensorStore::open(tensor_file)?;
    let tensors = store
        .iter()
        .map(|view| (view.name.to_string(), view.to_host()))
        .collect();
    let foreign = || Sidecar {
        source_format: Some("mlx-lm".to_string()),
        base: SidecarBase {
            path_or_repo: json.get("model").and_then(Value::as_str).map(str::to_string),
            ..SidecarBase::default()
        },
        ..Sidecar::default()
    };
    let sidecar = Sidecar::read(dir)?.unwrap_or_else(foreign);
    let mut report = AdapterReport::default();
    let mut adapter = Adapter {
        method: config.method,
        rank: config.rank,
        scale: config.scale,
        dropout: config.dropout,
        keys: config.keys.unwrap_or_default(),
        n_adapted_layers: config.num_layers,
        tensors,
        sidecar,
    };
    if adapter.method != Method::Full {
        trust_shapes(&mut adapter, options, &mut report);
        if adapter.keys.is_empty() {
            adapter.fill_keys();
        }
    }
    if adapter.sidecar.scale.is_some_and(|scale| scale.0 != adapter.scale) {
        let (old, new) = (adapter.sidecar.scale.unwrap_or_default(), adapter.scale);
        report.notes.push(format!(
            "adapter_config.json says scale {new}, planish.json {old}: the former counts"
        ));
        adapter.sidecar.alpha = None;
    }
    validate::check(&adapter, options, tensor_file, &mut report)?;
    Ok((adapter, report))
}

/// Where shapes are trusted, the rank is the one that the first tensor shows.
fn trust_shapes(adapter: &mut Adapter, options: &ReadOptions<'_>, report: &mut AdapterReport) {
    let mut matrices = adapter
        .tensors
        .iter()
        .filter(|(name, t)| name.ends_with(".lora_a") && t.shape.len() >= 2);
    let Some(shown) = matrices
        .next()
        .map(|(_, t)| t.shape[if t.shape.len() == 2 { 1 } else { t.shape.len() - 2 }])
    else {
        return;
    };
    if options.trust_shapes && shown != adapter.rank {
        report.notes.push(format!(
            "rank {shown} taken from the shapes; the configuration says {}",
            adapter.rank
        ));
        adapter.rank = shown;
    }
}

/// The keys of `adapter_config.json` that mlx-lm's loader uses.
#[derive(Debug)]
pub(super) struct MlxConfig {
    method: Method,
    num_layers: i64,
    rank: usize,
    scale: f64,
    dropout: f64,
    keys: Option<Vec<String>>,
}

pub(super) fn parse_config(json: &[u8], path: &Path) -> Result<MlxConfig> {
    config_of(&serde_json::from_slice(json).map_err(|e| Error::json(path, &e))?, path)
}

fn config_of(config: &Map<String, Value>, path: &Path) -> Result<MlxConfig> {
    let method = match config.get("fine_tune_type").map(Value::as_str) {
        None | Some(Some("lora")) => Method::Lora,
        Some(Some("dora")) => Method::Dora,
        Some(Some("full")) => Method::Full,
        Some(_) => {
            return Err(bad_key(
                path,
                "fine_tune_type",
                config.get("fine_tune_type"),
                "\"lora\", \"dora\" or \"full\"",
            ));
        }
    };
    // mlx-lm before 0.19 had another word for it.
    let layers = config.get("num_layers").or_else(|| config.get("lora_layers"));
    let num_layers = layers.and_then(Value::as_i64).filter(|n| *n >= -1);
    let num_layers = match (num_layers, method) {
        (Some(n), _) => n,
        (None, Method::Full) if layers.is_none() => -1,
        (None, _) => return Err(bad_key(path, "num_layers", layers, "a whole number, -1 for all layers")),
    };
    if method == Method::Full {
        return Ok(MlxConfig {
            method,
            num_layers,
            rank: 0,
            scale: 0.0,
            dropout: 0.0,
            keys: None,
        });
    }
    let parameters = config.get("lora_parameters");
    let Some(parameters) = parameters.and_then(Value::as_object) else {
        return Err(bad_key(
            path,
            "lora_parameters",
            parameters,
            "an object with rank, scale and dropout",
        ));
    };
    let bad = |key: &str, expected| bad_key(path, &format!("lora_parameters.{key}"), parameters.get(key), expected);
    let number = |key| parameters.get(key).and_then(Value::as_f64).filter(|n| n.is_finite());
    let rank = parameters
        .get("rank")
        .and_then(Value::as_u64)
        .and_then(|r| usize::try_from(r).ok())
        .filter(|r| *r > 0);
    let dropout = number("dropout").filter(|p| (0.0..1.0).contains(p));
    let keys = match parameters.get("keys") {
        None | Some(Value::Null) => None,
        Some(keys) => {
            let list = keys
                .as_array()
                .map(|list| list.iter().map(|k| k.as_str().map(str::to_string)));
            let list: Option<Vec<String>> = list.and_then(Iterator::collect);
            Some(list.ok_or_else(|| bad("keys", "a list of module names"))?)
        }
    };
    Ok(MlxConfig {
        method,
        num_layers,
        rank: rank.ok_or_else(|| bad("rank", "a whole number from 1"))?,
        scale: number("scale").ok_or_else(|| bad("scale", "a number: alpha / rank"))?,
        dropout: dropout.ok_or_else(|| bad("dropout", "a number from 0 to below 1"))?,
        keys,
    })
}

/// The configuration goes last, so that a folder with one is complete.
pub(super) fn write(adapter: &Adapter, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::write(dir, e))?;
    tensors::write(&dir.join(MLX_TENSOR_FILE), &adapter.tensors, &BTreeMap::new())?;
    adapter.current_sidecar().write(dir)?;
    let path = dir.join(CONFIG_FILE);
    let json = config_json(adapter).map_err(|e| Error::json(&path, &e))?;
    planish_core::fs::write_atomic(&path, &json).map_err(|e| Error::write(&path, e))
}

/// Sorted keys and an indent of 4, as mlx-lm writes it. Keys of an earlier mlx-lm configuration are kept.
fn config_json(adapter: &Adapter) -> Result<Vec<u8>, serde_json::Error> {
    let mut config = BTreeMap::new();
    let sidecar = &adapter.sidecar;
    if sidecar.source_format.as_deref() == Some("mlx-lm")
        && let Some(Value::Object(original)) = &sidecar.source_config
    {
        config.extend(original.clone());
    }
    if let Some(base) = &sidecar.base.path_or_repo {
        config.entry("model".to_string()).or_insert_with(|| base.clone().into());
    }
    config.insert("fine_tune_type".to_string(), adapter.method.name().into());
    config.insert("num_layers".to_string(), adapter.n_adapted_layers.into());
    config.insert("lora_parameters".to_string(), lora_parameters(adapter)?);
    let mut json = Vec::new();
    let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    config.serialize(&mut serde_json::Serializer::with_formatter(&mut json, indent))?;
    json.push(b'\n');
    Ok(json)
}

fn lora_parameters(adapter: &Adapter) -> Result<Value, serde_json::Error> {
    if adapter.method == Method::Full {
        return Ok(Value::Null);
    }
    let mut parameters = Map::new();
    parameters.insert("dropout".to_string(), serde_json::to_value(adapter.dropout)?);
    parameters.insert("keys".to_string(), serde_json::to_value(&adapter.keys)?);
    parameters.insert("rank".to_string(), adapter.rank.into());
    parameters.insert("scale".to_string(), serde_json::to_value(adapter.scale)?);
    Ok(Value::Object(parameters))
}

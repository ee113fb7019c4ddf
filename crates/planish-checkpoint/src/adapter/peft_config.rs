use std::path::Path;

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::{Refusal, bad_key};
use crate::error::{Error, Result};

/// The part of PEFT's `adapter_config.json` that decides what an adapter computes.
#[derive(Debug)]
pub(super) struct PeftConfig {
    pub(super) raw: Map<String, Value>,
    pub(super) r: usize,
    pub(super) alpha: f64,
    pub(super) dropout: f64,
    pub(super) use_rslora: bool,
    pub(super) use_dora: bool,
    rank_pattern: Vec<(Regex, usize)>,
    alpha_pattern: Vec<(Regex, f64)>,
}

/// Keys that choose modules, describe the file, or steer only training and initialisation: nothing to compute.
/// The initialisations that change the base are refused by `init_lora_weights`.
const HARMLESS: [&str; 24] = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ephemeral_gpu_offload",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "modules_to_save",
];

/// Keys read below.
const USED: [&str; 6] = [
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
];

impl PeftConfig {
    /// Reads a configuration and refuses all that would change the meaning of the tensors in a way unknown here.
    pub(super) fn parse(json: &[u8], path: &Path, force: bool) -> Result<Self> {
        let raw: Map<String, Value> = serde_json::from_slice(json).map_err(|e| Error::json(path, &e))?;
        if let Some(refusal) = find_refusal(&raw, force) {
            return Err(Error::refused(path, refusal));
        }
        let flag = |key: &str| match raw.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| bad_key(path, key, Some(value), "true or false")),
        };
        let dropout = number(raw.get("lora_dropout"), 0.0).filter(|p| (0.0..1.0).contains(p));
        Ok(Self {
            r: raw
                .get("r")
                .map_or(Some(8), rank_of)
                .ok_or_else(|| bad_key(path, "r", raw.get("r"), RANK))?,
            alpha: raw
                .get("lora_alpha")
                .map_or(Some(8.0), alpha_of)
                .ok_or_else(|| bad_key(path, "lora_alpha", raw.get("lora_alpha"), ALPHA))?,
            dropout: dropout.ok_or_else(|| {
                bad_key(
                    path,
                    "lora_dropout",
                    raw.get("lora_dropout"),
                    "a number from 0 to below 1",
                )
            })?,
            use_rslora: flag("use_rslora")?,
            use_dora: flag("use_dora")?,
            rank_pattern: patterns(&raw, "rank_pattern", path, rank_of, RANK)?,
            alpha_pattern: patterns(&raw, "alpha_pattern", path, alpha_of, ALPHA)?,
            raw,
        })
    }

    /// The rank of a module: its pattern's, or `r`.
    pub(super) fn rank(&self, module: &str) -> usize {
        first_match(&self.rank_pattern, module).unwrap_or(self.r)
    }

    /// The alpha of a module: its pattern's, or `lora_alpha`.
    pub(super) fn module_alpha(&self, module: &str) -> f64 {
        first_match(&self.alpha_pattern, module).unwrap_or(self.alpha)
    }

    /// The final multiplier of a module: alpha over rank, or over its root for rsLoRA.
    pub(super) fn scale(&self, module: &str) -> f64 {
        self.scale_of_rank(module, self.rank(module))
    }

    /// The scale of a module that no pattern names.
    pub(super) fn default_scale(&self) -> f64 {
        let rank = self.r as f64;
        self.alpha / if self.use_rslora { rank.sqrt() } else { rank }
    }

    pub(super) fn scale_of_rank(&self, module: &str, rank: usize) -> f64 {
        let rank = rank as f64;
        self.module_alpha(module) / if self.use_rslora { rank.sqrt() } else { rank }
    }
}

const RANK: &str = "a whole number from 1";
const ALPHA: &str = "a number other than 0";

fn rank_of(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|r| usize::try_from(r).ok()).filter(|r| *r > 0)
}

fn number(value: Option<&Value>, default: f64) -> Option<f64> {
    value.map_or(Some(default), Value::as_f64).filter(|n| n.is_finite())
}

/// Zero would switch the update off, and cannot be divided by.
fn alpha_of(value: &Value) -> Option<f64> {
    value.as_f64().filter(|alpha| alpha.is_finite() && *alpha != 0.0)
}

fn first_match<T: Copy>(patterns: &[(Regex, T)], module: &str) -> Option<T> {
    patterns
        .iter()
        .find(|(pattern, _)| pattern.is_match(module))
        .map(|(_, value)| *value)
}

/// Patterns as PEFT applies them: a regular expression for the end of the path, starting at a dot or at the beginning;
/// the first that matches counts.
fn patterns<T>(
    raw: &Map<String, Value>,
    key: &str,
    path: &Path,
    read: impl Fn(&Value) -> Option<T>,
    expected: &str,
) -> Result<Vec<(Regex, T)>> {
    let object = match raw.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(object)) => object,
        other => return Err(bad_key(path, key, other, "an object of numbers by pattern")),
    };
    let mut list = Vec::new();
    for (pattern, value) in object {
        let regex = RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
            .size_limit(1 << 20)
            .build();
        let named = || {
            bad_key(
                path,
                &format!("{key}.{pattern}"),
                Some(value),
                "a regular expression this program reads",
            )
        };
        let value = read(value).ok_or_else(|| bad_key(path, &format!("{key}.{pattern}"), Some(value), expected))?;
        list.push((regex.map_err(|_| named())?, value));
    }
    Ok(list)
}

fn find_refusal(raw: &Map<String, Value>, force: bool) -> Option<Refusal> {
    let text = |key: &str| {
        raw.get(key).map_or("nothing".to_string(), |v| {
            v.as_str().map_or(v.to_string(), str::to_string)
        })
    };
    if text("peft_type") != "LORA" {
        return Some(Refusal::UnsupportedPeftType {
            found: text("peft_type"),
        });
    }
    if is_set(raw.get("bias")) && text("bias") != "none" {
        return Some(Refusal::LoraBias {
            cause: format!("`bias` is {:?}", text("bias")),
        });
    }
    if is_set(raw.get("lora_bias")) {
        return Some(Refusal::LoraBias {
            cause: "`lora_bias` is set".to_string(),
        });
    }
    if let Some(Value::String(init)) = raw.get("init_lora_weights")
        && !["eva", "gaussian", "orthogonal"].contains(&init.as_str())
    {
        return Some(Refusal::ResidualInit { init: init.clone() });
    }
    if is_set(raw.get("modules_to_save")) {
        return Some(Refusal::ModulesToSave {
            names: vec![format!("`modules_to_save` = {}", text("modules_to_save"))],
        });
    }
    let unknown = raw
        .iter()
        .find(|(key, value)| is_set(Some(value)) && !HARMLESS.contains(&key.as_str()) && !USED.contains(&key.as_str()));
    unknown
        .filter(|_| !force)
        .map(|(key, value)| Refusal::UnsupportedPeftOption {
            key: key.clone(),
            value: value.to_string(),
        })
}

/// Whether a value differs from PEFT's ways of saying "off".
fn is_set(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}

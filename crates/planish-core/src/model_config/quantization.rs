//! Quantised weights in MLX's form: groups along the input dimension share a scale.

use std::collections::BTreeMap;

use serde_json::Value;

use super::ModelConfig;
use super::keys::{Keys, describe};
use crate::Result;

/// The `quantization` object of a model's `config.json`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// What holds for every embedding and linear layer without an entry of its own.
    pub default: LayerQuantization,
    /// Exceptions by module path; `None` = this module is not quantised.
    pub overrides: BTreeMap<String, Option<LayerQuantization>>,
}

/// How one module's weight is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerQuantization {
    /// Neighbouring inputs that share a scale.
    pub group_size: usize,
    /// Bits a weight.
    pub bits: usize,
    /// Number format.
    pub mode: QuantizationMode,
}

/// Number formats of quantised weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QuantizationMode {
    /// `w = scale · q + bias` with q an unsigned integer of 2, 3, 4, 5, 6 or 8 bits; groups of 32, 64 or 128.
    Affine,
    /// 4-bit floats, groups of 32 under a power-of-two scale (OCP microscaling).
    Mxfp4,
    /// 4-bit floats, groups of 16 under an 8-bit float scale.
    Nvfp4,
    /// 8-bit floats, groups of 32 under a power-of-two scale.
    Mxfp8,
}

impl QuantizationConfig {
    /// What holds for the module at `path`; `None` = not quantised.
    pub fn for_module(&self, path: &str) -> Option<LayerQuantization> {
        self.overrides.get(path).copied().unwrap_or(Some(self.default))
    }
}

impl QuantizationMode {
    /// Every mode.
    pub const ALL: [Self; 4] = [Self::Affine, Self::Mxfp4, Self::Nvfp4, Self::Mxfp8];

    /// MLX's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Affine => "affine",
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
            Self::Mxfp8 => "mxfp8",
        }
    }

    /// The bit widths it exists in.
    pub(crate) fn allowed_bits(self) -> &'static [usize] {
        match self {
            Self::Affine => &[2, 3, 4, 5, 6, 8],
            Self::Mxfp4 | Self::Nvfp4 => &[4],
            Self::Mxfp8 => &[8],
        }
    }

    /// The group sizes it exists in.
    pub(crate) fn allowed_group_sizes(self) -> &'static [usize] {
        match self {
            Self::Affine => &[32, 64, 128],
            Self::Mxfp4 | Self::Mxfp8 => &[32],
            Self::Nvfp4 => &[16],
        }
    }
}

/// MLX writes the same object under both keys; under the second alone other libraries keep their own forms.
pub(super) fn read(keys: &Keys<'_>) -> Result<Option<QuantizationConfig>> {
    let Some(object) = (match keys.object("quantization")? {
        Some(object) => Some(object),
        None => keys.object("quantization_config")?,
    }) else {
        return Ok(None);
    };
    if object.present("quant_method").is_some() {
        return Err(object.unsupported(
            "quant_method",
            "only MLX's own form is read: convert the model with mlx-lm first",
        ));
    }
    let default = layer_quantization(&object, None)?;
    let mut config = QuantizationConfig {
        default,
        overrides: Default::default(),
    };
    for (path, value) in object.map {
        let layer = match value {
            Value::Bool(false) => None,
            Value::Bool(true) => Some(default),
            Value::Object(_) => match object.object(path)? {
                Some(nested) => {
                    let layer = layer_quantization(&nested, Some(default))?;
                    nested.refuse_unread()?;
                    Some(layer)
                }
                None => continue,
            },
            _ if ["group_size", "bits", "mode"].contains(&path.as_str()) => continue,
            other => return Err(object.wrong(path, &describe(other), "true, false or {group_size, bits, mode}")),
        };
        config.overrides.insert(path.clone(), layer);
    }
    Ok(Some(config))
}

fn layer_quantization(keys: &Keys<'_>, outer: Option<LayerQuantization>) -> Result<LayerQuantization> {
    let mode = match keys.text("mode")? {
        // As MLX reads it: an entry without a mode is affine whatever surrounds it.
        None => QuantizationMode::Affine,
        Some(name) => QuantizationMode::ALL
            .into_iter()
            .find(|mode| mode.name() == name)
            .ok_or_else(|| {
                keys.unsupported(
                    "mode",
                    &format!(
                        "planish has {}",
                        QuantizationMode::ALL.map(QuantizationMode::name).join(", ")
                    ),
                )
            })?,
    };
    let pick = |key: &str, inherited: Option<usize>, allowed: &[usize]| {
        let list = allowed.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
        match keys.optional_size(key, 1 << 16)?.or(inherited) {
            Some(found) if allowed.contains(&found) => Ok(found),
            Some(found) => Err(keys.wrong(
                key,
                &found.to_string(),
                &format!("one of {list} in mode {}", mode.name()),
            )),
            None => Err(keys.missing(key, &format!("one of {list}"))),
        }
    };
    // A module of another mode than its surroundings inherits none of their numbers.
    let outer = outer.filter(|outer| outer.mode == mode);
    Ok(LayerQuantization {
        group_size: pick("group_size", outer.map(|o| o.group_size), mode.allowed_group_sizes())?,
        bits: pick("bits", outer.map(|o| o.bits), mode.allowed_bits())?,
        mode,
    })
}

/// Every quantised matrix must consist of whole groups.
pub(super) fn check_shapes(keys: &Keys<'_>, config: &ModelConfig) -> Result<()> {
    let Some(quantization) = &config.quantization else {
        return Ok(());
    };
    let arch = &config.arch;
    let check = |path: &str, input_dims: usize| match quantization.for_module(path) {
        Some(layer) if !input_dims.is_multiple_of(layer.group_size) => Err(keys.wrong(
            "quantization",
            &format!("group_size {} for {path}", layer.group_size),
            &format!("a divisor of its input size {input_dims}"),
        )),
        _ => Ok(()),
    };
    check(&arch.embedding_path(), arch.hidden_size)?;
    if !arch.head.is_tied {
        check(&arch.head_path(), arch.hidden_size)?;
    }
    arch.linears()
        .iter()
        .try_for_each(|linear| check(&linear.path, linear.input_dims))
}

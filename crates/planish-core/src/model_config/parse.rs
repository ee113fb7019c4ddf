//! From the JSON text to a [`ModelConfig`], every value checked.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    LayerQuantization, ModelConfig, ModelFamily, QuantizationConfig, QuantizationMode, RopeConfig, RopeScaling,
};
use crate::{Error, Result, suggest};

/// Larger than any model, small enough that products of two sizes fit a 64-bit integer with room.
const MAX_DIMS: usize = 1 << 24;
const MAX_LAYERS: usize = 1 << 12;
const MAX_HEADS: usize = 1 << 14;
const MAX_CONTEXT: usize = 1 << 30;
/// What the reference implementation takes when the file is silent.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
const DEFAULT_SLIDING_WINDOW: usize = 4096;

pub(super) fn model_config(text: &str, origin: &Path) -> Result<ModelConfig> {
    let value: Value = serde_json::from_str(text).map_err(|error| Error::Json {
        path: origin.to_path_buf(),
        line: error.line(),
        column: error.column(),
        message: error.to_string(),
    })?;
    let Value::Object(map) = &value else {
        return Err(Error::ModelKey {
            path: origin.to_path_buf(),
            key: "(whole file)".into(),
            found: describe(&value),
            expected: "a JSON object".into(),
        });
    };
    let keys = Keys {
        path: origin,
        prefix: String::new(),
        map,
    };
    let family = family(&keys)?;
    refuse_other_computations(&keys, family)?;

    let hidden_size = keys.size("hidden_size", MAX_DIMS)?;
    let n_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
    let n_heads = keys.size("num_attention_heads", MAX_HEADS)?;
    let config = ModelConfig {
        family,
        hidden_size,
        intermediate_size: keys.size("intermediate_size", MAX_DIMS)?,
        n_layers,
        n_heads,
        n_kv_heads: n_kv_heads(&keys, family, n_heads)?,
        head_dim: head_dim(&keys, family, hidden_size, n_heads)?,
        vocab_size: keys.size("vocab_size", MAX_DIMS)?,
        max_position_embeddings: keys
            .optional_size("max_position_embeddings", MAX_CONTEXT)?
            .unwrap_or(default_context(family)),
        rms_norm_eps: keys.positive("rms_norm_eps", 1.0)?.unwrap_or(1e-6) as f32,
        rope: rope(&keys)?,
        tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        attention_qkv_bias: family == ModelFamily::Qwen2 || keys.flag("attention_bias")?.unwrap_or(false),
        attention_output_bias: family != ModelFamily::Qwen2 && keys.flag("attention_bias")?.unwrap_or(false),
        mlp_bias: keys.flag("mlp_bias")?.unwrap_or(false),
        qk_norm: family == ModelFamily::Qwen3,
        sliding_window: sliding_window(&keys, family, n_layers)?,
        bos_token_id: keys.token_ids("bos_token_id")?.first().copied(),
        eos_token_ids: keys.token_ids("eos_token_id")?,
        quantization: quantization(&keys)?,
    };
    check_quantised_shapes(&keys, &config)?;
    Ok(config)
}

fn family(keys: &Keys<'_>) -> Result<ModelFamily> {
    let name = keys
        .text("model_type")?
        .ok_or_else(|| keys.missing("model_type", &known_families()))?;
    if let Some(family) = ModelFamily::ALL.into_iter().find(|family| family.model_type() == name) {
        return Ok(family);
    }
    let near = suggest::nearest(name, ModelFamily::ALL.map(ModelFamily::model_type));
    let hint = near.map(|near| format!(" (nearest: {near})")).unwrap_or_default();
    Err(keys.unsupported("model_type", &format!("planish has {}{hint}", known_families())))
}

fn known_families() -> String {
    ModelFamily::ALL.map(ModelFamily::model_type).join(", ")
}

/// Refuses every key known to change the computation away from what the four families do.
fn refuse_other_computations(keys: &Keys<'_>, family: ModelFamily) -> Result<()> {
    for key in ["hidden_act", "hidden_activation"] {
        if keys.text(key)?.is_some_and(|act| act != "silu" && act != "swish") {
            return Err(keys.unsupported(key, "the activation must be silu"));
        }
    }
    for key in [
        "num_experts",
        "num_local_experts",
        "n_routed_experts",
        "moe_num_experts",
    ] {
        if keys.present(key).is_some_and(|value| value.as_u64() != Some(0)) {
            return Err(keys.unsupported(key, "mixtures of experts are not supported, only dense models"));
        }
    }
    // Factors that other architectures multiply in; 1 changes nothing.
    for key in [
        "partial_rotary_factor",
        "rotary_pct",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "logit_scale",
        "scale_emb",
    ] {
        if keys.present(key).is_some_and(|value| value.as_f64() != Some(1.0)) {
            return Err(keys.unsupported(key, "must be 1 or absent"));
        }
    }
    for key in [
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "attention_multiplier",
        "clip_qkv",
        "query_pre_attn_scalar",
    ] {
        if keys.present(key).is_some() {
            return Err(keys.unsupported(key, "must be null or absent"));
        }
    }
    for key in [
        "use_qk_norm",
        "qk_norm",
        "is_encoder_decoder",
        "add_cross_attention",
        "use_mrope",
        "use_parallel_residual",
    ] {
        if keys.present(key).is_some_and(|value| value.as_bool() != Some(false))
            && !(family == ModelFamily::Qwen3 && key.ends_with("qk_norm"))
        {
            return Err(keys.unsupported(key, "must be false or absent"));
        }
    }
    if keys.present("no_rope_layers").is_some_and(|value| {
        value
            .as_array()
            .is_none_or(|layers| layers.iter().any(|l| l.as_u64() != Some(1)))
    }) {
        return Err(keys.unsupported("no_rope_layers", "every layer must be rotary"));
    }
    // The reference implementations of these families have no such biases, whatever the file says.
    let biases: &[&str] = match family {
        ModelFamily::Llama => &[],
        ModelFamily::Mistral => &["attention_bias", "mlp_bias"],
        ModelFamily::Qwen2 | ModelFamily::Qwen3 => &["mlp_bias"],
    };
    for key in biases {
        if keys.flag(key)? == Some(true) {
            return Err(keys.unsupported(key, &format!("{} has no such bias", family.model_type())));
        }
    }
    let Some(architectures) = keys.present("architectures") else {
        return Ok(());
    };
    let names = architectures.as_array().map(Vec::as_slice).unwrap_or_default();
    if !names.is_empty()
        && !names
            .iter()
            .any(|name| name.as_str().is_some_and(|n| n.ends_with("ForCausalLM")))
    {
        return Err(keys.unsupported("architectures", "only causal language models (…ForCausalLM)"));
    }
    Ok(())
}

fn n_kv_heads(keys: &Keys<'_>, family: ModelFamily, n_heads: usize) -> Result<usize> {
    const KEY: &str = "num_key_value_heads";
    let n_kv_heads = match (keys.optional_size(KEY, MAX_HEADS)?, keys.map.contains_key(KEY), family) {
        (Some(n), ..) => n,
        (None, true, _) | (None, _, ModelFamily::Llama) => n_heads,
        (None, false, ModelFamily::Mistral) => 8,
        (None, false, ModelFamily::Qwen2 | ModelFamily::Qwen3) => 32,
    };
    if !n_heads.is_multiple_of(n_kv_heads) {
        return Err(keys.wrong(
            KEY,
            &n_kv_heads.to_string(),
            &format!("a divisor of num_attention_heads = {n_heads}"),
        ));
    }
    Ok(n_kv_heads)
}

fn head_dim(keys: &Keys<'_>, family: ModelFamily, hidden_size: usize, n_heads: usize) -> Result<usize> {
    const KEY: &str = "head_dim";
    let head_dim = match (keys.optional_size(KEY, MAX_HEADS)?, family) {
        (Some(head_dim), _) => head_dim,
        (None, ModelFamily::Qwen3) => 128,
        (None, _) if hidden_size.is_multiple_of(n_heads) => hidden_size / n_heads,
        (None, _) => {
            let expected = format!("a multiple of num_attention_heads = {n_heads}, or an explicit head_dim");
            return Err(keys.wrong("hidden_size", &hidden_size.to_string(), &expected));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.wrong(
            KEY,
            &head_dim.to_string(),
            "an even number (rotary embedding turns pairs)",
        ));
    }
    Ok(head_dim)
}

fn default_context(family: ModelFamily) -> usize {
    match family {
        ModelFamily::Llama => 2048,
        ModelFamily::Mistral => 4096 * 32,
        ModelFamily::Qwen2 | ModelFamily::Qwen3 => 32_768,
    }
}

/// Both spellings: `rope_theta` beside `rope_scaling`, and one `rope_parameters` object holding both.
fn rope(keys: &Keys<'_>) -> Result<RopeConfig> {
    let nested = keys.object("rope_parameters")?;
    let top_theta = keys.positive("rope_theta", f64::from(f32::MAX))?;
    let nested_theta = match &nested {
        Some(parameters) => parameters.positive("rope_theta", f64::from(f32::MAX))?,
        None => None,
    };
    if let (Some(top), Some(nested)) = (top_theta, nested_theta)
        && top != nested
    {
        return Err(keys.wrong(
            "rope_theta",
            &top.to_string(),
            &format!("rope_parameters.rope_theta = {nested}, or no such key"),
        ));
    }
    let theta = nested_theta.or(top_theta).unwrap_or(DEFAULT_ROPE_THETA) as f32;
    let scaling = match (nested, keys.object("rope_scaling")?) {
        (Some(parameters), _) if parameters.rope_type()?.is_some() => rope_scaling(&parameters)?,
        (Some(parameters), _) if parameters.map.values().any(Value::is_object) => {
            return Err(keys.unsupported("rope_parameters", "one set of parameters for all layers"));
        }
        (_, Some(parameters)) => rope_scaling(&parameters)?,
        _ => RopeScaling::None,
    };
    Ok(RopeConfig { theta, scaling })
}

fn rope_scaling(keys: &Keys<'_>) -> Result<RopeScaling> {
    const MAX_FACTOR: f64 = 1e6;
    if keys
        .present("partial_rotary_factor")
        .is_some_and(|value| value.as_f64() != Some(1.0))
    {
        return Err(keys.unsupported("partial_rotary_factor", "must be 1 or absent"));
    }
    let required = |key: &str| {
        keys.positive(key, MAX_FACTOR)?
            .ok_or_else(|| keys.missing(key, "a positive number"))
    };
    let factor = || match required("factor")? {
        factor if factor >= 1.0 => Ok(factor as f32),
        factor => Err(keys.wrong("factor", &factor.to_string(), "at least 1")),
    };
    match keys.rope_type()? {
        None => Err(keys.missing("rope_type", "default, linear or llama3")),
        Some((_, "default")) => Ok(RopeScaling::None),
        Some((_, "linear")) => Ok(RopeScaling::Linear { factor: factor()? }),
        Some((_, "llama3")) => {
            let (low, high) = (required("low_freq_factor")?, required("high_freq_factor")?);
            if low >= high {
                return Err(keys.wrong(
                    "low_freq_factor",
                    &low.to_string(),
                    &format!("less than high_freq_factor = {high}"),
                ));
            }
            Ok(RopeScaling::Llama3 {
                factor: factor()?,
                low_freq_factor: low as f32,
                high_freq_factor: high as f32,
                original_max_position_embeddings: keys.size("original_max_position_embeddings", MAX_CONTEXT)?,
            })
        }
        Some((key, _)) => Err(keys.unsupported(key, "planish has default, linear and llama3")),
    }
}

/// One window for the whole model, or none; a mixture of blocks is refused.
fn sliding_window(keys: &Keys<'_>, family: ModelFamily, n_layers: usize) -> Result<Option<usize>> {
    const KEY: &str = "sliding_window";
    let stated = keys.optional_size(KEY, MAX_CONTEXT)?;
    let window = match family {
        ModelFamily::Llama => None,
        ModelFamily::Mistral if keys.map.contains_key(KEY) => stated,
        ModelFamily::Mistral => Some(DEFAULT_SLIDING_WINDOW),
        ModelFamily::Qwen2 | ModelFamily::Qwen3 if keys.flag("use_sliding_window")? == Some(true) => {
            if keys.map.contains_key(KEY) {
                stated
            } else {
                Some(DEFAULT_SLIDING_WINDOW)
            }
        }
        ModelFamily::Qwen2 | ModelFamily::Qwen3 => None,
    };
    if let Some(sliding_layers) = sliding_layers(keys, n_layers)? {
        return match sliding_layers {
            0 => Ok(None),
            n if n == n_layers && window.is_some() => Ok(window),
            n if n == n_layers => Err(keys.missing(KEY, "the window of the sliding_attention layers")),
            _ => Err(keys.unsupported(
                "layer_types",
                "all layers must be of one type, full or sliding attention",
            )),
        };
    }
    if window.is_none() || !matches!(family, ModelFamily::Qwen2 | ModelFamily::Qwen3) {
        return Ok(window);
    }
    // In the Qwen families the window applies from this block on.
    match keys.optional_count("max_window_layers", MAX_LAYERS)?.unwrap_or(28) {
        0 => Ok(window),
        n if n >= n_layers => Ok(None),
        _ => Err(keys.unsupported(
            "max_window_layers",
            "all layers must be of one type, full or sliding attention",
        )),
    }
}

/// How many entries of `layer_types` are sliding; `None` when the key is absent.
fn sliding_layers(keys: &Keys<'_>, n_layers: usize) -> Result<Option<usize>> {
    let Some(value) = keys.present("layer_types") else {
        return Ok(None);
    };
    let types = value.as_array().map(Vec::as_slice).unwrap_or_default();
    if types.len() != n_layers {
        return Err(keys.wrong(
            "layer_types",
            &describe(value),
            &format!("a list of {n_layers} words, one a layer"),
        ));
    }
    let mut sliding = 0;
    for layer_type in types {
        match layer_type.as_str() {
            Some("full_attention") => {}
            Some("sliding_attention") => sliding += 1,
            _ => {
                let reason = format!(
                    "{} is neither full_attention nor sliding_attention",
                    describe(layer_type)
                );
                return Err(keys.unsupported("layer_types", &reason));
            }
        }
    }
    Ok(Some(sliding))
}

/// MLX writes the same object under both keys; under the second alone other libraries keep their own forms.
fn quantization(keys: &Keys<'_>) -> Result<Option<QuantizationConfig>> {
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
            Value::Object(map) => {
                let nested = Keys {
                    path: object.path,
                    prefix: object.dotted(path) + ".",
                    map,
                };
                Some(layer_quantization(&nested, Some(default))?)
            }
            _ if ["group_size", "bits", "mode"].contains(&path.as_str()) => continue,
            other => return Err(object.wrong(path, &describe(other), "true, false or {group_size, bits, mode}")),
        };
        config.overrides.insert(path.clone(), layer);
    }
    Ok(Some(config))
}

fn layer_quantization(keys: &Keys<'_>, outer: Option<LayerQuantization>) -> Result<LayerQuantization> {
    let mode = match keys.text("mode")? {
        None => outer.map_or(QuantizationMode::Affine, |outer| outer.mode),
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
fn check_quantised_shapes(keys: &Keys<'_>, config: &ModelConfig) -> Result<()> {
    let Some(quantization) = &config.quantization else {
        return Ok(());
    };
    let check = |path: &str, input_dims: usize| match quantization.for_module(path) {
        Some(layer) if !input_dims.is_multiple_of(layer.group_size) => Err(keys.wrong(
            "quantization",
            &format!("group_size {} for {path}", layer.group_size),
            &format!("a divisor of its input size {input_dims}"),
        )),
        _ => Ok(()),
    };
    check("model.embed_tokens", config.hidden_size)?;
    if !config.tie_word_embeddings {
        check("lm_head", config.hidden_size)?;
    }
    config
        .block_linear_layers()
        .iter()
        .try_for_each(|linear| check(&linear.path, linear.input_dims))
}

/// An object of the file, and how errors name what is in it.
struct Keys<'a> {
    path: &'a Path,
    prefix: String,
    map: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    /// The value, unless absent or null.
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn size(&self, key: &str, max: usize) -> Result<usize> {
        self.optional_size(key, max)?
            .ok_or_else(|| self.missing(key, "a positive integer"))
    }

    fn optional_size(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.integer(key, 1, max)
    }

    fn optional_count(&self, key: &str, max: usize) -> Result<Option<usize>> {
        self.integer(key, 0, max)
    }

    fn integer(&self, key: &str, min: usize, max: usize) -> Result<Option<usize>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (min..=max).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, &describe(value), &format!("an integer from {min} to {max}"))),
        }
    }

    /// A number above 0 and at most `max`.
    fn positive(&self, key: &str, max: f64) -> Result<Option<f64>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            // As f32 it must not vanish either.
            Some(x) if x <= max && x as f32 > 0.0 => Ok(Some(x)),
            _ => Err(self.wrong(key, &describe(value), &format!("a number above 0, at most {max:e}"))),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "true or false"))
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        value
            .as_str()
            .map(Some)
            .ok_or_else(|| self.wrong(key, &describe(value), "a text"))
    }

    fn object(&self, key: &str) -> Result<Option<Keys<'a>>> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        let map = value
            .as_object()
            .ok_or_else(|| self.wrong(key, &describe(value), "an object"))?;
        Ok(Some(Keys {
            path: self.path,
            prefix: self.dotted(key) + ".",
            map,
        }))
    }

    /// One id or a list of ids.
    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.present(key) else {
            return Ok(Vec::new());
        };
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match value {
            Value::Array(ids) => ids.iter().map(one).collect(),
            single => one(single).map(|id| vec![id]),
        }
        .ok_or_else(|| self.wrong(key, &describe(value), "a token id or a list of token ids"))
    }

    /// The kind of rotary scaling with the key that says it: `rope_type`, formerly `type`.
    fn rope_type(&self) -> Result<Option<(&'static str, &'a str)>> {
        match self.text("rope_type")? {
            Some(name) => Ok(Some(("rope_type", name))),
            None => Ok(self.text("type")?.map(|name| ("type", name))),
        }
    }

    fn dotted(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    fn missing(&self, key: &str, expected: &str) -> Error {
        self.wrong(key, "nothing", expected)
    }

    fn wrong(&self, key: &str, found: &str, expected: &str) -> Error {
        Error::ModelKey {
            path: self.path.to_path_buf(),
            key: self.dotted(key),
            found: found.into(),
            expected: expected.into(),
        }
    }

    fn unsupported(&self, key: &str, reason: &str) -> Error {
        Error::UnsupportedModel {
            path: self.path.to_path_buf(),
            key: self.dotted(key),
            found: self.present(key).map_or_else(|| "nothing".into(), describe),
            reason: reason.into(),
        }
    }
}

/// The value as JSON, cut to a length that fits a message.
fn describe(value: &Value) -> String {
    const LONGEST: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

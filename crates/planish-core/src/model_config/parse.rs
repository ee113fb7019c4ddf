//! From the JSON text to a [`ModelConfig`], every value checked.

use std::path::Path;

use serde_json::Value;

use super::keys::{Keys, describe};
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A valid small model with `changes` laid over it; a null removes the key.
    fn parse(family: &str, changes: Value) -> Result<ModelConfig> {
        let mut config = json!({
            "model_type": family, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
            if value.is_null() {
                config.as_object_mut().unwrap().shift_remove(key);
            }
        }
        model_config(&config.to_string(), Path::new("dir/config.json"))
    }

    fn check_err(family: &str, changes: Value, expect: &str) {
        let message = parse(family, changes).unwrap_err().to_string();
        assert_eq!(message, format!("dir/config.json: {expect}"));
    }

    #[test]
    fn defaults_are_those_of_the_family() {
        let llama = parse("llama", json!({})).unwrap();
        assert_eq!(
            (llama.head_dim, llama.max_position_embeddings, llama.sliding_window),
            (16, 2048, None)
        );
        assert_eq!((llama.rope.theta, llama.rope.scaling), (10_000.0, RopeScaling::None));
        assert!(!llama.attention_qkv_bias && !llama.tie_word_embeddings && !llama.qk_norm);
        assert_eq!(
            parse("llama", json!({"num_key_value_heads": null})).unwrap().n_kv_heads,
            4
        );

        assert_eq!(parse("mistral", json!({})).unwrap().sliding_window, Some(4096));

        let qwen2 = parse("qwen2", json!({})).unwrap();
        assert!(qwen2.attention_qkv_bias && !qwen2.attention_output_bias);

        let qwen3 = parse("qwen3", json!({})).unwrap();
        assert_eq!(
            (qwen3.head_dim, qwen3.qk_norm, qwen3.attention_qkv_bias),
            (128, true, false)
        );
    }

    #[test]
    fn attention_bias_covers_all_four_projections() {
        for family in ["llama", "qwen3"] {
            let config = parse(family, json!({"attention_bias": true})).unwrap();
            assert!(config.attention_qkv_bias && config.attention_output_bias, "{family}");
        }
    }

    #[test]
    fn rope_scaling_in_its_three_spellings() {
        let llama3 = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let expect = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        for (outer, name) in [
            ("rope_scaling", "rope_type"),
            ("rope_scaling", "type"),
            ("rope_parameters", "rope_type"),
        ] {
            let mut scaling = llama3.clone();
            scaling[name] = json!("llama3");
            assert_eq!(
                parse("llama", json!({outer: scaling})).unwrap().rope.scaling,
                expect,
                "{outer}.{name}"
            );
        }
    }

    #[test]
    fn rope_parameters_hold_theta_too() {
        let nested = json!({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}});
        assert_eq!(
            parse("llama", nested).unwrap().rope,
            RopeConfig {
                theta: 500_000.0,
                scaling: RopeScaling::None
            }
        );
    }

    #[test]
    fn err_rope() {
        check_err(
            "llama",
            json!({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0, "rope_type": "default"}}),
            "`rope_theta`: found 1, expected rope_parameters.rope_theta = 2, or no such key",
        );
        check_err(
            "qwen3",
            json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
            "`rope_scaling.rope_type` = \"yarn\" is not supported: planish has default, linear and llama3",
        );
        check_err(
            "llama",
            json!({"rope_scaling": {"type": "linear"}}),
            "`rope_scaling.factor`: found nothing, expected a positive number",
        );
        check_err(
            "llama",
            json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
            "`rope_parameters` = {\"full_attention\":{\"rope_type\":\"default\"}} is not supported: one set of parameters for all layers",
        );
        assert!(parse("llama", json!({"rope_theta": 1e-60})).is_err(), "vanishes in f32");
        // Equal factors would divide by zero.
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192});
        check_err(
            "llama",
            json!({"rope_scaling": llama3}),
            "`rope_scaling.low_freq_factor`: found 4, expected less than high_freq_factor = 4",
        );
    }

    #[test]
    fn sliding_window_of_qwen_needs_its_switch_and_whole_model() {
        let window = |changes| parse("qwen2", changes).unwrap().sliding_window;
        assert_eq!(window(json!({"sliding_window": 128})), None);
        assert_eq!(
            window(json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": 0})),
            Some(128)
        );
        assert_eq!(
            window(json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": 2})),
            None
        );
        check_err(
            "qwen2",
            json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": 1}),
            "`max_window_layers` = 1 is not supported: all layers must be of one type, full or sliding attention",
        );
    }

    #[test]
    fn layer_types_decide_the_window() {
        let both = |types: [&str; 2]| parse("mistral", json!({"layer_types": types, "sliding_window": 64}));
        assert_eq!(both(["full_attention"; 2]).unwrap().sliding_window, None);
        assert_eq!(both(["sliding_attention"; 2]).unwrap().sliding_window, Some(64));
        assert!(
            matches!(both(["full_attention", "sliding_attention"]), Err(Error::UnsupportedModel { key, .. }) if key == "layer_types")
        );
    }

    #[test]
    fn token_ids_may_be_one_many_or_none() {
        let eos = |value| parse("llama", json!({"eos_token_id": value})).map(|config| config.eos_token_ids);
        assert_eq!(eos(json!(7)).unwrap(), [7]);
        assert_eq!(eos(json!([7, 9])).unwrap(), [7, 9]);
        assert!(eos(Value::Null).unwrap().is_empty());
        assert!(eos(json!(-1)).is_err());
    }

    #[test]
    fn quantization_defaults_overrides_and_modes() {
        let config = parse(
            "llama",
            json!({"quantization_config": {"group_size": 32, "bits": 4, "a": {"bits": 8}, "b": false, "c": true, "d": {"mode": "mxfp8", "group_size": 32, "bits": 8}}}),
        );
        let quantization = config.unwrap().quantization.unwrap();
        let layer = |group_size, bits, mode| Some(LayerQuantization { group_size, bits, mode });
        assert_eq!(
            quantization.for_module("anything"),
            layer(32, 4, QuantizationMode::Affine)
        );
        assert_eq!(quantization.for_module("a"), layer(32, 8, QuantizationMode::Affine));
        assert_eq!(quantization.for_module("b"), None);
        assert_eq!(quantization.for_module("c"), layer(32, 4, QuantizationMode::Affine));
        assert_eq!(quantization.for_module("d"), layer(32, 8, QuantizationMode::Mxfp8));
    }

    #[test]
    fn err_quantization() {
        check_err(
            "llama",
            json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}),
            "`quantization_config.quant_method` = \"gptq\" is not supported: only MLX's own form is read: convert the model with mlx-lm first",
        );
        check_err(
            "llama",
            json!({"quantization": {"group_size": 64, "bits": 7}}),
            "`quantization.bits`: found 7, expected one of 2, 3, 4, 5, 6, 8 in mode affine",
        );
        check_err(
            "llama",
            json!({"quantization": {"group_size": 64, "bits": 4}}),
            "`quantization`: found group_size 64 for model.layers.0.mlp.down_proj, expected a divisor of its input size 96",
        );
    }

    #[test]
    fn err_computation_that_is_not_ours() {
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("num_local_experts", json!(8)),
            ("partial_rotary_factor", json!(0.5)),
            ("final_logit_softcapping", json!(30.0)),
            ("use_qk_norm", json!(true)),
            ("architectures", json!(["LlamaForSequenceClassification"])),
        ] {
            let error = parse("llama", json!({key: value})).unwrap_err();
            assert!(
                matches!(&error, Error::UnsupportedModel { key: named, .. } if named == key),
                "{error}"
            );
        }
        assert!(matches!(
            parse("mistral", json!({"attention_bias": true})),
            Err(Error::UnsupportedModel { .. })
        ));
    }

    #[test]
    fn neutral_values_of_such_keys_are_accepted() {
        let neutral = json!({"num_local_experts": 0, "partial_rotary_factor": 1, "use_qk_norm": false, "hidden_act": "silu",
            "architectures": ["LlamaForCausalLM"], "no_rope_layers": [1, 1]});
        parse("llama", neutral).unwrap();
    }

    #[test]
    fn err_unknown_family_names_the_nearest() {
        check_err(
            "qwen2_moe",
            json!({}),
            "`model_type` = \"qwen2_moe\" is not supported: planish has llama, mistral, qwen2, qwen3 (nearest: qwen2)",
        );
    }

    #[test]
    fn err_impossible_numbers() {
        check_err(
            "llama",
            json!({"hidden_size": null}),
            "`hidden_size`: found nothing, expected a positive integer",
        );
        check_err(
            "llama",
            json!({"num_attention_heads": 0}),
            "`num_attention_heads`: found 0, expected an integer from 1 to 16384",
        );
        check_err(
            "llama",
            json!({"num_hidden_layers": 1e9}),
            "`num_hidden_layers`: found 1000000000.0, expected an integer from 1 to 4096",
        );
        check_err(
            "llama",
            json!({"num_key_value_heads": 3}),
            "`num_key_value_heads`: found 3, expected a divisor of num_attention_heads = 4",
        );
        check_err(
            "llama",
            json!({"head_dim": 15}),
            "`head_dim`: found 15, expected an even number (rotary embedding turns pairs)",
        );
        check_err(
            "llama",
            json!({"hidden_size": 66}),
            "`hidden_size`: found 66, expected a multiple of num_attention_heads = 4, or an explicit head_dim",
        );
        check_err(
            "llama",
            json!({"rms_norm_eps": "x"}),
            "`rms_norm_eps`: found \"x\", expected a number above 0, at most 1e0",
        );
    }

    #[test]
    fn err_not_json_has_line_and_column() {
        let error = model_config("{\n  \"a\": }", Path::new("c.json")).unwrap_err();
        assert!(matches!(error, Error::Json { line: 2, column: 8, .. }), "{error}");
        assert!(model_config(&"[".repeat(100_000), Path::new("c.json")).is_err());
    }

    /// Any JSON value, nested a little.
    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (0_u64..70).prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[a-z_]{0,8}".prop_map(Value::from),
            Just(json!("llama3")),
            Just(json!("affine")),
        ];
        leaf.prop_recursive(3, 24, 6, |inner| {
            let key = prop::sample::select(vec![
                "rope_type",
                "factor",
                "rope_theta",
                "bits",
                "group_size",
                "mode",
                "x",
            ]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::vec((key, inner), 0..4)
                    .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_string(), v)).collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn prop_any_values_under_any_keys_never_panic(
            family in prop::sample::select(ModelFamily::ALL.map(ModelFamily::model_type).to_vec()),
            changes in prop::collection::vec((prop::sample::select(KEYS.to_vec()), any_json()), 0..6),
        ) {
            let changes = changes.into_iter().map(|(k, v)| (k.to_string(), v)).collect();
            if let Ok(config) = parse(family, changes) {
                for tensor in config.expected_tensors() {
                    prop_assert!(tensor.shape.iter().all(|dims| *dims > 0), "{}", tensor.name);
                }
            }
        }

        #[test]
        fn prop_any_text_never_panics(text in ".{0,200}") {
            let _ = model_config(&text, Path::new("config.json"));
        }
    }

    const KEYS: [&str; 27] = [
        "architectures",
        "attention_bias",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "mlp_bias",
        "no_rope_layers",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "partial_rotary_factor",
        "quantization",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    ];
}

//! From GGUF metadata to `config.json`.

use std::f64::consts::PI;

use planish_core::families::{self, Family};
use planish_tensors::Dtype;
use serde_json::{Map, Value as Json, json};

use super::{Gguf, Metadata};
use crate::{Error, Result};

/// The tensor of Llama 3's rope factors.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Keys after `<architecture>.` that are read below.
const READ: [&str; 17] = [
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.causal",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "expert_count",
];

/// Keys that do not alter the computation of the supported families.
const WITHOUT_EFFECT: [&str; 5] = [
    "vocab_size",                           // the embedding tells
    "tensor_data_layout",                   // a remark of the first converters
    "rope.scaling.original_context_length", // used by yarn alone
    "rope.scaling.finetuned",               // a remark
    "expert_used_count",                    // without experts, nothing
];

/// Which family the file's architecture is read as, and how such files are made.
///
/// # Errors
/// [`Error::UnsupportedMetadata`] for another one, or for one part of a split model.
pub fn family(metadata: &Metadata) -> Result<(&'static Family, families::Gguf)> {
    let kind = metadata.text("general.type")?.unwrap_or("model");
    if kind != "model" {
        let reason = "only models are read; of an adapter use the PEFT folder that it was made from";
        return Err(metadata.unsupported("general.type", reason));
    }
    let key = "general.architecture";
    let name = metadata.required(key, metadata.text(key)?)?;
    let found = Family::of_gguf(name).ok_or_else(|| {
        let mut known: Vec<&str> = families::ALL
            .iter()
            .filter_map(|family| Some(family.gguf?.architecture))
            .collect();
        known.dedup();
        metadata.unsupported(key, format!("the architectures {} are converted", known.join(", ")))
    })?;
    if metadata.whole("split.count")?.is_some_and(|n| n > 1) {
        return Err(metadata.unsupported(
            "split.count",
            "join the parts first, with llama.cpp's gguf-split --merge",
        ));
    }
    Ok(found)
}

/// The `config.json` of a file's model, complete: absent keys of GGUF get the values that llama.cpp assumes.
///
/// # Errors
/// [`Error::MissingMetadata`], [`Error::MetadataType`]; [`Error::UnsupportedMetadata`] for a key that alters the
/// computation in a way that such a `config.json` cannot say.
pub fn model_config(file: &Gguf, family: &Family, form: families::Gguf, dtype: Dtype) -> Result<Map<String, Json>> {
    let keys = Keys {
        metadata: file.metadata(),
        prefix: form.architecture,
    };
    keys.refuse_unknown()?;
    keys.refuse_other_attention()?;

    let hidden_size = keys.whole("embedding_length")?;
    let n_heads = keys.whole("attention.head_count")?;
    let head_dim = keys.head_dim(hidden_size, n_heads)?;
    let theta = keys.real_or("rope.freq_base", 10_000.0)?;
    let embedding = tensor_shape(file, "token_embd.weight")?;
    let has = |name: &str| file.tensor(name).is_some();
    let eps_key = "attention.layer_norm_rms_epsilon";
    let eps = keys.metadata.required(&keys.full(eps_key), keys.real(eps_key)?)?;

    let config = json!({
        "architectures": [family.class],
        "model_type": family.model_type,
        "hidden_size": hidden_size,
        "intermediate_size": keys.whole("feed_forward_length")?,
        "num_hidden_layers": keys.whole("block_count")?,
        "num_attention_heads": n_heads,
        "num_key_value_heads": keys.optional_whole("attention.head_count_kv")?.unwrap_or(n_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": keys.whole("context_length")?,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": keys.rope_scaling(file, theta, head_dim)?,
        "attention_bias": has("blk.0.attn_q.bias"),
        "attention_dropout": 0.0,
        "mlp_bias": has("blk.0.ffn_gate.bias"),
        "tie_word_embeddings": !has("output.weight"),
        "vocab_size": embedding[0],
        "initializer_range": 0.02,
        "use_cache": true,
        "torch_dtype": dtype.torch_name(),
    });
    match config {
        Json::Object(map) => Ok(map),
        _ => unreachable!("the literal above is an object"),
    }
}

/// The metadata keys of one architecture, by the part after its name.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn optional_whole(&self, key: &str) -> Result<Option<u32>> {
        self.metadata.whole(&self.full(key))
    }

    fn whole(&self, key: &str) -> Result<u32> {
        self.metadata.required(&self.full(key), self.optional_whole(key)?)
    }

    /// A number without the noise of having been an f32: 1e-5, not 9.999999747378752e-6.
    fn real(&self, key: &str) -> Result<Option<f64>> {
        Ok(self
            .metadata
            .real(&self.full(key))?
            .map(|v| (v as f32).to_string().parse().unwrap_or(v)))
    }

    fn real_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.real(key)?.unwrap_or(default))
    }

    fn refuse(&self, key: &str, reason: &str) -> Error {
        self.metadata.unsupported(&self.full(key), reason)
    }

    fn refuse_unknown(&self) -> Result<()> {
        for (key, _) in self.metadata.iter() {
            let Some(own) = key.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('.')) else {
                continue;
            };
            if !READ.contains(&own) && !WITHOUT_EFFECT.contains(&own) {
                return Err(self.refuse(own, "planish does not know this key, and it may alter the computation"));
            }
        }
        Ok(())
    }

    fn refuse_other_attention(&self) -> Result<()> {
        if self.optional_whole("expert_count")?.is_some_and(|n| n > 0) {
            return Err(self.refuse("expert_count", "mixtures of experts are not supported"));
        }
        if self.metadata.flag(&self.full("attention.causal"))? == Some(false) {
            return Err(self.refuse("attention.causal", "only causal attention is supported"));
        }
        let context = self.whole("context_length")?;
        if self
            .optional_whole("attention.sliding_window")?
            .is_some_and(|window| window > 0 && window < context)
        {
            return Err(self.refuse(
                "attention.sliding_window",
                "only attention to the whole context is converted",
            ));
        }
        Ok(())
    }

    fn head_dim(&self, hidden_size: u32, n_heads: u32) -> Result<u32> {
        let head_dim = match self.optional_whole("attention.key_length")? {
            Some(head_dim) => head_dim,
            None => hidden_size
                .checked_div(n_heads)
                .ok_or_else(|| self.refuse("attention.head_count", "expected at least one head"))?,
        };
        for (key, meaning) in [
            (
                "attention.value_length",
                "heads of values that differ from those of keys are not supported",
            ),
            ("rope.dimension_count", "rotating a part of each head is not supported"),
        ] {
            if self.optional_whole(key)?.is_some_and(|n| n != head_dim) {
                return Err(self.refuse(key, &format!("expected {head_dim}: {meaning}")));
            }
        }
        Ok(head_dim)
    }

    fn rope_scaling(&self, file: &Gguf, theta: f64, head_dim: u32) -> Result<Json> {
        let key = "rope.scaling.type";
        let kind = self.metadata.text(&self.full(key))?;
        let linear = match kind {
            None => self.real("rope.scale_linear")?,
            Some("none") => None,
            Some("linear") => {
                let factor = "rope.scaling.factor";
                Some(self.metadata.required(&self.full(factor), self.real(factor)?)?)
            }
            Some(_) => return Err(self.refuse(key, "the scalings none, linear and Llama 3's are supported")),
        };
        let linear = linear.filter(|factor| *factor != 1.0);
        let Some(factors) = rope_factors(file, head_dim)? else {
            return Ok(linear.map_or(Json::Null, |factor| json!({"rope_type": "linear", "factor": factor})));
        };
        if linear.is_some() {
            return Err(self.refuse(key, &format!("it cannot be combined with the tensor {ROPE_FACTORS}")));
        }
        llama3_scaling(&factors, theta, head_dim).ok_or_else(|| Error::UnsupportedRopeFactors {
            path: file.path().to_path_buf(),
            tensor: ROPE_FACTORS,
        })
    }
}

fn rope_factors(file: &Gguf, head_dim: u32) -> Result<Option<Vec<f64>>> {
    let Some(tensor) = file.tensor(ROPE_FACTORS) else {
        return Ok(None);
    };
    let expected = vec![head_dim as usize / 2];
    if tensor.shape != expected {
        return Err(Error::TensorShape {
            path: file.path().to_path_buf(),
            tensor: tensor.name.clone(),
            found: tensor.shape.clone(),
            expected,
        });
    }
    let mut factors = vec![0.0; tensor.n_elements()];
    super::dequantize(tensor.kind, file.bytes(tensor), &mut factors);
    Ok(Some(factors.into_iter().map(f64::from).collect()))
}

/// The four numbers of Llama 3's scaling from the factors they lead to, or `None` when no four numbers do.
///
/// With wavelength `λ` of pair `i`, context before stretching `c`, and low and high factors `l < h`, the factor is
/// `1/((1−s)/F + s)` where `s = (c/λ − l)/(h − l)`, clamped to `[0, 1]`. Scaling `c`, `l` and `h` together changes
/// nothing, so `l = 1` is free to choose; then `s` is linear in `1/λ`, and two points on the slope give `c` and `h`.
fn llama3_scaling(factors: &[f64], theta: f64, head_dim: u32) -> Option<Json> {
    let wavelength = |i: usize| 2.0 * PI * theta.powf(2.0 * i as f64 / f64::from(head_dim));
    let largest = round_to(factors.iter().copied().fold(1.0, f64::max), 1e-3);
    if factors.iter().all(|f| close(*f, 1.0)) {
        return Some(Json::Null);
    }
    let slope: Vec<(f64, f64)> = (0..factors.len())
        .filter(|i| !close(factors[*i], 1.0) && !close(factors[*i], largest))
        .map(|i| {
            (
                1.0 / wavelength(i),
                (1.0 / factors[i] - 1.0 / largest) / (1.0 - 1.0 / largest),
            )
        })
        .collect();
    let (high, context) = fit(&slope)?;
    if !(high > 1.0 && high.is_finite() && (1.0..1e9).contains(&context)) {
        return None;
    }
    let expected = |i: usize| {
        let smooth = ((context / wavelength(i) - 1.0) / (high - 1.0)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / largest + smooth)
    };
    let explained = factors
        .iter()
        .enumerate()
        .all(|(i, factor)| close(*factor, expected(i)));
    explained.then(|| {
        json!({
            "rope_type": "llama3",
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": high,
            "original_max_position_embeddings": context as u64,
        })
    })
}

/// `h` and `c` for `l = 1`, from points `(1/λ, s)` of the slope.
fn fit(slope: &[(f64, f64)]) -> Option<(f64, f64)> {
    const USUAL_HIGH: f64 = 4.0;
    let (&(u0, s0), &(u1, s1)) = (slope.first()?, slope.last()?);
    if slope.len() == 1 {
        // Any line through a single point computes the same: take the published `h`.
        return Some((USUAL_HIGH, ((s0 * (USUAL_HIGH - 1.0) + 1.0) / u0).round()));
    }
    let steepness = (s0 - s1) / (u0 - u1);
    let below = steepness * u0 - s0; // l/(h − l)
    Some((round_to(1.0 + 1.0 / below, 1e-2), (steepness / below).round()))
}

/// Equal but for the rounding of f32 arithmetic in the program that computed the factors.
fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-4 * b.abs()
}

fn round_to(value: f64, step: f64) -> f64 {
    // Dividing by 1/step, a whole number, leaves no noise behind.
    let per_unit = (1.0 / step).round();
    (value * per_unit).round() / per_unit
}

fn tensor_shape<'a>(file: &'a Gguf, name: &str) -> Result<&'a [usize]> {
    let missing = || Error::MissingTensor {
        path: file.path().to_path_buf(),
        tensor: name.to_owned(),
    };
    Ok(&file.tensor(name).ok_or_else(missing)?.shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(theta: f64, head_dim: u32, largest: f64, low: f64, high: f64, context: f64) -> Vec<f64> {
        let factor = |i: u32| {
            let wavelength = 2.0 * PI * theta.powf(2.0 * f64::from(i) / f64::from(head_dim));
            let smooth = (context / wavelength - low) / (high - low);
            f64::from((1.0 / ((1.0 - smooth.clamp(0.0, 1.0)) / largest + smooth.clamp(0.0, 1.0))) as f32)
        };
        (0..head_dim / 2).map(factor).collect()
    }

    #[test]
    fn llama3_numbers_are_found_again() {
        let check = |theta, head_dim, largest, high, context: u64| {
            let found = llama3_scaling(
                &factors(theta, head_dim, largest, 1.0, high, context as f64),
                theta,
                head_dim,
            );
            let expect = json!({"rope_type": "llama3", "factor": largest, "low_freq_factor": 1.0,
                "high_freq_factor": high, "original_max_position_embeddings": context});
            assert_eq!(found, Some(expect));
        };
        check(500_000.0, 128, 8.0, 4.0, 8192); // Llama 3.1 8B
        check(500_000.0, 64, 32.0, 4.0, 8192); // Llama 3.2 1B
        check(100_000.0, 128, 4.0, 8.0, 4096);
    }

    #[test]
    fn factors_of_one_scale_nothing() {
        assert_eq!(llama3_scaling(&[1.0; 32], 10_000.0, 64), Some(Json::Null));
    }

    #[test]
    fn err_factors_that_no_four_numbers_explain() {
        let mut odd = factors(500_000.0, 128, 8.0, 1.0, 4.0, 8192.0);
        odd[3] = 1.01;
        assert_eq!(llama3_scaling(&odd, 500_000.0, 128), None);
    }
}

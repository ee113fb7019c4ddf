//! The file layout of ANEMLL 0.3.x: embeddings, chunks of layers, head, and `meta.yaml`.
//!
//! Compatibility is by reading its host's code, not by running it.

use coreml_mil::{BuiltFunction, DType, Dim, FunctionBuilder, MAIN, Result, Tensor, TensorType};

use super::{common_inputs, logit_names, monolith::user_defined, state_inputs};
use crate::{
    graph::{Cache, Decoder},
    package::PlannedPackage,
    settings::Settings,
    weights::{WeightFormat, WeightPlan},
};

/// All packages: embeddings, chunks in order, head.
pub(crate) fn plan(decoder: &Decoder, settings: &Settings) -> Result<Vec<PlannedPackage>> {
    let mut packages = vec![embeddings(decoder, settings)?];
    for chunk_idx in 0..settings.chunks.len() {
        packages.push(chunk(decoder, settings, chunk_idx)?);
    }
    packages.push(lm_head(decoder, settings)?);
    Ok(packages)
}

/// `meta.yaml` and the `config.json` that ANEMLL's host reads (tokenizer class and model type).
///
/// The tokenizer's own files are copied beside them by the exporter, where the model folder has them.
pub(crate) fn companion_files(
    decoder: &Decoder,
    settings: &Settings,
    name: &str,
    tokenizer_class: &str,
) -> [(String, String); 2] {
    let bits = |format: WeightFormat| format.lut_bits().map_or("none".to_owned(), |bits| bits.to_string());
    let (lut, head_lut) = (bits(decoder.format), bits(decoder.format.of_head()));
    let prefix = prefix(decoder);
    let suffix = lut_suffix(decoder.format);
    let head_suffix = lut_suffix(decoder.format.of_head());
    let meta = format!(
        "model_info:
  name: {}
  version: 0.3.4
  description: {}
  license: see the model's own licence
  author: planish {}
  framework: Core ML
  language: Rust
  architecture: {}
  parameters:
    context_length: {}
    batch_size: {}
    lut_embeddings: none
    lut_ffn: {lut}
    lut_lmhead: {head_lut}
    num_chunks: {}
    model_prefix: {prefix}
    embeddings: {prefix}_embeddings.mlmodelc
    lm_head: {prefix}_lm_head{head_suffix}.mlmodelc
    ffn: {prefix}_FFN_PF{suffix}.mlmodelc
    split_lm_head: {}
",
        yaml_string(name),
        yaml_string(&format!("{name}, exported for Core ML")),
        env!("CARGO_PKG_VERSION"),
        decoder.model.config.family.model_type,
        settings.context,
        settings.prefill,
        settings.chunks.len(),
        settings.head_parts,
    );
    let config = serde_json::json!({
        "model_type": decoder.model.config.family.model_type,
        "tokenizer_class": tokenizer_class,
    });
    [
        ("meta.yaml".into(), meta),
        ("config.json".into(), format!("{config:#}\n")),
    ]
}

/// A YAML scalar in double quotes; JSON strings are YAML.
fn yaml_string(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn embeddings(decoder: &Decoder, settings: &Settings) -> Result<PlannedPackage> {
    let mut plan = WeightPlan::new();
    let mut b = FunctionBuilder::new();
    let tokens = if settings.prefill == 1 {
        Dim::Fixed(1)
    } else {
        Dim::Unknown
    };
    let ids = b.input(
        "input_ids",
        TensorType {
            dtype: DType::I32,
            dims: vec![Dim::Fixed(1), tokens],
        },
    )?;
    let x = decoder.embed(&mut b, &mut plan, &ids)?;
    let function = b.finish(&[("hidden_states", &x)])?;
    let name = format!("{}_embeddings.mlpackage", prefix(decoder));
    let mut package = package(
        decoder,
        settings,
        name,
        vec![(MAIN.to_owned(), function)],
        plan,
        "embeddings",
    );
    package.enumerated = vec![vec![1, 1], vec![1, settings.prefill]];
    Ok(package)
}

fn chunk(decoder: &Decoder, settings: &Settings, chunk_idx: usize) -> Result<PlannedPackage> {
    let mut plan = WeightPlan::new();
    let infer = chunk_function(decoder, settings, chunk_idx, 1, false, &mut plan)?;
    let prefill = chunk_function(decoder, settings, chunk_idx, settings.prefill, true, &mut plan)?;
    let count = settings.chunks.len();
    let name = format!(
        "{}_FFN_PF{}_chunk_{:02}of{count:02}.mlpackage",
        prefix(decoder),
        lut_suffix(decoder.format),
        chunk_idx + 1
    );
    let functions = vec![("infer".to_owned(), infer), ("prefill".to_owned(), prefill)];
    Ok(package(decoder, settings, name, functions, plan, "layers"))
}

/// The last chunk's `infer` ends with the final norm; its `prefill` returns one row only, whose value no host uses.
fn chunk_function(
    decoder: &Decoder,
    settings: &Settings,
    chunk_idx: usize,
    tokens: usize,
    prefill: bool,
    plan: &mut WeightPlan,
) -> Result<BuiltFunction> {
    let d = decoder.model.arch.hidden_size;
    let (first, stop) = settings.chunks[chunk_idx];
    let last = stop == decoder.model.layers.len();
    let mut b = FunctionBuilder::new();
    let x = b.input("hidden_states", TensorType::new(DType::F16, &[1, tokens, d]))?;
    let inputs = common_inputs(&mut b, tokens, decoder.context)?;
    let (position, state) = state_inputs(&mut b, decoder.cache_type())?;
    let cache = Cache::State {
        state: &state,
        position: &position,
    };
    let context = decoder.context(&mut b, plan, &inputs.positions, &inputs.mask, &cache)?;
    let (x, _) = decoder.layers(&mut b, plan, &x, &context, &cache, first..stop)?;
    let x = match (last, prefill) {
        (true, true) => b.slice(&x, &[0, 0, 0], &[1, 1, d])?,
        (true, false) => decoder.final_norm(&mut b, plan, &x)?,
        (false, _) => x,
    };
    b.finish(&[("output_hidden_states", &x)])
}

fn lm_head(decoder: &Decoder, settings: &Settings) -> Result<PlannedPackage> {
    let mut plan = WeightPlan::new();
    let mut b = FunctionBuilder::new();
    let x = b.input(
        "hidden_states",
        TensorType::new(DType::F16, &[1, 1, decoder.model.arch.hidden_size]),
    )?;
    let logits = decoder.logits(&mut b, &mut plan, &x)?;
    let names = logit_names(logits.len());
    let outputs: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&logits).collect();
    let function = b.finish(&outputs)?;
    let suffix = lut_suffix(decoder.format.of_head());
    let name = format!("{}_lm_head{suffix}.mlpackage", prefix(decoder));
    Ok(package(
        decoder,
        settings,
        name,
        vec![(MAIN.to_owned(), function)],
        plan,
        "head",
    ))
}

fn package(
    decoder: &Decoder,
    settings: &Settings,
    file_name: String,
    functions: Vec<(String, BuiltFunction)>,
    plan: WeightPlan,
    part: &str,
) -> PlannedPackage {
    let description = format!("{} decoder: {part}", decoder.model.config.family.model_type);
    let user_defined = user_defined(decoder, settings);
    PlannedPackage {
        file_name,
        functions,
        plan,
        enumerated: Vec::new(),
        description,
        user_defined,
    }
}

fn prefix(decoder: &Decoder) -> &'static str {
    let family = decoder.model.config.family;
    family.anemll.unwrap_or(family.model_type)
}

fn lut_suffix(format: WeightFormat) -> String {
    format.lut_bits().map_or(String::new(), |bits| format!("_lut{bits}"))
}

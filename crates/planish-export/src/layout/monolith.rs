//! One package from token ids to logits, for small models and for tests.

use std::collections::BTreeMap;

use coreml_mil::{BuiltFunction, DType, FunctionBuilder, Result, Tensor, TensorType};

use super::{common_inputs, logit_names, state_inputs};
use crate::{
    graph::{Cache, Decoder},
    package::PlannedPackage,
    settings::{CacheMode, Settings},
    weights::WeightPlan,
};

/// Functions `infer` (one token, the default) and `prefill`, and the same with an adapter where one is kept.
pub(crate) fn plan(decoder: &Decoder, settings: &Settings, file_name: &str) -> Result<PlannedPackage> {
    let mut plan = WeightPlan::new();
    let mut functions = Vec::new();
    let base = Decoder { kept: None, ..*decoder };
    for (name, tokens) in [("infer", 1), ("prefill", settings.prefill)] {
        functions.push((name.to_owned(), function(&base, settings, tokens, &mut plan)?));
    }
    if let Some((adapter, _)) = decoder.kept {
        for (name, tokens) in [("infer", 1), ("prefill", settings.prefill)] {
            functions.push((
                format!("{name}_{adapter}"),
                function(decoder, settings, tokens, &mut plan)?,
            ));
        }
    }
    Ok(PlannedPackage {
        file_name: file_name.into(),
        functions,
        plan,
        enumerated: Vec::new(),
        description: format!(
            "{} decoder, token ids to logits",
            decoder.model.config.family.model_type
        ),
        user_defined: user_defined(decoder, settings),
    })
}

fn function(decoder: &Decoder, settings: &Settings, tokens: usize, plan: &mut WeightPlan) -> Result<BuiltFunction> {
    let mut b = FunctionBuilder::new();
    let ids = b.input("input_ids", TensorType::new(DType::I32, &[1, tokens]))?;
    let host = settings.cache == CacheMode::Host;
    let columns = decoder.context + if host { tokens } else { 0 };
    let inputs = common_inputs(&mut b, tokens, columns)?;
    if host {
        let cache = b.input("kv_cache", decoder.cache_type())?;
        let cache = Cache::Host { cache: &cache };
        return body(&mut b, decoder, plan, &ids, &inputs, &cache).and_then(|(logits, new)| finish(b, logits, new));
    }
    let (position, state) = state_inputs(&mut b, decoder.cache_type())?;
    let cache = Cache::State {
        state: &state,
        position: &position,
    };
    body(&mut b, decoder, plan, &ids, &inputs, &cache).and_then(|(logits, new)| finish(b, logits, new))
}

fn body(
    b: &mut FunctionBuilder,
    decoder: &Decoder,
    plan: &mut WeightPlan,
    ids: &Tensor,
    inputs: &super::Inputs,
    cache: &Cache,
) -> Result<(Vec<Tensor>, Option<Tensor>)> {
    let x = decoder.embed(b, plan, ids)?;
    let context = decoder.context(b, plan, &inputs.positions, &inputs.mask, cache)?;
    let (x, new) = decoder.layers(b, plan, &x, &context, cache, 0..decoder.model.layers.len())?;
    let x = decoder.final_norm(b, plan, &x)?;
    Ok((decoder.logits(b, plan, &x)?, new))
}

fn finish(b: FunctionBuilder, logits: Vec<Tensor>, new: Option<Tensor>) -> Result<BuiltFunction> {
    let names = logit_names(logits.len());
    let mut outputs: Vec<(&str, &Tensor)> = names.iter().map(String::as_str).zip(&logits).collect();
    outputs.extend(new.iter().map(|new| ("new_kv", new)));
    b.finish(&outputs)
}

/// What a host may want to know without reading shapes.
pub(super) fn user_defined(decoder: &Decoder, settings: &Settings) -> BTreeMap<String, String> {
    let pairs = [
        ("planish.context_length", settings.context.to_string()),
        ("planish.batch_size", settings.prefill.to_string()),
        ("planish.head_parts", settings.head_parts.to_string()),
        ("planish.weights", decoder.format.name().to_owned()),
    ];
    pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

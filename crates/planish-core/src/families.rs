//! The model families that planish reads, one file each: from a `config.json` to an [`Arch`].
//!
//! A family's file knows the defaults of the Python package transformers, the names of the tensors, and what llama.cpp calls such a
//! model. Nothing outside this folder asks which family a model is of.

mod dense;
mod gemma;
mod gemma2;
mod gemma3;
mod granite;
mod llama;
mod ministral;
mod mistral;
mod olmo2;
mod olmo3;
mod qwen2;
mod qwen3;
mod smollm3;

use crate::arch::Arch;
use crate::model_config::keys::Keys;
use crate::{Result, suggest};

/// Every family.
pub static ALL: [&Family; 13] = [
    &gemma::FAMILY,
    &gemma2::FAMILY,
    &gemma3::TEXT,
    &gemma3::WITH_VISION,
    &granite::FAMILY,
    &llama::FAMILY,
    &ministral::FAMILY,
    &mistral::FAMILY,
    &olmo2::FAMILY,
    &olmo3::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &smollm3::FAMILY,
];

/// A family of models that one reader understands.
#[derive(Debug)]
pub struct Family {
    /// The word that `config.json` has under `model_type`.
    pub model_type: &'static str,
    /// Class of the Python package transformers.
    pub class: &'static str,
    /// How GGUF files hold such models; `None` = not exchanged with GGUF.
    pub gguf: Option<Gguf>,
    /// What ANEMLL's file names begin with; `None` = it has no such models.
    pub anemll: Option<&'static str>,
    /// The model's keys are those of `text_config`, beside other parts of a larger model.
    pub(crate) is_nested: bool,
    /// Patterns for the tensors of those other parts, which are not read.
    pub other_parts: &'static [&'static str],
    /// From the keys to the architecture and the longest context.
    pub(crate) read: fn(&Keys<'_>) -> Result<(Arch, usize)>,
}

/// A family's form in GGUF files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gguf {
    /// `general.architecture`, which is also the first part of its metadata keys.
    pub architecture: &'static str,
    /// Whether the rows of q and k are stored in rope's interleaved order.
    pub permutes_query_and_key: bool,
    /// Whether llama.cpp reads biases of the attention's projections.
    pub reads_attention_biases: bool,
}

/// Families are told apart by their word.
impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl Family {
    /// The family that a GGUF file of this architecture is read as: the first one, since some share a word.
    pub fn of_gguf(architecture: &str) -> Option<(&'static Self, Gguf)> {
        let form = |family: &&'static Self| {
            Some((*family, family.gguf?)).filter(|(_, gguf)| gguf.architecture == architecture)
        };
        ALL.iter().find_map(form)
    }
}

/// The family that a configuration names.
pub(crate) fn of(root: &Keys<'_>) -> Result<&'static Family> {
    let known = || ALL.map(|family| family.model_type);
    let Some(name) = root.text("model_type")? else {
        return Err(root.missing("model_type", &known().join(", ")));
    };
    let Some(family) = ALL.into_iter().find(|family| family.model_type == name) else {
        let near = suggest::nearest(name, known());
        let hint = near.map(|near| format!(" (nearest: {near})")).unwrap_or_default();
        return Err(root.unsupported("model_type", &format!("planish has {}{hint}", known().join(", "))));
    };
    let architectures = root.present("architectures").and_then(|value| value.as_array());
    let mut classes = architectures
        .into_iter()
        .flatten()
        .map(|name| name.as_str().unwrap_or_default());
    let is_fit = |name: &str| name.ends_with("ForCausalLM") || name == family.class;
    if architectures.is_some_and(|names| !names.is_empty()) && !classes.any(is_fit) {
        return Err(root.unsupported("architectures", "only causal language models (…ForCausalLM)"));
    }
    Ok(family)
}

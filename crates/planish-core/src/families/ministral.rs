//! Ministral 8B of October 2024: Mistral with a window in some layers, as `layer_types` says.

use super::Family;
use super::mistral::read;

pub(super) static FAMILY: Family = Family {
    model_type: "ministral",
    class: "MinistralForCausalLM",
    gguf: None,
    anemll: None,
    is_nested: false,
    other_parts: &[],
    read,
};

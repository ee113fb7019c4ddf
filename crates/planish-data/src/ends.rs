//! Ends of text in a model's `generation_config.json`, so that other programs stop where this one does.

use std::collections::BTreeSet;

use serde_json::{Value, json};

/// A `generation_config.json` in which generation ends at these ids too, those it names first; nothing where it names
/// all of them already.
///
/// `eos_token_id` becomes a list. The ids are the tokenizer's ends ([`Tokenizer::eos_ids`](crate::Tokenizer::eos_ids)) and
/// the end of an assistant's turn ([`ChatTemplate::turn_end`](crate::ChatTemplate::turn_end)); without the latter a model
/// that was trained on conversations goes on past its answer wherever the file decides.
///
/// ```
/// use serde_json::json;
/// let with = planish_data::with_end_tokens(Some(&json!({"eos_token_id": 0, "top_p": 0.9})), [2, 0]);
/// assert_eq!(with, Some(json!({"eos_token_id": [0, 2], "top_p": 0.9})));
/// assert_eq!(planish_data::with_end_tokens(with.as_ref(), [2]), None);
/// ```
pub fn with_end_tokens(generation_config: Option<&Value>, ids: impl IntoIterator<Item = u32>) -> Option<Value> {
    let mut config = generation_config
        .filter(|config| config.is_object())
        .cloned()
        .unwrap_or_else(|| json!({}));
    let mut named: Vec<u64> = match config.get("eos_token_id") {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(id) => id.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    let before = named.len();
    let wanted: BTreeSet<u64> = ids.into_iter().map(u64::from).collect();
    named.extend(wanted.into_iter().filter(|id| !named.contains(id)).collect::<Vec<_>>());
    if named.len() == before {
        return None;
    }
    config["eos_token_id"] = json!(named);
    Some(config)
}

//! Any bytes as a `tokenizer_config.json` or a chat template, rendering one fixed conversation.
#![no_main]

use libfuzzer_sys::fuzz_target;
use planish_data::{ChatTemplate, TemplateOptions, Tokenizer};
use serde_json::json;

const TOKENIZER: &[u8] = include_bytes!("../../crates/planish-data/tests/it/fixtures/tiny/tokenizer.json");

fuzz_target!(|bytes: &[u8]| {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let config = serde_json::from_str(source).unwrap_or(json!({ "chat_template": source }));
    let Ok(tokenizer) = Tokenizer::from_parts("tokenizer.json".as_ref(), TOKENIZER, Some(&config), None, None) else {
        return;
    };
    let template = ChatTemplate::from_config(&config, "fuzz", &tokenizer, &TemplateOptions::default());
    if let Ok(Some(template)) = template {
        let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
        let _ = template.render(&messages, None, true);
    }
});

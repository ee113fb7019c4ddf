//! Entry points for the fuzz targets.

use std::path::Path;

use crate::Tokenizer;

/// Lets panics that are caught at the border to the tokenizers crate pass, and gives all others to the hook there was.
pub fn quiet_where_guarded() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !crate::guard::is_guarded() {
            hook(info);
        }
    }));
}

/// Any bytes as a `tokenizer.json`, or two files with a zero byte between them: that one and a `tokenizer_config.json`
/// that serves as every configuration. Byte ranges of what it encodes must lie inside the text.
pub fn tokenizer(bytes: &[u8]) {
    let (json, config) = match bytes.iter().position(|byte| *byte == 0) {
        Some(at) => (&bytes[..at], serde_json::from_slice(&bytes[at + 1..]).ok()),
        None => (bytes, None),
    };
    let config = config.as_ref();
    let Ok(tokenizer) = Tokenizer::from_parts(Path::new("tokenizer.json"), json, config, config, config) else {
        return;
    };
    let text = "a <s>b\n é🙂 12";
    let mut ids: Vec<u32> = (0..9).collect();
    for encoded in [tokenizer.encode(text), tokenizer.encode_text(text)]
        .into_iter()
        .flatten()
    {
        assert_eq!(encoded.ids.len(), encoded.ranges.len());
        assert!(
            encoded.ranges.iter().all(|range| text.get(range.clone()).is_some()),
            "{encoded:?}"
        );
        ids.extend(encoded.ids);
    }
    let _ = (tokenizer.decode(&ids), tokenizer.decode_all(&ids));
    let mut stream = tokenizer.stream();
    for id in ids {
        let _ = stream.push(id);
    }
    let _ = stream.finish();
}

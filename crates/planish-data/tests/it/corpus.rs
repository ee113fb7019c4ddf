//! The fuzzer's inputs, on stable Rust: whatever a file holds, the answer is data or an error, never a panic.

use planish_data::{
    ChatTemplate, DataOptions, Dataset, OnPrefixViolation, OnRowError, Overlong, TemplateOptions, Tokenizer, Train,
};
use serde_json::json;

use crate::support::{chatml, corpus, file, fixture, tokenizer};

#[test]
fn rows_of_the_corpus_give_data_or_an_error() {
    let tokenizer = tokenizer();
    let template = chatml(&tokenizer);
    let options = [
        DataOptions::default(),
        DataOptions {
            errors: OnRowError::Skip,
            on_prefix_violation: OnPrefixViolation::Unroll,
            max_seq_length: 3,
            overlong: Some(Overlong::Truncate),
            train: Train::Everything,
            ..DataOptions::default()
        },
        DataOptions {
            train: Train::MlxLm { mask_prompt: true },
            ..DataOptions::default()
        },
    ];
    let mut refused = 0;
    for entry in std::fs::read_dir(corpus("jsonl")).unwrap() {
        let path = entry.unwrap().path();
        for options in &options {
            match Dataset::load(&path, &tokenizer, Some(&template), options) {
                Ok((data, report)) => {
                    assert!(!data.is_empty() && report.targets > 0 || matches!(options.train, Train::MlxLm { .. }));
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.to_string().is_empty());
                }
            }
        }
    }
    assert!(
        refused > 60,
        "the corpus holds broken files, and they are told from good ones"
    );
}

#[test]
fn templates_of_the_corpus_give_text_or_an_error() {
    let bytes = std::fs::read(fixture("tiny/tokenizer.json")).unwrap();
    let row =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let row = file(row);
    for entry in std::fs::read_dir(corpus("chat_template")).unwrap() {
        let source = String::from_utf8_lossy(&std::fs::read(entry.unwrap().path()).unwrap()).into_owned();
        // As a whole configuration, and as the template alone.
        let config = serde_json::from_str(&source).unwrap_or(json!({ "chat_template": source }));
        let Ok(tokenizer) = Tokenizer::from_parts("x".as_ref(), &bytes, Some(&config), None, None) else {
            continue;
        };
        let template = ChatTemplate::from_config(&config, "x", &tokenizer, &TemplateOptions::default());
        if let Ok(Some(template)) = template {
            let _ = Dataset::load(&row.path, &tokenizer, Some(&template), &DataOptions::default());
        }
    }
}

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

#[test]
fn tokenizers_of_the_corpus_give_tokens_or_an_error() {
    for entry in std::fs::read_dir(corpus("tokenizer")).unwrap() {
        planish_data::fuzzing::tokenizer(&std::fs::read(entry.unwrap().path()).unwrap());
    }
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// A good file with a few bytes changed, doubled or cut: near enough to pass the first checks.
    fn damaged() -> impl Strategy<Value = Vec<u8>> {
        let good = r#"{"messages": [{"role": "user", "content": "a é🙂"}, {"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1e5, "\ud83d\ude00"]}}}]}], "auth_weight": 0.5, "prov_entropy": 1.0}
{"text": "plain", "evidence": [{"kind": "patent", "count": 2}]}
"#;
        let change = (
            0..good.len(),
            prop_oneof![
                any::<u8>().boxed(),
                prop::sample::select(b"{}[]\",:\\ue0n".to_vec()).boxed()
            ],
        );
        (prop::collection::vec(change, 0..6), 0..good.len()).prop_map(move |(changes, cut)| {
            let mut bytes = good.as_bytes().to_vec();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            bytes.rotate_left(cut * usize::from(cut % 3 == 0));
            bytes
        })
    }

    fn jinja() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "{{",
            "}}",
            "{%",
            "%}",
            "{#",
            "#}",
            " messages",
            "[",
            "0",
            "-1",
            "]",
            ".content",
            " | tojson",
            "(indent=",
            "3",
            ")",
            " for m in messages",
            " endfor",
            " if m",
            " endif",
            " set x = ",
            " 'a'",
            " + ",
            " ~ ",
            " * ",
            "9999",
            " strftime_now('%Y')",
            " raise_exception('e')",
            " generation ",
            " endgeneration ",
            "\n",
            "é",
            " is iterable",
            ".split('a')",
            "[::-1]",
            " namespace(a=1)",
        ]);
        prop::collection::vec(piece, 0..25).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn prop_damaged_files_are_data_or_an_error(bytes in damaged()) {
            let tokenizer = tokenizer();
            let template = chatml(&tokenizer);
            let file = file(bytes);
            for errors in [OnRowError::Stop, OnRowError::Skip] {
                let options = DataOptions { errors, max_seq_length: 12, ..DataOptions::default() };
                if let Ok((data, report)) = Dataset::load(&file.path, &tokenizer, Some(&template), &options) {
                    prop_assert!(report.targets > 0 && !data.is_empty());
                }
            }
        }

        #[test]
        fn prop_any_template_gives_text_or_an_error(source in jinja()) {
            let tokenizer = tokenizer();
            if let Ok(template) = ChatTemplate::from_source(&source, "x", &tokenizer, &TemplateOptions::default()) {
                let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
                let _ = template.render(&messages, None, true);
            }
        }
    }
}

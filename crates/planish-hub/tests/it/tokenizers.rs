//! Rebuilt tokenizers against the originals (`goldens/make_tokens.py`), both run by the crate `tokenizers`.

use std::path::Path;

use planish_core::model_config::ModelConfig;
use planish_hub::Error;
use planish_hub::gguf::tokenizer::{from_gguf, to_gguf};
use planish_hub::gguf::{Array, Gguf, Metadata, Value, write};
use serde_json::{Value as Json, json};
use tokenizers::{NormalizedString, Normalizer, PreTokenizedString, PreTokenizer, Tokenizer};

use crate::gguf_goldens::{golden, read_json};
use crate::package::cached_smollm2;

fn load(tokenizer: &Json) -> Tokenizer {
    Tokenizer::from_bytes(tokenizer.to_string()).unwrap()
}

/// A file with a five-token vocabulary, and `extra` pairs over the ordinary ones.
fn small_file(dir: &Path, extra: &[(&str, Value)]) -> Gguf {
    let texts = |list: &[&str]| Value::Array(Array::String(list.iter().map(|t| (*t).to_owned()).collect()));
    let mut pairs = vec![
        ("tokenizer.ggml.model", Value::from("gpt2")),
        ("tokenizer.ggml.pre", Value::from("smollm")),
        ("tokenizer.ggml.tokens", texts(&["a", "b", "ab", "<s>", "</s>"])),
        (
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(vec![1, 1, 1, 3, 3])),
        ),
        ("tokenizer.ggml.merges", texts(&["a b"])),
        ("tokenizer.ggml.bos_token_id", Value::U32(3)),
        ("tokenizer.ggml.eos_token_id", Value::U32(4)),
    ];
    for (key, value) in extra {
        pairs.retain(|(k, _)| k != key);
        pairs.push((key, value.clone()));
    }
    let pairs: Vec<_> = pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    let path = dir.join("small.gguf");
    write(&path, &pairs, &[], |_| unreachable!("there are no tensors")).unwrap();
    Gguf::open(&path).unwrap()
}

fn ids_match(tokenizer: &Tokenizer, goldens: &Json) {
    let (strings, ids) = (
        goldens["strings"].as_array().unwrap(),
        goldens["ids"].as_array().unwrap(),
    );
    assert_eq!(strings.len(), 40);
    for (text, expect) in strings.iter().zip(ids) {
        let found = tokenizer.encode(text.as_str().unwrap(), true).unwrap();
        assert_eq!(&json!(found.get_ids()), expect, "{text}");
        let back = tokenizer.decode(found.get_ids(), false).unwrap();
        assert_eq!(back, text.as_str().unwrap(), "decoded");
    }
}

#[test]
fn golden_tiny_tokenizer_gives_the_ids_of_the_original() {
    let file = Gguf::open(&golden("tiny_tokenizer.gguf")).unwrap();
    let tokenizer = load(&from_gguf(file.metadata(), 512).unwrap().tokenizer);
    ids_match(&tokenizer, &read_json(golden("tiny_tokens.json")));
}

#[test]
fn parity_smollm2_ids_on_forty_awkward_strings() {
    let Some(path) = cached_smollm2() else { return };
    let file = Gguf::open(&path).unwrap();
    let tokenizer = load(&from_gguf(file.metadata(), 8192).unwrap().tokenizer);
    ids_match(&tokenizer, &read_json(golden("smollm2_tokens.json")));
}

#[test]
fn golden_text_is_cut_as_by_the_original() {
    let goldens = read_json(golden("pieces.json"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["llama-bpe", "qwen2", "tekken"] {
        let file = small_file(dir.path(), &[("tokenizer.ggml.pre", Value::from(name))]);
        let tokenizer = load(&from_gguf(file.metadata(), 512).unwrap().tokenizer);
        for (text, expect) in goldens["strings"]
            .as_array()
            .unwrap()
            .iter()
            .zip(goldens[name].as_array().unwrap())
        {
            let mut normal = NormalizedString::from(text.as_str().unwrap());
            if let Some(normalizer) = tokenizer.get_normalizer() {
                normalizer.normalize(&mut normal).unwrap();
            }
            let mut cut = PreTokenizedString::from(normal.get());
            tokenizer.get_pre_tokenizer().unwrap().pre_tokenize(&mut cut).unwrap();
            let offsets = tokenizers::OffsetType::Byte;
            let splits = cut.get_splits(tokenizers::OffsetReferential::Normalized, offsets);
            let pieces: Vec<_> = splits.into_iter().map(|(piece, ..)| piece).collect();
            assert_eq!(&json!(pieces), expect, "{name}: {text}");
        }
    }
}

#[test]
fn beginning_and_end_are_added_as_the_file_says() {
    let check = |extra: &[(&str, Value)], expect: &[u32]| {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = load(
            &from_gguf(small_file(dir.path(), extra).metadata(), 512)
                .unwrap()
                .tokenizer,
        );
        assert_eq!(tokenizer.encode("ab", true).unwrap().get_ids(), expect, "{extra:?}");
    };
    let (bos, eos) = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token");
    let llama3 = ("tokenizer.ggml.pre", Value::from("llama-bpe"));
    check(&[], &[2]);
    check(&[(bos, Value::Bool(true))], &[3, 2]);
    check(&[(bos, Value::Bool(true)), (eos, Value::Bool(true))], &[3, 2, 4]);
    check(std::slice::from_ref(&llama3), &[3, 2]);
    check(&[llama3, (bos, Value::Bool(false))], &[2]);
}

#[test]
fn err_tokenizers_that_cannot_be_carried_over() {
    let check = |key: &str, value: Value, expect: &str| {
        let dir = tempfile::tempdir().unwrap();
        let error = from_gguf(small_file(dir.path(), &[(key, value)]).metadata(), 512)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expect) && error.contains("small.gguf"), "{error}");
    };
    let texts = |list: &[&str]| Value::Array(Array::String(list.iter().map(|t| (*t).to_owned()).collect()));
    check(
        "tokenizer.ggml.model",
        Value::from("llama"),
        "tokenizer.ggml.model = \"llama\"",
    );
    check(
        "tokenizer.ggml.pre",
        Value::from("deepseek-coder"),
        "\"deepseek-coder\"",
    );
    check("tokenizer.ggml.pre", Value::U32(1), "expected a string");
    check(
        "tokenizer.ggml.token_type",
        Value::Array(Array::I32(vec![1, 1, 1, 3])),
        "token_type",
    );
    check(
        "tokenizer.ggml.token_type",
        Value::Array(Array::I32(vec![1, 1, 1, 3, 6])),
        "token 4 has the type 6",
    );
    check(
        "tokenizer.ggml.tokens",
        texts(&["a", "b", "ab", "a", "</s>"]),
        "\"a\" appears as 0 and as 3",
    );
    check("tokenizer.ggml.merges", texts(&["b a"]), "merge 0");
    check(
        "tokenizer.ggml.eos_token_id",
        Value::U32(5),
        "the vocabulary has 5 tokens",
    );
    check("tokenizer.ggml.add_space_prefix", Value::Bool(true), "add_space_prefix");
}

/// A folder with the tokenizer of [`small_file`], its `tokenizer.json` changed by `edit`.
fn folder(dir: &Path, edit: impl FnOnce(&mut Json)) -> ModelConfig {
    let made = from_gguf(small_file(dir, &[]).metadata(), 512).unwrap();
    let mut tokenizer = made.tokenizer;
    edit(&mut tokenizer);
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), Json::Object(made.config).to_string()).unwrap();
    let config = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 6, "eos_token_id": [4, 3]}"#;
    ModelConfig::from_json_str(config, "config.json".as_ref()).unwrap()
}

fn exported(edit: impl FnOnce(&mut Json)) -> Result<Metadata, Error> {
    let dir = tempfile::tempdir().unwrap();
    let config = folder(dir.path(), edit);
    let made = to_gguf(dir.path(), &config)?;
    let path = dir.path().join("out.gguf");
    write(&path, &made.metadata, &[], |_| unreachable!("there are no tensors")).unwrap();
    Ok(Gguf::open(&path).unwrap().metadata().clone())
}

#[test]
fn rows_without_a_token_and_further_ends_are_stored() {
    let metadata = exported(|_| {}).unwrap();
    assert_eq!(metadata.texts("tokenizer.ggml.tokens").unwrap().unwrap()[5], "[PAD5]");
    assert_eq!(
        metadata.get("tokenizer.ggml.token_type"),
        Some(&Value::Array(Array::I32(vec![1, 1, 1, 3, 3, 5])))
    );
    assert_eq!(metadata.whole("tokenizer.ggml.eos_token_id").unwrap(), Some(4));
    assert_eq!(metadata.whole("tokenizer.ggml.eot_token_id").unwrap(), Some(3));
    assert_eq!(metadata.flag("tokenizer.ggml.add_bos_token").unwrap(), Some(false));
}

#[test]
fn forms_that_published_tokenizers_have_are_read() {
    let metadata = exported(|t| {
        t["model"]["merges"] = json!(["a b"]);
        t["model"]["continuing_subword_prefix"] = json!("");
        t["model"].as_object_mut().unwrap().remove("ignore_merges");
        t["normalizer"] = json!({"type": "Sequence", "normalizers": []});
        t["post_processor"] = json!({"type": "Sequence", "processors": [
            {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true},
            {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
        ]});
    })
    .unwrap();
    assert_eq!(metadata.texts("tokenizer.ggml.merges").unwrap().unwrap(), ["a b"]);
    assert_eq!(metadata.flag("tokenizer.ggml.add_bos_token").unwrap(), Some(true));
}

#[test]
fn err_exports_that_would_change_the_ids() {
    let check = |edit: fn(&mut Json), expect: &str| {
        let error = exported(edit).unwrap_err();
        assert!(
            matches!(error, Error::UnsupportedTokenizer { .. }) && error.to_string().contains(expect),
            "{error}"
        );
    };
    check(|t| t["model"]["type"] = json!("Unigram"), "Unigram");
    check(
        |t| t["pre_tokenizer"]["pretokenizers"][0] = json!({"type": "Whitespace"}),
        "Whitespace",
    );
    check(|t| t["normalizer"] = json!({"type": "Lowercase"}), "normalizer");
    check(|t| t["model"]["ignore_merges"] = json!(true), "ignore_merges");
    check(|t| t["model"]["byte_fallback"] = json!(true), "byte_fallback");
    check(|t| t["added_tokens"][0]["lstrip"] = json!(true), "lstrip");
    check(|t| t["added_tokens"][0]["id"] = json!(99), "99");
    check(|t| t["model"]["vocab"]["b"] = json!(0), "id 0");
    check(
        |t| t["post_processor"] = json!({"type": "BertProcessing"}),
        "BertProcessing",
    );
    let other_token = |t: &mut Json| {
        t["post_processor"] = json!({"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
    };
    check(other_token, "expected the bos token");
}

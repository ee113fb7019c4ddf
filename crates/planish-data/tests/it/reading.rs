use std::fmt::Write as _;

use planish_data::{
    DataOptions, Dataset, Error, FieldNames, Format, MissingProvenance, OnRowError, Overlong, RowErrorKind, Scoring,
    Splits, Train,
};
use serde_json::{Value, json};

use crate::support::{chat, chatml, file, fixture, load, rows, tokenizer, trained_text, turn};

fn text(text: &str) -> Value {
    json!({"text": text})
}

/// Every message of a refused file, with the directory taken out.
fn refusal(bytes: impl AsRef<[u8]>, options: &DataOptions) -> String {
    let file = file(bytes);
    let error = load(&file, options).unwrap_err().to_string();
    error.replace(&format!("{}/", file.path.parent().unwrap().display()), "")
}

#[test]
fn each_format_is_inferred_and_remapped() {
    let check = |row: Value, expect: Format| {
        let (data, report) = load(&rows(&[row.clone(), row]), &DataOptions::default()).unwrap();
        assert_eq!((data.format(), report.format, report.duplicates), (expect, expect, 1));
    };
    check(text("one"), Format::Text);
    check(json!({"prompt": "a", "completion": "b"}), Format::Completions);
    check(chat(&[("user", "a"), ("assistant", "b")]), Format::Chat);
    check(
        json!({"messages": [turn("user", "a"), turn("assistant", "b")], "tools": [{"name": "f"}]}),
        Format::Tools,
    );
    check(
        json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        Format::Preference,
    );

    let options = DataOptions {
        fields: FieldNames {
            prompt: "question".into(),
            completion: "answer".into(),
            ..FieldNames::default()
        },
        ..DataOptions::default()
    };
    let (data, report) = load(&rows(&[json!({"question": "a", "answer": "b", "id": 7})]), &options).unwrap();
    assert_eq!(trained_text(&data, 0, &tokenizer()), "b<|im_end|>");
    assert_eq!(report.remarks[0].text, "nothing reads the field \"id\"");
}

#[test]
fn chat_rows_with_and_without_tools_are_one_chat_file() {
    let plain = chat(&[("user", "a"), ("assistant", "b")]);
    let mut with_tools = plain.clone();
    with_tools["tools"] = json!([{"name": "f"}]);
    for pair in [[plain.clone(), with_tools.clone()], [with_tools, plain]] {
        assert_eq!(
            load(&rows(&pair), &DataOptions::default()).unwrap().1.format,
            Format::Chat
        );
        let options = DataOptions {
            format: Some(Format::Tools),
            ..DataOptions::default()
        };
        assert!(
            load(&rows(&pair), &options)
                .unwrap_err()
                .to_string()
                .contains("the field \"tools\" is missing")
        );
    }
}

#[test]
fn err_mixed_file_names_line_and_types() {
    let bytes = "{\"text\": \"a\"}\n{\"text\": \"b\"}\n{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    for errors in [OnRowError::Stop, OnRowError::Skip] {
        let options = DataOptions {
            errors,
            ..DataOptions::default()
        };
        assert_eq!(
            refusal(bytes, &options),
            "train.jsonl:3:1: this row is of type completions, line 1 is of type text. Fix: keep rows of one type in a file"
        );
    }
}

/// Broken rows and their messages, to the letter: place, field, found, expected, way out.
#[test]
fn golden_messages_of_broken_files() {
    let golden = std::fs::read_to_string(fixture("messages.txt")).unwrap();
    let mut ours = String::new();
    for (name, bytes) in broken_files() {
        writeln!(ours, "# {name}\n{}\n", refusal(&bytes, &DataOptions::default())).unwrap();
    }
    if std::env::var_os("PLANISH_WRITE_GOLDENS").is_some() {
        write_corpus();
        std::fs::write(fixture("messages.txt"), &ours).unwrap();
    }
    assert_eq!(
        ours, golden,
        "PLANISH_WRITE_GOLDENS=1 writes the file anew; read it before committing"
    );
}

fn broken_files() -> Vec<(&'static str, Vec<u8>)> {
    let chat_with = |turn: &str| format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"a\"}}, {turn}]}}\n");
    let deep = format!(
        "{{\"text\": \"a\", \"x\": {}{}}}\n",
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    let named: Vec<(&'static str, String)> = vec![
        ("empty file", String::new()),
        ("blank lines only", "\n \n\r\n".into()),
        ("not JSON", "hello\n".into()),
        ("not an object", "[1, 2]\n".into()),
        ("trailing comma", "{\"text\": \"a\",}\n".into()),
        ("two objects in a line", "{\"text\": \"a\"} {\"text\": \"b\"}\n".into()),
        ("second line broken", "{\"text\": \"a\"}\n{\"text\": \"b\n".into()),
        ("cut off", "{\"text\": \"a\"}\n{\"text\": \"b".into()),
        ("duplicate key", "{\"text\": \"a\", \"text\": \"b\"}\n".into()),
        (
            "duplicate key inside",
            chat_with("{\"role\": \"assistant\", \"role\": \"user\", \"content\": \"b\"}"),
        ),
        ("lone surrogate", "{\"text\": \"\\ud83d\"}\n".into()),
        ("lone low surrogate", "{\"text\": \"\\ude00\"}\n".into()),
        (
            "not a number",
            "{\"text\": \"a\", \"auth_weight\": NaN, \"prov_entropy\": 1}\n".into(),
        ),
        (
            "infinite number",
            "{\"text\": \"a\", \"auth_weight\": 1e999, \"prov_entropy\": 1}\n".into(),
        ),
        ("nested too deep", deep),
        ("no known field", "{\"body\": \"a\"}\n".into()),
        ("no field", "{}\n".into()),
        ("fields of two formats", "{\"text\": \"a\", \"messages\": []}\n".into()),
        ("text is null", "{\"text\": null}\n".into()),
        ("text is empty", "{\"text\": \"\"}\n".into()),
        ("messages is a string", "{\"messages\": \"a\"}\n".into()),
        ("messages is empty", "{\"messages\": []}\n".into()),
        ("message is a string", "{\"messages\": [\"a\"]}\n".into()),
        ("role is missing", chat_with("{\"content\": \"b\"}")),
        (
            "role is unknown",
            chat_with("{\"role\": \"critic\", \"content\": \"b\"}"),
        ),
        (
            "content is null",
            chat_with("{\"role\": \"assistant\", \"content\": null}"),
        ),
        ("content is missing", chat_with("{\"role\": \"assistant\"}")),
        (
            "content holds an image",
            chat_with("{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}"),
        ),
        (
            "train is a string",
            chat_with("{\"role\": \"assistant\", \"content\": \"b\", \"train\": \"yes\"}"),
        ),
        (
            "no assistant turn",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n".into(),
        ),
        (
            "arguments are no object",
            chat_with(
                "{\"role\": \"assistant\", \"tool_calls\": [{\"function\": {\"name\": \"f\", \"arguments\": \"x\"}}]}",
            ),
        ),
        (
            "tools is an object",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": {}}\n".into(),
        ),
        (
            "completion is empty",
            "{\"prompt\": \"a\", \"completion\": \"\"}\n".into(),
        ),
        (
            "completion is a list",
            "{\"prompt\": \"a\", \"completion\": [1]}\n".into(),
        ),
        (
            "equal pair",
            "{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"b\"}\n".into(),
        ),
        (
            "pair of two kinds",
            "{\"chosen\": \"b\", \"rejected\": [{\"role\": \"assistant\", \"content\": \"c\"}]}\n".into(),
        ),
        (
            "authority out of range",
            "{\"text\": \"a\", \"auth_weight\": 1.0, \"prov_entropy\": 1}\n".into(),
        ),
        (
            "entropy below zero",
            "{\"text\": \"a\", \"auth_weight\": 0.5, \"prov_entropy\": -1}\n".into(),
        ),
        (
            "half of the distrust fields",
            "{\"text\": \"a\", \"auth_weight\": 0.5}\n".into(),
        ),
        (
            "distrust fields in some rows",
            "{\"text\": \"a\", \"auth_weight\": 0.5, \"prov_entropy\": 1}\n{\"text\": \"b\"}\n".into(),
        ),
        (
            "unknown evidence",
            "{\"text\": \"a\", \"auth_weight\": 0.5, \"evidence\": [{\"kind\": \"rumour\"}]}\n".into(),
        ),
        (
            "wide characters before the fault",
            "{\"é漢🙂\": 1, \"text\": 5}\n".into(),
        ),
    ];
    let mut all: Vec<(&'static str, Vec<u8>)> = named
        .into_iter()
        .map(|(name, text)| (name, text.into_bytes()))
        .collect();
    all.push(("not UTF-8", b"{\"text\": \"caf\xe9\"}\n".to_vec()));
    all.push((
        "UTF-16",
        "\u{feff}{\"text\": \"a\"}\n"
            .encode_utf16()
            .flat_map(u16::to_le_bytes)
            .collect(),
    ));
    all.push(("zero bytes", vec![0; 64]));
    all
}

/// The same files begin the fuzzer's corpus.
fn write_corpus() {
    let dir = crate::support::corpus("jsonl");
    for (name, bytes) in broken_files() {
        std::fs::write(dir.join(name.replace(' ', "-")), bytes).unwrap();
    }
}

#[test]
fn marks_and_line_ends_are_passed_over_and_counted() {
    let bytes = b"\xef\xbb\xbf{\"text\": \"one\"}\r\n\r\n{\"text\": \"two\"}\r\n   \n{\"text\": \"three\"}";
    let (data, report) = load(&file(bytes), &DataOptions::default()).unwrap();
    assert_eq!((report.rows, report.blank_lines, report.crlf_lines), (3, 2, 3));
    assert_eq!(report.byte_order_marks, 1);
    assert_eq!(
        data.examples().iter().map(|example| example.line).collect::<Vec<_>>(),
        [1, 3, 5]
    );
    assert_eq!(
        trained_text(&data, 1, &tokenizer()),
        trained_text(
            &load(&rows(&[text("two")]), &DataOptions::default()).unwrap().0,
            0,
            &tokenizer()
        )
    );
    let said = report.warnings().join("\n");
    for word in ["byte-order mark", "2 blank lines", "3 lines end with carriage return"] {
        assert!(said.contains(word), "{said}");
    }
}

#[test]
fn errors_stop_after_twenty_or_are_skipped_and_counted() {
    let bad = "{\"text\": 5}\n".repeat(30);
    let Err(Error::Rows(errors)) = load(&file(&bad), &DataOptions::default()) else {
        panic!("refused")
    };
    assert_eq!(
        errors.iter().map(|error| error.line).collect::<Vec<_>>(),
        (1..=20).collect::<Vec<_>>()
    );

    let skip = DataOptions {
        errors: OnRowError::Skip,
        ..DataOptions::default()
    };
    let good: String = (0..57)
        .map(|index| format!("{{\"text\": \"row {index}\"}}\n"))
        .collect();
    let (data, report) = load(&file(format!("{good}{{\"text\": 5}}\nxx\n{{\"text\": 6}}\n")), &skip).unwrap();
    assert_eq!((data.len(), report.rows, report.skipped.len()), (57, 60, 3));
    assert_eq!(
        report.skipped_by_kind().into_iter().collect::<Vec<_>>(),
        [(RowErrorKind::Json, 1), (RowErrorKind::WrongType, 2)]
    );
    let mut listed = Vec::new();
    report.write_skipped(&mut listed).unwrap();
    let first: Value = serde_json::from_slice(listed.split(|byte| *byte == b'\n').next().unwrap()).unwrap();
    assert_eq!(
        (&first["line"], &first["kind"], &first["field"]),
        (&json!(58), &json!("wrong-type"), &json!("text"))
    );

    let too_many = load(&file(format!("{good}{}", "{\"text\": 5}\n".repeat(4))), &skip);
    assert!(
        matches!(
            too_many,
            Err(Error::TooManySkipped {
                skipped: 4,
                rows: 61,
                ..
            })
        ),
        "4 of 61 are more than 5 %"
    );
}

#[test]
fn a_line_above_the_limit_is_named_without_being_held() {
    let mut bytes = b"{\"text\": \"".to_vec();
    bytes.resize(100 << 20, b'x');
    bytes.extend_from_slice(b"\"}\n{\"text\": \"short\"}\n");
    let file = file(&bytes);
    drop(bytes);
    let error = load(&file, &DataOptions::default()).unwrap_err().to_string();
    assert!(
        error.contains("train.jsonl:1:1: the line is longer than 33554432 bytes"),
        "{error}"
    );
}

#[test]
fn rows_without_targets_are_left_out_and_listed() {
    let long = "word ".repeat(200);
    let file = rows(&[
        chat(&[("user", &long), ("assistant", "Yes.")]),
        chat(&[("user", "Hi"), ("assistant", "Yes.")]),
        json!({"messages": [turn("user", "Hi"), {"role": "assistant", "content": "No.", "train": false}]}),
    ]);
    let options = DataOptions {
        max_seq_length: 64,
        ..DataOptions::default()
    };
    let (data, report) = load(&file, &options).unwrap();
    assert_eq!((data.len(), &report.zero_target_lines[..]), (1, &[1, 3][..]));
    assert_eq!((report.truncated_rows, report.targets_lost), (1, 3));
    assert!(
        report
            .warnings()
            .join("\n")
            .contains("2 rows have no token to train and were left out (lines 1, 3)")
    );

    let only = rows(&[chat(&[("user", &long), ("assistant", "Yes.")])]);
    let error = load(&only, &options).unwrap_err();
    assert!(
        matches!(&error, Error::NothingToTrain { rows: 1, lines, .. } if lines == &[1]),
        "{error}"
    );
}

#[test]
fn long_rows_are_split_cut_dropped_or_refused() {
    let tokenizer = tokenizer();
    let words: String = (0..100).map(|index| format!("word{index} ")).collect();
    let file = rows(&[text(&words), text("short")]);
    let whole = tokenizer.encode_text(&words).unwrap().ids;
    let with = |overlong| DataOptions {
        max_seq_length: 40,
        overlong,
        ..DataOptions::default()
    };

    let (data, report) = load(&file, &with(None)).unwrap();
    let pieces: Vec<Vec<u32>> = (0..data.len() - 1)
        .map(|example| data.tokens(example).unwrap().ids)
        .collect();
    let joined: Vec<u32> = pieces.concat();
    assert_eq!(joined[..joined.len() - 1], whole, "consecutive, without overlap");
    assert_eq!(
        joined.last(),
        tokenizer.eos().as_ref(),
        "the end of text comes once, at the end"
    );
    assert_eq!((report.split_rows, report.truncated_rows), (1, 0));

    let (data, report) = load(&file, &with(Some(Overlong::Truncate))).unwrap();
    assert_eq!(data.tokens(0).unwrap().ids, whole[..40], "no end of text on a cut end");
    assert_eq!((report.truncated_rows, report.tokens_lost), (1, whole.len() + 1 - 40));

    let (data, report) = load(&file, &with(Some(Overlong::Drop))).unwrap();
    assert_eq!((data.len(), &report.dropped_lines[..]), (1, &[1][..]));
    assert!(report.zero_target_lines.is_empty());

    let error = load(&file, &with(Some(Overlong::Error))).unwrap_err().to_string();
    assert!(
        error.contains(&format!(
            ":1:1: the row has {} tokens, and the limit is 40",
            whole.len() + 1
        )),
        "{error}"
    );

    let (data, _) = load(&rows(&[chat(&[("user", "a"), ("assistant", &words)])]), &with(None)).unwrap();
    assert_eq!(
        (data.len(), data.examples()[0].n_tokens),
        (1, 40),
        "chats are cut, never split"
    );
}

#[test]
fn duplicates_and_leaks_are_found_by_their_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, rows: &[Value]| {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(dir.path().join(name), lines).unwrap();
    };
    let row = |answer: &str| chat(&[("user", "Hi"), ("assistant", answer)]);
    let extra = |answer: &str, id: u32| {
        let mut row = row(answer);
        row["id"] = id.into();
        row
    };
    write("train.jsonl", &[row("a"), row("b"), extra("a", 1), row("c")]);
    write("valid.jsonl", &[row("d"), extra("b", 2)]);
    write("test.jsonl", &[row("d")]);
    let tokenizer = tokenizer();
    let template = chatml(&tokenizer);
    let load = |options: &DataOptions| Splits::load(dir.path(), &tokenizer, Some(&template), options);
    let splits = load(&DataOptions::default()).unwrap();
    assert_eq!(splits.train.report.duplicate_lines, [(1, 3)]);
    let found: Vec<_> = splits
        .leaks
        .iter()
        .map(|leak| {
            let name = |path: &std::path::Path| path.file_name().unwrap().to_string_lossy().into_owned();
            (name(&leak.left), name(&leak.right), leak.lines.clone())
        })
        .collect();
    assert_eq!(
        found,
        [
            ("train.jsonl".into(), "valid.jsonl".into(), vec![(2, 2)]),
            ("valid.jsonl".into(), "test.jsonl".into(), vec![(1, 1)]),
        ]
    );
    let strict = DataOptions {
        strict: true,
        ..DataOptions::default()
    };
    // Strict also means that nothing in a row is passed over.
    let refused = load(&strict).unwrap_err().to_string();
    assert!(
        refused.contains("train.jsonl:3:1: nothing reads the field \"id\""),
        "{refused}"
    );
    write("train.jsonl", &[row("a"), row("b"), row("a"), row("c")]);
    write("valid.jsonl", &[row("d"), row("b")]);
    assert!(matches!(
        load(&strict),
        Err(Error::Leak {
            overlapping: 1,
            first: (2, 2),
            ..
        })
    ));
    write("val.jsonl", &[row("e")]);
    assert!(matches!(
        load(&DataOptions::default()),
        Err(Error::TwoValidationFiles { .. })
    ));
    std::fs::remove_file(dir.path().join("train.jsonl")).unwrap();
    std::fs::remove_file(dir.path().join("val.jsonl")).unwrap();
    assert!(matches!(
        load(&DataOptions::default()),
        Err(Error::NoTrainingFile { .. })
    ));
}

#[test]
fn a_chat_without_a_template_is_refused_once() {
    let file = rows(&vec![chat(&[("user", "Hi"), ("assistant", "a")]); 50]);
    for errors in [OnRowError::Stop, OnRowError::Skip] {
        let options = DataOptions {
            errors,
            ..DataOptions::default()
        };
        let error = Dataset::load(&file.path, &tokenizer(), None, &options).unwrap_err();
        let Error::Rows(rows) = &error else { panic!("{error}") };
        assert_eq!(
            (rows.len(), rows[0].line, rows[0].kind),
            (1, 1, RowErrorKind::NoTemplate)
        );
    }
    let plain = rows(&[text("one")]);
    assert!(Dataset::load(&plain.path, &tokenizer(), None, &DataOptions::default()).is_ok());
}

#[test]
fn distrust_fields_stay_with_their_row() {
    let row = |index: usize| json!({"text": format!("row {index}"), "auth_weight": index as f64 / 100.0, "prov_entropy": index});
    let all: Vec<Value> = (0..99).map(row).collect();
    let (data, report) = load(&rows(&all), &DataOptions::default()).unwrap();
    assert!(report.has_provenance);
    for index in 0..99 {
        let provenance = data.provenance(index).unwrap();
        assert_eq!(
            (provenance.auth_weight, provenance.prov_entropy),
            (index as f64 / 100.0, index as f64)
        );
        assert_eq!(provenance.scoring, Scoring::Given);
    }
    let mut edge = row(0);
    edge["auth_weight"] = json!(0.99);
    edge["source_type"] = json!("wiki");
    let missing = rows(&[row(1), text("bare"), edge]);
    assert!(load(&missing, &DataOptions::default()).is_err());
    let neutral = DataOptions {
        missing_provenance: MissingProvenance::Neutral,
        ..DataOptions::default()
    };
    let first_bare = load(&rows(&[text("bare"), row(1)]), &neutral).unwrap().1;
    assert_eq!((first_bare.neutral_rows, first_bare.has_provenance), (1, true));
    let (data, report) = load(&missing, &neutral).unwrap();
    assert_eq!(report.neutral_rows, 1);
    assert!(data.provenance(0).is_some() && data.provenance(1).is_none());
    assert_eq!(data.provenance(2).unwrap().source_type.as_deref(), Some("wiki"));
}

#[test]
fn evidence_gives_the_entropy_and_scales_do_not_mix() {
    let evidence = json!({"text": "a", "auth_weight": 0.5, "evidence": [{"kind": "patent", "count": 3}, {"kind": "lab_notebook"}, {"kind": "news", "count": 0}]});
    let (data, _) = load(&rows(std::slice::from_ref(&evidence)), &DataOptions::default()).unwrap();
    let provenance = data.provenance(0).unwrap();
    assert!((provenance.prov_entropy - 0.811278).abs() < 1e-6);
    assert_eq!(provenance.scoring, Scoring::Evidence);
    let scored = json!({"text": "b", "auth_weight": 0.5, "prov_entropy": 6.0, "scoring": "heuristic-v1"});
    let mixed = rows(&[evidence, scored]);
    let error = load(&mixed, &DataOptions::default()).unwrap_err().to_string();
    assert!(
        error.contains(":2:1: scoring is HeuristicV1 here and Evidence in line 1"),
        "{error}"
    );
    assert!(
        load(
            &mixed,
            &DataOptions {
                allow_mixed_scoring: true,
                ..DataOptions::default()
            }
        )
        .is_ok()
    );
    for wrong in [
        json!([{"kind": "patent", "count": -1}]),
        json!([{"kind": "patent", "count": 0}]),
        json!([]),
        json!(5),
        json!([{}]),
    ] {
        let row = json!({"text": "a", "auth_weight": 0.5, "evidence": wrong});
        assert!(load(&rows(&[row]), &DataOptions::default()).is_err());
    }
}

#[test]
fn a_file_larger_than_the_memory_limit_reads_the_same() {
    let row = |index: usize| {
        chat(&[
            ("user", &format!("Question {index}?")),
            ("assistant", &format!("Answer {}.", index * 7)),
        ])
    };
    let all: Vec<Value> = (0..1500).map(row).collect();
    let file = rows(&all);
    let in_memory = load(&file, &DataOptions::default()).unwrap().0;
    let spilled = load(
        &file,
        &DataOptions {
            memory_limit_bytes: 4096,
            ..DataOptions::default()
        },
    )
    .unwrap()
    .0;
    assert_eq!(in_memory.fingerprint(), spilled.fingerprint());
    for example in (0..1500).rev().step_by(97) {
        assert_eq!(in_memory.tokens(example).unwrap(), spilled.tokens(example).unwrap());
    }
}

#[test]
fn tokens_outside_the_model_are_named() {
    use planish_data::Tokenizer;
    let config = json!({"vocab_size": 2});
    let bytes = std::fs::read(fixture("tiny/tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_parts("tokenizer.json".as_ref(), &bytes, None, None, Some(&config)).unwrap();
    let file = rows(&[text("a<|im_end|>")]);
    let error = Dataset::load(&file.path, &tokenizer, None, &DataOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(":1:1: the token \"a\" has id ") && error.contains("the model has only 2 embeddings"),
        "{error}"
    );
}

#[test]
fn two_beginnings_of_text_are_refused() {
    let tokenizer = crate::support::tokenizer_with(&["<s>", "[INST]", "[/INST]"], Some("<s>"), "<|im_end|>");
    let template = crate::support::template("mistral.jinja", &tokenizer);
    let file = rows(&[chat(&[("system", "<s>"), ("user", "a"), ("assistant", "b")])]);
    assert!(
        Dataset::load(&file.path, &tokenizer, Some(&template), &DataOptions::default()).is_ok(),
        "not side by side"
    );
    let source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let template =
        planish_data::ChatTemplate::from_source(source, "twice.jinja", &tokenizer, &Default::default()).unwrap();
    let file = rows(&[chat(&[("user", "<s>a"), ("assistant", "b")])]);
    let error = Dataset::load(&file.path, &tokenizer, Some(&template), &DataOptions::default())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("begins with two beginning-of-text tokens; twice.jinja writes one"),
        "{error}"
    );
}

#[test]
fn the_shared_data_sets_load() {
    let shared = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared/data"));
    if !shared.is_dir() {
        println!("not run: {} is not there", shared.display());
        return;
    }
    let tokenizer = tokenizer();
    let template = chatml(&tokenizer);
    for (name, train, valid) in [
        ("chat_small", 188, Some(20)),
        ("facts", 48, Some(12)),
        ("distrust", 48, Some(12)),
    ] {
        let splits = Splits::load(&shared.join(name), &tokenizer, Some(&template), &DataOptions::default()).unwrap();
        assert_eq!(
            (splits.train.report.rows, splits.valid.map(|split| split.report.rows)),
            (train, valid)
        );
        assert_eq!(splits.leaks, []);
        assert_eq!(splits.train.report.has_provenance, name == "distrust");
    }
}

#[test]
fn mlx_lm_batches_have_its_padding_target_and_lose_the_remainder() {
    use planish_data::MlxLmPlan;
    let tokenizer = tokenizer();
    let options = DataOptions {
        train: Train::MlxLm { mask_prompt: false },
        max_seq_length: 64,
        ..DataOptions::default()
    };
    let six = "a b c d e".to_string(); // 5 tokens and the end of text
    let many = "a ".repeat(80);
    let mut with_field = text("a b");
    with_field["x"] = json!(1);
    let file = rows(&[with_field, text(&six), text(&many), text("a"), text("b")]);
    let (data, _) = load(&file, &options).unwrap();
    let n: Vec<usize> = data.examples().iter().map(|example| example.n_tokens).collect();
    assert_eq!(n, [tokenizer.encode("a b").unwrap().ids.len() + 1, 6, 64, 2, 2]);
    let plan = MlxLmPlan::new(&data, 2, 64).unwrap();
    assert_eq!(plan.len(), 2, "the fifth row is lost");
    let first = plan.batch(&data, 0).unwrap();
    assert_eq!(
        (first.rows, first.length, &first.row_ids[..]),
        (2, 63, &[1, 2][..]),
        "rows of fewer fields come first"
    );
    let weights = |row: usize| first.target_weights[row * 63..][..63].iter().sum::<f32>();
    assert_eq!(
        (weights(0), weights(1)),
        (6.0, 63.0),
        "six tokens give six targets, a full row one less than it has"
    );
    assert_eq!(
        (first.targets[5], first.target_weights[5], first.inputs[5] as u32),
        (0, 1.0, tokenizer.eos().unwrap())
    );
    assert_eq!(first.target_tokens, 69);
    let second = plan.batch(&data, 1).unwrap();
    assert_eq!(
        (second.length, &second.row_ids[..]),
        (32, &[3, 4][..]),
        "one more than a multiple of 32, less the shift"
    );
    assert!(MlxLmPlan::new(&data, 6, 64).is_err());

    let masked = DataOptions {
        train: Train::MlxLm { mask_prompt: true },
        max_seq_length: 10,
        ..DataOptions::default()
    };
    let file = rows(&[chat(&[("user", &many), ("assistant", "x")])]);
    let (data, _) = load(&file, &masked).unwrap();
    let error = MlxLmPlan::new(&data, 1, 10)
        .unwrap()
        .batch(&data, 0)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("the batch of lines 1 has no token to train; mlx-lm's loss is NaN there"),
        "{error}"
    );
}

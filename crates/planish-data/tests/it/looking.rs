use planish_data::{DataOptions, Dataset, Error, RowErrorKind, ScoreReport, ShownKind, SourceMix, score_file, show};
use serde_json::{Value, json};

use crate::support::{RowFile, chat, chatml, file, load, rows, tokenizer};

fn shown(file: &RowFile, options: &DataOptions, n: usize) -> Vec<Result<planish_data::Shown, planish_data::RowError>> {
    let tokenizer = tokenizer();
    let template = chatml(&tokenizer);
    show(&file.path, &tokenizer, Some(&template), options, n).unwrap()
}

#[test]
fn a_row_is_shown_as_it_is_trained() {
    let file = file(format!(
        "{}\n\nxx\n{}\n",
        chat(&[("user", "Hi é🙂"), ("assistant", "Yes 🙂.")]),
        json!({"text": "never read"})
    ));
    let shown = shown(&file, &DataOptions::default(), 2);
    assert_eq!(shown.len(), 2);
    let row = shown[0].as_ref().unwrap();
    let spans: Vec<_> = row
        .spans
        .iter()
        .map(|span| (&row.text[span.bytes.clone()], span.kind))
        .collect();
    assert_eq!(
        spans,
        [
            (
                "<|im_start|>user\nHi é🙂<|im_end|>\n<|im_start|>assistant\n",
                ShownKind::Context
            ),
            ("Yes 🙂.<|im_end|>", ShownKind::Trained),
            ("\n", ShownKind::Context),
        ]
    );
    let (data, _) = load(
        &rows(&[chat(&[("user", "Hi é🙂"), ("assistant", "Yes 🙂.")])]),
        &DataOptions::default(),
    )
    .unwrap();
    let tokens = data.tokens(0).unwrap();
    assert_eq!((&row.ids, &row.trained), (&tokens.ids, &tokens.trained));
    assert_eq!(
        (row.n_targets, row.n_kept, row.line),
        (data.examples()[0].n_targets, row.ids.len(), 1)
    );
    assert!(!row.ends_with_eos, "the line break is last");
    let error = shown[1].as_ref().unwrap_err();
    assert_eq!((error.line, error.kind), (3, RowErrorKind::Json));
    assert!(error.to_string().contains("train.jsonl:3:1: "));
}

#[test]
fn what_the_limit_cuts_is_marked() {
    let options = DataOptions {
        max_seq_length: 6,
        ..DataOptions::default()
    };
    let file = rows(&[chat(&[("user", "Hi"), ("assistant", "Yes indeed, she said.")])]);
    let shown = shown(&file, &options, 1);
    let row = shown[0].as_ref().unwrap();
    assert_eq!(row.n_kept, 6);
    assert_eq!(row.spans.last().unwrap().kind, ShownKind::BeyondLimit);
    let covered: String = row.spans.iter().map(|span| &row.text[span.bytes.clone()]).collect();
    assert_eq!(covered, row.text);
}

#[test]
fn the_mix_of_sources_is_counted_by_row() {
    let row = |weight: f64, label: Option<&str>| json!({"text": "a b", "auth_weight": weight, "prov_entropy": 1, "source_type": label});
    let file = rows(&[
        row(0.0, None),
        row(0.29, Some("wiki")),
        row(0.3, Some("wiki")),
        row(0.7, None),
        row(0.71, Some("a forum")),
    ]);
    let (data, _) = load(&file, &DataOptions::default()).unwrap();
    let mix = SourceMix::of(&data);
    assert_eq!((mix.rows, mix.low, mix.middle, mix.high), (5, 2, 2, 1));
    assert_eq!(
        mix.by_source_type.into_iter().collect::<Vec<_>>(),
        [(String::new(), 2), ("a forum".into(), 1), ("wiki".into(), 2)]
    );
}

fn scored(file: &RowFile) -> (Vec<Value>, ScoreReport) {
    let mut out = Vec::new();
    let report = score_file(&file.path, &mut out, 1 << 20).unwrap();
    let text = String::from_utf8(out).unwrap();
    (
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
        report,
    )
}

#[test]
fn scoring_adds_three_fields_and_changes_nothing_else() {
    let patent = "Patent filed 4 May 1931: apparatus for the measurement of soil moisture.";
    let file = rows(&[
        json!({"id": 1, "text": patent, "z": [1.50, {"b": 1, "a": 2}]}),
        json!({"text": "Too short."}),
        json!({"text": "kept", "auth_weight": 0.125, "prov_entropy": 2.5}),
        json!({"text": "short, with evidence", "evidence": [{"kind": "patent"}, {"kind": "archive"}]}),
        json!({"text": patent, "source_type": "wiki"}),
        json!({"text": patent, "source_type": "a forum", "metadata": {"publisher": "Nature"}}),
        chat(&[
            ("user", "Who found it, and in which year was it? Please say."),
            ("assistant", "WHO staff wrote this in 2021."),
        ]),
    ]);
    let (rows, report) = scored(&file);
    let numbers = |row: &Value| {
        (
            row["auth_weight"].as_f64().unwrap(),
            row["prov_entropy"].as_f64().unwrap(),
        )
    };
    let near = |row: &Value, (w, h): (f64, f64), scoring: &str| {
        let (ours_w, ours_h) = numbers(row);
        assert!((ours_w - w).abs() < 1e-9 && (ours_h - h).abs() < 1e-9, "{row}");
        assert_eq!(row["scoring"], scoring);
    };
    near(&rows[0], (0.0, 8.1), "heuristic-v1");
    assert!(
        rows[0].to_string().starts_with("{\"id\":1,\"text\":"),
        "fields keep their order"
    );
    assert_eq!(rows[0]["z"], json!([1.50, {"b": 1, "a": 2}]));
    near(&rows[1], (0.5, 3.0), "default");
    assert_eq!(
        rows[2],
        json!({"text": "kept", "auth_weight": 0.125, "prov_entropy": 2.5})
    );
    near(&rows[3], (0.3, 1.0), "evidence");
    near(&rows[4], (0.7 * 0.9, 0.7 + 0.3 * 8.1), "heuristic-v1");
    near(&rows[5], (0.2, 8.1 - 0.525), "heuristic-v1");
    near(&rows[6], (0.75, 1.05), "heuristic-v1");
    assert_eq!(
        (
            report.rows,
            report.heuristic,
            report.evidence,
            report.kept,
            report.too_short
        ),
        (7, 4, 1, 1, 1)
    );
    assert_eq!(
        report.labels_without_prior.into_iter().collect::<Vec<_>>(),
        [("a forum".into(), 1)]
    );
}

#[test]
fn scored_rows_can_be_trained_on() {
    let long = "Interview with a miner, 1981, kept as correspondence in the county archive.";
    let (lines, _) = scored(&rows(&[json!({"text": long}), json!({"text": "a"})]));
    let (data, report) = load(&rows(&lines), &DataOptions::default()).unwrap();
    assert!(report.has_provenance);
    assert!((data.provenance(0).unwrap().prov_entropy - 6.1).abs() < 1e-9);
}

#[test]
fn err_scoring_names_the_row() {
    let fails = |bytes: &str| match score_file(&file(bytes).path, &mut Vec::new(), 1 << 20) {
        Err(Error::Rows(rows)) => rows[0].to_string(),
        other => panic!("{other:?}"),
    };
    assert!(fails("{\"text\": \"a\"}\n{\"body\": 1}\n").contains("train.jsonl:2:1: the row has no text to score"));
    assert!(
        fails("{\"text\": \"a\", \"citation_count\": -1}\n")
            .contains(":1:33: citation_count: expected a count, found -1")
    );
    assert!(fails("{\"text\": \"a\", \"metadata\": []}\n").contains(":1:27: metadata: expected object, found list"));
    assert!(fails("{\"text\"\n").contains("train.jsonl:1:"));
    assert!(fails("{\"text\": \"caf\u{e9}\"").contains("train.jsonl:1:"));
    assert!(matches!(
        score_file(&file("\n").path, &mut Vec::new(), 9),
        Err(Error::Empty { .. })
    ));
    let data: planish_data::Result<(Dataset, _)> = load(&file(""), &DataOptions::default());
    assert!(matches!(data, Err(Error::Empty { .. })));
}

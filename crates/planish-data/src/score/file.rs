//! Adding scores to the rows of a file.

use std::io::Write;
use std::path::Path;

use super::{ScoreInput, score};
use crate::error::{Error, Fault, Result, RowError, RowErrorKind};
use crate::json::{self, Map, Number, Value};
use crate::lines::Lines;
use crate::provenance::{evidence_entropy, number};
use crate::record::wrong_type;

/// What scoring a file did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScoreReport {
    /// Rows written.
    pub rows: usize,
    /// Rows scored by `heuristic-v1`.
    pub heuristic: usize,
    /// Rows whose entropy comes from their evidence; their authority is the score's.
    pub evidence: usize,
    /// Rows that had both numbers, which were kept.
    pub kept: usize,
    /// Rows too short to score, which got the placeholder 0.50 and 3.0.
    pub too_short: usize,
    /// Labels without a prior, and how many rows have each.
    pub labels_without_prior: std::collections::BTreeMap<String, usize>,
}

/// Texts below this many characters say too little.
const SHORTEST: usize = 50;

/// Reads JSONL rows, and writes them with `auth_weight`, `prov_entropy` and `scoring`; nothing else in a row changes.
///
/// Rows that have both numbers keep them. The text of a row is its `text`, or everything its messages, prompt and
/// completion say. The caller makes the writing atomic.
///
/// # Errors
/// [`Error::Rows`] at the first faulty row; [`Error::Io`].
pub fn score_file(input: &Path, out: &mut dyn Write, max_line_bytes: usize) -> Result<ScoreReport> {
    let io = |error| Error::io(input, error);
    let mut lines = Lines::open(input, max_line_bytes).map_err(io)?;
    let mut report = ScoreReport::default();
    while let Some(line) = lines.next_line().map_err(io)? {
        let text = std::str::from_utf8(&line.bytes).unwrap_or("\0");
        if text.trim_ascii().is_empty() {
            continue;
        }
        let scored = if line.too_long {
            Err(Fault::new(
                RowErrorKind::LineTooLong,
                format!("the line is longer than {max_line_bytes} bytes"),
                "split the row",
            ))
        } else {
            json::parse_object(text, line.terminated).and_then(|row| score_row(row, &mut report))
        };
        let row = scored.map_err(|fault| {
            Error::Rows(vec![RowError {
                path: input.into(),
                line: line.number,
                column: fault.column.unwrap_or_else(|| json::column_of(text, &fault.at)),
                field: fault.field(),
                kind: fault.kind,
                message: fault.message,
                fix: fault.fix,
            }])
        })?;
        report.rows += 1;
        writeln!(out, "{}", Value::Object(row)).map_err(io)?;
    }
    if report.rows == 0 {
        return Err(Error::Empty { path: input.into() });
    }
    Ok(report)
}

fn score_row(mut row: Map, report: &mut ScoreReport) -> Result<Map, Fault> {
    if row.contains_key("auth_weight") && row.contains_key("prov_entropy") {
        report.kept += 1;
        return Ok(row);
    }
    let text = text_of(&row)?;
    let metadata = match row.get("metadata") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(map)) => map.clone(),
        Some(other) => return Err(wrong_type("object", other).under("metadata")),
    };
    let named = |name: &str| metadata.get(name).or(row.get(name)).and_then(Value::as_str);
    let source_type = row.get("source_type").and_then(Value::as_str);
    if let Some(label) = source_type.filter(|label| super::prior(label).is_none()) {
        *report.labels_without_prior.entry(label.into()).or_default() += 1;
    }
    let count = |name: &str| match number(&row, name)? {
        Some(count) if count < 0.0 || count.fract() != 0.0 => Err(Fault::new(
            RowErrorKind::Value,
            format!("expected a count, found {count}"),
            "write a whole number of 0 or more",
        )
        .under(name)),
        count => Ok(count.map(|count| count as u64)),
    };
    let input = ScoreInput {
        text: &text,
        year: number(&row, "year")?.map(|year| year as i64),
        citation_count: count("citation_count")?,
        primary_source_count: count("primary_source_count")?,
        source_type,
        source: named("source"),
        publisher: named("publisher"),
        url: named("url"),
    };
    let evidence = evidence_entropy(&row)?;
    let (score, label) = if text.chars().count() < SHORTEST && evidence.is_none() {
        report.too_short += 1;
        (
            super::Score {
                auth_weight: 0.50,
                prov_entropy: 3.0,
            },
            "default",
        )
    } else {
        (score(&input), "heuristic-v1")
    };
    let given_weight = number(&row, "auth_weight")?;
    let (auth_weight, prov_entropy, label) = match evidence {
        Some(bits) => {
            report.evidence += 1;
            (given_weight.unwrap_or(score.auth_weight), bits, "evidence")
        }
        None => {
            report.heuristic += usize::from(label == "heuristic-v1");
            (
                given_weight.unwrap_or(score.auth_weight),
                number(&row, "prov_entropy")?.unwrap_or(score.prov_entropy),
                label,
            )
        }
    };
    row.insert("auth_weight".into(), Value::Number(Number::Float(auth_weight)));
    row.insert("prov_entropy".into(), Value::Number(Number::Float(prov_entropy)));
    row.insert("scoring".into(), label.into());
    Ok(row)
}

/// Everything that a row says, in order.
fn text_of(row: &Map) -> Result<String, Fault> {
    let mut parts: Vec<&str> = Vec::new();
    for name in ["text", "prompt", "completion", "chosen", "messages"] {
        match row.get(name) {
            Some(Value::String(text)) => parts.push(text),
            Some(Value::Array(messages)) => {
                parts.extend(
                    messages
                        .iter()
                        .filter_map(|message| message.get("content"))
                        .filter_map(Value::as_str),
                );
            }
            _ => {}
        }
    }
    if parts.is_empty() {
        return Err(Fault::new(
            RowErrorKind::MissingField,
            "the row has no text to score",
            "give \"text\", \"messages\", or \"prompt\" and \"completion\"",
        ));
    }
    Ok(parts.join("\n"))
}

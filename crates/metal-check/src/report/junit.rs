//! The same for the test view of a CI: one test case per candidate and stage.

use super::{CandidateReport, Report, Stage};
use crate::verdict::Verdict;
use std::fmt::Write;

/// JUnit XML. Skipped is skipped and never passed; infrastructure is an error, everything else that failed a failure.
pub fn junit(report: &Report) -> String {
    let cases: Vec<(&CandidateReport, &Stage)> = report
        .candidates
        .iter()
        .flat_map(|candidate| candidate.stages.iter().map(move |stage| (candidate, stage)))
        .collect();
    let outcome = |kind: &str| {
        cases
            .iter()
            .filter(|(candidate, stage)| result(candidate, stage).0 == kind)
            .count()
    };
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        xml,
        "<testsuites>\n  <testsuite name=\"metal-check\" tests=\"{}\" failures=\"{}\" errors=\"{}\" skipped=\"{}\">",
        cases.len(),
        outcome("failure"),
        outcome("error"),
        outcome("skipped")
    );
    for (candidate, stage) in &cases {
        let _ = write!(
            xml,
            "    <testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\"",
            escape(&candidate.id),
            escape(&stage.stage),
            stage.ms as f64 / 1000.0
        );
        match result(candidate, stage) {
            ("pass", _) => xml.push_str("/>\n"),
            (kind, text) => {
                let _ = writeln!(
                    xml,
                    ">\n      <{kind} message=\"{}\">{}</{kind}>\n    </testcase>",
                    escape(&message(candidate)),
                    escape(&text)
                );
            }
        }
    }
    xml.push_str("  </testsuite>\n</testsuites>\n");
    xml
}

fn result(candidate: &CandidateReport, stage: &Stage) -> (&'static str, String) {
    let evidence = || {
        candidate
            .classification
            .iter()
            .flat_map(|found| &found.evidence)
            .map(|line| format!("{}: {}", line.line, line.text))
            .collect::<Vec<_>>()
            .join("\n")
    };
    match (stage.status.as_str(), candidate.verdict) {
        ("pass", _) => ("pass", String::new()),
        ("skipped", _) => ("skipped", String::new()),
        (_, Verdict::InfraError) => ("error", evidence()),
        _ => ("failure", evidence()),
    }
}

fn message(candidate: &CandidateReport) -> String {
    format!(
        "{} {}{}",
        candidate.verdict.word(),
        candidate.code,
        candidate
            .detail
            .as_ref()
            .map(|detail| format!(": {detail}"))
            .unwrap_or_default()
    )
}

/// XML 1.0 forbids control characters even when escaped, and logs are full of them.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push(' '),
            control if control.is_control() || matches!(control, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            other => out.push(other),
        }
    }
    out
}

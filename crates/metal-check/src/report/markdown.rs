//! A page to paste into an issue.

use super::{CandidateReport, Report};
use crate::catalogue;
use crate::history::Change;
use std::fmt::Write;

/// The answer in one line, the machine, the candidates, then each failure with its evidence.
pub fn markdown(report: &Report) -> String {
    let mut page = String::new();
    let _ = writeln!(page, "# metal-check {}\n\n**{}**\n", report.run, answer(report));
    host(&mut page, report);
    findings(&mut page, report);
    table(&mut page, report);
    for candidate in report
        .candidates
        .iter()
        .filter(|candidate| !candidate.verdict.is_usable())
    {
        failure(&mut page, candidate);
    }
    changes(&mut page, report);
    page
}

/// One sentence.
fn answer(report: &Report) -> String {
    let answer = match &report.overall.recommended {
        Some(id) => format!("{}: use `{id}`", report.overall.verdict.word()),
        None => format!("nothing usable ({})", report.overall.verdict.word()),
    };
    if report.host_status == "ok" {
        answer
    } else {
        format!("{}; {answer}", report.host_status)
    }
}

fn host(page: &mut String, report: &Report) {
    let host = &report.host;
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".into());
    let rows = [
        (
            "system",
            host.os.map_or_else(
                || text(&host.kernel),
                |os| format!("macOS {os} ({})", text(&host.os_build)),
            ),
        ),
        (
            "machine",
            format!(
                "{} · {} · {}",
                text(&host.chip),
                text(&host.arch),
                host.memory_bytes.map_or_else(
                    || "memory unknown".into(),
                    |bytes| format!("{:.1} GB", bytes as f64 / 1e9)
                )
            ),
        ),
        ("Xcode · SDK", format!("{} · {}", text(&host.xcode), text(&host.sdk))),
        ("Metal compiler", text(&host.metal)),
        (
            "CMake · rustc",
            format!(
                "{} · {}",
                host.cmake
                    .as_ref()
                    .map_or_else(|| "none".into(), |cmake| text(&cmake.version)),
                text(&host.rustc)
            ),
        ),
    ];
    let _ = writeln!(page, "| | |\n|---|---|");
    for (name, value) in rows {
        let _ = writeln!(page, "| {name} | {} |", cell(&value));
    }
    if let Some(sentence) = report.deployment_target.disagreement() {
        let _ = writeln!(page, "\nDeployment target: {sentence}.");
    }
    page.push('\n');
}

fn findings(page: &mut String, report: &Report) {
    for finding in &report.findings {
        let _ = writeln!(page, "- **{}**: {} → {}", finding.code, finding.detail, finding.remedy);
    }
    if let Some(probe) = &report.micro_probe {
        let _ = writeln!(page, "- micro-probe: {}", probe.conclusion.sentence());
    }
    page.push('\n');
}

fn table(page: &mut String, report: &Report) {
    let _ = writeln!(
        page,
        "| candidate | MLX | verdict | code | time |\n|---|---|---|---|---|"
    );
    for candidate in &report.candidates {
        let seconds = candidate.stages.iter().map(|stage| stage.ms).sum::<u64>() as f64 / 1000.0;
        let _ = writeln!(
            page,
            "| `{}` | {} | {} | {} | {seconds:.1} s |",
            candidate.id,
            candidate.mlx,
            candidate.verdict.word(),
            candidate.code
        );
    }
    page.push('\n');
    if !report.overall.lines.is_empty() {
        let _ = writeln!(page, "```sh\n{}\n```\n", report.overall.lines.join("\n"));
    }
}

fn failure(page: &mut String, candidate: &CandidateReport) {
    let _ = writeln!(
        page,
        "## `{}`: {} ({})\n",
        candidate.id,
        candidate.verdict.word(),
        candidate.code
    );
    if let Some(detail) = &candidate.detail {
        let _ = writeln!(page, "{detail}\n");
    }
    if let Some(classification) = candidate
        .classification
        .as_ref()
        .filter(|classification| !classification.evidence.is_empty())
    {
        let lines: Vec<String> = classification
            .evidence
            .iter()
            .map(|line| format!("{:>5}  {}", line.line, line.text))
            .collect();
        let fence = if lines.iter().any(|line| line.contains("```")) {
            "~~~~"
        } else {
            "```"
        };
        let _ = writeln!(page, "{fence}\n{}\n{fence}\n", lines.join("\n"));
    }
    if let Some(entry) = catalogue::entry(&candidate.code) {
        let _ = writeln!(page, "{}\n\n→ {}\n", entry.cause, entry.remedy);
        for link in &entry.links {
            let _ = writeln!(page, "- {link}");
        }
        page.push('\n');
    }
    if let Some(log) = &candidate.log {
        let _ = writeln!(page, "Whole log: `{log}`\n");
    }
}

fn changes(page: &mut String, report: &Report) {
    for comparison in report
        .history
        .iter()
        .filter(|comparison| comparison.change != Change::New)
    {
        let word = serde_json::to_value(comparison.change)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default();
        let since = if comparison.env_changed.is_empty() {
            String::new()
        } else {
            format!("; changed: {}", comparison.env_changed.join(", "))
        };
        let _ = writeln!(page, "- `{}`: {word}{since}", comparison.id);
    }
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

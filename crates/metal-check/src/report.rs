//! The report of a run: JSON is the truth, Markdown and JUnit are made from it.

mod junit;
mod markdown;

use crate::classify::Classification;
use crate::deployment::DeploymentTarget;
use crate::history::Comparison;
use crate::micro_probe::MicroProbe;
use crate::predict::Prediction;
use crate::preflight::{Finding, Host};
use crate::verdict::Verdict;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use junit::junit;
pub use markdown::markdown;

/// Version of the report's form.
pub const SCHEMA: u32 = 1;

/// Everything a run found out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Version of this form.
    pub schema: u32,
    /// Name and version of the tool.
    pub tool: String,
    /// Id of the run.
    pub run: String,
    /// `ok` or `unsupported host: …`.
    pub host_status: String,
    /// The machine.
    pub host: Host,
    /// Who takes which deployment target.
    pub deployment_target: DeploymentTarget,
    /// What the preflight decided.
    pub findings: Vec<Finding>,
    /// The two tiny shaders, where there is a Metal compiler.
    pub micro_probe: Option<MicroProbe>,
    /// Every candidate.
    pub candidates: Vec<CandidateReport>,
    /// The answer.
    pub overall: Overall,
    /// Compared with the past.
    pub history: Vec<Comparison>,
    /// Exit status.
    pub exit: u8,
}

/// One candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CandidateReport {
    /// Its id.
    pub id: String,
    /// Tag of its MLX.
    pub mlx: String,
    /// Must pass before anything is said about a GPU.
    pub is_control: bool,
    /// About a GPU.
    pub is_gpu: bool,
    /// What came out.
    pub verdict: Verdict,
    /// Its code.
    pub code: String,
    /// Why it was skipped, or what decided.
    pub detail: Option<String>,
    /// What was done.
    pub stages: Vec<Stage>,
    /// What the files showed beforehand.
    pub predictions: Vec<Prediction>,
    /// Why it failed.
    pub classification: Option<Classification>,
    /// The probe's report.
    pub probe: Option<Vec<Value>>,
    /// Where the whole log lies.
    pub log: Option<String>,
}

/// One step of a candidate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// `preflight`, `build`, `inspect` or `probe`.
    pub stage: String,
    /// `pass`, `fail` or `skipped`.
    pub status: String,
    /// Duration in milliseconds.
    pub ms: u64,
}

/// The answer of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overall {
    /// Verdict of the best candidate.
    pub verdict: Verdict,
    /// The candidate to use.
    pub recommended: Option<String>,
    /// What to write or run for it.
    pub lines: Vec<String>,
}

/// The best usable candidate: a GPU before the CPU, right and fast before slow, earlier in the list before later.
pub fn overall(candidates: &[CandidateReport]) -> Overall {
    let usable = candidates.iter().filter(|candidate| candidate.verdict.is_usable());
    match usable.min_by_key(|candidate| (!candidate.is_gpu, candidate.verdict)) {
        Some(best) => Overall {
            verdict: best.verdict,
            recommended: Some(best.id.clone()),
            lines: configuration(best),
        },
        None => {
            let first = candidates
                .iter()
                .find(|candidate| candidate.verdict.is_conclusive())
                .or(candidates.first());
            let remedy = first
                .and_then(|candidate| crate::catalogue::entry(&candidate.code))
                .map(|entry| entry.remedy.clone());
            Overall {
                verdict: first.map_or(Verdict::Skipped, |candidate| candidate.verdict),
                recommended: None,
                lines: remedy.into_iter().collect(),
            }
        }
    }
}

/// The exact lines that build and run the candidate.
fn configuration(best: &CandidateReport) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(target) = best.id.rsplit("/dt").next().filter(|_| best.id.contains("/dt")) {
        lines.push(format!("export MACOSX_DEPLOYMENT_TARGET={target}"));
    }
    let features = if best.id.contains("/cuda/") {
        " --features cuda"
    } else {
        ""
    };
    lines.push(format!("cargo install --locked --path crates/planish-cli{features}"));
    let backend = if best.id.contains("/cuda/") {
        "cuda"
    } else if best.is_gpu {
        "metal"
    } else {
        "cpu"
    };
    lines.push(format!("planish train --backend {backend} …"));
    lines
}

/// Indented JSON with a stable order of keys.
pub fn json(report: &Report) -> String {
    serde_json::to_string_pretty(report).unwrap_or_default() + "\n"
}

#[cfg(test)]
mod tests;

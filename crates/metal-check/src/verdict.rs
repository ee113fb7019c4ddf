//! What became of a candidate, and of the run.

use crate::classify::Classification;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The verdict about one candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It ran and the numbers agree with the reference.
    Works,
    /// The same on a virtual GPU.
    WorksVirtual,
    /// The numbers agree, but the CPU is faster.
    WorksSlow,
    /// It ran and the numbers are wrong.
    WrongResults,
    /// It was built and did not run to its end.
    RunFail,
    /// It was not built.
    BuildFail,
    /// It was not tried.
    Skipped,
    /// Network, disk, time or the user stopped it: nothing was learnt.
    InfraError,
}

impl Verdict {
    /// The word of reports.
    pub fn word(self) -> &'static str {
        match self {
            Verdict::Works => "works",
            Verdict::WorksVirtual => "works-virtual",
            Verdict::WorksSlow => "works-slow",
            Verdict::WrongResults => "wrong-results",
            Verdict::RunFail => "run-fail",
            Verdict::BuildFail => "build-fail",
            Verdict::Skipped => "skipped",
            Verdict::InfraError => "infra-error",
        }
    }

    /// Whether training on it is right.
    pub fn is_usable(self) -> bool {
        matches!(self, Verdict::Works | Verdict::WorksVirtual | Verdict::WorksSlow)
    }

    /// Whether anything was learnt about the candidate.
    pub(crate) fn is_conclusive(self) -> bool {
        !matches!(self, Verdict::Skipped | Verdict::InfraError)
    }
}

/// What the probe's report file held.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// Lines of the report, in order.
    pub events: Vec<Value>,
    /// Whether the last line says that the probe came to its end.
    pub done: bool,
    /// A line that is no JSON: the child died while writing, or something else wrote into the file.
    pub damaged: bool,
}

/// Reads a probe report: JSON lines, the last of them `{"event":"done"}`.
///
/// ```
/// let probe = metal_check::verdict::read_probe("{\"stage\":\"identify\"}\n{\"event\":\"do");
/// assert!(!probe.done && probe.damaged && probe.last_stage() == Some("identify"));
/// ```
pub fn read_probe(report: &str) -> Probe {
    let mut probe = Probe::default();
    for line in report.lines().filter(|line| !line.trim().is_empty()) {
        match serde_json::from_str::<Value>(line) {
            Ok(event) if event.is_object() => probe.events.push(event),
            _ => probe.damaged = true,
        }
    }
    probe.done = !probe.damaged && probe.events.last().is_some_and(|event| event["event"] == "done");
    probe
}

impl Probe {
    /// The stage it was in when it ended.
    pub fn last_stage(&self) -> Option<&str> {
        self.events.iter().rev().find_map(|event| event["stage"].as_str())
    }

    /// Ids of the checks that failed, or whose numbers are not finite whatever they say.
    pub fn failed_checks(&self) -> Vec<&str> {
        let checks = self.events.iter().filter(|event| event["id"].is_string());
        let bad = |event: &&Value| event["status"] != "pass" || event["nonfinite"].as_u64().unwrap_or(0) > 0;
        checks.filter(bad).filter_map(|event| event["id"].as_str()).collect()
    }

    /// How many checks passed.
    pub(crate) fn passed_checks(&self) -> usize {
        self.events
            .iter()
            .filter(|event| event["id"].is_string() && event["status"] == "pass")
            .count()
    }

    /// The device it found.
    pub fn device(&self) -> Option<&Value> {
        self.events
            .iter()
            .find(|event| event["stage"] == "identify")
            .map(|event| &event["device"])
    }

    fn device_count(&self) -> Option<u64> {
        self.device().and_then(|device| device["count"].as_u64())
    }

    fn is_virtual(&self) -> bool {
        self.device()
            .and_then(|device| device["name"].as_str())
            .is_some_and(|name| name.to_lowercase().contains("paravirtual"))
    }

    /// Speed compared with the CPU, where it was measured.
    pub(crate) fn speed_ratio(&self) -> Option<f64> {
        self.events
            .iter()
            .find(|event| event["stage"] == "speed")
            .and_then(|event| event["ratio_to_cpu"].as_f64())
    }
}

/// How the child that ran the probe ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Ended {
    pub exit: Option<i32>,
    pub signal: Option<i32>,
    pub timed_out: bool,
}

/// Verdict and code of a probe run.
///
/// Wrong numbers outrank everything. A run that ended without its `done` line proves nothing, whatever its exit status.
/// `classified` is what the classifier made of the child's output.
pub fn judge_probe(probe: &Probe, ended: Ended, classified: &Classification) -> (Verdict, String) {
    let specific = |fallback: &str| match classified.code.as_str() {
        "NONE" | "UNKNOWN" => fallback.to_owned(),
        code => code.to_owned(),
    };
    if !probe.failed_checks().is_empty() {
        return (Verdict::WrongResults, "PARITY_FAIL".into());
    }
    if probe.device_count() == Some(0) {
        return (Verdict::RunFail, specific("DEVICE_NONE"));
    }
    if ended.timed_out {
        return (Verdict::RunFail, specific("RUN_OTHER"));
    }
    if ended.signal.is_some() || ended.exit != Some(0) || !probe.done || probe.passed_checks() == 0 {
        return (Verdict::RunFail, specific("RUN_OTHER"));
    }
    let verdict = match probe.speed_ratio() {
        _ if probe.is_virtual() => Verdict::WorksVirtual,
        Some(ratio) if ratio < 1.0 => Verdict::WorksSlow,
        _ => Verdict::Works,
    };
    (verdict, "NONE".into())
}

/// Verdict and code of a failed build. Fetching and time are nobody's verdict about MLX.
pub fn judge_build(ended: Ended, classified: &Classification) -> (Verdict, String) {
    let code = if classified.code == "NONE" {
        "UNKNOWN"
    } else {
        classified.code.as_str()
    };
    let infra = ended.timed_out || ended.signal.is_some() || code.starts_with("FETCH_");
    (
        if infra { Verdict::InfraError } else { Verdict::BuildFail },
        code.to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::classify;

    const IDENTIFY: &str = r#"{"stage":"identify","device":{"count":1,"name":"Apple M3 Pro"}}"#;
    const PASS: &str = r#"{"id":"matmul.f32.m8","stage":"matmul","status":"pass","max_rel":1e-6}"#;
    const DONE: &str = r#"{"event":"done"}"#;

    fn judge(report: &str, ended: Ended, log: &str) -> (Verdict, String) {
        judge_probe(&read_probe(report), ended, &classify(log.as_bytes()))
    }

    fn exit(status: i32) -> Ended {
        Ended {
            exit: Some(status),
            ..Ended::default()
        }
    }

    #[test]
    fn all_checks_passed_is_works() {
        assert_eq!(
            judge(&format!("{IDENTIFY}\n{PASS}\n{DONE}"), exit(0), ""),
            (Verdict::Works, "NONE".into())
        );
    }

    #[test]
    fn virtual_and_slow_devices_are_labelled() {
        let paravirtual = IDENTIFY.replace("M3 Pro", "Paravirtual device");
        assert_eq!(
            judge(&format!("{paravirtual}\n{PASS}\n{DONE}"), exit(0), "").0,
            Verdict::WorksVirtual
        );
        let speed = r#"{"stage":"speed","ratio_to_cpu":0.4}"#;
        assert_eq!(
            judge(&format!("{IDENTIFY}\n{PASS}\n{speed}\n{DONE}"), exit(0), "").0,
            Verdict::WorksSlow
        );
    }

    #[test]
    fn wrong_numbers_outrank_a_good_exit() {
        let fail = PASS.replace("pass", "fail");
        assert_eq!(
            judge(&format!("{IDENTIFY}\n{fail}\n{DONE}"), exit(0), ""),
            (Verdict::WrongResults, "PARITY_FAIL".into())
        );
        let nan = r#"{"id":"matmul.bf16.m9","stage":"matmul","status":"pass","nonfinite":512}"#;
        assert_eq!(
            judge(&format!("{IDENTIFY}\n{nan}\n{DONE}"), exit(0), "").0,
            Verdict::WrongResults
        );
    }

    #[test]
    fn no_device_crash_hang_and_no_report_are_run_failures() {
        let none = IDENTIFY.replace(":1,", ":0,");
        assert_eq!(
            judge(&format!("{none}\n{DONE}"), exit(0), ""),
            (Verdict::RunFail, "DEVICE_NONE".into())
        );
        let crashed = Ended {
            signal: Some(6),
            ..Ended::default()
        };
        assert_eq!(
            judge(
                IDENTIFY,
                crashed,
                "[METAL] Command buffer execution failed: Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)"
            ),
            (Verdict::RunFail, "RUN_CMDBUF_OTHER".into())
        );
        let hung = Ended {
            signal: Some(9),
            timed_out: true,
            ..Ended::default()
        };
        assert_eq!(judge(IDENTIFY, hung, ""), (Verdict::RunFail, "RUN_OTHER".into()));
        assert_eq!(
            judge(
                "",
                exit(255),
                "MLX error: Failed to load the default metallib. library not found"
            ),
            (Verdict::RunFail, "METALLIB_NOT_FOUND".into())
        );
        assert_eq!(judge(&format!("{IDENTIFY}\n{PASS}"), exit(0), "").0, Verdict::RunFail);
        assert_eq!(
            judge(DONE, exit(0), "").0,
            Verdict::RunFail,
            "done without a single check"
        );
    }

    #[test]
    fn fetching_and_time_are_no_verdict_about_mlx() {
        assert_eq!(
            judge_build(
                exit(101),
                &classify(b"fatal: unable to access 'https://github.com/x/y.git/': Could not resolve host: github.com")
            )
            .0,
            Verdict::InfraError
        );
        assert_eq!(
            judge_build(
                Ended {
                    timed_out: true,
                    ..Ended::default()
                },
                &classify(b"")
            )
            .0,
            Verdict::InfraError
        );
        assert_eq!(
            judge_build(exit(101), &classify(b"")),
            (Verdict::BuildFail, "UNKNOWN".into())
        );
    }
}

//! Builds one candidate in isolation, looks at what came out, and tries it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::Result;
use metal_check::candidate::{self, Candidate, Route};
use metal_check::classify;
use metal_check::predict::{self, Prediction};
use metal_check::report::{CandidateReport, Stage};
use metal_check::runner::{Outcome, Runner, Spec};
use metal_check::verdict::{self, Ended, Verdict};
use metal_check::version::Version;
use metal_check::{macho, metallib};

use super::Session;
use super::probe_crate::{self, Places};

/// Limits and permissions of a run.
pub(super) struct Limits {
    pub(super) build_ms: u64,
    pub(super) probe_ms: u64,
    pub(super) offline: bool,
}

/// What a build may see of the caller's environment; everything else is set here or absent.
const PASSED_ON: [&str; 22] = [
    "PATH",
    "HOME",
    "USER",
    "TMPDIR",
    "CARGO_HOME",
    "RUSTUP_HOME",
    "RUSTUP_TOOLCHAIN",
    "DEVELOPER_DIR",
    "SDKROOT",
    "LIBCLANG_PATH",
    "PLANISH_CACHE",
    "XDG_CACHE_HOME",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
    "NO_PROXY",
    "no_proxy",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "PIP_INDEX_URL",
    "PIP_CERT",
];

pub(super) fn attempt(
    candidate: &Candidate,
    session: &Session,
    limits: &Limits,
    runner: &mut dyn Runner,
) -> Result<CandidateReport> {
    let mut report = empty(candidate);
    if let Some(skip) = candidate::skip(candidate, session.preflight, limits.offline) {
        report.stages.push(Stage {
            stage: "preflight".into(),
            status: "skipped".into(),
            ms: 0,
        });
        (report.code, report.detail) = (skip.code, Some(skip.detail));
        return Ok(report);
    }
    let places = Places::of(&fs::canonicalize(session.out)?, candidate);
    probe_crate::write(&places, candidate, &fs::canonicalize(session.root)?)?;
    report.log = Some(places.build_log.display().to_string());
    if !build(candidate, &places, limits, runner, &mut report) {
        return Ok(report);
    }
    let macos = session.preflight.host.os.filter(|_| session.preflight.host.is_mac());
    if let Some(macos) = macos.filter(|_| candidate.features.is_gpu()) {
        inspect(&places, candidate, macos, &mut report);
    }
    match report.predictions.first().cloned() {
        Some(Prediction { code, detail }) => {
            (report.verdict, report.code, report.detail) = (Verdict::RunFail, code, Some(detail))
        }
        None => probe(candidate, &places, limits, runner, &mut report),
    }
    Ok(report)
}

fn empty(candidate: &Candidate) -> CandidateReport {
    CandidateReport {
        id: candidate.to_string(),
        mlx: candidate.generation.mlx.clone(),
        is_control: candidate.is_control,
        is_gpu: candidate.features.is_gpu(),
        verdict: Verdict::Skipped,
        code: "NONE".into(),
        detail: None,
        stages: Vec::new(),
        predictions: Vec::new(),
        classification: None,
        probe: None,
        log: None,
    }
}

/// The environment of one candidate, the same for its build and its probe.
fn environment(candidate: &Candidate, places: &Places) -> BTreeMap<String, String> {
    let mut environment: BTreeMap<String, String> = PASSED_ON
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)))
        .collect();
    let mut set = |name: &str, value: String| environment.insert(name.to_owned(), value);
    set("CARGO_TARGET_DIR", places.target.display().to_string());
    set("MLX_RS_METAL_PATH", places.metallib.display().to_string());
    set("CARGO_TERM_COLOR", "never".into());
    set("LC_ALL", "C".into());
    match candidate.target.as_str() {
        "linux" => {}
        "as-is" => {
            if let Ok(target) = std::env::var("MACOSX_DEPLOYMENT_TARGET") {
                set("MACOSX_DEPLOYMENT_TARGET", target);
            }
        }
        target => {
            set("MACOSX_DEPLOYMENT_TARGET", target.to_owned());
        }
    }
    environment
}

/// Whether there is a program afterwards.
fn build(
    candidate: &Candidate,
    places: &Places,
    limits: &Limits,
    runner: &mut dyn Runner,
    report: &mut CandidateReport,
) -> bool {
    let mut argv: Vec<String> = ["cargo", "build", "--release", "-vv"].map(str::to_owned).to_vec();
    if limits.offline {
        argv.push("--offline".into());
    }
    let outcome = runner.run(&Spec {
        label: format!("build {candidate}"),
        argv,
        env: Some(environment(candidate, places)),
        directory: Some(places.source.display().to_string()),
        timeout_ms: limits.build_ms,
        log: Some(places.build_log.display().to_string()),
        ..Spec::default()
    });
    stage(report, "build", outcome.is_success(), &outcome);
    if outcome.is_success() {
        return true;
    }
    let classification = classify::classify(outcome.log().as_bytes());
    (report.verdict, report.code) = verdict::judge_build(ended(&outcome), &classification);
    report.detail = reason(&outcome, limits.build_ms);
    report.classification = Some(classification);
    false
}

fn probe(
    candidate: &Candidate,
    places: &Places,
    limits: &Limits,
    runner: &mut dyn Runner,
    report: &mut CandidateReport,
) {
    let device = if candidate.features.is_gpu() { "gpu" } else { "cpu" };
    let argv = [
        places.program().display().to_string(),
        places.probe_report.display().to_string(),
        device.to_owned(),
    ]
    .to_vec();
    let outcome = runner.run(&Spec {
        label: format!("probe {candidate}"),
        argv,
        env: Some(environment(candidate, places)),
        timeout_ms: limits.probe_ms,
        log: Some(places.probe_log.display().to_string()),
        report: Some(places.probe_report.display().to_string()),
        ..Spec::default()
    });
    let probe = verdict::read_probe(outcome.report.as_deref().unwrap_or_default());
    let classification = classify::classify(outcome.log().as_bytes());
    (report.verdict, report.code) = verdict::judge_probe(&probe, ended(&outcome), &classification);
    stage(report, "probe", report.verdict.is_usable(), &outcome);
    if !report.verdict.is_usable() {
        let failed = probe.failed_checks();
        let died = || probe.last_stage().map(|stage| format!("died in stage {stage}"));
        report.detail = if failed.is_empty() {
            reason(&outcome, limits.probe_ms).or_else(died)
        } else {
            Some(format!("wrong: {}", failed.join(", ")))
        };
        report.classification = Some(classification);
        report.log = Some(places.probe_log.display().to_string());
    }
    report.probe = Some(probe.events);
}

fn reason(outcome: &Outcome, limit_ms: u64) -> Option<String> {
    match outcome {
        Outcome {
            not_started: Some(why), ..
        } => Some(format!("did not start: {why}")),
        Outcome { timed_out: true, .. } => Some(format!(
            "no end within {} s; the whole process group was ended",
            limit_ms / 1000
        )),
        Outcome {
            signal: Some(signal), ..
        } => Some(format!("ended by signal {signal}")),
        _ => None,
    }
}

fn ended(outcome: &Outcome) -> Ended {
    Ended {
        exit: outcome.exit,
        signal: outcome.signal,
        timed_out: outcome.timed_out,
    }
}

fn stage(report: &mut CandidateReport, name: &str, passed: bool, outcome: &Outcome) {
    let status = if passed { "pass" } else { "fail" };
    report.stages.push(Stage {
        stage: name.into(),
        status: status.into(),
        ms: outcome.wall_ms,
    });
}

/// Compares what the library and the shader archive need with the running system, before anything is loaded.
fn inspect(places: &Places, candidate: &Candidate, macos: Version, report: &mut CandidateReport) {
    let beside = fs::read_to_string(places.target.join("mlx-lib-dir"))
        .ok()
        .map(PathBuf::from);
    let directory = match candidate.route {
        Route::Prebuilt => beside,
        Route::Source | Route::SourceJit => Some(places.metallib.clone()),
    };
    let Some(directory) = directory else { return };
    if let Ok(bytes) = fs::read(directory.join("libmlx.dylib")) {
        match macho::parse(&bytes) {
            Ok(image) => report.predictions.extend(predict::of_library(&image, macos)),
            Err(error) => report.predictions.push(Prediction {
                code: "LOAD_OTHER".into(),
                detail: error.to_string(),
            }),
        }
    }
    let shaders = directory.join("mlx.metallib");
    if shaders.exists() {
        match read_metallib(&shaders) {
            Ok((header, summary)) => report
                .predictions
                .extend(predict::of_metallib(&header, Some(&summary), macos)),
            Err(error) => report
                .predictions
                .push(predict::of_unreadable_metallib(&error.to_string())),
        }
    }
    let passed = report.predictions.is_empty();
    stage(report, "inspect", passed, &Outcome::default());
}

/// Header and list of functions, without reading the hundred megabytes of kernels.
fn read_metallib(path: &Path) -> Result<(metallib::Header, metallib::Summary)> {
    let mut file = File::open(path)?;
    let mut head = Vec::new();
    file.by_ref()
        .take(metallib::HEADER_BYTES as u64)
        .read_to_end(&mut head)?;
    let header = metallib::parse_header(&head, file.metadata()?.len())?;
    file.seek(SeekFrom::Start(header.functions.offset))?;
    let mut list = Vec::new();
    file.take(header.functions.size + 4).read_to_end(&mut list)?;
    let summary = metallib::summarize(&metallib::parse_functions(&list)?);
    Ok((header, summary))
}

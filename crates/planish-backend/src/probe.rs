//! The parent's side of a probe: start the child, watch it, read its report, conclude.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::child::PROBE_COMMAND;
use crate::files::MlxFiles;
use crate::report::{Backend, Check, CheckStatus, ChildEnd, DeviceReport, ProbeReport, SCHEMA, Verdict};
use crate::tail::Tail;
use crate::{Error, Result};

/// Most that is read of a report; a whole one has a tenth of it.
const MOST_REPORT_BYTES: u64 = 1 << 20;

/// How long a probe may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In all.
    pub total: Duration,
    /// Without a new line in the report.
    pub silent: Duration,
    /// Between the request to end and the end by force.
    pub grace: Duration,
}

impl Limits {
    /// The limits for a device. The first use of CUDA compiles its kernels, which took 35 s on an H100.
    pub fn of(backend: Backend) -> Self {
        let (total, silent) = match backend {
            Backend::Cuda => (300, 150),
            Backend::Metal => (60, 20),
            // No driver to hang in, but perhaps a machine that is busy.
            Backend::Cpu => (120, 60),
        };
        Self {
            total: Duration::from_secs(total),
            silent: Duration::from_secs(silent),
            grace: Duration::from_secs(5),
        }
    }

    /// The same, held to so many seconds in all.
    pub fn within(self, total: Duration) -> Self {
        Self {
            total,
            silent: self.silent.min(total),
            grace: self.grace,
        }
    }
}

/// Probes a device in a child process that runs `program` with [`PROBE_COMMAND`].
///
/// A failure whose cause passes (the Metal compiler service died) is tried once more.
///
/// # Errors
/// [`Error::Process`] and [`Error::Io`]; that the device does not work is no error but a verdict.
pub fn probe(program: &Path, backend: Backend, seed: u64, limits: Limits) -> Result<ProbeReport> {
    let report = probe_once(program, backend, seed, limits)?;
    if report.code == "COMPILER_SERVICE_DEAD" {
        std::thread::sleep(Duration::from_secs(2));
        return probe_once(program, backend, seed, limits);
    }
    Ok(report)
}

fn probe_once(program: &Path, backend: Backend, seed: u64, limits: Limits) -> Result<ProbeReport> {
    let file = ReportFile::new()?;
    let mut command = Command::new(program);
    command
        .arg(PROBE_COMMAND)
        .arg(backend.name())
        .arg(&file.path)
        .arg(seed.to_string());
    let end = run_guarded(command, &file.path, limits)?;
    Ok(conclude(backend, seed, &file.read(), end))
}

/// Runs a command that may crash or hang, in a process group of its own that is gone afterwards. `sign_of_life` is a file
/// that grows while the command makes progress.
///
/// # Errors
/// [`Error::Process`] when it cannot be started or watched; how it ended is no error.
pub fn run_guarded(mut command: Command, sign_of_life: &Path, limits: Limits) -> Result<ChildEnd> {
    // MLX's own error handler prints on standard output.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(&mut command, 0);
    let child = command.spawn().map_err(|source| Error::Process {
        action: "start",
        source,
    })?;
    watch(child, sign_of_life, limits)
}

/// What a report and the end of the process that wrote it mean.
pub fn conclude(backend: Backend, seed: u64, lines: &str, end: ChildEnd) -> ProbeReport {
    let mut report = ProbeReport {
        child: end,
        ..report_of_nothing(backend, seed)
    };
    let mut done = false;
    let (mut error, mut predicted) = (None, None);
    for line in lines.lines() {
        // A line that was cut by a crash is the end of what there is to read.
        let Ok(event) = serde_json::from_str::<Line>(line) else {
            break;
        };
        match event {
            Line::Start { mlx_version } => report.mlx_version = mlx_version,
            Line::Stage { stage } => report.stage = stage,
            Line::Device { device } => report.device = device,
            Line::Files { files } => report.files = files,
            Line::Predicted { code, detail } => {
                predicted.get_or_insert((code, detail));
            }
            Line::Check { check } => report.checks.push(distrusted(check)),
            Line::Speed { gflops, cpu_gflops } => {
                (report.gflops, report.cpu_gflops) = (Some(gflops), cpu_gflops);
            }
            Line::Error { message } => error = Some(message),
            Line::Done => done = true,
        }
    }
    let (verdict, code) = match predicted {
        Some((code, detail)) => {
            report.detail = Some(detail);
            (Verdict::Unloadable, code)
        }
        None => verdict_of(&report, done, error.as_deref()),
    };
    (report.verdict, report.code) = (verdict, code);
    report.detail = report.detail.take().or_else(|| detail(&report, error));
    report
}

/// A check that says it passed although numbers were not finite has not.
fn distrusted(mut check: Check) -> Check {
    if check.nonfinite > 0 {
        check.status = CheckStatus::Fail;
    }
    check
}

/// The words behind a verdict: how the process ended, or what MLX said.
fn detail(report: &ProbeReport, error: Option<String>) -> Option<String> {
    let end = &report.child;
    let failed = report.checks.iter().find(|check| check.status == CheckStatus::Fail);
    let last_words = || end.stderr_tail.last().cloned();
    match report.verdict {
        Verdict::Ok | Verdict::OkVirtual => None,
        Verdict::Hung => Some(format!(
            "no answer within {:.1} s; it was ended",
            end.wall_ms as f64 / 1000.0
        )),
        Verdict::Crashed => error.or_else(|| {
            let signal = end.signal.map(|signal| format!("signal {signal}"));
            let words: Vec<String> = signal.into_iter().chain(last_words()).collect();
            (!words.is_empty()).then(|| words.join(", "))
        }),
        Verdict::NoReport => error.or_else(last_words).or_else(|| {
            let exit = end.exit.map(|code| format!("exit code {code} "));
            Some(format!("{}without a whole report", exit.unwrap_or_default()))
        }),
        Verdict::WrongResults | Verdict::Oom => failed.map(describe),
        Verdict::NoDevice | Verdict::Unloadable => error,
    }
}

fn describe(check: &Check) -> String {
    match (&check.note, check.max_rel, check.cosine) {
        (Some(note), _, _) => note.clone(),
        _ if check.nonfinite > 0 => format!("{} elements are NaN or infinite", check.nonfinite),
        (_, Some(max_rel), Some(cosine)) => format!("relative error {max_rel:.1e}, cosine {cosine:.4}"),
        _ => "outside its bound".to_owned(),
    }
}

/// A report before anything is known.
pub(crate) fn report_of_nothing(backend: Backend, seed: u64) -> ProbeReport {
    ProbeReport {
        schema: SCHEMA,
        backend,
        verdict: Verdict::NoReport,
        code: "NO_REPORT".to_owned(),
        stage: String::new(),
        mlx_version: String::new(),
        app: format!("planish {}", env!("CARGO_PKG_VERSION")),
        seed,
        device: DeviceReport::default(),
        files: MlxFiles::default(),
        checks: Vec::new(),
        gflops: None,
        cpu_gflops: None,
        detail: None,
        child: ChildEnd::default(),
        cached: false,
    }
}

#[derive(Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line {
    Start { mlx_version: String },
    Stage { stage: String },
    Device { device: DeviceReport },
    Files { files: MlxFiles },
    Predicted { code: String, detail: String },
    Check { check: Check },
    Speed { gflops: f64, cpu_gflops: Option<f64> },
    Error { message: String },
    Done,
}

fn verdict_of(report: &ProbeReport, done: bool, error: Option<&str>) -> (Verdict, String) {
    let end = &report.child;
    let failed = |stage: &str| {
        let fails = |c: &Check| c.status == CheckStatus::Fail && c.id.starts_with(stage);
        report.checks.iter().any(fails)
    };
    let told: Vec<&str> = end.stderr_tail.iter().map(String::as_str).chain(error).collect();
    let told = told.join("\n");
    if end.timed_out {
        return (Verdict::Hung, "HUNG".into());
    }
    if end.signal.is_some() || told.contains("terminate called") || told.contains("terminating due to") {
        return (Verdict::Crashed, class_of(&told, "CRASHED"));
    }
    if !done || (report.gflops.is_none() && !failed("") && error.is_none() && report.device.count > 0) {
        return (Verdict::NoReport, class_of(&told, "NO_REPORT"));
    }
    if failed("memory") {
        return (Verdict::Oom, "RUN_OOM".into());
    }
    if failed("") {
        return (Verdict::WrongResults, "PARITY_FAIL".into());
    }
    if error.is_some() {
        return (Verdict::Crashed, class_of(&told, "RUN_OTHER"));
    }
    if report.device.count == 0 {
        return (Verdict::NoDevice, "DEVICE_NONE".into());
    }
    if report.device.is_virtual {
        (Verdict::OkVirtual, "NONE".into())
    } else {
        (Verdict::Ok, "NONE".into())
    }
}

/// The code of the catalogue for what the process said.
fn class_of(told: &str, other: &str) -> String {
    let answer = metal_check::classify::classify(told.as_bytes());
    match answer.code.as_str() {
        "NONE" | "UNKNOWN" | "RUN_OTHER" if told.contains("out of memory") => "RUN_OOM".to_owned(),
        "NONE" | "UNKNOWN" | "RUN_OTHER" => other.to_owned(),
        code => code.to_owned(),
    }
}

/// Waits for the child, and ends it when it takes too long. Nothing of its group is left afterwards.
fn watch(mut child: Child, report: &Path, limits: Limits) -> Result<ChildEnd> {
    let process = |action| move |source| Error::Process { action, source };
    let told = [child.stdout.take().map(Tail::of), child.stderr.take().map(Tail::of)];
    let started = Instant::now();
    let ended = wait(&mut child, report, limits);
    // A helper that the child left behind would go on, and hold our ends of the pipes.
    signal_group(&child, true);
    let (status, timed_out) = ended.map_err(process("watch its child"))?;
    #[cfg(unix)]
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    let signal = None;
    Ok(ChildEnd {
        exit: status.code(),
        signal,
        wall_ms: started.elapsed().as_millis() as u64,
        stderr_tail: told.into_iter().flatten().flat_map(Tail::lines).collect(),
        timed_out,
        limits_ms: [limits.total.as_millis() as u64, limits.silent.as_millis() as u64],
    })
}

/// How the child ended, and whether it had to be made to.
fn wait(child: &mut Child, report: &Path, limits: Limits) -> std::io::Result<(ExitStatus, bool)> {
    let started = Instant::now();
    let (mut size, mut alive_at) = (0, started);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((status, false));
        }
        let now = std::fs::metadata(report).map_or(0, |meta| meta.len());
        if now != size {
            (size, alive_at) = (now, Instant::now());
        }
        if started.elapsed() > limits.total || alive_at.elapsed() > limits.silent {
            return stop(child, limits.grace).map(|status| (status, true));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Asks the child's whole group to end, then ends it.
fn stop(child: &mut Child, grace: Duration) -> std::io::Result<std::process::ExitStatus> {
    signal_group(child, false);
    let asked = Instant::now();
    while asked.elapsed() < grace {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    signal_group(child, true);
    let _ = child.kill();
    child.wait()
}

#[cfg(unix)]
fn signal_group(child: &Child, force: bool) {
    use rustix::process::{Pid, Signal, kill_process_group};
    let signal = if force { Signal::KILL } else { Signal::TERM };
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // It may have ended by itself in the meantime.
        let _ = kill_process_group(group, signal);
    }
}

#[cfg(not(unix))]
fn signal_group(_: &Child, _: bool) {}

/// A file with a name of its own, removed at the end.
struct ReportFile {
    path: std::path::PathBuf,
}

impl ReportFile {
    fn new() -> Result<Self> {
        static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("planish-probe-{}-{number}.jsonl", std::process::id()));
        std::fs::File::create(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "create",
            source,
        })?;
        Ok(Self { path })
    }

    /// What was written, as far as it can be a report.
    fn read(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(file) = std::fs::File::open(&self.path) {
            // An unreadable end leaves what was read before it.
            let _ = file.take(MOST_REPORT_BYTES).read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: &str = r#"{"event":"device","device":{"count":1,"name":"GPU","architecture":"a","memory_bytes":1,"recommended_bytes":1,"virtual":false}}"#;
    const PASS: &str = r#"{"event":"check","check":{"id":"matmul.f32.m8","status":"pass","max_rel":1e-6,"cosine":1.0,"nonfinite":0,"ms":1.0}}"#;
    const FAIL: &str = r#"{"event":"check","check":{"id":"matmul.bf16.m9","status":"fail","max_rel":null,"cosine":null,"nonfinite":512,"ms":0.8}}"#;
    const SPEED: &str = r#"{"event":"speed","gflops":900.0}"#;
    const DONE: &str = r#"{"event":"done"}"#;
    const STAGE: &str = r#"{"event":"stage","stage":"matmul"}"#;

    fn check(lines: &[&str], end: ChildEnd, verdict: Verdict, code: &str) {
        let report = conclude(Backend::Metal, 7, &lines.join("\n"), end);
        assert_eq!((report.verdict, report.code.as_str()), (verdict, code), "{lines:?}");
    }

    fn exit(code: i32) -> ChildEnd {
        ChildEnd {
            exit: Some(code),
            ..ChildEnd::default()
        }
    }

    fn signal(signal: i32, stderr: &str) -> ChildEnd {
        ChildEnd {
            signal: Some(signal),
            stderr_tail: vec![stderr.into()],
            ..ChildEnd::default()
        }
    }

    #[test]
    fn endings_become_verdicts() {
        check(&[STAGE, DEVICE, PASS, SPEED, DONE], exit(0), Verdict::Ok, "NONE");
        let virtual_device = DEVICE.replace("\"virtual\":false", "\"virtual\":true");
        check(
            &[&virtual_device, PASS, SPEED, DONE],
            exit(0),
            Verdict::OkVirtual,
            "NONE",
        );
        check(
            &[STAGE, DEVICE, PASS, FAIL, DONE],
            exit(0),
            Verdict::WrongResults,
            "PARITY_FAIL",
        );
        check(
            &[
                STAGE,
                r#"{"event":"device","device":{"count":0,"name":null,"architecture":null,"memory_bytes":null,"recommended_bytes":null,"virtual":false}}"#,
                DONE,
            ],
            exit(0),
            Verdict::NoDevice,
            "DEVICE_NONE",
        );
        check(&[STAGE, DEVICE], signal(6, "abort"), Verdict::Crashed, "CRASHED");
        check(
            &[STAGE],
            signal(6, "Unable to reach MTLCompilerService"),
            Verdict::Crashed,
            "COMPILER_SERVICE_DEAD",
        );
        check(&[STAGE], exit(255), Verdict::NoReport, "NO_REPORT");
        check(&[], exit(0), Verdict::NoReport, "NO_REPORT");
        check(&[STAGE, DEVICE, PASS, DONE], exit(0), Verdict::NoReport, "NO_REPORT");
        let slow = ChildEnd {
            timed_out: true,
            signal: Some(15),
            ..ChildEnd::default()
        };
        check(&[STAGE, DEVICE], slow, Verdict::Hung, "HUNG");
        let thrown = r#"{"event":"error","message":"MLX could not add: out of memory"}"#;
        check(&[STAGE, DEVICE, thrown, DONE], exit(0), Verdict::Crashed, "RUN_OOM");
        let predicted = r#"{"event":"predicted","code":"METALLIB_TARGET_TOO_NEW","detail":"needs macOS 26.2"}"#;
        check(
            &[predicted, DONE],
            exit(0),
            Verdict::Unloadable,
            "METALLIB_TARGET_TOO_NEW",
        );
        let nan_that_passed = FAIL.replace("\"fail\"", "\"pass\"");
        check(
            &[STAGE, DEVICE, &nan_that_passed, SPEED, DONE],
            exit(0),
            Verdict::WrongResults,
            "PARITY_FAIL",
        );
    }

    #[test]
    fn a_cut_line_does_not_hide_the_stage_of_death() {
        let report = conclude(Backend::Cuda, 7, &format!("{STAGE}\n{{\"event\":\"che"), signal(11, ""));
        assert_eq!((report.stage.as_str(), report.verdict), ("matmul", Verdict::Crashed));
        assert_eq!(report.reason(), "CRASHED in matmul: signal 11, ");
    }

    #[cfg(unix)]
    fn script(text: &str) -> (tempfile::TempDir, std::path::PathBuf) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        (dir, path)
    }

    #[cfg(unix)]
    #[test]
    fn a_child_that_sleeps_is_ended_with_its_group() {
        let (_dir, program) = script("trap '' TERM; sleep 600 & wait; sleep 600");
        let short = Duration::from_millis(200);
        let limits = Limits {
            total: Duration::from_secs(5),
            silent: short,
            grace: short,
        };
        let started = Instant::now();
        let report = probe(&program, Backend::Metal, 7, limits).unwrap();
        assert_eq!(report.verdict, Verdict::Hung);
        assert!(started.elapsed() < Duration::from_secs(4));
    }

    #[cfg(unix)]
    #[test]
    fn a_child_that_kills_itself_has_crashed_in_its_stage() {
        let (_dir, program) = script(r#"echo '{"event":"stage","stage":"add"}' > "$3"; echo boom >&2; kill -ABRT $$"#);
        let report = probe(&program, Backend::Metal, 7, Limits::of(Backend::Metal)).unwrap();
        assert_eq!((report.verdict, report.stage.as_str()), (Verdict::Crashed, "add"));
        assert_eq!(report.child.stderr_tail, ["boom"]);
        assert_eq!(report.child.signal, Some(6));
    }

    #[cfg(unix)]
    #[test]
    fn a_helper_left_behind_holds_nobody_up_and_is_ended() {
        let (dir, program) = script(r#"sleep 600 & echo $! > "$(dirname "$0")/helper"; yes | head -c 3000000 >&2"#);
        let started = Instant::now();
        let report = probe(&program, Backend::Metal, 7, Limits::of(Backend::Metal)).unwrap();
        assert_eq!(report.verdict, Verdict::NoReport);
        assert!(
            report.child.stderr_tail.len() <= 40,
            "{}",
            report.child.stderr_tail.len()
        );
        assert!(started.elapsed() < Duration::from_secs(10));
        let helper = std::fs::read_to_string(dir.path().join("helper")).unwrap();
        let alive = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", helper.trim())).unwrap_or_default();
            !state.is_empty() && !state.contains(") Z ")
        };
        while alive() {
            assert!(started.elapsed() < Duration::from_secs(10), "process {helper} survives");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn err_program_that_does_not_exist() {
        let refused = probe(
            Path::new("/nonexistent/planish"),
            Backend::Cpu,
            7,
            Limits::of(Backend::Cpu),
        );
        assert!(matches!(refused, Err(Error::Process { action: "start", .. })));
    }
}

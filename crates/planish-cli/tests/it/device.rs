//! A probe that goes wrong, whatever way, leads to the next device with the reason shown, within its limit.
//!
//! The real program starts a script in place of its probe (`PLANISH_TEST_PROBE`, which only debug builds know).
#![cfg(all(unix, debug_assertions))]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::{Ran, run, text, tiny_model};
use crate::train_command::data_folder;

const GPU: &str = if cfg!(target_os = "macos") { "metal" } else { "cuda" };
/// What a probe says first of all, up to its products.
const BEGINNING: &str = r#"
say '{"event":"start","mlx_version":"0.32.2"}'
say '{"event":"stage","stage":"identify"}'
say '{"event":"device","device":{"count":1,"name":"Fake GPU","architecture":"x","memory_bytes":1,"recommended_bytes":1,"virtual":false}}'
say '{"event":"stage","stage":"matmul"}'
"#;

/// A machine whose GPU probe is a script of our own.
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    /// `say` writes a line into the report; every start is counted; the processor is probed by the real program.
    fn new(script: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (path, real) = (dir.path().join("probe"), env!("CARGO_BIN_EXE_planish"));
        let starts = dir.path().join("starts");
        let script = format!(
            "#!/bin/sh\nif [ \"$2\" = cpu ]; then exec '{real}' \"$@\"; fi\necho $$ >> '{}'\nreport=$3\n\
             say() {{ printf '%s\\n' \"$1\" >> \"$report\"; }}\n{script}\n",
            starts.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_planish"));
        command
            .args(args)
            .env("PLANISH_TEST_PROBE", self.path("probe"))
            .env("PLANISH_CACHE", self.path("cache"))
            .env("PLANISH_PROBE_SECONDS", "1.5");
        command
    }

    fn logits(&self, backend: &str) -> Ran {
        let (model, out) = (tiny_model(), self.path("logits.safetensors"));
        let _ = std::fs::remove_file(&out);
        let args = [
            "logits",
            "--backend",
            backend,
            "--tokens",
            "1,2,3",
            "--model",
            text(model),
            "--out",
            text(&out),
        ];
        run(&mut self.command(&args))
    }

    fn has_logits(&self) -> bool {
        self.path("logits.safetensors").exists()
    }

    /// Process ids of the probes that were started.
    fn starts(&self) -> Vec<String> {
        let log = std::fs::read_to_string(self.path("starts")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}

/// Under `auto` the run goes on with the processor and says why in one line; asked for by name it stops.
fn check(script: &str, reason: &str) {
    let scene = Scene::new(script);
    let started = Instant::now();
    let ran = scene.logits("auto");
    assert_eq!(ran.code, Some(0), "{script}: {}", ran.stderr);
    assert!(scene.has_logits());
    let lines: Vec<&str> = ran.stderr.lines().filter(|line| line.starts_with("backend:")).collect();
    assert_eq!(lines.len(), 1, "{script}: {}", ran.stderr);
    let expected = format!("backend: cpu — {GPU} not used: {reason}");
    assert!(
        lines[0].starts_with(&expected),
        "{script}\n expected {expected}\n found    {}",
        lines[0]
    );
    assert!(lines[0].contains("planish doctor"));
    // The limit, the five seconds that a stubborn probe is given to end, and a slow machine.
    assert!(started.elapsed() < Duration::from_secs(30), "{script}");

    let strict = scene.logits(GPU);
    assert_eq!(strict.code, Some(1), "{script}: {}", strict.stderr);
    assert!(!scene.has_logits(), "{script}: it computed elsewhere");
    let expected = format!("error: backend {GPU} cannot be used: {reason}");
    assert!(strict.stderr.contains(&expected), "{script}: {}", strict.stderr);
    for pid in scene.starts() {
        assert!(!is_alive(&pid), "{script}: process {pid} survives");
    }
}

#[test]
fn a_probe_that_crashes() {
    check(&format!("{BEGINNING}kill -SEGV $$"), "CRASHED in matmul: signal 11");
    check(
        &format!("{BEGINNING}echo 'Unable to build metal library from source' >&2; kill -ABRT $$"),
        "JIT_OTHER in matmul",
    );
}

#[test]
fn a_probe_that_hangs() {
    check("exec sleep 600", "HUNG: no answer within 1.");
    check(
        &format!("{BEGINNING}exec sleep 600"),
        "HUNG in matmul: no answer within 1.",
    );
}

#[test]
fn a_probe_that_prints_garbage() {
    check(
        "head -c 100000 /dev/urandom > \"$report\"",
        "NO_REPORT: exit code 0 without a whole report",
    );
    check(
        &format!("{BEGINNING}printf '{{\"event\":\"che' >> \"$report\""),
        "NO_REPORT in matmul",
    );
    check("echo 'MLX error: bad luck'; exit 255", "NO_REPORT: MLX error: bad luck");
}

#[test]
fn a_probe_with_wrong_numbers() {
    let nan = r#"say '{"event":"check","check":{"id":"matmul.bf16.m9","status":"fail","max_rel":null,"cosine":null,"nonfinite":512,"ms":1.0}}'
say '{"event":"done"}'"#;
    check(
        &format!("{BEGINNING}{nan}"),
        "PARITY_FAIL in matmul.bf16.m9: 512 elements are NaN or infinite",
    );
    let claimed = nan.replace("\"fail\"", "\"pass\"");
    let speed = r#"say '{"event":"speed","gflops":9000.0,"cpu_gflops":300.0}'"#;
    check(
        &format!("{BEGINNING}{speed}\n{claimed}"),
        "PARITY_FAIL in matmul.bf16.m9: 512 elements are NaN or infinite",
    );
}

#[test]
fn a_gpu_that_is_not_there_is_worth_no_line() {
    let scene = Scene::new("say '{\"event\":\"stage\",\"stage\":\"identify\"}'; say '{\"event\":\"done\"}'");
    let ran = scene.logits("auto");
    assert_eq!(
        (ran.code, ran.stderr.contains("backend:")),
        (Some(0), false),
        "{}",
        ran.stderr
    );
}

#[test]
fn lasting_verdicts_are_remembered_and_passing_ones_are_not() {
    let crash = Scene::new("kill -SEGV $$");
    for _ in 0..3 {
        assert_eq!(crash.logits("auto").code, Some(0));
    }
    assert_eq!(crash.starts().len(), 1);
    let again = crash.logits("auto");
    assert!(again.stderr.contains("(remembered)"), "{}", again.stderr);
    let afresh = run(&mut crash.command(&["doctor", "--json", "--no-probe-cache"]));
    assert_eq!((afresh.code, crash.starts().len()), (Some(0), 2), "{}", afresh.stderr);

    let garbage = Scene::new("exit 3");
    for _ in 0..2 {
        assert_eq!(garbage.logits("auto").code, Some(0));
    }
    assert_eq!(garbage.starts().len(), 2);
}

#[test]
fn the_processor_is_taken_without_a_probe() {
    let scene = Scene::new("exit 3");
    let ran = scene.logits("cpu");
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    assert!(scene.starts().is_empty());
}

#[test]
fn the_record_of_a_run_says_why_the_gpu_was_not_used() {
    let scene = Scene::new(&format!("{BEGINNING}kill -SEGV $$"));
    let (model, data, out) = (tiny_model(), data_folder(scene.dir.path()), scene.path("out"));
    let args = [
        "train",
        "--model",
        text(model),
        "--data",
        text(&data),
        "--out",
        text(&out),
        "--set",
        "train.steps=1",
    ];
    run(&mut scene.command(&args)).success();
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let first: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&first["backend"], &first["probe"]["verdict"]),
        (&"cpu".into(), &"ok".into())
    );
    let not_used = first["probe"]["not_used"].as_array().unwrap();
    assert_eq!((not_used.len(), &not_used[0]["backend"]), (1, &GPU.into()), "{first}");
    let reason = not_used[0]["reason"].as_str().unwrap();
    assert!(reason.starts_with("CRASHED in matmul"), "{reason}");
}

#[test]
fn doctor_names_the_failure_and_its_mend() {
    let scene = Scene::new(&format!("{BEGINNING}kill -SEGV $$"));
    let ran = run(&mut scene.command(&["doctor", "--json"])).success();
    let found: serde_json::Value = serde_json::from_str(&ran).unwrap();
    assert_eq!(found["selected"], "cpu");
    assert!(found["fail_over"].as_str().unwrap().contains("CRASHED in matmul"));
    let gpu = &found["backends"][0];
    assert_eq!(
        (gpu["name"].as_str(), gpu["usable"].as_bool(), gpu["code"].as_str()),
        (Some(GPU), Some(false), Some("CRASHED"))
    );
    assert_eq!(gpu["device"], "Fake GPU");
    assert!(
        gpu["remedy"]
            .as_str()
            .unwrap()
            .contains("planish doctor --no-probe-cache")
    );
    let screen = run(&mut scene.command(&["doctor"])).success();
    for words in ["CRASHED in matmul", "--backend auto takes cpu", "Missing:"] {
        assert!(screen.contains(words), "no {words:?} in\n{screen}");
    }
}

#[test]
fn err_time_limit_that_is_no_number() {
    let scene = Scene::new("exit 3");
    let ran = run(scene.command(&["doctor"]).env("PLANISH_PROBE_SECONDS", "soon"));
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("PLANISH_PROBE_SECONDS=soon"), "{}", ran.stderr);
}

/// The real probe hangs on a pipe that nobody reads; killing the one that started it must end it.
#[test]
fn a_killed_run_leaves_no_probe_behind() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let script = format!(
        "'{}' __probe cpu '{}' 7 & echo $! > '{1}.pid'; exec sleep 600",
        env!("CARGO_BIN_EXE_planish"),
        text(&pipe)
    );
    let mut shell = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let pid = wait_for(&dir.path().join("pipe.pid"));
    std::thread::sleep(Duration::from_millis(500));
    assert!(is_alive(&pid), "the probe should hang on its pipe");
    end(&mut shell);
    let killed = Instant::now();
    while is_alive(&pid) {
        assert!(killed.elapsed() < Duration::from_secs(10), "process {pid} survives");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn end(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn wait_for(file: &Path) -> String {
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if text.ends_with('\n') {
            return text.trim().to_owned();
        }
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "{} does not appear",
            file.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_alive(pid: &str) -> bool {
    let output = Command::new("ps").args(["-o", "stat=", "-p", pid]).output().unwrap();
    let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    !state.is_empty() && !state.starts_with('Z')
}

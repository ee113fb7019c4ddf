//! `metal-check` end to end on a Mac made of shell scripts: what `xcrun`, `xcodebuild`, `sw_vers`, `sysctl` and `cargo`
//! print and do is the scenario, everything else is real.

use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const GOOD_PROBE: &str = r#"echo '{"stage":"identify","device":{"count":1,"name":"Apple M2 Pro"}}' > "$1"
echo '{"id":"matmul.f32.m8","stage":"matmul","status":"pass","max_rel":1e-6,"nonfinite":0}' >> "$1"
echo '{"event":"done"}' >> "$1""#;

const MISSING_METAL: &str =
    r#"echo 'xcrun: error: unable to find utility "metal", not a developer tool or in PATH' >&2; exit 72"#;
const MISSING_COMPONENT: &str = "echo \"error: cannot execute tool 'metal' due to missing Metal Toolchain; use: xcodebuild -downloadComponent MetalToolchain\" >&2; exit 1";
const WORKING_METAL: &str =
    "case \"$*\" in *--version*) echo 'Apple metal version 32023.850';; *-E*) echo 310;; *-min=11.0*-c*) exit 1;; esac";

/// A repository, a home and a `PATH` of their own.
struct Mac {
    base: TempDir,
}

impl Mac {
    /// All is well: macOS 15.6.1, Xcode 26.1, a Metal compiler, builds that succeed and probes that are right.
    fn new() -> Self {
        let mac = Self {
            base: TempDir::new().unwrap(),
        };
        for folder in ["shims", "home", "repo/crates/mlx-sys", "repo/docs"] {
            fs::create_dir_all(mac.path(folder)).unwrap();
        }
        mac.shim(
            "sw_vers",
            "printf 'ProductName:\\t\\tmacOS\\nProductVersion:\\t\\t15.6.1\\nBuildVersion:\\t\\t24G90\\n'",
        );
        mac.shim("sysctl", "case \"$2\" in hw.optional.arm64) echo 1;; sysctl.proc_translated) echo 0;; hw.memsize) echo 34359738368;; hw.model) echo Mac14,9;; machdep.cpu.brand_string) echo 'Apple M2 Pro';; esac");
        mac.shim("xcodebuild", "case \"$1\" in -version) printf 'Xcode 26.1\\nBuild version 17B55\\n';; -showComponent) echo 'Status: installed';; esac");
        mac.metal(WORKING_METAL);
        mac.cargo("", GOOD_PROBE);
        // What a source build needs besides, so that the machine that runs this test does not matter.
        mac.shim("cmake", "echo 'cmake version 4.1.2'");
        mac.shim("rustc", "case \"$1\" in -vV) printf 'rustc 1.95.0 (x)\\nhost: aarch64-apple-darwin\\n';; --print) echo deployment_target=11.0;; esac");
        mac.git(&["init", "-q"]);
        fs::write(mac.path("repo/.gitignore"), "/target\n").unwrap();
        fs::write(mac.path("repo/crates/mlx-sys/README"), "stands for the real one\n").unwrap();
        mac.git(&["add", "-A"]);
        mac.git(&[
            "-c",
            "user.name=t",
            "-c",
            "user.email=t@t",
            "commit",
            "-q",
            "-m",
            "start",
        ]);
        mac
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    fn shim(&self, name: &str, script: &str) {
        let path = self.path("shims").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What `xcrun` does when it is asked for the Metal compiler.
    fn metal(&self, script: &str) {
        self.shim(
            "xcrun",
            &format!("case \"$*\" in *--show-sdk-version*) echo 26.1;; *metal*) {script};; esac"),
        );
    }

    /// `cargo` notes its environment, runs `before` (which may fail) and leaves a program that does `probe` on a GPU.
    fn cargo(&self, before: &str, probe: &str) {
        let log = self.path("cargo.log");
        self.shim(
            "cargo",
            &format!(
                "[ \"$1\" = build ] || exit 1\n\
                 echo \"$PWD|dt=$MACOSX_DEPLOYMENT_TARGET|target=$CARGO_TARGET_DIR|metallib=$MLX_RS_METAL_PATH|color=$CARGO_TERM_COLOR|lc=$LC_ALL|rustflags=$RUSTFLAGS|secret=$SECRET\" >> '{}'\n\
                 {before}\n\
                 mkdir -p \"$CARGO_TARGET_DIR/release\"\n\
                 program=\"$CARGO_TARGET_DIR/release/metal-check-probe\"\n\
                 cat > \"$program\" <<'PROBE'\n#!/bin/sh\nif [ \"$2\" = cpu ]; then\n{GOOD_PROBE}\nexit 0\nfi\n{probe}\nPROBE\n\
                 chmod +x \"$program\"",
                log.display()
            ),
        );
    }

    fn git(&self, arguments: &[&str]) -> String {
        let output = Command::new("git")
            .args(arguments)
            .current_dir(self.path("repo"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        let path = format!("{}:{}", self.path("shims").display(), std::env::var("PATH").unwrap());
        command.arg("metal-check").args(arguments).args([
            "--root",
            self.path("repo").to_str().unwrap(),
            "--out",
            self.path("out").to_str().unwrap(),
        ]);
        command
            .env("PATH", path)
            .env("HOME", self.path("home"))
            .env("RUSTFLAGS", "--cfg user")
            .env("SECRET", "x")
            .env_remove("MACOSX_DEPLOYMENT_TARGET");
        command
    }

    fn run(&self, arguments: &[&str]) -> Run {
        self.finish(self.command(arguments))
    }

    fn finish(&self, mut command: Command) -> Run {
        let output = command.output().unwrap();
        let text = fs::read_to_string(self.path("out/report.json")).unwrap_or_default();
        Run {
            report: serde_json::from_str(&text).unwrap_or_default(),
            output,
        }
    }

    fn history(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("repo/target/metal-check/history.jsonl")).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Processes that have a path of this test in their command line.
    fn processes(&self) -> Vec<String> {
        let output = Command::new("ps").args(["-eo", "stat=,args="]).output().unwrap();
        let marker = self.base.path().to_str().unwrap().to_owned();
        let alive = |line: &&str| line.contains(&marker) && !line.starts_with('Z');
        String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter(alive)
            .map(str::to_owned)
            .collect()
    }
}

struct Run {
    report: Value,
    output: Output,
}

impl Run {
    /// Exit status, and verdict and code of the candidates in order.
    fn check(&self, status: i32, candidates: &[(&str, &str)]) {
        let found: Vec<(&str, &str)> = self.report["candidates"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| (one["verdict"].as_str().unwrap(), one["code"].as_str().unwrap()))
            .collect();
        assert_eq!(
            (self.output.status.code(), found.as_slice()),
            (Some(status), candidates),
            "{}",
            String::from_utf8_lossy(&self.output.stderr)
        );
        assert_eq!(self.report["exit"], status);
    }

    fn changes(&self) -> Vec<&str> {
        self.report["history"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["change"].as_str().unwrap())
            .collect()
    }
}

const WORKS: (&str, &str) = ("works", "NONE");

#[test]
fn success_recommends_prebuilt_metal() {
    let mac = Mac::new();
    let run = mac.run(&[]);
    run.check(0, &[WORKS, WORKS, WORKS]);
    assert_eq!(run.report["overall"]["recommended"], "0.33.0/prebuilt/metal/dt14.0");
    assert_eq!(run.report["host"]["xcode"], "26.1");
    assert_eq!(run.report["micro_probe"]["conclusion"], "toolchain_fine");
    assert_eq!(run.changes(), ["new", "new", "new"]);
    assert_eq!(mac.history().len(), 3);
    assert!(mac.path("out/report.md").exists() && mac.path("out/report.xml").exists());
}

#[test]
fn isolation_holds_and_git_sees_nothing() {
    let mac = Mac::new();
    let mut command = mac.command(&[]);
    command.env("MACOSX_DEPLOYMENT_TARGET", "26.0");
    mac.finish(command).check(0, &[WORKS, WORKS, WORKS]);
    let log = fs::read_to_string(mac.path("cargo.log")).unwrap();
    let mut own = std::collections::BTreeSet::new();
    for line in log.lines() {
        let fields: Vec<&str> = line.split('|').collect();
        assert_eq!(fields[1], "dt=14.0");
        assert_eq!(&fields[4..], ["color=never", "lc=C", "rustflags=", "secret="]);
        for (field, name) in [(fields[2], "target="), (fields[3], "metallib=")] {
            let place = field.strip_prefix(name).unwrap();
            assert!(
                Path::new(place).starts_with(fs::canonicalize(mac.path("out")).unwrap()),
                "{place}"
            );
            assert!(own.insert(place.to_owned()), "{place} is shared");
        }
    }
    assert_eq!(own.len(), 6);
    assert_eq!(mac.git(&["status", "--porcelain"]), "");
    assert_eq!(
        fs::read_dir(mac.path("home")).unwrap().count(),
        0,
        "something was written to the home directory"
    );
}

#[test]
fn missing_metal_tool_skips_source_only() {
    let mac = Mac::new();
    mac.metal(MISSING_METAL);
    mac.run(&[])
        .check(0, &[WORKS, WORKS, ("skipped", "TOOLCHAIN_METAL_MISSING")]);
    assert_eq!(mac.history()[2]["verdict"], "skipped");
}

#[test]
fn missing_toolchain_component_skips_source_only() {
    let mac = Mac::new();
    mac.metal(MISSING_COMPONENT);
    let run = mac.run(&[]);
    run.check(0, &[WORKS, WORKS, ("skipped", "TOOLCHAIN_COMPONENT_MISSING")]);
    assert!(
        run.report["findings"][0]["remedy"]
            .as_str()
            .unwrap()
            .contains("xcodebuild -downloadComponent MetalToolchain")
    );
}

#[test]
fn low_deployment_target_is_found_and_named() {
    let mac = Mac::new();
    mac.cargo("case \"$CARGO_TARGET_DIR\" in *source*) printf 'CMake Error at CMakeLists.txt:209 (message):\\n  MLX requires macOS >= 14.0\\n-- Configuring incomplete, errors occurred!\\n' >&2; exit 101;; esac", GOOD_PROBE);
    let mut command = mac.command(&[]);
    command.env("MACOSX_DEPLOYMENT_TARGET", "11.0");
    let run = mac.finish(command);
    run.check(0, &[WORKS, WORKS, ("build-fail", "DEPLOY_TARGET_TOO_OLD")]);
    assert_eq!(run.report["findings"][0]["code"], "DEPLOY_TARGET_TOO_OLD");
    assert_eq!(
        run.report["candidates"][2]["classification"]["evidence"][1]["text"]
            .as_str()
            .map(|text| text.contains("MLX requires macOS")),
        Some(true)
    );
}

#[test]
fn hang_is_ended_in_time_with_its_children() {
    let mac = Mac::new();
    mac.cargo("", "trap '' TERM; sleep 300 & sleep 300; sleep 300");
    let started = Instant::now();
    let run = mac.run(&["--probe-timeout", "1"]);
    assert!(started.elapsed() < Duration::from_secs(60));
    run.check(10, &[WORKS, ("run-fail", "RUN_OTHER"), ("run-fail", "RUN_OTHER")]);
    assert!(
        run.report["candidates"][1]["detail"]
            .as_str()
            .unwrap()
            .contains("no end within 1 s")
    );
    assert_eq!(mac.processes(), [""; 0]);
}

#[test]
fn hanging_build_is_infrastructure() {
    let mac = Mac::new();
    mac.cargo(
        "case \"$CARGO_TARGET_DIR\" in *prebuilt_metal*) sleep 300;; esac",
        GOOD_PROBE,
    );
    mac.run(&["--build-timeout", "20"])
        .check(0, &[WORKS, ("infra-error", "UNKNOWN"), WORKS]);
}

#[test]
fn crash_is_named_and_cpu_remains() {
    let mac = Mac::new();
    mac.cargo("", "echo 'libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution failed: Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)' >&2\necho '{\"stage\":\"identify\",\"device\":{\"count\":1}}' > \"$1\"\nkill -ABRT $$");
    let run = mac.run(&[]);
    run.check(
        10,
        &[
            WORKS,
            ("run-fail", "RUN_CMDBUF_OTHER"),
            ("run-fail", "RUN_CMDBUF_OTHER"),
        ],
    );
    assert_eq!(
        run.report["overall"]["recommended"],
        "0.33.0/prebuilt/accelerate/dt14.0"
    );
}

#[test]
fn wrong_numbers_have_their_own_status() {
    let mac = Mac::new();
    mac.cargo("", &GOOD_PROBE.replace("\"pass\"", "\"fail\""));
    let run = mac.run(&[]);
    run.check(
        12,
        &[
            WORKS,
            ("wrong-results", "PARITY_FAIL"),
            ("wrong-results", "PARITY_FAIL"),
        ],
    );
    assert_eq!(run.report["candidates"][1]["detail"], "wrong: matmul.f32.m8");
}

#[test]
fn half_a_report_is_no_success() {
    let mac = Mac::new();
    mac.cargo(
        "",
        &GOOD_PROBE.replace("echo '{\"event\":\"done\"}'", "printf '{\"event\":'"),
    );
    mac.run(&[])
        .check(10, &[WORKS, ("run-fail", "RUN_OTHER"), ("run-fail", "RUN_OTHER")]);
}

#[test]
fn offline_and_network_failures_say_nothing_about_metal() {
    let mac = Mac::new();
    mac.run(&["--offline"])
        .check(0, &[WORKS, WORKS, ("skipped", "FETCH_OFFLINE")]);
    mac.cargo("echo \"fatal: unable to access 'https://github.com/x/y.git/': Could not resolve host: github.com\" >&2; exit 101", GOOD_PROBE);
    mac.run(&[]).check(30, &[("infra-error", "FETCH_OFFLINE"); 3]);
}

#[test]
fn history_sees_regressions_and_repairs() {
    let mac = Mac::new();
    mac.run(&[]).check(0, &[WORKS, WORKS, WORKS]);
    assert_eq!(mac.run(&[]).changes(), ["unchanged", "unchanged", "unchanged"]);
    mac.cargo("", "kill -SEGV $$");
    let run = mac.run(&[]);
    run.check(11, &[WORKS, ("run-fail", "RUN_OTHER"), ("run-fail", "RUN_OTHER")]);
    assert_eq!(run.changes(), ["unchanged", "regressed", "regressed"]);
    mac.cargo("", GOOD_PROBE);
    assert_eq!(mac.run(&[]).changes(), ["unchanged", "now-works", "now-works"]);
    assert_eq!(mac.history().len(), 12);
}

#[test]
fn only_record_touches_the_tracked_file() {
    let mac = Mac::new();
    mac.run(&["--record"]);
    assert_eq!(
        mac.git(&["status", "--porcelain", "-uall"]),
        "?? docs/metal-history.jsonl\n"
    );
}

#[test]
fn a_killed_run_leaves_no_process() {
    let mac = Mac::new();
    mac.cargo("", "sleep 300 & sleep 300");
    for signal in ["-KILL", "-TERM", "-INT"] {
        if signal == "-INT" && interrupts_are_ignored() {
            println!("skipped for Ctrl-C: this test was started with interrupts ignored, which programs inherit");
            continue;
        }
        let mut run = mac
            .command(&[])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let hanging = || mac.processes().iter().any(|line| line.contains("probe.jsonl gpu"));
        wait_for("the probe to hang", hanging);
        assert!(
            Command::new("kill")
                .args([signal, &run.id().to_string()])
                .status()
                .unwrap()
                .success()
        );
        run.wait().unwrap();
        wait_for("all processes to end", || mac.processes().is_empty());
    }
}

/// Whether whoever started us (`nohup`, a shell's `&`) set interrupts to be ignored, as Linux reports it.
fn interrupts_are_ignored() -> bool {
    const INTERRUPT: u64 = 1 << 1; // bit of signal 2
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).is_ok_and(|mask| mask & INTERRUPT != 0))
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_recorded_run_is_repeated_without_running_anything() {
    let mac = Mac::new();
    mac.cargo(
        "",
        "echo 'RuntimeError: [metal::malloc] Resource limit (499000) exceeded.' >&2; exit 1",
    );
    let first = mac.run(&[]);
    fs::rename(mac.path("out"), mac.path("recorded")).unwrap();
    fs::remove_dir_all(mac.path("shims")).unwrap();
    let again = mac.run(&["--replay", mac.path("recorded").to_str().unwrap()]);
    again.check(
        10,
        &[
            WORKS,
            ("run-fail", "RUN_RESOURCE_LIMIT"),
            ("run-fail", "RUN_RESOURCE_LIMIT"),
        ],
    );
    assert_eq!(first.report["host"], again.report["host"]);
    assert_eq!(mac.history().len(), 3, "a replay is no new run");
}

#[test]
fn another_system_is_unsupported_and_its_cpu_is_tried() {
    let mac = Mac::new();
    for name in ["sw_vers", "sysctl", "xcrun", "xcodebuild"] {
        mac.shim(name, "exit 1");
    }
    if cfg!(target_os = "macos") {
        eprintln!("skipped: this is a Mac");
        return;
    }
    mac.shim("nvidia-smi", "exit 9");
    let run = mac.run(&[]);
    run.check(20, &[WORKS]);
    assert_eq!(run.report["candidates"][0]["id"], "0.33.0/prebuilt/cpu/linux");
    assert_eq!(run.report["host_status"], "unsupported host: Linux is not macOS");
    mac.run(&["--allow-unsupported"]).check(0, &[WORKS]);
    mac.shim("nvidia-smi", "echo 'GPU 0: NVIDIA H100'");
    mac.run(&["--allow-unsupported"]).check(0, &[WORKS, WORKS]);
}

#[test]
fn assumed_host_walks_the_mac_path() {
    let mac = Mac::new();
    for name in ["sw_vers", "sysctl"] {
        mac.shim(name, "exit 1");
    }
    let output = mac
        .command(&["--list", "--assume-host", "macos-arm64"])
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("0.33.0/prebuilt/metal/dt14.0"));
}

#[test]
fn classify_prints_one_object_and_succeeds() {
    let mac = Mac::new();
    let log = mac.path("log.txt");
    for (text, code) in [
        (
            "MLX error: Failed to load the default metallib. library not found\r\n",
            "METALLIB_NOT_FOUND",
        ),
        ("error: what is this\n", "UNKNOWN"),
        ("", "NONE"),
    ] {
        fs::write(&log, text).unwrap();
        let output = mac
            .command(&["--classify", log.to_str().unwrap(), "--json"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap()["code"], code);
    }
    let output = mac
        .command(&["--classify", "-"])
        .stdin(fs::File::open(&log).unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        mac.command(&["--classify", "/no/such/file"])
            .output()
            .unwrap()
            .status
            .code(),
        Some(1)
    );
}

#[test]
fn wrong_arguments_are_usage_errors() {
    let mac = Mac::new();
    assert_eq!(
        mac.command(&["--no-such-flag"]).output().unwrap().status.code(),
        Some(2)
    );
    let output = mac
        .command(&["--candidate", "0.33.0/prebuilt/metal/dt15.0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nearest: 0.33.0/prebuilt/metal/dt14.0"));
}

#[test]
fn reports_hold_no_home_directory() {
    let mac = Mac::new();
    let home = mac.path("home");
    mac.cargo(
        &format!("echo 'error: {}/x is gone' >&2; exit 1", home.display()),
        GOOD_PROBE,
    );
    mac.run(&[]);
    for name in ["report.json", "report.md", "report.xml"] {
        let text = fs::read_to_string(mac.path("out").join(name)).unwrap();
        assert!(!text.contains(home.to_str().unwrap()), "{name}");
    }
}

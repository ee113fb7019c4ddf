//! Runs a command as a process group that never outlives us: not after its time, not after ours.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use metal_check::excerpt;
use metal_check::runner::{Outcome, Recorded, Runner, Spec};
use rustix::process::{Pid, Signal, kill_process_group};

/// Between asking a group to end and ending it.
const GRACE: Duration = Duration::from_secs(5);
/// Answers of short commands are kept up to here; a flood is cut, not swallowed.
const MAX_KEPT_BYTES: u64 = 4 * 1024 * 1024;
/// Logs longer than this are shortened before they are classified; the file stays whole.
const MAX_LOG_BYTES: usize = 8 * 1024 * 1024;

/// The real runner, which also writes down what it saw so that `--replay` can show it again.
pub(super) struct Real {
    recording: Option<File>,
}

impl Real {
    pub(super) fn new(recording: Option<File>) -> Self {
        Self { recording }
    }
}

impl Runner for Real {
    fn run(&mut self, spec: &Spec) -> Outcome {
        let outcome = run(spec);
        if let Some(file) = &mut self.recording {
            let recorded = Recorded {
                label: spec.label.clone(),
                outcome: outcome.clone(),
            };
            let line = serde_json::to_string(&recorded).unwrap_or_default() + "\n";
            // A recording that cannot be written must not stop the check itself.
            if file.write_all(line.as_bytes()).is_err() {
                self.recording = None;
            }
        }
        outcome
    }
}

fn run(spec: &Spec) -> Outcome {
    let started = Instant::now();
    let mut outcome = match start(spec) {
        Ok(child) => attend(child, spec, started),
        Err(error) => Outcome {
            not_started: Some(error.to_string()),
            ..Outcome::default()
        },
    };
    collect_files(spec, &mut outcome);
    outcome.wall_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    outcome
}

fn start(spec: &Spec) -> std::io::Result<Child> {
    let (program, arguments) = spec
        .argv
        .split_first()
        .ok_or_else(|| std::io::Error::other("no program"))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command.stdin(if spec.stdin.is_some() {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    if let Some(environment) = &spec.env {
        command.env_clear().envs(environment);
    }
    if let Some(directory) = &spec.directory {
        command.current_dir(directory);
    }
    command.spawn()
}

fn attend(mut child: Child, spec: &Spec, started: Instant) -> Outcome {
    let group = Pid::from_child(&child);
    let guard = Guard::over(group);
    if let (Some(text), Some(mut stdin)) = (&spec.stdin, child.stdin.take()) {
        // A child that does not read its input is no reason to fail here.
        let _ = stdin.write_all(text.as_bytes());
    }
    let readers = Readers::start(&mut child, spec.log.as_deref(), started);
    let timed_out = !wait_until(&mut child, started + Duration::from_millis(spec.timeout_ms));
    if timed_out {
        let _ = kill_process_group(group, Signal::TERM);
        wait_until(&mut child, Instant::now() + GRACE);
    }
    // Grandchildren may still run, and hold the pipes open.
    let _ = kill_process_group(group, Signal::KILL);
    let status = child.wait().ok();
    guard.release();
    let (stdout, stderr) = readers.join();
    Outcome {
        exit: status.and_then(|status| status.code()),
        signal: status.and_then(|status| status.signal()),
        timed_out,
        not_started: None,
        stdout,
        stderr,
        report: None,
        wall_ms: 0,
    }
}

/// What the command left in files, so that a recording holds all of a run.
fn collect_files(spec: &Spec, outcome: &mut Outcome) {
    let read = |path: &String| {
        std::fs::read(path)
            .ok()
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    if let Some(log) = spec.log.as_ref().and_then(read) {
        outcome.stdout = if log.len() > MAX_LOG_BYTES {
            excerpt::shorten(&log)
        } else {
            log
        };
    }
    outcome.report = spec.report.as_ref().and_then(read);
}

/// Whether it ended before that moment.
fn wait_until(child: &mut Child, deadline: Instant) -> bool {
    let mut pause = Duration::from_millis(2);
    loop {
        match child.try_wait() {
            Ok(Some(_)) => return true,
            Ok(None) if Instant::now() >= deadline => return false,
            _ => thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// A shell that ends the group when we disappear, whatever ended us: its input is a pipe that only we hold.
struct Guard(Option<Child>);

impl Guard {
    fn over(group: Pid) -> Self {
        let script = "read released || kill -s KILL -- \"-$1\"";
        let group = group.as_raw_nonzero().to_string();
        let guard = Command::new("/bin/sh")
            .args(["-c", script, "guard", &group])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(guard.ok())
    }

    fn release(mut self) {
        if let Some(guard) = &mut self.0 {
            if let Some(mut stdin) = guard.stdin.take() {
                let _ = stdin.write_all(b"released\n");
            }
            let _ = guard.wait();
        }
    }
}

/// Threads that empty both pipes, into memory or into one log with a time before each line.
struct Readers(Vec<JoinHandle<String>>);

impl Readers {
    fn start(child: &mut Child, log: Option<&str>, started: Instant) -> Self {
        let log = log
            .and_then(|path| File::create(path).ok())
            .map(|file| Arc::new(Mutex::new(file)));
        let streams: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|pipe| Box::new(pipe) as _),
            child.stderr.take().map(|pipe| Box::new(pipe) as _),
        ];
        let reader = |stream: Option<Box<dyn Read + Send>>| {
            let log = log.clone();
            thread::spawn(move || match (stream, log) {
                (None, _) => String::new(),
                (Some(stream), None) => keep(stream),
                (Some(stream), Some(log)) => copy(stream, &log, started),
            })
        };
        Self(streams.into_iter().map(reader).collect())
    }

    fn join(self) -> (String, String) {
        let mut texts = self.0.into_iter().map(|thread| thread.join().unwrap_or_default());
        (texts.next().unwrap_or_default(), texts.next().unwrap_or_default())
    }
}

fn keep(mut stream: Box<dyn Read + Send>) -> String {
    let mut kept = Vec::new();
    let _ = stream.by_ref().take(MAX_KEPT_BYTES).read_to_end(&mut kept);
    let _ = std::io::copy(&mut stream, &mut std::io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

fn copy(stream: Box<dyn Read + Send>, log: &Mutex<File>, started: Instant) -> String {
    let mut stream = BufReader::new(stream);
    let mut line = Vec::new();
    while stream.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
        let mut stamped = format!("[{:9.3}] ", started.elapsed().as_secs_f64()).into_bytes();
        stamped.append(&mut line);
        if stamped.last() != Some(&b'\n') {
            stamped.push(b'\n');
        }
        if let Ok(mut log) = log.lock() {
            let _ = log.write_all(&stamped);
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(script: &str, timeout_ms: u64) -> Spec {
        let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
        Spec {
            label: script.into(),
            argv,
            timeout_ms,
            ..Spec::default()
        }
    }

    #[test]
    fn answers_and_statuses_come_back() {
        let outcome = run(&spec("echo out; echo err >&2; exit 7", 5000));
        assert_eq!(
            (outcome.exit, outcome.stdout.as_str(), outcome.stderr.as_str()),
            (Some(7), "out\n", "err\n")
        );
        assert_eq!(run(&spec("kill -6 $$", 5000)).signal, Some(6));
        let absent = Spec {
            argv: vec!["/no/such/program".into()],
            ..Spec::default()
        };
        assert!(run(&absent).not_started.is_some());
    }

    #[test]
    fn a_grandchild_that_holds_the_pipe_does_not_hold_us() {
        let started = Instant::now();
        let outcome = run(&spec("sleep 60 & echo $!", 5000));
        assert!(started.elapsed() < Duration::from_secs(20));
        assert_gone(outcome.stdout.trim());
    }

    #[test]
    fn a_hang_ends_in_time_with_its_children() {
        let outcome = run(&spec("trap '' TERM; sleep 60 & echo $!; wait; sleep 60", 200));
        assert!(outcome.timed_out && outcome.wall_ms < 20_000);
        assert_gone(outcome.stdout.trim());
    }

    #[test]
    fn a_flood_is_cut() {
        let outcome = run(&spec("head -c 20000000 /dev/zero", 60_000));
        assert_eq!((outcome.exit, outcome.stdout.len() as u64), (Some(0), MAX_KEPT_BYTES));
    }

    /// No such process, or one that is dead and only not yet reaped by whoever adopted it.
    fn assert_gone(pid: &str) {
        let is_dead = || {
            let state = Command::new("ps").args(["-o", "stat=", "-p", pid]).output().unwrap();
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            state.is_empty() || state.starts_with('Z')
        };
        for _ in 0..100 {
            if is_dead() {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("process {pid} still runs");
    }
}

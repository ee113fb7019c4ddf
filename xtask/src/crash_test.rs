//! `cargo xtask crash-test`: a run that is killed at random moments and resumed ends with the bytes of one that was not.
//!
//! The real program trains the tiny model with dropout, accumulation, packing and evaluation, saving after every update.
//! Every other kill comes at a random moment of the process's life, start included; the rest wait for some updates and then
//! for a checkpoint that is being written, and strike within the time that such a write takes, which the uninterrupted run
//! tells. Where a kill landed is told by what it left: the temporary folder of a write.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::program::build_planish;
use crate::repo;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// How often the run is killed
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// Updates of the run
    #[arg(long, default_value_t = 80)]
    steps: usize,
    /// Decides the moments
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Give up after this long
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    limit: u64,
    /// A program that is built already
    #[arg(long, value_name = "FILE")]
    planish: Option<PathBuf>,
}

const MODEL: &str = "crates/planish-nn/tests/fixtures/tiny-llama-1m";
/// Files that must be the same in the last checkpoint, and the final adapter.
const CHECKPOINT_FILES: [&str; 4] = [
    "adapters.safetensors",
    "optimizer.safetensors",
    "adapter_config.json",
    "state.json",
];
/// What a record of the metrics says about time and place, which no two runs share.
const TIMED: [&str; 3] = ["second", "memory", "rss"];

pub(crate) fn run(args: &Args) -> Result<()> {
    let planish = args.planish.clone().map_or_else(build_planish, Ok)?;
    let folder = tempfile::tempdir()?;
    let test = CrashTest {
        planish,
        data: write_data(folder.path())?,
        steps: args.steps,
        deadline: Instant::now() + Duration::from_secs(args.limit),
    };
    let (straight, killed) = (folder.path().join("straight"), folder.path().join("killed"));

    let begun = Instant::now();
    let write_time = test.finish_watched(&straight)?;
    let whole = begun.elapsed();
    println!(
        "uninterrupted: {} updates in {:.1} s; a checkpoint write takes {:.1} ms",
        args.steps,
        whole.as_secs_f64(),
        write_time.as_secs_f64() * 1e3
    );

    let mut tally = Tally::default();
    let mut random = Random(args.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let startup = test.startup(&straight)?;
    let life = startup + whole.saturating_sub(startup).div_f64(args.kills as f64);
    for kill in 0..args.kills {
        test.check_time()?;
        let moment = if kill % 2 == 0 {
            Moment::After(life.mul_f64(random.next()))
        } else {
            // The kills that are left share nine tenths of the way, so that the run is still going at the last of them.
            let way = (args.steps * 9 / 10).saturating_sub(newest_step(&killed) as usize);
            let share = 4.0 * way as f64 / (args.kills - kill) as f64;
            Moment::InWriteAfter((random.next() * share.min(way as f64)) as u64)
        };
        tally.count(test.kill(&killed, moment, write_time.mul_f64(AIM * random.next()))?);
    }
    test.finish(&killed)?;
    println!("{tally}");
    ensure!(
        tally.in_write * 5 >= args.kills,
        "only {} kills hit a checkpoint write",
        tally.in_write
    );
    compare(&straight, &killed, args.steps)?;
    println!("{:.0} s in all", begun.elapsed().as_secs_f64());
    Ok(())
}

/// Between two looks at the folder of checkpoints.
const GLANCE: Duration = Duration::from_micros(50);

/// Share of a write in which the aimed kills fall: the signal takes its time, too.
const AIM: f64 = 0.7;

struct CrashTest {
    planish: PathBuf,
    data: PathBuf,
    steps: usize,
    deadline: Instant,
}

/// When a process is killed.
enum Moment {
    /// This long after its start.
    After(Duration),
    /// In the checkpoint write that follows so many updates.
    InWriteAfter(u64),
}

/// What a killed process was doing.
enum Landed {
    InWrite,
    BetweenWrites,
    BeforeTheFirst,
}

#[derive(Default)]
struct Tally {
    in_write: usize,
    between: usize,
    before: usize,
    furthest: u64,
}

impl CrashTest {
    fn command(&self, out: &Path) -> Command {
        let mut command = Command::new(&self.planish);
        command.args(["train", "--resume", "--backend", "cpu", "--model"]);
        command.arg(repo::root().join(MODEL)).arg("--data").arg(&self.data);
        command.arg("--out").arg(out);
        let steps = format!("train.steps={}", self.steps);
        let settings = [
            steps.as_str(),
            "checkpoint.every=1",
            "checkpoint.keep_last=2",
            "train.batch_size=2",
            "train.accumulation=2",
            "train.eval_every=7",
            "lora.dropout=0.1",
            "data.packing=true",
            "train.max_seq_length=64",
            "logging.report_every=3",
            "optimizer.learning_rate=1e-3",
        ];
        for setting in settings {
            command.args(["--set", setting]);
        }
        // One thread: the sums of the straight run and of the others are then taken in one order on any machine.
        command.env("OPENBLAS_NUM_THREADS", "1");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    /// Runs to the end.
    fn finish(&self, out: &Path) -> Result<()> {
        let child = self.command(out).spawn().context("planish does not start")?;
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the run failed:\n{}", said.trim());
        self.check_time()
    }

    /// Runs to the end, and tells how long a checkpoint write takes: the median time that its temporary folder was there.
    fn finish_watched(&self, out: &Path) -> Result<Duration> {
        let mut child = self.command(out).spawn().context("planish does not start")?;
        let (mut writes, mut since) = (Vec::new(), None);
        while child.try_wait()?.is_none() {
            self.check_time().inspect_err(|_| drop(child.kill()))?;
            match (is_writing(out), since) {
                (true, None) => since = Some(Instant::now()),
                (false, Some(begun)) => {
                    writes.push(begun.elapsed());
                    since = None;
                }
                _ => {}
            }
            std::thread::sleep(GLANCE);
        }
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "the run failed:\n{}", said.trim());
        writes.sort();
        let median = writes.get(writes.len() / 2);
        median.copied().context("no checkpoint write was seen")
    }

    /// How long a process takes before its first update: a resume of a finished run does no more.
    fn startup(&self, finished: &Path) -> Result<Duration> {
        let begun = Instant::now();
        self.finish(finished)?;
        Ok(begun.elapsed())
    }

    /// Starts the run and kills it; where a write is waited for, so long after it was seen.
    fn kill(&self, out: &Path, moment: Moment, into_write: Duration) -> Result<(Landed, u64)> {
        let begun_at = newest_step(out);
        let mut child = self.command(out).spawn().context("planish does not start")?;
        match moment {
            Moment::After(time) => std::thread::sleep(time),
            Moment::InWriteAfter(updates) => {
                // What an earlier kill left is there until the new process has the lock: only progress tells.
                let due = |out: &Path| newest_step(out) >= begun_at + updates.max(1) && is_writing(out);
                while !due(out) && child.try_wait()?.is_none() {
                    self.check_time().inspect_err(|_| drop(child.kill()))?;
                    std::thread::sleep(GLANCE);
                }
                // A sleep would last longer than asked for.
                let seen = Instant::now();
                while seen.elapsed() < into_write {
                    std::hint::spin_loop();
                }
            }
        }
        // SIGKILL on Unix.
        let ended = child.try_wait()?;
        child.kill()?;
        reap(child, ended.is_some())?;
        let step = newest_step(out);
        Ok(match (is_writing(out), step) {
            (true, step) => (Landed::InWrite, step),
            (false, 0) => (Landed::BeforeTheFirst, 0),
            (false, step) => (Landed::BetweenWrites, step),
        })
    }

    fn check_time(&self) -> Result<()> {
        ensure!(
            Instant::now() < self.deadline,
            "out of time: give a larger --limit, or fewer --kills"
        );
        Ok(())
    }
}

/// A process that was not killed must have had a reason that is not a failure; there is none before the last update.
fn reap(child: Child, ended_before: bool) -> Result<()> {
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    if ended_before && !output.status.success() {
        bail!("the run failed by itself:\n{}", said.trim());
    }
    ensure!(
        !ended_before,
        "the run was finished before the last kill: give more --steps, or fewer --kills"
    );
    Ok(())
}

/// Whether a checkpoint is being written: its temporary folder, or that of one being replaced, is there.
fn is_writing(out: &Path) -> bool {
    names(&out.join("checkpoints")).iter().any(|name| name.starts_with('.'))
}

fn newest_step(out: &Path) -> u64 {
    let names = names(&out.join("checkpoints"));
    let steps = names.iter().filter_map(|name| name.strip_prefix("step-")?.parse().ok());
    steps.max().unwrap_or(0)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

impl Tally {
    fn count(&mut self, (landed, step): (Landed, u64)) {
        match landed {
            Landed::InWrite => self.in_write += 1,
            Landed::BetweenWrites => self.between += 1,
            Landed::BeforeTheFirst => self.before += 1,
        }
        self.furthest = self.furthest.max(step);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let total = self.in_write + self.between + self.before;
        write!(
            f,
            "{total} kills: {} in a checkpoint write, {} between writes, {} before the first checkpoint; the last at update {}",
            self.in_write, self.between, self.before, self.furthest
        )
    }
}

/// Byte by byte; the records of the metrics but for what they say about time and memory.
fn compare(straight: &Path, killed: &Path, steps: usize) -> Result<()> {
    let last = format!("checkpoints/step-{steps:07}");
    let mut files: Vec<String> = CHECKPOINT_FILES.iter().map(|file| format!("{last}/{file}")).collect();
    files.push("adapters.safetensors".into());
    for file in files {
        if file.ends_with("state.json") {
            let read = |out: &Path| -> Result<Value> {
                let mut state: Value = serde_json::from_slice(&std::fs::read(out.join(&file))?)?;
                // The metrics before it hold times, whose digits differ.
                state["metrics_offset"] = Value::Null;
                Ok(state)
            };
            ensure!(read(straight)? == read(killed)?, "{file} differs");
            println!("{file}: equal but for the offset into the metrics");
            continue;
        }
        let read = |out: &Path| std::fs::read(out.join(&file)).with_context(|| file.clone());
        let (expect, found) = (read(straight)?, read(killed)?);
        ensure!(expect == found, "{file} differs from the uninterrupted run");
        println!("{file}: {} bytes, identical", found.len());
    }
    let (expect, found) = (records(straight)?, records(killed)?);
    for (expect, found) in expect.iter().zip(&found) {
        ensure!(
            expect == found,
            "metrics.jsonl: {found}, the uninterrupted run has {expect}"
        );
    }
    let (lines, wanted) = (found.len(), expect.len());
    ensure!(
        lines == wanted,
        "metrics.jsonl has {lines} records, the uninterrupted run has {wanted}"
    );
    println!("metrics.jsonl: {} records, equal but for times and memory", found.len());
    Ok(())
}

fn records(out: &Path) -> Result<Vec<Value>> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl"))?;
    let mut records = Vec::new();
    for line in text.lines() {
        let mut record: Value = serde_json::from_str(line)?;
        if let Some(fields) = record.as_object_mut() {
            fields.retain(|key, _| TIMED.iter().all(|part| !key.contains(part)));
        }
        // The beginning says what it goes on from.
        if record["kind"] == "train" || record["kind"] == "eval" {
            records.push(record);
        }
    }
    Ok(records)
}

/// Short conversations of different lengths.
fn write_data(folder: &Path) -> Result<PathBuf> {
    let data = folder.join("data");
    std::fs::create_dir(&data)?;
    let row = |i: usize| {
        let turn = |role: &str, content: String| json!({"role": role, "content": content});
        let answer = format!("It is {}, my dear{}.", i * 7 % 13, ", and so it was".repeat(i % 4));
        json!({"messages": [turn("user", format!("What is {i}?")), turn("assistant", answer)]}).to_string()
    };
    let rows = |range: std::ops::Range<usize>| range.map(row).collect::<Vec<_>>().join("\n") + "\n";
    std::fs::write(data.join("train.jsonl"), rows(0..23))?;
    std::fs::write(data.join("valid.jsonl"), rows(100..104))?;
    Ok(data)
}

/// Numbers from 0 to 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }
}

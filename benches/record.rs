//! What a run of benchmarks found, for people and as JSON: device, commit, dtypes and medians.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

/// Medians of the benchmarks that criterion runs into a folder while this value lives.
pub(crate) struct Record {
    folder: PathBuf,
    started: SystemTime,
}

/// A benchmark `part/…/who`, where `who` ends in `_f32` or `_bf16` if it computes.
struct Measured {
    part: String,
    who: String,
    median_ms: f64,
}

impl Record {
    /// Of what is written into `criterion/` beside the build from now on.
    pub(crate) fn start() -> Result<Self> {
        let program = std::env::current_exe()?;
        let target = program.ancestors().nth(3).context("a program outside target/")?;
        Ok(Record {
            folder: target.join("criterion"),
            started: SystemTime::now(),
        })
    }

    /// Where criterion has to write.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Prints the table and writes `NAME.json`; does neither if nothing was measured.
    #[allow(clippy::print_stdout)] // a benchmark prints
    pub(crate) fn finish(self, name: &str) -> Result<()> {
        let measured = self.measured()?;
        if measured.is_empty() {
            return Ok(());
        }
        let (device, commit) = (device(), commit());
        println!("{device}; commit {commit}; medians");
        println!("| part | who | dtype | ms | × composed |\n|---|---|---|---|---|");
        for one in &measured {
            let composed = measured
                .iter()
                .find(|other| other.part == one.part && other.who.starts_with("composed"));
            let ratio = composed.map_or("-".to_owned(), |other| {
                format!("{:.2}", other.median_ms / one.median_ms)
            });
            let (who, dtype) = one.who_and_dtype();
            println!("| {} | {who} | {dtype} | {:.3} | {ratio} |", one.part, one.median_ms);
        }
        let of = |one: &Measured| {
            let (who, dtype) = one.who_and_dtype();
            json!({"part": one.part, "who": who, "dtype": dtype, "median_ms": one.median_ms})
        };
        let results: Vec<Value> = measured.iter().map(of).collect();
        let report = json!({"device": device, "commit": commit, "results": results});
        Ok(std::fs::write(
            self.folder.join(format!("{name}.json")),
            format!("{report:#}\n"),
        )?)
    }

    /// In the order in which they ran.
    fn measured(&self) -> Result<Vec<Measured>> {
        let mut found: Vec<(SystemTime, Measured)> = Vec::new();
        for group in folders(&self.folder) {
            for benchmark in folders(&group) {
                let estimates = benchmark.join("new/estimates.json");
                let Ok(written) = std::fs::metadata(&estimates).and_then(|file| file.modified()) else {
                    continue;
                };
                // Clocks of files are coarser than the system's.
                if written + Duration::from_millis(100) >= self.started {
                    found.push((written, read(&benchmark, &estimates)?));
                }
            }
        }
        found.sort_by_key(|(written, _)| *written);
        Ok(found.into_iter().map(|(_, measured)| measured).collect())
    }
}

impl Measured {
    fn who_and_dtype(&self) -> (&str, &str) {
        match self.who.rsplit_once('_') {
            Some((who, dtype @ ("f32" | "bf16"))) => (who, dtype),
            _ => (&self.who, "-"),
        }
    }
}

fn read(benchmark: &Path, estimates: &Path) -> Result<Measured> {
    let json = |path: &Path| -> Result<Value> { Ok(serde_json::from_slice(&std::fs::read(path)?)?) };
    let about = json(&benchmark.join("new/benchmark.json"))?;
    let text = |key: &str| about[key].as_str().unwrap_or_default().to_owned();
    let nanoseconds = json(estimates)?["median"]["point_estimate"].as_f64();
    Ok(Measured {
        part: text("group_id"),
        who: text("function_id"),
        median_ms: nanoseconds.context("criterion's estimates have no median")? / 1e6,
    })
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

/// Processor and threads.
fn device() -> String {
    let brand = ["-n", "machdep.cpu.brand_string"];
    let model = match std::fs::read_to_string("/proc/cpuinfo") {
        Ok(info) => info
            .lines()
            .find_map(|line| Some(line.strip_prefix("model name")?.split_once(": ")?.1.to_owned())),
        Err(_) => output_of("sysctl", &brand),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!(
        "{}, {threads} threads",
        model.unwrap_or_else(|| "unknown processor".to_owned())
    )
}

fn commit() -> String {
    output_of("git", &["describe", "--always", "--dirty"]).unwrap_or_else(|| "unknown".to_owned())
}

fn output_of(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !text.is_empty()).then_some(text)
}

//! `cargo xtask metal-check`: which MLX works on this machine, and if none does, why. See docs/metal.md.

mod attempt;
mod page;
mod probe_crate;
mod process;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use metal_check::candidate::{self, Age, Candidate, Generation, Scope};
use metal_check::deployment::DeploymentTarget;
use metal_check::history::{self, Comparison, Entry};
use metal_check::preflight::{self, Preflight};
use metal_check::redact::Redactor;
use metal_check::report::{self, CandidateReport, Report};
use metal_check::runner::{Replay, Runner, Spec};
use metal_check::{classify, exit, micro_probe};

/// Name and version in every report.
const TOOL: &str = concat!("metal-check ", env!("CARGO_PKG_VERSION"));

#[derive(clap::Args)]
#[allow(clippy::struct_excessive_bools)] // Each is a flag of the command line.
pub(crate) struct Args {
    /// Ask the machine and stop (about two seconds)
    #[arg(long)]
    preflight: bool,
    /// Try the whole matrix instead of the locked release at 14.0
    #[arg(long)]
    full: bool,
    /// Try only these candidates
    #[arg(long, value_name = "ID", num_args = 1..)]
    candidate: Vec<String>,
    /// Print the ids of the candidates and stop
    #[arg(long)]
    list: bool,
    /// Ask no index and fetch nothing
    #[arg(long)]
    offline: bool,
    /// Name the cause in a log and stop; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    classify: Option<PathBuf>,
    /// Print JSON (with --classify, --preflight and --list)
    #[arg(long)]
    json: bool,
    /// Repeat a recorded run instead of running anything
    #[arg(long, value_name = "DIR")]
    replay: Option<PathBuf>,
    /// Which reports to write
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "json,md,junit", value_parser = ["json", "md", "junit"])]
    format: Vec<String>,
    /// Where to write them and everything else of the run
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Also append the results to docs/metal-history.jsonl, which git tracks
    #[arg(long)]
    record: bool,
    /// Succeed on a machine without Metal
    #[arg(long)]
    allow_unsupported: bool,
    /// Limit of a build, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 45 * 60)]
    build_timeout: u64,
    /// Limit of a probe, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    probe_timeout: u64,
    /// Treat the machine as another (tests)
    #[arg(long, hide = true, value_parser = ["macos-arm64"])]
    assume_host: Option<String>,
    /// Repository to work for (tests)
    #[arg(long, hide = true)]
    root: Option<PathBuf>,
}

/// Runs the command and returns the status to exit with.
pub(crate) fn main(args: &Args) -> u8 {
    match run(args) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("error: {error:#}");
            match error.downcast_ref() {
                Some(metal_check::Error::UnknownCandidate { .. }) => exit::USAGE,
                _ => exit::INTERNAL,
            }
        }
    }
}

/// The page with generated parts, relative to the root.
pub(crate) use page::PATH as PAGE;

/// Whether those parts are what the tables give.
pub(crate) fn is_page_current() -> bool {
    page::is_current(&crate::repo::root())
}

/// Writes them.
pub(crate) fn write_page() -> Result<()> {
    page::write(&crate::repo::root())
}

fn run(args: &Args) -> Result<u8> {
    if let Some(file) = &args.classify {
        return classify_file(file, args.json);
    }
    let root = args.root.clone().unwrap_or_else(crate::repo::root);
    let state = root.join("target/metal-check");
    let run = format!("{}-{:04x}", utc(SystemTime::now()), std::process::id() & 0xffff);
    let out = args.out.clone().unwrap_or_else(|| state.join(&run));
    let needs_files = !(args.preflight || args.list);
    if needs_files {
        fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    }
    let mut runner = runner(args, needs_files.then_some(out.as_path()))?;
    let preflight = ask(args, runner.as_dyn());
    if args.preflight {
        return print_preflight(&preflight, args.json);
    }
    let list = candidates(args, &preflight, runner.as_dyn());
    if args.list {
        return print_list(&list, args.json);
    }
    let chosen = candidate::choose(list, &args.candidate)?;
    let report = check(
        args,
        &Session {
            root: &root,
            out: &out,
            run: &run,
            preflight: &preflight,
        },
        &chosen,
        runner.as_dyn(),
    )?;
    runner.refuse_the_unexpected()?;
    finish(args, &root, &state, &out, report)
}

/// What stays the same during a run.
struct Session<'a> {
    root: &'a Path,
    out: &'a Path,
    run: &'a str,
    preflight: &'a Preflight,
}

enum AnyRunner {
    Real(process::Real),
    Replay(Replay),
}

impl AnyRunner {
    fn as_dyn(&mut self) -> &mut dyn Runner {
        match self {
            Self::Real(real) => real,
            Self::Replay(replay) => replay,
        }
    }

    fn refuse_the_unexpected(&self) -> Result<()> {
        match self {
            Self::Replay(replay) if !replay.unexpected.is_empty() => {
                anyhow::bail!(
                    "the recording has no answer for: {}; record the run again",
                    replay.unexpected.join(", ")
                )
            }
            _ => Ok(()),
        }
    }
}

const RECORDING: &str = "recording.jsonl";

fn runner(args: &Args, out: Option<&Path>) -> Result<AnyRunner> {
    if let Some(directory) = &args.replay {
        let path = directory.join(RECORDING);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        return Ok(AnyRunner::Replay(Replay::parse(&text)?));
    }
    let recording = out.map(|out| File::create(out.join(RECORDING))).transpose()?;
    Ok(AnyRunner::Real(process::Real::new(recording)))
}

fn classify_file(file: &Path, json: bool) -> Result<u8> {
    let mut log = Vec::new();
    if file == Path::new("-") {
        std::io::stdin()
            .read_to_end(&mut log)
            .context("cannot read standard input")?;
    } else {
        log = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
    }
    let answer = classify::classify(&log);
    if json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(0);
    }
    match answer.code.as_str() {
        "UNKNOWN" => println!("not recognised; died in phase {}; evidence below", answer.phase.word()),
        code => println!("{code} ({})", answer.phase.word()),
    }
    for line in &answer.evidence {
        println!("{:>6}  {}", line.line, line.text);
    }
    println!("→ {}", answer.remedy);
    for link in &answer.links {
        println!("  {link}");
    }
    Ok(0)
}

fn ask(args: &Args, runner: &mut dyn Runner) -> Preflight {
    let environment: BTreeMap<String, String> = std::env::vars().collect();
    let mut preflight = preflight::ask(runner, &environment);
    if args.assume_host.is_some() {
        preflight.host.kernel = Some("Darwin".into());
        preflight.host.arch = Some("arm64".into());
    }
    preflight
}

fn print_preflight(preflight: &Preflight, json: bool) -> Result<u8> {
    if json {
        println!("{}", serde_json::to_string_pretty(preflight)?);
        return Ok(0);
    }
    let host = &preflight.host;
    let system = host
        .os
        .map_or_else(|| host.kernel.clone().unwrap_or_default(), |os| format!("macOS {os}"));
    println!(
        "{system} on {}; {}",
        host.arch.as_deref().unwrap_or("unknown"),
        host_status(preflight)
    );
    if preflight.findings.is_empty() {
        println!("nothing stands in the way of a build");
    }
    for finding in &preflight.findings {
        println!("{}: {}\n  → {}", finding.code, finding.detail, finding.remedy);
    }
    Ok(0)
}

fn print_list(list: &[Candidate], json: bool) -> Result<u8> {
    let ids: Vec<String> = list.iter().map(Candidate::to_string).collect();
    if json {
        println!("{}", serde_json::to_string_pretty(&ids)?);
    } else {
        ids.iter().for_each(|id| println!("{id}"));
    }
    Ok(0)
}

fn candidates(args: &Args, preflight: &Preflight, runner: &mut dyn Runner) -> Vec<Candidate> {
    let mut ask = |label: &str, argv: &[&str]| {
        let argv = argv.iter().map(|&word| word.to_owned()).collect();
        runner.run(&Spec {
            label: label.into(),
            argv,
            timeout_ms: 30_000,
            ..Spec::default()
        })
    };
    let is_mac = preflight.host.is_mac();
    let has_cuda = !is_mac && ask("nvidia-smi", &["nvidia-smi", "-L"]).is_success();
    let newest = (args.full && is_mac && !args.offline)
        .then(|| ask("newest mlx-rs", &["cargo", "search", "mlx-rs", "--limit", "1"]));
    let newest = newest.and_then(|outcome| newer_generation(&outcome.stdout));
    candidate::candidates(&Scope {
        full: args.full,
        is_mac,
        has_cuda,
        macos: preflight.host.os,
        newest,
    })
}

/// A release that is newer than the locked one, from the answer of `cargo search`. Its mlx-sys is left to cargo.
fn newer_generation(found: &str) -> Option<Generation> {
    let line = found.lines().find(|line| line.starts_with("mlx-rs "))?;
    let version = line.split('"').nth(1)?;
    let known = candidate::known_generations();
    let is_newer = version.parse::<metal_check::version::Version>().ok()? > known[0].mlx_rs.parse().ok()?;
    is_newer.then(|| Generation {
        mlx_rs: version.into(),
        mlx_sys: "*".into(),
        mlx: "unknown".into(),
        age: Age::Newer,
    })
}

fn host_status(preflight: &Preflight) -> String {
    let host = &preflight.host;
    if host.supports_metal() {
        return "ok".into();
    }
    let why = match (host.is_mac(), host.is_arm64(), host.translated) {
        (false, ..) => format!("{} is not macOS", host.kernel.as_deref().unwrap_or("this system")),
        (true, _, Some(true)) => "the process runs under Rosetta".into(),
        (true, false, _) => "not an Apple processor".into(),
        (true, true, _) => "macOS is older than 14".into(),
    };
    format!("unsupported host: {why}")
}

fn check(args: &Args, session: &Session, chosen: &[Candidate], runner: &mut dyn Runner) -> Result<Report> {
    let cargo_config = fs::read_to_string(session.root.join(".cargo/config.toml")).ok();
    let deployment_target = DeploymentTarget::of(&session.preflight.host, cargo_config.as_deref());
    for finding in &session.preflight.findings {
        eprintln!("{}: {} → {}", finding.code, finding.detail, finding.remedy);
    }
    let micro_probe = session
        .preflight
        .host
        .metal
        .is_some()
        .then(|| run_micro_probe(session, &deployment_target, runner))
        .transpose()?;
    let limits = attempt::Limits {
        build_ms: args.build_timeout * 1000,
        probe_ms: args.probe_timeout * 1000,
        offline: args.offline,
    };
    let mut reports: Vec<CandidateReport> = Vec::new();
    for candidate in chosen {
        eprintln!("{candidate} …");
        let report = attempt::attempt(candidate, session, &limits, runner)?;
        eprintln!("{candidate}: {} ({})", report.verdict.word(), report.code);
        reports.push(report);
    }
    let overall = report::overall(&reports);
    Ok(Report {
        schema: report::SCHEMA,
        tool: TOOL.into(),
        run: session.run.into(),
        host_status: host_status(session.preflight),
        host: session.preflight.host.clone(),
        deployment_target,
        findings: session.preflight.findings.clone(),
        micro_probe,
        candidates: reports,
        overall,
        history: Vec::new(),
        exit: 0,
    })
}

fn run_micro_probe(
    session: &Session,
    target: &DeploymentTarget,
    runner: &mut dyn Runner,
) -> Result<micro_probe::MicroProbe> {
    let directory = session.out.join("micro-probe");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join("micro_probe.metal"), micro_probe::SOURCE)?;
    let effective = target
        .explicit()
        .or(target.host.as_deref())
        .unwrap_or("14.0")
        .to_owned();
    Ok(micro_probe::run(runner, &directory.to_string_lossy(), &effective))
}

/// History, exit status, files; then the page for the reader.
fn finish(args: &Args, root: &Path, state: &Path, out: &Path, mut report: Report) -> Result<u8> {
    let own = state.join("history.jsonl");
    let tracked = root.join("docs/metal-history.jsonl");
    let now = entries(&report);
    report.history = compare(&[&own, &tracked], &now)?;
    report.exit = exit::status(&exit::Facts {
        candidates: report
            .candidates
            .iter()
            .map(|one| (one.verdict, one.is_control, one.is_gpu))
            .collect(),
        changes: report.history.iter().map(|comparison| comparison.change).collect(),
        host_supported: report.host_status == "ok",
        allow_unsupported: args.allow_unsupported,
    });
    if args.replay.is_none() {
        append(&own, &now)?;
    }
    if args.record {
        append(&tracked, &now)?;
    }
    let redactor = Redactor {
        home: std::env::var("HOME").ok(),
        user: std::env::var("USER").ok(),
    };
    let page = redactor.redact(&report::markdown(&report));
    let files = [
        ("json", "report.json", report::json(&report)),
        ("md", "report.md", page.clone()),
        ("junit", "report.xml", report::junit(&report)),
    ];
    for (format, name, text) in files {
        if args.format.iter().any(|wanted| wanted == format) {
            planish_core::fs::write_atomic(&out.join(name), redactor.redact(&text).as_bytes())?;
        }
    }
    println!("{page}");
    println!("reports: {}", redactor.redact(&out.display().to_string()));
    Ok(report.exit)
}

fn entries(report: &Report) -> Vec<Entry> {
    let (os, xcode, chip) = report.host.key();
    let time = report.run.split('-').next().unwrap_or_default();
    let entry = |one: &CandidateReport| Entry {
        time: time.to_owned(),
        candidate: one.id.clone(),
        os: os.clone(),
        xcode: xcode.clone(),
        chip: chip.clone(),
        verdict: one.verdict,
        code: one.code.clone(),
        mlx: one.mlx.clone(),
        tool: TOOL.into(),
    };
    report.candidates.iter().map(entry).collect()
}

fn compare(files: &[&Path], now: &[Entry]) -> Result<Vec<Comparison>> {
    let mut past = Vec::new();
    for file in files {
        let text = match fs::read(file) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        let (entries, broken) = history::parse(&text);
        for line in broken {
            eprintln!("warning: {} line {line} is no entry and is skipped", file.display());
        }
        past.extend(entries);
    }
    Ok(now.iter().map(|entry| history::compare(&past, entry)).collect())
}

/// One write a line, so that an interrupted run leaves a readable file.
fn append(file: &Path, entries: &[Entry]) -> Result<()> {
    if let Some(parent) = file.parent() {
        fs::create_dir_all(parent)?;
    }
    let mut out = OpenOptions::new()
        .create(true)
        .append(true)
        .open(file)
        .with_context(|| format!("cannot append to {}", file.display()))?;
    for entry in entries {
        out.write_all(history::line(entry).as_bytes())?;
    }
    Ok(())
}

/// `YYYYMMDDTHHMMSSZ`.
fn utc(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Date of a day since 1970-01-01 in the Gregorian calendar, counting years from March so that leap days come last.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_utc() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(
            [at(0), at(951_782_400), at(1_767_225_599)],
            ["19700101T000000Z", "20000229T000000Z", "20251231T235959Z"]
        );
    }

    #[test]
    fn only_a_newer_release_is_tried() {
        assert_eq!(
            newer_generation("mlx-rs = \"0.34.1\"    # MLX\n").map(|found| found.mlx_rs),
            Some("0.34.1".into())
        );
        assert!(newer_generation("mlx-rs = \"0.33.0\"\n").is_none());
        assert!(newer_generation("").is_none());
    }
}

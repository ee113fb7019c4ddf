use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use planish_backend::Choice;
use planish_checkpoint::run_state::Input;
use planish_core::hash;
use planish_core::model_config::ModelConfig;
use planish_core::run_config::RunConfig;
use planish_core::units::format_duration;
use planish_data::{Rungs, Split, Splits};
use planish_nn::Model;
use planish_tensors::TensorStore;
use planish_train::{End, Identity, Resume, StopFlag, Summary, TrainOptions, Trainer, template_time};
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::data::{self, Text};
use crate::failure::{Interrupted, usage};
use crate::kernels;
use crate::model::{self, DeviceInUse};
use crate::model_path::require_model;
use crate::output;
use crate::train_view::TrainView;

/// Fine-tune a model
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Configuration file; flags and --set win over it
    #[arg(long, value_name = "run.toml")]
    config: Option<PathBuf>,
    /// Folder of the base model in the Hugging Face layout
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// Folder with train.jsonl and perhaps valid.jsonl
    #[arg(long, value_name = "DIR")]
    data: Option<String>,
    /// Folder for the results; must not exist, or be empty
    #[arg(long, value_name = "DIR")]
    out: Option<String>,
    /// Device; auto takes the fastest that computes correctly
    #[arg(long, value_name = "DEVICE", value_parser = model::device_words())]
    backend: Option<String>,
    /// Set any key of the configuration, such as lora.rank=16; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    assignments: Vec<String>,
    /// Train with the arithmetic, the batches and the defaults of another program, for comparing with it
    #[arg(long, value_name = "PROGRAM", value_parser = ["mlx-lm"])]
    compat: Option<String>,
    /// Resume bit-exactly from the newest whole checkpoint in --out, with the settings in its config.toml
    #[arg(long)]
    resume: bool,
    /// With --resume: go on although these have changed since the checkpoint
    #[arg(long, value_name = "INPUT", value_delimiter = ',', requires = "resume", value_parser = input_words())]
    accept_changed: Vec<String>,
    /// Start anew from the trained weights of the newest checkpoint: new optimizer, step 0
    #[arg(long, conflicts_with = "resume")]
    resume_weights_only: bool,
    /// Print the whole configuration, defaults included, and stop
    #[arg(long)]
    print_config: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let config = configuration(args)?;
    if args.print_config {
        return output::line(config.to_toml().trim_end());
    }
    let resume = match (args.resume, args.resume_weights_only) {
        (true, _) => Resume::Exact,
        (_, true) => Resume::WeightsOnly,
        _ => Resume::Fresh,
    };
    let accepted: Vec<Input> = Input::ALL
        .into_iter()
        .filter(|input| args.accept_changed.iter().any(|word| word == input.word()))
        .collect();
    let signal = Arc::new(AtomicI32::new(SIGINT));
    let summary = train(&config, resume, &accepted, &signal)?;
    conclude(&summary, signal.load(Ordering::Relaxed))
}

fn configuration(args: &Args) -> Result<RunConfig> {
    let mut builder = RunConfig::builder();
    if let Some(file) = args.config.clone().or_else(|| saved_config(args)) {
        builder = builder.file(&file)?;
    }
    for assignment in &args.assignments {
        builder = builder.set(assignment)?;
    }
    let flags = [
        ("--model", "model.path", &args.model),
        ("--data", "data.path", &args.data),
        ("--out", "train.out", &args.out),
        ("--backend", "backend.device", &args.backend),
        ("--compat", "train.compat", &args.compat),
    ];
    for (flag, key, value) in flags {
        if let Some(value) = value {
            builder = builder.flag(flag, key, value)?;
        }
    }
    Ok(builder.build()?)
}

/// The configuration of the run that goes on, where it wrote one.
fn saved_config(args: &Args) -> Option<PathBuf> {
    let file = Path::new(args.out.as_ref()?).join("config.toml");
    (args.resume || args.resume_weights_only)
        .then_some(file)
        .filter(|file| file.exists())
}

/// The words for what a run reads, from the library's own list.
fn input_words() -> PossibleValuesParser {
    PossibleValuesParser::new(Input::ALL.map(Input::word))
}

fn train(config: &RunConfig, resume: Resume, accepted: &[Input], signal: &Arc<AtomicI32>) -> Result<Summary> {
    let model_dir = required(&config.model.path, "--model", "model.path")?;
    require_model(model_dir)?;
    let data_path = required(&config.data.path, "--data", "data.path")?;
    let out = required(&config.train.out, "--out", "train.out")?;

    let context = ModelConfig::from_file(&model_dir.join("config.json"))?.max_position_embeddings;
    let max_seq_length = data::max_seq_length(config.train.max_seq_length, context)?;
    // A template with a date in it renders the same rows when the run goes on.
    let saved = template_time(out).filter(|_| resume == Resume::Exact);
    let now = saved.map_or_else(seconds_since_1970, Ok)?;
    let text = Text::configured(model_dir, config, Some(now))?;
    let options = data::options(config, max_seq_length)?;
    let splits = Splits::load(data_path, &text.tokenizer, text.template.as_ref(), &options)?;
    warn_about(&splits);

    let (device, choice) = model::choose_device(config.backend.device)?;
    limit_memory(device, &choice, config)?;
    let (mut base, _) = Model::load(model_dir, &kernels::for_training(config))?;
    output::note(&format!("computing with {}", base.choice()));

    let options = TrainOptions {
        max_seq_length,
        rungs: rungs(device),
        ..TrainOptions::from_config(config)?
    };
    let mut setup = Trainer::new(options, &splits.train.data, out)
        .config(config)
        .stop(&stop_on_signals(signal)?)
        .resume(resume)
        .accept_changed(accepted)
        .base(model_dir)
        .identity(identity(model_dir, &text, now)?);
    setup = setup.context(Map::from_iter([
        (
            "versions".into(),
            json!({"planish": env!("CARGO_PKG_VERSION"), "mlx": planish_mlx::version()?}),
        ),
        ("backend".into(), device.word().into()),
        ("probe".into(), what_the_probe_said(&choice)),
        ("model".into(), model_dir.display().to_string().into()),
        ("data".into(), statistics(&splits)),
    ]));
    let samples = &config.logging;
    setup = setup.samples(&text.tokenizer, samples.samples, samples.sample_tokens);
    if let (DeviceInUse::Metal, Some(gflops)) = (device, choice.report.gflops) {
        setup = setup.bound_work(1e9 * gflops);
    }
    if let Some(limit) = config.backend.memory_limit {
        setup = setup.memory_budget(limit.0);
    }
    if let Some(skipped) = skipped_rows(&splits)? {
        setup = setup.file("data_skipped.jsonl", skipped);
    }
    if let Some(valid) = &splits.valid {
        setup = setup.valid(&valid.data);
    }
    Ok(setup.run(&mut base, &mut TrainView::new(model_dir, device))?)
}

/// Keeps MLX to what the device recommends, or to what the user set. The processor has a limit only when one is set.
fn limit_memory(device: DeviceInUse, choice: &Choice, config: &RunConfig) -> Result<()> {
    let asked = config.backend.memory_limit.map(|limit| limit.0);
    if device == DeviceInUse::Cpu && asked.is_none() {
        return Ok(());
    }
    if let Some(budget) = planish_backend::budget(&choice.report.device, asked) {
        planish_backend::set_limits(&budget)?;
    }
    Ok(())
}

/// Why this device, for the record of the run.
fn what_the_probe_said(choice: &Choice) -> Value {
    let report = &choice.report;
    let rejected = choice.rejected.iter();
    json!({
        "verdict": choice.verdict.name(),
        "device": report.device.name,
        "gflops": report.gflops,
        "not_used": rejected.map(|it| json!({"backend": it.backend.name(), "reason": it.reason})).collect::<Vec<_>>(),
    })
}

fn seconds_since_1970() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs())?)
}

/// Figures of the data, for `planish report`.
fn statistics(splits: &Splits) -> Value {
    let of = |split: &Split| {
        let report = &split.report;
        json!({
            "path": split.data.path().display().to_string(),
            "format": report.format.name(),
            "rows": report.rows,
            "examples": report.examples,
            "tokens": report.tokens,
            "trained_tokens": report.targets,
            "truncated_rows": report.truncated_rows,
            "skipped_rows": report.skipped.len(),
            "duplicates": report.duplicates,
            "length_median": report.lengths.median,
            "length_p90": report.lengths.p90,
            "length_max": report.lengths.max,
        })
    };
    json!({"train": of(&splits.train), "valid": splits.valid.as_ref().map(of)})
}

/// The faulty rows that were left out, as JSON lines.
fn skipped_rows(splits: &Splits) -> Result<Option<Vec<u8>>> {
    let mut lines = Vec::new();
    for split in [Some(&splits.train), splits.valid.as_ref()].into_iter().flatten() {
        split.report.write_skipped(&mut lines)?;
    }
    Ok(Some(lines).filter(|lines| !lines.is_empty()))
}

/// What must be the same when the run goes on.
fn identity(model_dir: &Path, text: &Text, template_time: i64) -> Result<Identity> {
    let store = TensorStore::open(model_dir)?;
    let mut hashes = vec![hash::sha256_file(&model_dir.join("config.json"))?];
    for file in store.files() {
        hashes.push(hash::sha256_file(file).with_context(|| format!("cannot read {}", file.display()))?);
    }
    Ok(Identity {
        base_sha256: hash::sha256_hex(hashes.concat().as_bytes()),
        tokenizer_sha256: text.tokenizer.sha256().to_string(),
        template_sha256: text
            .template
            .as_ref()
            .map(|template| template.sha256().to_string())
            .unwrap_or_default(),
        template_time: Some(template_time),
    })
}

fn required<'a>(path: &'a Option<PathBuf>, flag: &str, key: &str) -> Result<&'a Path> {
    path.as_deref().ok_or_else(|| {
        usage(format!(
            "{flag} is missing\ngive it, or {key} in the configuration file"
        ))
    })
}

fn warn_about(splits: &Splits) {
    let all: [Option<&Split>; 2] = [Some(&splits.train), splits.valid.as_ref()];
    for split in all.into_iter().flatten() {
        output::note(&format!(
            "{}: {}",
            split.data.path().display(),
            data::describe(&split.report)
        ));
        for warning in split.report.warnings() {
            output::note(&format!("warning: {}: {warning}", split.data.path().display()));
        }
    }
    for file in &splits.unread {
        let fix = "call it train, valid or test, or put its rows into one of them";
        output::note(&format!("warning: {}: not read; {fix}", file.display()));
    }
    for leak in &splits.leaks {
        let (left, right) = (leak.left.display(), leak.right.display());
        output::note(&format!(
            "warning: {} rows of {right} are in {left} too (first: lines {:?})",
            leak.lines.len(),
            leak.lines[0]
        ));
    }
}

fn rungs(device: DeviceInUse) -> Rungs {
    if device == DeviceInUse::Cuda {
        Rungs::Cuda
    } else {
        Rungs::Fine
    }
}

/// The first signal that asks the program to end stops the run after its update; the second ends the process at once.
fn stop_on_signals(which: &Arc<AtomicI32>) -> Result<StopFlag> {
    let stop = StopFlag::default();
    let (asked, which) = (stop.clone(), which.clone());
    let mut wanted = vec![SIGINT, SIGTERM];
    if !hangups_are_ignored() {
        wanted.push(SIGHUP);
    }
    let mut signals = Signals::new(wanted).context("cannot listen for signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if asked.is_set() {
                std::process::exit(128 + signal);
            }
            which.store(signal, Ordering::Relaxed);
            asked.stop();
            output::note("\nstopping after this update; once more ends at once");
        }
    });
    Ok(stop)
}

/// Whether this process was started to outlive its terminal (`nohup`): children inherit which signals are ignored, and a
/// shell that hangs itself up lives on.
fn hangups_are_ignored() -> bool {
    let mut shell = Command::new("sh");
    shell.args(["-c", "kill -HUP $$; exit 0"]);
    let status = shell
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

fn conclude(summary: &Summary, signal: i32) -> Result<()> {
    let out = summary.out.display();
    let elapsed = format_duration(std::time::Duration::from_secs_f64(summary.elapsed_seconds));
    let step = summary.position.step;
    if summary.end == End::Interrupted {
        let message = match step {
            0 => format!("stopped before the first update; nothing is left in {out}"),
            _ => format!(
                "stopped after step {step}; go on with: {}",
                resume_command(&summary.out)
            ),
        };
        return Err(Interrupted { message, signal }.into());
    }
    let adapter_step = summary.adapter_step.unwrap_or(step);
    let best = summary
        .best
        .map(|(step, loss)| format!(", best validation loss {loss:.4} at step {step}"));
    output::note(&format!(
        "{step} steps, {} trained tokens in {elapsed}{}; {out} has the adapter of step {}",
        summary.tokens,
        best.unwrap_or_default(),
        adapter_step,
    ));
    if let Some((0, _)) = summary.best.filter(|_| step > 0) {
        output::note(&format!(
            "warning: every evaluation was worse than the untrained model; the adapter kept is that of step {adapter_step}"
        ));
    }
    output::line(&out.to_string())
}

/// The command that goes on with the run in a folder.
fn resume_command(out: &Path) -> String {
    let out = out.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,".contains(c);
    let quoted = match out.chars().all(is_plain) {
        true => out,
        false => format!("'{}'", out.replace('\'', "'\\''")),
    };
    format!("planish train --resume --out {quoted}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_that_goes_on_can_be_pasted() {
        let command = |out: &str| resume_command(Path::new(out));
        assert_eq!(command("runs/a"), "planish train --resume --out runs/a");
        assert_eq!(
            command("my runs/it's"),
            "planish train --resume --out 'my runs/it'\\''s'"
        );
    }
}

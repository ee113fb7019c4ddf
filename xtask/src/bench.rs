//! `cargo xtask bench`: planish and its peers on the same work, one after the other and round after round, so that what
//! else the machine does falls on all of them. What is quoted is the ratio.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use wheel_fetch::mlx::Flavour;

use crate::parity::{mlx_lm_python, peft_python};
use crate::program::{build_planish, output, target_folder};
use crate::repo;

/// Updates that the speed options are judged on, and how far the loss may be off.
const CURVE_STEPS: usize = 100;
const CURVE_LIMIT: f64 = 1e-2;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What is measured
    #[arg(long, value_enum, default_value = "step")]
    work: Work,
    /// Shape of the model with random weights that a step is measured on
    #[arg(long, value_parser = ["135m", "1b", "8b"], default_value = "135m")]
    shape: String,
    /// Rows of a batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, default_value_t = 256)]
    length: usize,
    /// Steps a program runs each time, two of warm-up among them
    #[arg(long, default_value_t = 6)]
    steps: usize,
    /// How often each program runs
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Tokens to generate
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Compute activations again in the backward pass
    #[arg(long)]
    checkpointing: bool,
    /// Folder of a real model, for generation and data. Without it: SmolLM2-135M, which is fetched
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder with train.jsonl, for --work data and curve
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Who takes part besides planish. Without it: all that can do the work, except torch-compile and mlx-lm as installed
    #[arg(long, value_enum, value_delimiter = ',')]
    peers: Vec<Peer>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Work {
    /// A LoRA training step on random tokens
    Step,
    /// Greedy generation
    Generate,
    /// Trained tokens per second of a run on a data set
    Data,
    /// The loss of 100 updates on a data set against the same in plain f32: speed must not cost accuracy
    Curve,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Peer {
    /// planish in plain f32: MLX's operations
    PlanishComposed,
    /// planish with its own kernels in f32
    PlanishNative,
    /// mlx-lm from PyPI, with its reference BLAS
    MlxLm,
    /// mlx-lm with OpenBLAS in that BLAS's place
    MlxLmOpenblas,
    /// PyTorch and PEFT, f32
    TorchF32,
    /// PyTorch and PEFT, bf16
    TorchBf16,
    /// The same, compiled
    TorchCompileBf16,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let bench = Bench::prepare(args)?;
    if args.work == Work::Curve {
        return bench.compare_curves();
    }
    let contenders: Vec<Option<Peer>> = std::iter::once(None)
        .chain(bench.peers.iter().copied().map(Some))
        .collect();
    let mut results: Vec<Vec<Value>> = vec![Vec::new(); contenders.len()];
    for round in 0..args.rounds {
        for (contender, results) in contenders.iter().zip(&mut results) {
            let result = bench.measure(*contender)?;
            eprintln!(
                "round {}: {}: {:.1} tok/s",
                round + 1,
                name(*contender),
                number(&result, "tokens_per_second")
            );
            results.push(result);
        }
    }
    print_table(&bench, &contenders, &results)
}

/// Everything that the programs need.
struct Bench<'a> {
    args: &'a Args,
    planish: PathBuf,
    peers: Vec<Peer>,
    /// Config of the measured shape in the form of the Hugging Face hub.
    config: PathBuf,
    /// Folder of the real model, where one is needed.
    model: PathBuf,
}

impl<'a> Bench<'a> {
    fn prepare(args: &'a Args) -> Result<Self> {
        let planish = build_planish()?;
        let model = match (&args.model, args.work) {
            (Some(model), _) => model.clone(),
            (None, Work::Step) => PathBuf::new(),
            (None, _) => {
                let printed = output(Command::new(&planish).args(["pull", "smollm2-135m"]))?;
                printed
                    .lines()
                    .last()
                    .context("`planish pull` printed no folder")?
                    .into()
            }
        };
        let folder = work_folder();
        std::fs::create_dir_all(&folder)?;
        let config = folder.join(format!("{}.json", args.shape));
        std::fs::write(&config, shape(&args.shape).to_string())?;
        let peers = match (&args.peers[..], args.work) {
            ([], Work::Step) => vec![Peer::MlxLmOpenblas, Peer::TorchF32, Peer::TorchBf16],
            ([], _) => vec![Peer::MlxLmOpenblas],
            (chosen, _) => chosen.to_vec(),
        };
        Ok(Self {
            args,
            planish,
            peers,
            config,
            model,
        })
    }

    fn measure(&self, contender: Option<Peer>) -> Result<Value> {
        match contender {
            None => self.planish("auto"),
            Some(Peer::PlanishComposed) => self.planish("composed"),
            Some(Peer::PlanishNative) => self.planish("native"),
            Some(Peer::MlxLm) => self.mlx_lm(&[]),
            Some(Peer::MlxLmOpenblas) => self.mlx_lm(&fast_blas()?),
            Some(Peer::TorchF32) => self.torch("float32", false),
            Some(Peer::TorchBf16) => self.torch("bfloat16", false),
            Some(Peer::TorchCompileBf16) => self.torch("bfloat16", true),
        }
    }

    fn planish(&self, kernels: &str) -> Result<Value> {
        let args = self.args;
        let mut command = user_command(&self.planish);
        match args.work {
            Work::Step => {
                command.args(["bench", "--json", "--kernels", kernels, "--shape", &args.shape]);
                command.args(["--batch", &args.batch.to_string(), "--seq", &args.length.to_string()]);
                command.args(["--steps", &args.steps.to_string()]);
                if args.checkpointing {
                    command.arg("--checkpointing");
                }
            }
            Work::Generate => {
                command.args(["bench", "--json", "--kernels", kernels, "--dtype", "f32"]);
                command.args([
                    "--generate",
                    &args.tokens.to_string(),
                    "--steps",
                    &args.steps.to_string(),
                ]);
                command.arg("--model").arg(&self.model);
            }
            Work::Data | Work::Curve => return self.planish_run(kernels),
        }
        Ok(serde_json::from_str(&output(&mut command)?)?)
    }

    /// Two runs that differ in nothing but what computes.
    fn compare_curves(&self) -> Result<()> {
        let losses = |kernels: &str| -> Result<Vec<f64>> {
            let steps = self.training_records(kernels, CURVE_STEPS)?;
            Ok(steps.iter().map(|step| number(step, "loss")).collect())
        };
        let (fast, plain) = (losses("auto")?, losses("composed")?);
        let off = largest_difference(&fast, &plain).context("the runs have no records, or not the same number")?;
        println!(
            "{} updates: loss {:.4} to {:.4}; plain f32 {:.4} to {:.4}; largest relative difference {off:.1e}",
            fast.len(),
            fast[0],
            fast[fast.len() - 1],
            plain[0],
            plain[plain.len() - 1],
        );
        ensure!(
            off <= CURVE_LIMIT,
            "the curves are {off:.1e} apart, more than {CURVE_LIMIT:.0e}"
        );
        Ok(())
    }

    /// A run of `planish train`, read from its own record.
    fn planish_run(&self, kernels: &str) -> Result<Value> {
        let steps = self.training_records(kernels, self.args.steps)?;
        let rate = rate_after_warm_up(&steps).context("metrics.jsonl has too few records of training")?;
        let last = steps.last().context("no record")?;
        Ok(json!({
            "tokens_per_second": rate, "dtype": "float32", "device": "cpu",
            "peak_bytes": last["memory"]["rss_bytes"].as_f64().or(last["rss_bytes"].as_f64()),
        }))
    }

    /// One record an update of a run of `planish train`.
    fn training_records(&self, kernels: &str, steps: usize) -> Result<Vec<Value>> {
        let out = work_folder().join("run");
        let _ = std::fs::remove_dir_all(&out);
        let kernels = kernels.replace('-', "_");
        let settings = [
            "data.packing=true".to_owned(),
            format!("train.batch_size={}", self.args.batch),
            "train.max_seq_length=512".to_owned(),
            format!("train.steps={steps}"),
            "logging.report_every=1".to_owned(),
            format!("model.kernels={kernels}"),
        ];
        let mut command = user_command(&self.planish);
        command.arg("train").arg("--model").arg(&self.model);
        command.arg("--data").arg(self.data()?).arg("--out").arg(&out);
        for setting in &settings {
            command.args(["--set", setting]);
        }
        output(&mut command)?;
        let text = std::fs::read_to_string(out.join("metrics.jsonl"))?;
        let mut lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        lines.retain(|line| line["tokens_per_second"].is_f64());
        Ok(lines)
    }

    fn mlx_lm(&self, environment: &[(&str, String)]) -> Result<Value> {
        let args = self.args;
        let python = mlx_lm_python()?;
        let mut command = user_command(&python);
        command.arg(repo::root().join("xtask/peers/mlx_lm_peer.py"));
        match args.work {
            Work::Step => {
                command.arg("step").arg(&self.config);
                command.args([args.batch, args.length, args.steps].map(|number| number.to_string()));
                command.args(["float32", if args.checkpointing { "1" } else { "0" }]);
            }
            Work::Generate => {
                command.arg("generate").arg(&self.model);
                command.args([args.tokens, args.steps].map(|number| number.to_string()));
            }
            Work::Data | Work::Curve => {
                command.arg("data").arg(&self.model).arg(self.data()?);
                command.args([args.batch, args.steps].map(|number| number.to_string()));
            }
        }
        last_object(&output(
            command.envs(environment.iter().map(|(key, value)| (key, value))),
        )?)
    }

    fn torch(&self, dtype: &str, compiled: bool) -> Result<Value> {
        let args = self.args;
        if args.work != Work::Step {
            bail!("PyTorch takes part in --work step only");
        }
        let python = peft_python()?;
        let mut command = user_command(&python);
        command
            .arg(repo::root().join("xtask/peers/torch_peer.py"))
            .arg(&self.config);
        command.args([args.batch, args.length, args.steps].map(|number| number.to_string()));
        let flag = |on: bool| if on { "1" } else { "0" };
        last_object(&output(command.args([
            dtype,
            flag(args.checkpointing),
            flag(compiled),
        ]))?)
    }

    fn data(&self) -> Result<&Path> {
        self.args
            .data
            .as_deref()
            .context("--work data and curve need --data DIR")
    }
}

/// A command as users run it: without the settings that hold OpenBLAS to one kernel.
fn user_command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_remove("OPENBLAS_CORETYPE").env_remove("OPENBLAS_L2_SIZE");
    command
}

/// What puts OpenBLAS in the place of the BLAS inside a Linux wheel of MLX: the libraries that planish itself uses.
fn fast_blas() -> Result<Vec<(&'static str, String)>> {
    let flavour = Flavour::for_target(std::env::consts::OS, std::env::consts::ARCH, false, (0, 0))?;
    let bundled = flavour.bundled_libraries().context("only Linux wheels bring a BLAS")?;
    // planish was built before, so the cache holds the libraries.
    let prefix = wheel_fetch::mlx::prefix(flavour, |_| Ok(()))?;
    let folder = prefix.parent().unwrap_or(&prefix).join(bundled);
    let mut libraries = Vec::new();
    for entry in std::fs::read_dir(&folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("libblas-") || name.starts_with("liblapack-") {
            libraries.push(path.display().to_string());
        }
    }
    if libraries.is_empty() {
        bail!("{}: no forwarding libraries to OpenBLAS", folder.display());
    }
    Ok(vec![("LD_PRELOAD", libraries.join(":"))])
}

/// SmolLM2-135M, Llama 3.2 1B and Llama 3.1 8B as `config.json` says them.
fn shape(name: &str) -> Value {
    let (d, f, layers, heads, kv, head_dim, vocab, theta, tied) = match name {
        "1b" => (2048, 8192, 16, 32, 8, 64, 128_256, 500_000.0, true),
        "8b" => (4096, 14336, 32, 32, 8, 128, 128_256, 500_000.0, false),
        _ => (576, 1536, 30, 9, 3, 64, 49152, 100_000.0, true),
    };
    json!({
        "model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": vocab,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": tied,
    })
}

fn name(contender: Option<Peer>) -> &'static str {
    match contender {
        None => "planish",
        Some(Peer::PlanishComposed) => "planish, MLX operations",
        Some(Peer::PlanishNative) => "planish, native f32",
        Some(Peer::MlxLm) => "mlx-lm as installed",
        Some(Peer::MlxLmOpenblas) => "mlx-lm + OpenBLAS",
        Some(Peer::TorchF32 | Peer::TorchBf16) => "PyTorch + PEFT",
        Some(Peer::TorchCompileBf16) => "PyTorch + PEFT + compile",
    }
}

fn print_table(bench: &Bench<'_>, contenders: &[Option<Peer>], results: &[Vec<Value>]) -> Result<()> {
    let args = bench.args;
    let commit = repo::output_of(&["git", "describe", "--always", "--dirty"])?;
    let work = match args.work {
        Work::Step => format!("{} B{} T{}", args.shape, args.batch, args.length),
        Work::Generate => format!("generation of {} tokens", args.tokens),
        Work::Data | Work::Curve => format!("trained tokens, batch {}", args.batch),
    };
    println!(
        "{work}; {}; commit {}; medians of {} rounds",
        machine(),
        commit.trim(),
        args.rounds
    );
    println!("| program | device | dtype | tokens/s | peak GB | planish is × |");
    println!("|---|---|---|---|---|---|");
    let medians: Vec<f64> = results
        .iter()
        .map(|rounds| median(rounds, "tokens_per_second"))
        .collect();
    for ((contender, rounds), speed) in contenders.iter().zip(results).zip(&medians) {
        let word = |key: &str| rounds[0][key].as_str().unwrap_or("-").to_owned();
        println!(
            "| {} | {} | {}{} | {speed:.1} | {:.2} | {:.2} |",
            name(*contender),
            rounds[0]["backend"]
                .as_str()
                .map_or_else(|| word("device"), str::to_owned),
            word("dtype"),
            rounds[0]["kernels"]
                .as_str()
                .map(|kernels| format!(" ({kernels})"))
                .unwrap_or_default(),
            median(rounds, "peak_memory_bytes").max(median(rounds, "peak_bytes")) / 1e9, // ours, or a peer's
            medians[0] / speed
        );
    }
    Ok(())
}

/// Processor and threads.
fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown processor", |(_, model)| model);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{model}, {threads} threads")
}

/// Tokens a second over all records but the first two, which warm up.
fn rate_after_warm_up(steps: &[Value]) -> Option<f64> {
    let counted = steps.windows(2).skip(1);
    let (mut tokens, mut seconds) = (0.0, 0.0);
    for pair in counted {
        let trained = pair[1]["tokens"].as_f64()? - pair[0]["tokens"].as_f64()?;
        tokens += trained;
        seconds += trained / pair[1]["tokens_per_second"].as_f64()?;
    }
    (seconds > 0.0).then_some(tokens / seconds)
}

/// Largest relative difference; `None` where the lists are empty, of different lengths, or hold what is no number.
fn largest_difference(found: &[f64], expect: &[f64]) -> Option<f64> {
    let is_comparable = !expect.is_empty() && found.len() == expect.len();
    let off = found.iter().zip(expect).map(|(a, b)| ((a - b) / b).abs());
    let all: Vec<f64> = off.collect();
    (is_comparable && all.iter().all(|off| off.is_finite())).then(|| all.into_iter().fold(0.0, f64::max))
}

fn median(rounds: &[Value], key: &str) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(|round| number(round, key)).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or(f64::NAN)
}

/// The object on the last line; programs may print others before.
fn last_object(printed: &str) -> Result<Value> {
    let line = printed.lines().last().context("nothing was printed")?;
    serde_json::from_str(line).with_context(|| format!("no JSON object: {line}"))
}

fn work_folder() -> PathBuf {
    target_folder().join("bench")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_leaves_the_first_two_records_out() {
        let record = |tokens: u32, rate: f64| json!({"tokens": tokens, "tokens_per_second": rate});
        let records = [record(10, 1.0), record(20, 1.0), record(40, 5.0), record(60, 20.0)];
        // 20 tokens in 4 seconds and 20 in 1.
        assert_eq!(rate_after_warm_up(&records), Some(8.0));
    }

    #[test]
    fn curves_are_compared_step_by_step() {
        assert_eq!(largest_difference(&[2.0, 1.5], &[2.0, 1.0]), Some(0.5));
        assert_eq!(largest_difference(&[2.0], &[2.0, 1.0]), None);
        assert_eq!(largest_difference(&[f64::NAN], &[2.0]), None);
        assert_eq!(largest_difference(&[], &[]), None);
    }

    #[test]
    fn the_last_line_is_the_answer() {
        assert_eq!(last_object("noise\n{\"a\": 1}\n").unwrap(), json!({"a": 1}));
        assert!(last_object("noise").is_err());
    }
}

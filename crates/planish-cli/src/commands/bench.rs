use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use planish_core::model_config::ModelConfig;
use planish_core::run_config::BackendDevice;
use planish_mlx::{Dtype, memory};
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{ChosenKernels, Kernels, LoadOptions, LoraConfig, Model, Purpose};
use planish_train::optimizer::{Adam, Rule};
use planish_train::{Compile, TimedStep, TrainOptions, compiles_updates, timed_steps};
use serde_json::json;

use crate::model::{self, DeviceInUse};
use crate::output;

/// Steps before the first that counts.
const WARM_UP: usize = 2;

/// Tokens that generation is given to read.
const PROMPT_TOKENS: usize = 32;

/// Measure the speed of a training step, or of generation, on this machine
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Shape of a model with random weights
    #[arg(long, value_parser = ["135m", "1b", "8b"], default_value = "135m", conflicts_with = "model")]
    shape: String,
    /// Folder of a model to measure instead
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Rows of a batch
    #[arg(long, default_value_t = 4)]
    batch: usize,
    /// Tokens of a row
    #[arg(long, value_name = "T", alias = "length", default_value_t = 256)]
    seq: usize,
    /// Steps, two of warm-up among them
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(3..))]
    steps: u64,
    /// Measure generation of this many tokens instead of training
    #[arg(long, value_name = "TOKENS")]
    generate: Option<usize>,
    /// What computes the blocks
    #[arg(long, value_parser = ["auto", "composed", "native", "native-bf16", "fused"], default_value = "auto")]
    kernels: String,
    /// Element type of weights and activations [default: f32 on a CPU, bf16 on a GPU]
    #[arg(long)]
    dtype: Option<ElementType>,
    /// Compute activations again in the backward pass instead of keeping them
    #[arg(long)]
    checkpointing: bool,
    /// Run updates as they are written, also on a GPU, where they are traced and compiled otherwise
    #[arg(long, conflicts_with = "compile")]
    no_compile: bool,
    /// Trace and compile updates on the CPU too, which needs a C++ compiler and `--kernels composed`
    #[arg(long)]
    compile: bool,
    /// Wait for each compiled update before the next is set going
    #[arg(long)]
    no_ahead: bool,
    /// Trained positions whose logits exist at one time [default: as many as take 128 MiB, on a GPU 512 MiB]
    #[arg(long, value_name = "N")]
    chunk_tokens: Option<usize>,
    /// Device
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = model::device_words())]
    backend: String,
    /// Print one JSON object, with the loss of every step
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum ElementType {
    #[value(alias = "float32")]
    F32,
    #[value(alias = "float16")]
    F16,
    #[value(alias = "bfloat16")]
    Bf16,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    use planish_core::run_config::Setting;
    let device = model::select_device(BackendDevice::from_text(&args.backend).unwrap_or(BackendDevice::Auto))?;
    let kernels = match args.kernels.as_str() {
        "composed" => Some(Kernels::Composed),
        "native" => Some(Kernels::Native),
        "native-bf16" => Some(Kernels::NativeBf16),
        "fused" => Some(Kernels::Fused),
        _ => None,
    };
    let mut model = load(args, device, kernels)?;
    match args.generate {
        Some(tokens) => generation(args, device, &model, tokens),
        None => training(args, device, &mut model),
    }
}

fn load(args: &Args, device: DeviceInUse, kernels: Option<Kernels>) -> Result<Model> {
    let dtype = args.dtype.map(|dtype| match dtype {
        ElementType::F32 => Dtype::Float32,
        ElementType::F16 => Dtype::Float16,
        ElementType::Bf16 => Dtype::Bfloat16,
    });
    let purpose = match args.generate {
        Some(_) => Purpose::Inference,
        None => Purpose::Adapters,
    };
    if let Some(dir) = &args.model {
        let options = LoadOptions {
            dtype,
            kernels,
            purpose,
            ..LoadOptions::default()
        };
        return Ok(Model::load(dir, &options)?.0);
    }
    let by_device = match device {
        DeviceInUse::Cpu => Dtype::Float32,
        _ => Dtype::Bfloat16,
    };
    let (config, dtype) = (shape(&args.shape)?, dtype.unwrap_or(by_device));
    let kernels = match kernels {
        Some(kernels) => kernels,
        None => ChosenKernels::fastest(dtype, purpose, false)?.kernels,
    };
    Ok(Model::random_with(&config, dtype, kernels, 0)?)
}

/// Shapes of models that people train: SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B.
fn shape(name: &str) -> Result<ModelConfig> {
    let (d, f, layers, heads, kv, head_dim, vocab, theta, tied) = match name {
        "135m" => (576, 1536, 30, 9, 3, 64, 49152, 100_000.0, true),
        "1b" => (2048, 8192, 16, 32, 8, 64, 128_256, 500_000.0, true),
        "8b" => (4096, 14336, 32, 32, 8, 128, 128_256, 500_000.0, false),
        _ => bail!("no shape {name}"),
    };
    let config = json!({
        "model_type": "llama", "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": head_dim, "vocab_size": vocab,
        "rope_theta": theta, "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "tie_word_embeddings": tied,
    });
    ModelConfig::from_json_str(&config.to_string(), Path::new(name)).context("the shape is no model")
}

/// Rank 8 on every linear layer, Adam, random tokens that are all targets.
fn training(args: &Args, device: DeviceInUse, model: &mut Model) -> Result<()> {
    model.attach_lora(&LoraConfig::default(), 0)?;
    let options = TrainOptions {
        rule: Rule::Adam(Adam::default()),
        learning_rate: 1e-5,
        clip_norm: None,
        activation_checkpointing: args.checkpointing,
        compile: match (args.compile, args.no_compile) {
            (true, _) => Compile::On,
            (_, true) => Compile::Off,
            _ => Compile::Auto,
        },
        launch_ahead: !args.no_ahead,
        chunk_tokens: args.chunk_tokens,
        ..TrainOptions::default()
    };
    memory::reset_peak()?;
    let steps = timed_steps(model, (args.batch, args.seq), &options, args.steps as usize)?;
    let median = median(steps[WARM_UP..].iter().map(|step| step.seconds).collect());
    let speed = (args.batch * args.seq) as f64 / median;
    let compiled = if compiles_updates(model, &options)? {
        " compiled"
    } else {
        ""
    };
    let work = format!("B{} T{}{compiled}", args.batch, args.seq);
    print(args, device, model, &work, speed, median, &steps)
}

/// Greedy continuation of a fixed prompt.
fn generation(args: &Args, device: DeviceInUse, model: &Model, tokens: usize) -> Result<()> {
    let vocab_size = model.config().arch.vocab_size as u32;
    let prompt: Vec<u32> = (0..PROMPT_TOKENS as u32)
        .map(|i| (i * 7919 + 13) % vocab_size)
        .collect();
    let options = GenerateOptions {
        max_tokens: tokens,
        stop_tokens: Vec::new(),
        sampling: planish_nn::Sampling::default(),
    };
    let mut speeds = Vec::new();
    for _ in 0..args.steps {
        let mut stream = generate(model, &prompt, &options)?;
        stream.next().transpose()?; // reading the prompt is not what is measured
        let started = Instant::now();
        let written = stream.try_fold(0, |count, token| token.map(|_| count + 1))?;
        speeds.push(f64::from(written) / started.elapsed().as_secs_f64());
    }
    let speed = median(speeds.split_off(1));
    print(
        args,
        device,
        model,
        &format!("generate {tokens}"),
        speed,
        1.0 / speed,
        &[],
    )
}

fn print(
    args: &Args,
    device: DeviceInUse,
    model: &Model,
    work: &str,
    speed: f64,
    median: f64,
    steps: &[TimedStep],
) -> Result<()> {
    let name = args
        .model
        .as_ref()
        .map_or(args.shape.clone(), |dir| dir.display().to_string());
    let (dtype, kernels) = (
        format!("{:?}", model.dtype()).to_lowercase(),
        model.kernels().describe(),
    );
    let arrays = memory::usage()?.peak_bytes;
    // A GPU's memory is not in the resident size.
    let peak = match device {
        DeviceInUse::Cpu => resident_peak().unwrap_or(arrays),
        _ => arrays,
    };
    if args.json {
        let losses: Vec<f64> = steps.iter().map(|step| step.loss).collect();
        let report = json!({
            "shape": name, "work": work, "backend": device.word(), "dtype": dtype, "kernels": kernels,
            "tokens_per_second": speed, "step_ms": median * 1e3,
            "first_step_ms": steps.first().map(|step| step.seconds * 1e3),
            "peak_memory_bytes": peak, "array_peak_bytes": arrays, "losses": losses,
        });
        return output::line(&report.to_string());
    }
    let checkpointing = if args.checkpointing { ", checkpointing" } else { "" };
    let ms = median * 1e3;
    let gb = peak as f64 / 1e9;
    output::line(&format!(
        "planish {name} {work} {} {dtype} ({kernels}{checkpointing}): {speed:.1} tok/s, {ms:.1} ms, peak {gb:.2} GB",
        device.word()
    ))
}

/// Largest resident size of the process in bytes, where `/proc` tells it.
fn resident_peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

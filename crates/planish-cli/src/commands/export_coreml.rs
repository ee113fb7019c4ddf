use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use planish_checkpoint::fuse::read_update;
use planish_core::units::{format_bytes, format_duration};
use planish_export::weights::WeightFormat;
use planish_export::{CacheMode, ExportOptions, ExportReport, Layout, export};

use super::export::{prompt, read_text};
use crate::model_path::require_model;
use crate::output;

/// Write Core ML packages, for the Neural Engine and the GPU of Apple devices
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder of the model in the Hugging Face layout; MLX's quantised weights are dequantised
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Folder of an adapter, in mlx-lm's or PEFT's layout; it is merged before rounding
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Go on although the adapter changes nothing, or was made for another model
    #[arg(long, requires = "adapter")]
    force: bool,
    /// Keep the adapter beside the base weights, in functions infer_NAME and prefill_NAME
    #[arg(long, value_name = "NAME", requires = "adapter")]
    keep_adapter: Option<String>,
    /// The .mlpackage (monolith) or the folder of packages (anemll); must not exist
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// One package, or embeddings, chunks and head as ANEMLL's hosts load them
    #[arg(long, default_value = "monolith", value_parser = ["monolith", "anemll"])]
    layout: String,
    /// Keys and values in a Core ML state, or with the caller
    #[arg(long, default_value = "state", value_parser = ["state", "host"])]
    cache: String,
    /// Positions of the cache [default: 1024, or the model's longest context if that is less]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Tokens of a prefill call [default: 64, or the context if that is less]
    #[arg(long, value_name = "S")]
    prefill: Option<usize>,
    /// Packages that the layers are split into [default: planned by size and layers]
    #[arg(long, value_name = "M")]
    chunks: Option<usize>,
    /// Parts of the head [default: 16 for Qwen, 8 for others, or a divisor of the vocabulary near it]
    #[arg(long, value_name = "K")]
    head_parts: Option<usize>,
    /// Form of the linear layers' weights
    #[arg(long, default_value = "fp16", value_parser = ["fp16", "int8", "int4", "lut6", "lut4"])]
    weights: String,
    /// Smallest epsilon of the norms; fp16 is subnormal below 6.1e-5
    #[arg(long, value_name = "E", default_value_t = 0.0)]
    min_epsilon: f32,
    /// Text like yours, for activation ranges, better compressed weights and perplexity
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Run the package on the CPU and compare it with the model before it gets its name
    #[arg(long)]
    check: bool,
    /// Write a script with inputs and expected values for a Mac beside the package
    #[arg(long)]
    verify: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model)?;
    let options = options(args)?;
    let update = read_update(&args.model, args.adapter.as_deref(), args.force)?;
    let start = Instant::now();
    let report = export(&args.model, update, &args.out, &options)?;
    let elapsed = start.elapsed();
    if args.json {
        let mut json = serde_json::to_value(&report)?;
        json["seconds"] = elapsed.as_secs_f64().into();
        return output::line(&format!("{json:#}"));
    }
    for warning in &report.warnings {
        output::note(&format!("warning: {warning}"));
    }
    output::line(&describe(&report, elapsed)?)
}

fn options(args: &Args) -> Result<ExportOptions> {
    let defaults = ExportOptions::default();
    let prefill = args
        .prefill
        .unwrap_or_else(|| defaults.prefill.min(args.context.unwrap_or(defaults.prefill)));
    Ok(ExportOptions {
        layout: if args.layout == "anemll" {
            Layout::Anemll
        } else {
            Layout::Monolith
        },
        cache: if args.cache == "host" {
            CacheMode::Host
        } else {
            CacheMode::State
        },
        context: args.context,
        prefill,
        chunks: args.chunks,
        head_parts: args.head_parts,
        weights: args.weights.parse::<WeightFormat>().map_err(anyhow::Error::msg)?,
        min_epsilon: args.min_epsilon,
        keep_adapter: args.keep_adapter.clone(),
        check: args.check,
        verify_bundle: args.verify,
        calibration: args
            .text
            .as_deref()
            .map(|path| read_text(&args.model, path))
            .transpose()?
            .unwrap_or_default(),
        prompt: prompt(&args.model),
    })
}

fn describe(report: &ExportReport, elapsed: Duration) -> Result<String> {
    let mut text = String::new();
    for package in &report.packages {
        let functions = package.functions.join(", ");
        let size = format_bytes(package.weight_bytes + package.specification_bytes);
        writeln!(
            text,
            "{}: {functions}; {} operations, {size}",
            package.file_name, package.operations
        )?;
    }
    if !report.layer_errors.is_empty() {
        writeln!(text, "error of the stored weights, |W - W'| / |W|:")?;
        for layer in &report.layer_errors {
            writeln!(text, "  {:.5}  {}", layer.relative_error, layer.tensor)?;
        }
    }
    if let Some(check) = &report.check {
        let (exact, fp16) = (&check.exact, &check.fp16);
        writeln!(
            text,
            "check, f32 arithmetic on the stored weights: {} positions, largest logit error {:.5} (logits up to {:.2})",
            exact.positions, exact.max_error, exact.max_logit
        )?;
        writeln!(
            text,
            "check, fp16 arithmetic against the f32 model: {} decoded tokens, top-1 {:.1} %, in top-5 {:.1} %, KL {:.2e}",
            fp16.positions,
            fp16.top1 * 100.0,
            fp16.in_top5 * 100.0,
            fp16.kl
        )?;
        if let Some((model, package, tokens)) = check.perplexity {
            writeln!(
                text,
                "perplexity of {tokens} tokens: model {model:.3}, package {package:.3}"
            )?;
        }
    }
    let rate = report.bytes as f64 / elapsed.as_secs_f64().max(1e-9);
    writeln!(
        text,
        "{}, context {}, {} in {} ({}/s)",
        report.settings.layout_name(),
        report.settings.context,
        format_bytes(report.bytes),
        format_duration(elapsed),
        format_bytes(rate as u64)
    )?;
    write!(text, "{}", report.path.display())?;
    Ok(text)
}

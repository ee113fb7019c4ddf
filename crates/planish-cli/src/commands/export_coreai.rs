use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use planish_checkpoint::fuse::read_update;
use planish_core::units::{format_bytes, format_duration};
use planish_data::Tokenizer;
use planish_export::weights::WeightFormat;
use planish_export::{CoreAiOptions, CoreAiReport, export_coreai};

use super::export::{prompt, read_text};
use crate::model_path::require_model;
use crate::output;

/// Write a Core AI asset, for macOS, iOS, iPadOS and visionOS 27
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
    /// NAME.aimodel for the asset alone; any other name for the bundle that Apple's engines load; must not exist
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Longest text [default: the model's longest context]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Form of the linear layers' weights
    #[arg(long, default_value = "fp16", value_parser = ["fp16", "int8", "int4", "lut4"])]
    weights: String,
    /// Text like yours, for activation ranges and better compressed weights
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Run the asset on the CPU and compare it with the model before it gets its name
    #[arg(long)]
    check: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model)?;
    let text = args
        .text
        .as_deref()
        .map(|path| read_text(&args.model, path))
        .transpose()?;
    let options = CoreAiOptions {
        weights: args.weights.parse::<WeightFormat>().map_err(anyhow::Error::msg)?,
        context: args.context,
        calibration: text.unwrap_or_default(),
        prompt: prompt(&args.model),
        end_tokens: end_tokens(&args.model),
        check: args.check,
    };
    let update = read_update(&args.model, args.adapter.as_deref(), args.force)?;
    let start = Instant::now();
    let report = export_coreai(&args.model, update, &args.out, &options)?;
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

/// Tokens that end a text or a turn, the tokenizer's own first. A model folder may lack a tokenizer.
fn end_tokens(model: &Path) -> Vec<String> {
    let Ok(tokenizer) = Tokenizer::from_dir(model) else {
        return Vec::new();
    };
    let others = tokenizer
        .eos_ids()
        .iter()
        .copied()
        .filter(|id| Some(*id) != tokenizer.eos());
    let ids = tokenizer.eos().into_iter().chain(others);
    ids.filter_map(|id| tokenizer.id_to_token(id)).collect()
}

fn describe(report: &CoreAiReport, elapsed: Duration) -> Result<String> {
    let mut text = String::new();
    if !report.layer_errors.is_empty() {
        writeln!(text, "error of the stored weights, |W - W'| / |W|:")?;
        for layer in &report.layer_errors {
            writeln!(text, "  {:.5}  {}", layer.relative_error, layer.tensor)?;
        }
    }
    if let Some(check) = &report.check {
        for (way, found) in [("kernels", &check.kernels), ("bodies", &check.bodies)] {
            writeln!(
                text,
                "check, f32 arithmetic on the stored weights by {way}: {} positions, largest logit error {:.2e} (logits up to {:.2})",
                found.positions, found.max_error, found.max_logit
            )?;
        }
        writeln!(
            text,
            "check, fp16 arithmetic against the f32 model: {} positions, top-1 {:.1} %, in top-5 {:.1} %, KL {:.2e}",
            check.fp16.positions,
            check.fp16.top1 * 100.0,
            check.fp16.in_top5 * 100.0,
            check.fp16.kl
        )?;
    }
    let rate = report.bytes as f64 / elapsed.as_secs_f64().max(1e-9);
    writeln!(
        text,
        "{}, context {}, {} operations, {} in {} ({}/s)",
        if report.is_bundle { "bundle" } else { "asset" },
        report.context,
        report.operations,
        format_bytes(report.bytes),
        format_duration(elapsed),
        format_bytes(rate as u64)
    )?;
    write!(text, "{}", report.path.display())?;
    Ok(text)
}

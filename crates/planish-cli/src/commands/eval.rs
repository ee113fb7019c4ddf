use std::path::PathBuf;

use anyhow::{Result, bail};
use planish_core::run_config::RunConfig;
use planish_data::Dataset;
use planish_train::{TrainOptions, evaluate};
use serde_json::json;

use crate::data::{self, Text};
use crate::model::ModelArgs;
use crate::model_path::require_model;
use crate::output;

/// Measure the loss and perplexity of a model on a file
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// JSONL file
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Rows computed at once; does not change the result
    #[arg(long, value_name = "N", default_value_t = 4)]
    batch_size: usize,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model.model)?;
    let text = Text::of_model(&args.model.model)?;
    let model = args.model.load()?;
    let max_seq_length = data::max_seq_length(None, model.config().max_position_embeddings)?;
    let options = data::options(&RunConfig::default(), max_seq_length)?;
    let (data, report) = Dataset::load(&args.data, &text.tokenizer, text.template.as_ref(), &options)?;
    for warning in report.warnings() {
        output::note(&format!("warning: {}: {warning}", args.data.display()));
    }
    let options = TrainOptions {
        batch_size: args.batch_size,
        max_seq_length,
        ..TrainOptions::default()
    };
    options.check()?;
    let found = evaluate(&model, &data, &options, None)?;
    if !found.loss.is_finite() {
        bail!("the loss of {} is not finite", args.model.named());
    }
    if args.json {
        let document = json!({
            "loss": found.loss,
            "perplexity": found.perplexity,
            "perplexity_se": found.perplexity_se,
            "tokens": found.tokens,
        });
        return output::line(&document.to_string());
    }
    output::line(&format!(
        "loss {:.4}  perplexity {:.3} ± {:.3}  {} tokens",
        found.loss, found.perplexity, found.perplexity_se, found.tokens
    ))
}

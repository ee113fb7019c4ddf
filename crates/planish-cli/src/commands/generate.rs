use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use planish_data::{ChatTemplate, TemplateOptions, Tokenizer};
use planish_nn::Sampling;
use planish_nn::generate::{GenerateOptions, generate};
use serde_json::json;

use crate::model::ModelArgs;
use crate::model_path::require_model;
use crate::output;

/// Continue a prompt, or answer it as a chat turn
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// What to say to the model
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// System message before the prompt
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Take the prompt as plain text to be continued, without the chat template
    #[arg(long)]
    raw: bool,
    /// Most tokens to write
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Randomness; 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temp: f32,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the random choice
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Print one JSON document at the end instead of streaming
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    require_model(&args.model.model)?;
    let tokenizer = Tokenizer::from_dir(&args.model.model)?;
    let prompt = prompt_ids(args, &tokenizer)?;
    let model = args.model.load_to_generate()?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        stop_tokens: tokenizer.eos_ids().iter().copied().collect(),
        sampling: Sampling {
            temperature: args.temp,
            top_p: args.top_p,
            seed: args.seed,
        },
    };

    let mut stream = tokenizer.stream();
    let mut text = String::new();
    let mut clock = Clock::default();
    for token in generate(&model, &prompt, &options)? {
        clock.tick();
        let token = token.with_context(|| format!("{} cannot be used", args.model.named()))?;
        if let Some(piece) = stream.push(token)? {
            args.show(&piece)?;
            text.push_str(&piece);
        }
    }
    let rest = stream.finish()?;
    args.show(&rest)?;
    text.push_str(&rest);

    if args.json {
        let report = json!({
            "text": text,
            "prompt_tokens": prompt.len(),
            "tokens": clock.n_tokens,
            "tokens_per_second": clock.tokens_per_second(),
        });
        output::line(&report.to_string())
    } else {
        output::line("")
    }
}

impl Args {
    fn show(&self, piece: &str) -> Result<()> {
        if self.json || piece.is_empty() {
            return Ok(());
        }
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(piece.as_bytes())?;
        stdout.flush()?;
        Ok(())
    }
}

fn prompt_ids(args: &Args, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    if args.raw {
        return Ok(tokenizer.encode_text(&args.prompt)?.ids);
    }
    let Some(template) = ChatTemplate::from_dir(&args.model.model, tokenizer, &TemplateOptions::default())? else {
        bail!(
            "{} has no chat template\nuse --raw to continue the prompt as plain text",
            args.model.model.display()
        );
    };
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    messages.push(json!({"role": "user", "content": args.prompt}));
    let text = template.render(&messages.into(), None, true)?;
    Ok(tokenizer.encode(&text)?.ids)
}

/// Times the tokens after the first, which also pays for the prompt.
#[derive(Default)]
struct Clock {
    first: Option<Instant>,
    n_tokens: usize,
    seconds: f64,
}

impl Clock {
    fn tick(&mut self) {
        self.n_tokens += 1;
        self.seconds = self.first.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
    }

    /// `None` with fewer than two tokens: there is nothing to measure.
    fn tokens_per_second(&self) -> Option<f64> {
        (self.n_tokens > 1 && self.seconds > 0.0).then(|| (self.n_tokens - 1) as f64 / self.seconds)
    }
}

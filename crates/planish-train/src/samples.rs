//! Answers of the model to a few prompts of the data, for looking at what training changed.

use planish_data::{Dataset, Side, Tokenizer};
use planish_nn::generate::{GenerateOptions, generate};
use planish_nn::{Model, Sampling};

use crate::Result;
use crate::events::SampleReport;

/// Prompts from a data set, with what the data says the answer is.
#[derive(Debug)]
pub(crate) struct Samples<'a> {
    tokenizer: &'a Tokenizer,
    prompts: Vec<Prompt>,
    max_tokens: usize,
}

#[derive(Debug)]
struct Prompt {
    ids: Vec<u32>,
    text: String,
    expected: String,
}

/// Prompts of plain texts, which are trained from the second token on, end here.
const TEXT_PROMPT_TOKENS: usize = 8;

impl<'a> Samples<'a> {
    /// The first `count` examples: everything before the first trained token is the prompt.
    pub(crate) fn of(data: &Dataset, tokenizer: &'a Tokenizer, count: usize, max_tokens: usize) -> Result<Self> {
        let examples = data.examples().iter().enumerate();
        let wanted = examples
            .filter(|(_, example)| example.side != Some(Side::Rejected))
            .take(count);
        let mut prompts = Vec::new();
        for (index, _) in wanted {
            let tokens = data.tokens(index)?;
            let first_trained = tokens.trained.iter().position(|&trained| trained).unwrap_or(0);
            let end = if first_trained <= 1 {
                TEXT_PROMPT_TOKENS.min(tokens.ids.len() / 2).max(1)
            } else {
                first_trained
            };
            let answer = (end..tokens.ids.len()).take_while(|&at| tokens.trained[at]);
            let answer: Vec<u32> = answer.map(|at| tokens.ids[at]).collect();
            prompts.push(Prompt {
                text: tokenizer.decode_all(&tokens.ids[..end])?,
                ids: tokens.ids[..end].to_vec(),
                expected: tokenizer.decode(&answer)?,
            });
        }
        Ok(Self {
            tokenizer,
            prompts,
            max_tokens,
        })
    }

    /// The likeliest answers, token by token.
    pub(crate) fn answers(&self, model: &Model, when: &'static str) -> Result<Vec<SampleReport>> {
        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            stop_tokens: self.tokenizer.eos_ids().iter().copied().collect(),
            sampling: Sampling::default(),
        };
        let answer = |prompt: &Prompt| {
            let ids = generate(model, &prompt.ids, &options)?.collect::<Result<Vec<u32>, _>>()?;
            Ok(SampleReport {
                when,
                prompt: prompt.text.clone(),
                text: self.tokenizer.decode(&ids)?,
                expected: prompt.expected.clone(),
            })
        };
        self.prompts.iter().map(answer).collect()
    }
}

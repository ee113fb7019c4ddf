//! Writing text: one token after another, with a cache of what came before.

use mlx_rs::ops::indexing::TryIndexOp;
use planish_mlx::{Array, host};

use crate::sampling::Sampler;
use crate::{AttentionMask, Error, KvCache, Model, Result, Sampling};

/// Prompt tokens computed at once; bounds the memory that a long prompt takes.
const PREFILL_TOKENS: usize = 512;

/// When to stop, and how to choose tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most this many new tokens.
    pub max_tokens: usize,
    /// Tokens that end the text; the one that is met is not part of it.
    pub stop_tokens: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

/// New tokens after `prompt`, each computed when it is asked for, so that a caller can show them as they come.
///
/// The iterator ends after `max_tokens`, at a stop token, or after an error.
///
/// # Errors
/// [`Error::EmptyPrompt`]; [`Error::TokenOutOfRange`]; [`Error::SamplingRange`]. Items: [`Error::Mlx`].
///
/// # Example
/// ```no_run
/// use planish_nn::generate::{GenerateOptions, generate};
/// # let (model, _) = planish_nn::Model::load("m".as_ref(), &Default::default())?;
/// let options = GenerateOptions { max_tokens: 20, stop_tokens: vec![2], sampling: Default::default() };
/// for token in generate(&model, &[1, 2, 3], &options)? {
///     println!("{}", token?);
/// }
/// # Ok::<(), planish_nn::Error>(())
/// ```
pub fn generate<'a>(model: &'a Model, prompt: &[u32], options: &GenerateOptions) -> Result<Tokens<'a>> {
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    model.check_tokens(prompt)?;
    Ok(Tokens {
        model,
        cache: KvCache::new(),
        pending: prompt.to_vec(),
        left: options.max_tokens,
        stop_tokens: options.stop_tokens.clone(),
        sampler: Sampler::new(options.sampling)?,
    })
}

/// The iterator of [`generate`].
#[derive(Debug)]
pub struct Tokens<'a> {
    model: &'a Model,
    cache: KvCache,
    /// Tokens that the cache does not hold yet: the prompt, then the last token.
    pending: Vec<u32>,
    left: usize,
    stop_tokens: Vec<u32>,
    sampler: Sampler,
}

impl Iterator for Tokens<'_> {
    type Item = Result<u32>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        match self.step() {
            Ok(token) if self.stop_tokens.contains(&token) => {
                self.left = 0;
                None
            }
            Ok(token) => Some(Ok(token)),
            Err(error) => {
                self.left = 0;
                Some(Err(error))
            }
        }
    }
}

impl Tokens<'_> {
    /// Computes the pending tokens and chooses the next.
    fn step(&mut self) -> Result<u32> {
        let pending = std::mem::take(&mut self.pending);
        let mut hidden = None;
        for chunk in pending.chunks(PREFILL_TOKENS) {
            let ids = self.model.token_array(&[chunk])?;
            hidden = Some(self.model.hidden(&ids, &AttentionMask::Causal, Some(&mut self.cache))?);
            if pending.len() > PREFILL_TOKENS {
                mlx_rs::transforms::eval(self.cache.arrays())?;
            }
        }
        let hidden = hidden.ok_or(Error::EmptyPrompt)?;
        let token = self.sampler.next(&self.last_logits(&hidden)?);
        self.pending = vec![token];
        Ok(token)
    }

    /// Logits of the last position of `[1, s, d]`, on the host.
    fn last_logits(&self, hidden: &Array) -> Result<Vec<f32>> {
        let last = hidden.try_index((.., -1, ..))?; // [1, d]
        let logits = host::to_f32_vec(&self.model.logits(&last)?)?;
        match logits.iter().any(|logit| logit.is_nan()) {
            true => Err(Error::LogitsNotFinite),
            false => Ok(logits),
        }
    }
}

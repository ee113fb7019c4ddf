//! Whether a run fits in memory: an estimate from the shapes alone, and what to change where it does not.

use planish_core::arch::{Layer, Mixer};
use planish_core::model_config::ModelConfig;
use planish_core::target_modules::resolve;
use planish_core::units::format_bytes;
use planish_loss::head_loss::{CHUNK_TOKENS, automatic_chunk};
use planish_mlx::device::DeviceKind;
use planish_nn::LoraConfig;

use crate::objectives::Recipe;
use crate::options::{TrainOptions, Tuning};
use crate::{Error, Result};

/// Bytes that a run is expected to hold at its peak, by what they are for.
///
/// `weights`: as computed with · 20 bytes a trained number: value, master, gradient, two moments · activations of a block `b·l·(c₁·d + c₂·d_ff)·bytes` and its attention `2·b·h·l²·bytes`, for all blocks or, with
/// activation checkpointing, for one, beside the blocks' inputs · logits `3·t·v·4` of the positions computed at one time.
/// The constants are measured; the estimate is meant to be within a quarter of the truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// The model's weights, and a second copy of them where a reference model needs one.
    pub weights: u64,
    /// Trained tensors with masters, gradients and moments.
    pub training: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations: u64,
    /// Logits and their gradients.
    pub logits: u64,
}

/// Value, master, gradient and two moments, f32 each.
const BYTES_PER_TRAINED_NUMBER: u64 = 20;
/// Inputs of projections and residuals kept in a block, in multiples of the hidden size.
const KEPT_HIDDEN: u64 = 12;
/// Kept inside the feed-forward layer, in multiples of its width.
const KEPT_FEED_FORWARD: u64 = 5;
/// Copies of the attention matrix kept in a block.
const KEPT_ATTENTION: u64 = 2;
/// An estimate may be that much too high before it is believed without a measurement.
pub(crate) const TRUST: f64 = 1.5;

impl MemoryEstimate {
    /// For batches of `rows` rows of `length` tokens; `weight_bytes` is the size of the weights as they are computed with.
    ///
    /// # Errors
    /// [`Error::RunConfig`] for target modules that the model does not have.
    pub fn of(
        config: &ModelConfig,
        weight_bytes: u64,
        options: &TrainOptions,
        rows: usize,
        length: usize,
    ) -> Result<Self> {
        let n_weights: u64 = config
            .expected_tensors()
            .iter()
            .map(|t| t.shape.iter().product::<usize>() as u64)
            .sum();
        let element = (weight_bytes / n_weights.max(1)).max(2);
        let is_full = options.tuning == Tuning::Full;
        let reference = matches!(options.recipe, Recipe::Dpo(_)) && is_full;
        let n_trained = if is_full {
            n_weights
        } else {
            adapter_numbers(config, options)?
        };
        Ok(Self {
            weights: weight_bytes * if reference { 2 } else { 1 },
            training: n_trained * BYTES_PER_TRAINED_NUMBER,
            activations: activations(config, options, rows as u64, length as u64, element),
            logits: logits(config, options, rows * length),
        })
    }

    /// Everything together.
    pub fn total(&self) -> u64 {
        self.weights + self.training + self.activations + self.logits
    }
}

/// Refuses adapters of a larger rank than that of their weight, before any is made.
///
/// # Errors
/// [`Error::Config`]; [`Error::RunConfig`] for target modules that the model does not have.
pub(crate) fn check_ranks(config: &ModelConfig, options: &TrainOptions) -> Result<()> {
    let Tuning::Adapters(lora) = &options.tuning else {
        return Ok(());
    };
    for (path, rank, (input_dims, output_dims)) in adapters(config, lora)? {
        let most = input_dims.min(output_dims);
        if rank > most {
            return Err(Error::Config {
                key: "lora.rank",
                reason: format!(
                    "{rank} is larger than the rank of {path}, a weight of {output_dims} × {input_dims}: at most {most}"
                ),
            });
        }
    }
    Ok(())
}

/// Seconds that a piece of work may take: the watchdog of a Mac's display ends what keeps the GPU from drawing for longer.
const LONGEST_WORK: f64 = 0.5;

/// Parts of a micro-batch so that forward and backward pass over one block, which is about what MLX hands to the GPU at once,
/// take at most [`LONGEST_WORK`].
pub(crate) fn pieces(config: &ModelConfig, (rows, length): (usize, usize), flops_per_second: f64) -> usize {
    let (arch, linears) = (&config.arch, config.arch.linears());
    let weights: usize = linears
        .iter()
        .map(|linear| linear.input_dims * linear.output_dims)
        .sum();
    let of_token = 6 * weights / arch.layers.len().max(1) + 12 * length * arch.hidden_size;
    let seconds = |pieces: usize| (of_token * rows.div_ceil(pieces) * length) as f64 / flops_per_second;
    let mut pieces = 1;
    while pieces < rows && seconds(pieces) > LONGEST_WORK {
        pieces *= 2;
    }
    pieces
}

fn adapter_numbers(config: &ModelConfig, options: &TrainOptions) -> Result<u64> {
    let Tuning::Adapters(lora) = &options.tuning else {
        return Ok(0);
    };
    let numbers = |(_, rank, (input_dims, output_dims)): &Adapted| rank * (input_dims + output_dims);
    Ok(adapters(config, lora)?.iter().map(numbers).sum::<usize>() as u64)
}

/// Path of a module, rank of its adapter, and input and output dimensions of its weight.
type Adapted = (String, usize, (usize, usize));

fn adapters(config: &ModelConfig, lora: &LoraConfig) -> Result<Vec<Adapted>> {
    let (arch, linears) = (&config.arch, config.arch.linears());
    let mut paths: Vec<String> = linears.iter().map(|linear| linear.path.clone()).collect();
    if !arch.head.is_tied {
        paths.push(arch.head_path());
    }
    let targets = resolve(&lora.targets, &paths)?;
    let ranks = lora.ranks.resolve(lora.rank, &targets)?;
    let dims = |path: &str| {
        let linear = linears.iter().find(|linear| linear.path == path);
        linear.map_or((arch.hidden_size, arch.vocab_size), |linear| {
            (linear.input_dims, linear.output_dims)
        })
    };
    let ranked = targets.into_iter().zip(ranks);
    Ok(ranked.map(|(path, rank)| (path.clone(), rank, dims(&path))).collect())
}

fn activations(config: &ModelConfig, options: &TrainOptions, rows: u64, length: u64, element: u64) -> u64 {
    let positions = rows * length;
    let hidden = config.arch.hidden_size as u64;
    let of_layer = |layer: &Layer| {
        let scores = match &layer.mixer {
            Mixer::Attention(attention) => KEPT_ATTENTION * rows * attention.n_heads as u64 * length * length,
        };
        let wide = layer.feed_forward.width() as u64;
        (positions * (KEPT_HIDDEN * hidden + KEPT_FEED_FORWARD * wide) + scores) * element
    };
    let layers = config.arch.layers.iter().map(of_layer);
    if options.activation_checkpointing {
        layers.max().unwrap_or(0) + config.arch.layers.len() as u64 * positions * hidden * element
    } else {
        layers.sum()
    }
}

fn logits(config: &ModelConfig, options: &TrainOptions, positions: usize) -> u64 {
    let row = config.arch.vocab_size * size_of::<f32>();
    let automatic = automatic_chunk(DeviceKind::Cpu, positions, config.arch.vocab_size);
    let at_once = options.chunk_tokens.unwrap_or(automatic).min(positions);
    // A head that trains keeps every chunk's logits until the backward pass.
    let kept = if options.tuning == Tuning::Full {
        positions
    } else {
        at_once
    };
    3 * (kept * row) as u64
}

/// The first change that brings the estimate below the budget; `correction` is measured over estimated.
pub(crate) fn suggestion(
    config: &ModelConfig,
    weight_bytes: u64,
    options: &TrainOptions,
    shape: (usize, usize),
    budget: u64,
    correction: f64,
) -> Result<String> {
    let fits = |changed: &TrainOptions, rows: usize, length: usize| -> Result<bool> {
        let estimate = MemoryEstimate::of(config, weight_bytes, changed, rows, length)?;
        Ok(estimate.total() as f64 * correction <= budget as f64)
    };
    let (rows, length) = shape;
    let mut changed = options.clone();
    let mut words: Vec<String> = Vec::new();
    if options.chunk_tokens.is_none_or(|chunk| chunk > CHUNK_TOKENS) && rows * length > CHUNK_TOKENS {
        changed.chunk_tokens = Some(CHUNK_TOKENS);
        words.push(format!("loss.chunk_tokens={CHUNK_TOKENS}"));
        if fits(&changed, rows, length)? {
            return Ok(words.join(" and "));
        }
    }
    if !options.activation_checkpointing {
        changed.activation_checkpointing = true;
        words.push("train.checkpointing=true".to_owned());
        if fits(&changed, rows, length)? {
            return Ok(words.join(" and "));
        }
    }
    let rows_of_one = rows / options.batch_size.max(1);
    let mut batch_size = options.batch_size;
    while batch_size > 1 {
        batch_size /= 2;
        if fits(&changed, batch_size * rows_of_one.max(1), length)? {
            let accumulation = (options.batch_size * options.accumulation).div_ceil(batch_size);
            words.push(format!(
                "train.batch_size={batch_size} and train.accumulation={accumulation}"
            ));
            return Ok(words.join(" and "));
        }
    }
    words.push(format!(
        "train.batch_size=1 and train.accumulation={}",
        options.batch_size * options.accumulation
    ));
    let mut shorter = length;
    while shorter > 128 {
        shorter /= 2;
        if fits(&changed, rows_of_one.max(1), shorter)? {
            words.push(format!("train.max_seq_length={shorter}"));
            return Ok(words.join(" and "));
        }
    }
    Ok("a smaller or a quantised model: no setting of the run brings it down far enough".to_owned())
}

/// The error of a run that needs more than there is.
pub(crate) fn too_large(
    needed: u64,
    is_measured: bool,
    budget: u64,
    shape: (usize, usize),
    suggestion: String,
) -> Error {
    Error::Memory {
        needed: format_bytes(needed),
        how: if is_measured { "takes" } else { "is estimated to take" },
        budget: format_bytes(budget),
        rows: shape.0,
        length: shape.1,
        suggestion,
    }
}

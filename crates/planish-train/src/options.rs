//! Everything a supervised run can be told, resolved and typed.

use std::path::PathBuf;
use std::time::Duration;

use planish_core::run_config::{
    Compat as ConfigCompat, Compile as ConfigCompile, DistrustLink, DistrustMode, LoraInit as ConfigInit,
    LoraMethod as ConfigMethod, LossName, OptimizerName, RunConfig, ScheduleName,
};
use planish_core::target_modules::{Blocks, PerModule, TargetModules};
use planish_data::Rungs;
use planish_loss::TokenLossOptions;
use planish_loss::distrust::{self, Link, Mode, Weighting};
use planish_loss::dpo::DpoOptions;
use planish_nn::{LoraConfig, LoraInit, LoraMethod, LoraScale};

use crate::objectives::Recipe;
use crate::optimizer::{Adafactor, Adam, AdamW, Groups, Lion, Muon, Rule, Sgd};
use crate::schedule::Shape;
use crate::{Error, Result};

/// Settings of a [`Trainer`](crate::Trainer); the defaults are those of `planish train`.
///
/// # Example
/// ```
/// use planish_core::run_config::RunConfig;
/// use planish_train::{Length, TrainOptions};
///
/// let config = RunConfig::builder().set("train.steps=50")?.set("optimizer.learning_rate=2e-4")?.build()?;
/// let options = TrainOptions::from_config(&config)?;
/// assert_eq!(options.length, Length::Steps(50));
/// assert_eq!(options.learning_rate, 2e-4);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct TrainOptions {
    /// What is minimised.
    pub recipe: Recipe,
    /// What is trained.
    pub tuning: Tuning,
    /// Folder of an adapter whose values the fresh ones get.
    pub start: Option<PathBuf>,
    /// How long.
    pub length: Length,
    /// Rows of one forward and backward pass.
    pub batch_size: usize,
    /// Passes that are summed into one update.
    pub accumulation: usize,
    /// Longest example in tokens, as the data was read.
    pub max_seq_length: usize,
    /// Pack several examples into one row.
    pub packing: bool,
    /// Lengths that the backend likes.
    pub rungs: Rungs,
    /// Seed of the order, of fresh adapters and of dropout.
    pub seed: u64,
    /// Compute activations again in the backward pass instead of keeping them.
    pub activation_checkpointing: bool,
    /// Whether updates are traced once a shape and compiled.
    pub compile: Compile,
    /// Set the next compiled update going before the last is read, so that the device does not wait. Adapters only.
    pub launch_ahead: bool,
    /// Try one update at the largest shape first, and refuse what does not fit in memory.
    pub preflight: bool,
    /// The update rule.
    pub rule: Rule,
    /// LoRA+.
    pub groups: Groups,
    /// Learning rate at the end of the warm-up.
    pub learning_rate: f64,
    /// What follows the warm-up.
    pub shape: Shape,
    /// Learning rate at the end.
    pub min_learning_rate: f64,
    /// Updates of warm-up; `None`: [`default_warmup`](crate::schedule::default_warmup).
    pub warmup_steps: Option<usize>,
    /// Largest global norm of a gradient; `None`: no limit.
    pub clip_norm: Option<f64>,
    /// Label smoothing and z-loss.
    pub loss: TokenLossOptions,
    /// Trained positions whose logits exist at one time; `None`: all up to 128 MiB of
    /// logits (on a GPU 512 MiB), else as many as take that, at most 1024.
    pub chunk_tokens: Option<usize>,
    /// Distrust weighting.
    pub distrust: DistrustOptions,
    /// How micro-batches are averaged.
    pub reduction: Reduction,
    /// Whose batches are trained.
    pub compat: Compat,
    /// Updates between two evaluations; `None`: before the first update and after the last.
    pub eval_every: Option<usize>,
    /// Micro-batches of an evaluation, always the same first ones; `None`: the whole validation set.
    pub val_batches: Option<usize>,
    /// Keep the adapter of the best evaluation instead of the last.
    pub save_best: bool,
    /// Evaluations without a new best after which the run ends; 0: never.
    pub patience: usize,
    /// How much lower a loss must be to be a new best.
    pub min_delta: f64,
    /// Updates between two saved states; `None`: only at the end and when interrupted.
    pub checkpoint_every: Option<usize>,
    /// Time between two saved states, where saving takes little of it; `None`: by updates alone.
    pub checkpoint_interval: Option<Duration>,
    /// Saved states that are kept, besides the best.
    pub keep_last: usize,
    /// Updates between two reports.
    pub report_every: usize,
    /// Write TensorBoard event files.
    pub tensorboard: bool,
}

/// What is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Tuning {
    /// Fresh low-rank adapters; the base model is frozen.
    Adapters(Box<LoraConfig>),
    /// Every weight.
    Full,
}

/// How long a run is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// So many updates.
    Steps(usize),
    /// So many passes over the data, rounded up to whole updates.
    Epochs(f64),
}

/// How the micro-batches of one update are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reduction {
    /// Every trained token of the window counts the same, however the window is cut.
    #[default]
    TokenExact,
    /// The mean of the micro-batches' own means, as mlx-lm does: a short batch counts as much as a long one.
    MeanOfMeans,
}

/// Whose batches are trained.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Compat {
    /// planish's own: every trained token once an epoch, none of padding.
    #[default]
    Native,
    /// Those of mlx-lm 0.32, its padding target included. The data must be read with
    /// [`Train::MlxLm`](planish_data::Train::MlxLm).
    MlxLm {
        /// Indices of batches in the order of training, taken around in a circle; `None`: drawn anew for each epoch.
        batch_order: Option<Vec<usize>>,
    },
}

/// Whether updates are traced once a shape and compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compile {
    /// On a GPU, where the recipe can be.
    #[default]
    Auto,
    /// Always; on the CPU that needs a C++ compiler while training.
    On,
    /// Never.
    Off,
}

/// How distrust fields are used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistrustOptions {
    /// What for.
    pub mode: Mode,
    /// `α` of the reported value.
    pub alpha: f64,
    /// `λ` of [`Mode::Additive`].
    pub lambda: f64,
    /// From provenance to weight.
    pub weighting: Weighting,
    /// Train although less than 5 % of the examples carry the weight.
    pub force: bool,
}

impl Default for DistrustOptions {
    fn default() -> Self {
        Self {
            mode: Mode::Off,
            alpha: distrust::DEFAULT_ALPHA,
            lambda: 1.0,
            weighting: Weighting::default(),
            force: false,
        }
    }
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            recipe: Recipe::Sft,
            tuning: Tuning::Adapters(Box::default()),
            start: None,
            length: Length::Epochs(1.0),
            batch_size: 4,
            accumulation: 1,
            max_seq_length: 2048,
            packing: false,
            rungs: Rungs::Fine,
            seed: 0,
            activation_checkpointing: false,
            compile: Compile::Auto,
            launch_ahead: true,
            preflight: false,
            rule: Rule::adamw(),
            groups: Groups::default(),
            learning_rate: 1e-4,
            shape: Shape::Cosine,
            min_learning_rate: 0.0,
            warmup_steps: None,
            clip_norm: Some(1.0),
            loss: TokenLossOptions::default(),
            chunk_tokens: None,
            distrust: DistrustOptions::default(),
            reduction: Reduction::TokenExact,
            compat: Compat::Native,
            eval_every: None,
            val_batches: None,
            save_best: true,
            patience: 0,
            min_delta: 0.0,
            checkpoint_every: None,
            checkpoint_interval: Some(Duration::from_secs(300)),
            keep_last: 2,
            report_every: 10,
            tensorboard: false,
        }
    }
}

impl TrainOptions {
    /// The settings of a run configuration.
    ///
    /// # Errors
    /// [`Error::RunConfig`] for a number of blocks that cannot be; [`Error::Config`].
    pub fn from_config(config: &RunConfig) -> Result<Self> {
        let (train, optimizer) = (&config.train, &config.optimizer);
        let options = Self {
            recipe: recipe(config),
            tuning: tuning(config)?,
            length: match (train.steps, train.epochs) {
                (Some(steps), _) => Length::Steps(steps),
                (None, epochs) => Length::Epochs(epochs.unwrap_or(1.0)),
            },
            batch_size: train.batch_size,
            accumulation: train.accumulation,
            max_seq_length: train.max_seq_length.unwrap_or(Self::default().max_seq_length),
            packing: config.data.packing,
            seed: train.seed,
            activation_checkpointing: train.checkpointing,
            compile: match train.compile {
                ConfigCompile::Auto => Compile::Auto,
                ConfigCompile::True => Compile::On,
                ConfigCompile::False => Compile::Off,
            },
            rule: rule(config)?,
            compat: compat(config)?,
            reduction: if config.train.compat == ConfigCompat::MlxLm {
                Reduction::MeanOfMeans
            } else {
                Reduction::TokenExact
            },
            val_batches: train.val_batches,
            start: config.lora.start.clone(),
            preflight: train.preflight,
            learning_rate: optimizer.learning_rate,
            shape: shape(config),
            groups: Groups {
                lora_b_ratio: optimizer.lora_b_ratio,
            },
            loss: TokenLossOptions {
                label_smoothing: config.loss.label_smoothing as f32,
                z_loss: config.loss.z_loss as f32,
            },
            patience: train.patience,
            min_delta: train.min_delta,
            min_learning_rate: config.schedule.min_learning_rate,
            warmup_steps: config.schedule.warmup_steps,
            clip_norm: Some(optimizer.clip_norm).filter(|norm| *norm > 0.0),
            chunk_tokens: config.loss.chunk_tokens,
            distrust: distrust_options(config),
            eval_every: train.eval_every,
            save_best: train.save_best,
            checkpoint_every: config.checkpoint.every,
            checkpoint_interval: Duration::try_from_secs_f64(60.0 * config.checkpoint.every_minutes)
                .ok()
                .filter(|interval| !interval.is_zero()),
            keep_last: config.checkpoint.keep_last,
            report_every: config.logging.report_every,
            tensorboard: config.logging.tensorboard,
            ..Self::default()
        };
        options.check()?;
        Ok(options)
    }

    /// Refuses values outside their range.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Loss`].
    pub fn check(&self) -> Result<()> {
        self.loss.check()?;
        self.distrust.weighting.check()?;
        let rules = [
            (self.batch_size > 0, "train.batch_size", "0 rows make no batch"),
            (self.accumulation > 0, "train.accumulation", "0 batches make no update"),
            (self.report_every > 0, "logging.report_every", "0 is no interval"),
            (self.eval_every != Some(0), "train.eval_every", "0 is no interval"),
            (self.checkpoint_every != Some(0), "checkpoint.every", "0 is no interval"),
            (
                self.chunk_tokens != Some(0),
                "loss.chunk_tokens",
                "a chunk needs at least 1 token",
            ),
            (self.length != Length::Steps(0), "train.steps", "the run has no update"),
            (
                !matches!(self.length, Length::Epochs(n) if n.is_nan() || n <= 0.0 || n.is_infinite()),
                "train.epochs",
                "must be a positive number",
            ),
            (
                self.clip_norm.is_none_or(|norm| norm > 0.0),
                "optimizer.clip_norm",
                "must be positive; leave it out for no limit",
            ),
        ];
        match rules.into_iter().find(|(holds, ..)| !holds) {
            Some((_, key, reason)) => Err(Error::Config {
                key,
                reason: reason.to_owned(),
            }),
            None => Ok(()),
        }
    }
}

fn recipe(config: &RunConfig) -> Recipe {
    let loss = &config.loss;
    match loss.name {
        LossName::CrossEntropy => Recipe::Sft,
        LossName::Dpo => Recipe::Dpo(DpoOptions {
            beta: loss.beta as f32,
            label_smoothing: loss.label_smoothing as f32,
        }),
        LossName::Orpo => Recipe::Orpo {
            lambda: loss.lambda as f32,
        },
    }
}

fn tuning(config: &RunConfig) -> Result<Tuning> {
    let lora = &config.lora;
    let method = match lora.method {
        ConfigMethod::Full => return Ok(Tuning::Full),
        ConfigMethod::Lora => LoraMethod::Lora,
        ConfigMethod::Dora => LoraMethod::Dora,
    };
    let scale = match (lora.scale, lora.alpha) {
        (Some(scale), _) => LoraScale::Fixed(scale),
        (None, alpha) => {
            let alpha = alpha.unwrap_or(2.0 * lora.rank as f64);
            if lora.rank_stabilized {
                LoraScale::RankStabilised(alpha)
            } else {
                LoraScale::Alpha(alpha)
            }
        }
    };
    Ok(Tuning::Adapters(Box::new(LoraConfig {
        method,
        rank: lora.rank,
        scale,
        dropout: lora.dropout as f32,
        targets: TargetModules::new(lora.targets.iter().cloned(), Blocks::from_count(lora.layers)?),
        ranks: PerModule::new(pairs("lora.ranks", &lora.ranks, |rank: &usize| *rank > 0)?),
        alphas: PerModule::new(pairs("lora.alphas", &lora.alphas, |alpha: &f64| {
            *alpha > 0.0 && alpha.is_finite()
        })?),
        init: match lora.init {
            ConfigInit::Zero => LoraInit::Zero,
            ConfigInit::Pissa => LoraInit::Pissa,
        },
    })))
}

/// Texts of the form `pattern=number`.
fn pairs<T: std::str::FromStr>(
    key: &'static str,
    texts: &[String],
    is_right: fn(&T) -> bool,
) -> Result<Vec<(String, T)>> {
    let pair = |text: &String| {
        let (pattern, number) = text.split_once('=')?;
        let number = number.trim().parse().ok().filter(is_right)?;
        Some((pattern.trim().to_owned(), number))
    };
    let refuse = |text| Error::Config {
        key,
        reason: format!("found {text:?}, expected pattern=number with a positive number, such as q_proj=16"),
    };
    texts
        .iter()
        .map(|text| pair(text).ok_or_else(|| refuse(text)))
        .collect()
}

/// mlx-lm's batches, in an order from a file if there is one: `[3, 0, 1, …]`.
fn compat(config: &RunConfig) -> Result<Compat> {
    if config.train.compat == ConfigCompat::None {
        return Ok(Compat::Native);
    }
    let Some(path) = &config.train.batch_order else {
        return Ok(Compat::MlxLm { batch_order: None });
    };
    let io = |source| Error::Io {
        path: path.clone(),
        action: "read",
        source,
    };
    let text = std::fs::read_to_string(path).map_err(io)?;
    let order = serde_json::from_str(&text).map_err(|error| Error::Config {
        key: "train.batch_order",
        reason: format!("{}: expected a JSON list of whole numbers: {error}", path.display()),
    })?;
    Ok(Compat::MlxLm {
        batch_order: Some(order),
    })
}

/// The update rule as configured; in mlx-lm's name without bias correction, and with its decay, which reaches everything.
fn rule(config: &RunConfig) -> Result<Rule> {
    if config.train.compat == ConfigCompat::MlxLm {
        let decays = config.optimizer.name == OptimizerName::Adamw;
        return Ok(Rule::Adam(Adam {
            betas: config.optimizer.betas,
            eps: config.optimizer.eps,
            bias_correction: false,
            weight_decay: if decays { config.optimizer.weight_decay } else { 0.0 },
        }));
    }
    Ok(native_rule(config))
}

fn native_rule(config: &RunConfig) -> Rule {
    let optimizer = &config.optimizer;
    let (betas, eps, weight_decay) = (optimizer.betas, optimizer.eps, optimizer.weight_decay);
    let adamw = AdamW {
        betas,
        eps,
        weight_decay,
    };
    match optimizer.name {
        OptimizerName::Adamw => Rule::AdamW(adamw),
        OptimizerName::Adam => Rule::Adam(Adam {
            betas,
            eps,
            ..Adam::default()
        }),
        OptimizerName::Sgd => Rule::Sgd(Sgd {
            momentum: optimizer.momentum,
            nesterov: false,
            weight_decay,
        }),
        OptimizerName::Lion => Rule::Lion(Lion { betas, weight_decay }),
        OptimizerName::Muon => Rule::Muon(Muon {
            momentum: optimizer.momentum,
            weight_decay,
            fallback: adamw,
            ..Muon::default()
        }),
        OptimizerName::Adafactor => Rule::Adafactor(Adafactor {
            weight_decay,
            ..Adafactor::default()
        }),
    }
}

fn shape(config: &RunConfig) -> Shape {
    let schedule = &config.schedule;
    match schedule.name {
        ScheduleName::Constant => Shape::Constant,
        ScheduleName::Linear => Shape::Linear,
        ScheduleName::Cosine => Shape::Cosine,
        ScheduleName::CosineRestarts => Shape::CosineRestarts {
            cycles: u32::try_from(schedule.cycles).unwrap_or(u32::MAX),
        },
        ScheduleName::Polynomial => Shape::Polynomial { power: schedule.power },
        ScheduleName::Wsd => Shape::Wsd {
            decay_share: schedule.decay_share,
        },
    }
}

fn distrust_options(config: &RunConfig) -> DistrustOptions {
    let distrust = &config.distrust;
    DistrustOptions {
        mode: match distrust.mode {
            DistrustMode::Off => Mode::Off,
            DistrustMode::Additive => Mode::Additive,
            DistrustMode::Weight => Mode::Weight,
            DistrustMode::Sampler => Mode::Sampler,
        },
        alpha: distrust.alpha,
        lambda: distrust.lambda.unwrap_or(1.0),
        weighting: Weighting {
            link: match distrust.link {
                DistrustLink::Hinge => Link::Hinge,
                DistrustLink::Literal => Link::Literal,
                DistrustLink::Tempered => Link::Tempered { tau: 4.0 },
            },
            floor: distrust.floor,
            cap: distrust.cap,
            ..Weighting::default()
        },
        force: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(assignments: &[&str]) -> TrainOptions {
        let mut builder = RunConfig::builder();
        for assignment in assignments {
            builder = builder.set(assignment).unwrap();
        }
        TrainOptions::from_config(&builder.build().unwrap()).unwrap()
    }

    #[test]
    fn every_optimizer_and_schedule_word_reaches_the_run() {
        for name in OptimizerName::ALL {
            assert_eq!(options(&[&format!("optimizer.name={name}")]).rule.name(), name.word());
        }
        let shape = |text: &str| {
            options(&[
                text,
                "schedule.cycles=3",
                "schedule.power=2",
                "schedule.decay_share=0.5",
            ])
            .shape
        };
        assert_eq!(shape("schedule.name=constant"), Shape::Constant);
        assert_eq!(
            shape("schedule.name=cosine_restarts"),
            Shape::CosineRestarts { cycles: 3 }
        );
        assert_eq!(shape("schedule.name=polynomial"), Shape::Polynomial { power: 2.0 });
        assert_eq!(shape("schedule.name=wsd"), Shape::Wsd { decay_share: 0.5 });
    }

    #[test]
    fn mlx_lm_has_adam_without_correction_and_means_of_means() {
        let found = options(&["train.compat=mlx-lm", "optimizer.name=adamw"]);
        let expected = Adam {
            bias_correction: false,
            weight_decay: 0.01,
            ..Adam::default()
        };
        assert_eq!(found.rule, Rule::Adam(expected));
        assert_eq!(found.reduction, Reduction::MeanOfMeans);
        assert_eq!(
            (found.clip_norm, found.shape, found.warmup_steps),
            (None, Shape::Constant, Some(0))
        );
        assert_eq!(found.compat, Compat::MlxLm { batch_order: None });
    }

    #[test]
    fn patterns_and_rank_stabilisation_reach_the_adapters() {
        let found = options(&[
            "lora.ranks=q_proj=16, mlp.*=2",
            "lora.alphas=q_proj=4",
            "lora.rank_stabilized=true",
        ]);
        let Tuning::Adapters(lora) = found.tuning else {
            panic!("adapters")
        };
        assert_eq!(lora.scale, LoraScale::RankStabilised(16.0));
        assert_eq!(lora.ranks, PerModule::new([("q_proj", 16), ("mlp.*", 2)]));
        assert_eq!(lora.alphas, PerModule::new([("q_proj", 4.0)]));
        let wrong = RunConfig::builder().set("lora.ranks=q_proj").unwrap().build().unwrap();
        let message = TrainOptions::from_config(&wrong).unwrap_err().to_string();
        assert!(message.contains("q_proj=16"), "{message}");
    }

    #[test]
    fn keys_arrive_where_they_belong() {
        let found = options(&[
            "optimizer.lora_b_ratio=16",
            "optimizer.clip_norm=0",
            "loss.label_smoothing=0.25",
            "loss.z_loss=0.5",
            "train.patience=3",
            "train.min_delta=0.125",
            "loss.distrust.mode=weight",
            "loss.distrust.link=tempered",
        ]);
        assert_eq!(found.groups.lora_b_ratio, 16.0);
        assert_eq!(found.clip_norm, None);
        assert_eq!(
            found.loss,
            TokenLossOptions {
                label_smoothing: 0.25,
                z_loss: 0.5
            }
        );
        assert_eq!((found.patience, found.min_delta), (3, 0.125));
        assert_eq!(
            (found.distrust.mode, found.distrust.weighting.link),
            (Mode::Weight, Link::Tempered { tau: 4.0 })
        );
    }
}

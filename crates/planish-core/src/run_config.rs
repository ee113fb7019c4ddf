//! What a training run does: every key of `run.toml` with its type, default and meaning, in one table below.
//!
//! Values come from the defaults, a file, `--set key=value` and flags; the later of these wins, key by key. An unknown
//! key is an error that names the nearest known one.

mod builder;
mod setting;
mod validate;

use std::path::PathBuf;

pub use builder::RunConfigBuilder;
use setting::words;
pub use setting::{ByteSize, Setting};

/// One key of the run configuration, for documentation.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Table that holds it, dotted.
    pub section: &'static str,
    /// Name inside the table.
    pub name: &'static str,
    /// What is accepted.
    pub expected: String,
    /// The default as TOML; `None` = unset, a rule decides (see `doc`).
    pub default: Option<toml::Value>,
    /// Meaning.
    pub doc: String,
}

/// Declares the settings: a struct a section, and the functions that go through all keys.
macro_rules! settings {
    ($(
        $(#[doc = $section_doc:literal])+
        [$section:literal] $field:ident: $name:ident {
            $($(#[doc = $doc:literal])+ $key:ident: $type:ty = $default:expr,)+
        }
    )+) => {
        /// Everything that a training run can be told, with all defaults filled in.
        ///
        /// ```
        /// use planish_core::run_config::RunConfig;
        /// let config = RunConfig::builder().text("[lora]\nrank = 4", "run.toml")?.set("train.batch_size=2")?.build()?;
        /// assert_eq!((config.lora.rank, config.lora.scale(), config.train.batch_size), (4, 4.0, 2));
        /// assert_eq!(RunConfig::builder().text(&config.to_toml(), "again")?.build()?, config);
        /// # Ok::<(), planish_core::Error>(())
        /// ```
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct RunConfig {
            $($(#[doc = $section_doc])+ pub $field: $name,)+
        }

        $(
            $(#[doc = $section_doc])+
            #[derive(Clone, Debug, PartialEq)]
            pub struct $name {
                $($(#[doc = $doc])+ pub $key: $type,)+
            }

            impl Default for $name {
                fn default() -> Self {
                    Self { $($key: $default,)+ }
                }
            }
        )+

        impl RunConfig {
            /// Sections in order, with their meaning.
            pub fn sections() -> Vec<(&'static str, String)> {
                vec![$(($section, joined(&[$($section_doc),+])),)+]
            }

            /// Every key there is, in order.
            pub fn keys() -> Vec<Key> {
                let defaults = Self::default();
                vec![$($(Key {
                    section: $section,
                    name: stringify!($key),
                    expected: <$type as Setting>::expected(),
                    default: defaults.$field.$key.to_toml(),
                    doc: joined(&[$($doc),+]),
                },)+)+]
            }

            /// The value of every key, in the order of [`keys`](Self::keys); `None` = unset.
            fn values(&self) -> Vec<Option<toml::Value>> {
                vec![$($(self.$field.$key.to_toml(),)+)+]
            }

            /// Sets one key. `None`: there is no such key. `Some(false)`: the value is not acceptable.
            fn assign(&mut self, path: &str, value: &builder::Value) -> Option<bool> {
                $($(
                    if path == concat!($section, ".", stringify!($key)) {
                        let parsed = value.parse();
                        let is_acceptable = parsed.is_some();
                        if let Some(parsed) = parsed {
                            self.$field.$key = parsed;
                        }
                        return Some(is_acceptable);
                    }
                )+)+
                None
            }

            /// The words that a key accepts, where it accepts only words.
            fn words_of(path: &str) -> Vec<&'static str> {
                $($(
                    if path == concat!($section, ".", stringify!($key)) {
                        return <$type as Setting>::words();
                    }
                )+)+
                Vec::new()
            }
        }
    };
}

settings! {
    /// The base model.
    ["model"] model: ModelSettings {
        /// Folder of the base model in the Hugging Face layout (`--model`). Required to train.
        path: Option<PathBuf> = None,
        /// What computes the blocks (docs/performance.md).
        kernels: KernelChoice = KernelChoice::Auto,
    }

    /// What to learn from.
    ["data"] data: DataSettings {
        /// Folder with `train.jsonl` and perhaps `valid.jsonl` (`--data`). Required to train.
        path: Option<PathBuf> = None,
        /// Kind of rows. Unset: told from all rows, which must be of one kind.
        format: Option<DataFormat> = None,
        /// Put several short rows side by side into one, kept apart by the attention mask.
        packing: bool = false,
        /// What happens to rows longer than `train.max_seq_length`. Unset: `split` for text, `truncate` for others.
        overlong: Option<Overlong> = None,
        /// Roles whose messages are trained.
        train_roles: Vec<String> = vec!["assistant".into()],
        /// Train only the last assistant turn of a conversation.
        last_turn_only: bool = false,
        /// Train every token of a conversation after the first, prompts and markup included.
        train_prompt: bool = false,
        /// Only with `train.compat = "mlx-lm"`: its `--mask-prompt`, which trains the last message alone.
        mask_prompt: bool = false,
        /// What happens where a template rewrites history, so that a turn cannot be found in the whole conversation.
        on_prefix_violation: OnPrefixViolation = OnPrefixViolation::Unroll,
        /// What happens to faulty rows.
        errors: OnRowError = OnRowError::Stop,
        /// What happens to a row without `auth_weight` and `prov_entropy` in a file that has them.
        missing: MissingProvenance = MissingProvenance::Error,
        /// Allow entropies of different scales (`scoring`) in one file.
        allow_mixed_scoring: bool = false,
        /// Refuse rows that are in two splits, and fields that nothing reads or writes, instead of a warning.
        strict: bool = false,
        /// Token that ends a text row, such as `<|endoftext|>`. Unset: the tokenizer's end of text.
        append_eos: Option<String> = None,
        /// What happens to control tokens that stand inside messages.
        control_tokens: ControlTokens = ControlTokens::Keep,
        /// Jinja file that takes the place of the model's own chat template.
        chat_template: Option<PathBuf> = None,
        /// Keywords for the chat template, as `name=value`, such as `enable_thinking=false`.
        template_kwargs: Vec<String> = Vec::new(),
        /// Name of the field with a plain text.
        text_feature: String = "text".into(),
        /// Name of the field with a prompt.
        prompt_feature: String = "prompt".into(),
        /// Name of the field with a completion.
        completion_feature: String = "completion".into(),
        /// Name of the field with the messages of a conversation.
        chat_feature: String = "messages".into(),
    }

    /// The trainable low-rank update.
    ["lora"] lora: LoraSettings {
        /// Kind of update.
        method: LoraMethod = LoraMethod::Lora,
        /// Inner width of the update: more can learn more and costs more.
        rank: usize = 8,
        /// Strength of the update, as a multiple of the rank: `scale = alpha / rank`. Unset when `lora.scale` is given.
        alpha: Option<f64> = Some(16.0),
        /// Strength of the update: the factor itself. Giving it unsets `lora.alpha`; both in one place are an error.
        scale: Option<f64> = None,
        /// Divide `alpha` by the root of the rank instead of the rank (rsLoRA): large ranks keep their strength.
        rank_stabilized: bool = false,
        /// Where the update starts.
        init: LoraInit = LoraInit::Zero,
        /// Ranks of single modules, as `pattern=rank`, such as `q_proj=16`.
        ranks: Vec<String> = Vec::new(),
        /// Alphas of single modules, as `pattern=alpha`.
        alphas: Vec<String> = Vec::new(),
        /// Folder of an adapter to go on from; its rank, scale and modules must be those asked for here.
        start: Option<PathBuf> = None,
        /// Share of the update's inputs that are zeroed at random while training, from 0 to below 1.
        dropout: f64 = 0.0,
        /// Which linear layers are adapted: names (`q_proj`), patterns (`model.layers.*.mlp.*`) or `all-linear`.
        targets: Vec<String> = vec![crate::target_modules::ALL_LINEAR.into()],
        /// Adapt only the last n blocks; 0 or -1 means all.
        layers: i64 = -1,
    }

    /// How long and in what portions to train.
    ["train"] train: TrainSettings {
        /// Folder for the results (`--out`). Required to train.
        out: Option<PathBuf> = None,
        /// Number of updates. Unset: what `train.epochs` says.
        steps: Option<usize> = None,
        /// Passes over the data, fractions allowed. Unset: 1, unless `train.steps` is given.
        epochs: Option<f64> = None,
        /// Rows in one forward and backward pass.
        batch_size: usize = 4,
        /// Passes that are summed into one update.
        accumulation: usize = 1,
        /// Longest row in tokens. Unset: 2048, or the model's context if that is shorter.
        max_seq_length: Option<usize> = None,
        /// Seed of every random choice: the order of rows, initial values, dropout.
        seed: u64 = 0,
        /// Updates between two evaluations. Unset: only before the first update and after the last.
        eval_every: Option<usize> = None,
        /// Batches of an evaluation, always the same ones. Unset: the whole validation set.
        val_batches: Option<usize> = None,
        /// End with the adapter of the best evaluation instead of the last one. Where every evaluation was worse than that of
        /// the untrained model, the last adapter is kept, with a warning.
        save_best: bool = true,
        /// Evaluations without a better loss after which the run ends; 0 = never.
        patience: usize = 0,
        /// How much lower the validation loss must be to count as better.
        min_delta: f64 = 0.0,
        /// Compute activations again in the backward pass instead of keeping them: less memory, more time.
        checkpointing: bool = false,
        /// Trace the update once a shape and fuse its element-wise operations. `auto`: on a GPU. On the CPU, `true` needs a C++
        /// compiler while training.
        compile: Compile = Compile::Auto,
        /// Before the first update, run one at the largest shape and refuse settings that do not fit in memory.
        preflight: bool = true,
        /// Train with the arithmetic, the batches and the defaults of another program (`--compat`).
        compat: Compat = Compat::None,
        /// Only with `compat`: JSON file with the indices of batches in the order of training.
        batch_order: Option<PathBuf> = None,
    }

    /// How gradients become updates.
    ["optimizer"] optimizer: OptimizerSettings {
        /// Update rule.
        name: OptimizerName = OptimizerName::Adamw,
        /// Largest step size; the schedule scales it.
        learning_rate: f64 = 1e-4,
        /// Share of each matrix taken away per unit of learning rate.
        weight_decay: f64 = 0.01,
        /// Memory of the first and second moment, for adamw, adam and lion.
        betas: [f64; 2] = [0.9, 0.999],
        /// Memory of past gradients, for sgd and muon.
        momentum: f64 = 0.9,
        /// Learning rate of `lora_b` relative to all else (LoRA+): 1 = equal, 16 is usual.
        lora_b_ratio: f64 = 1.0,
        /// Added to the denominator of the update.
        eps: f64 = 1e-8,
        /// Largest norm of the gradient over all parameters; longer ones are scaled down. 0 = no limit.
        clip_norm: f64 = 1.0,
    }

    /// How the learning rate moves.
    ["schedule"] schedule: ScheduleSettings {
        /// Shape after the warm-up.
        name: ScheduleName = ScheduleName::Cosine,
        /// Updates of linear rise from 0. Unset: 3 % of all, at least 10, at most a quarter of all.
        warmup_steps: Option<usize> = None,
        /// Learning rate at the end.
        min_learning_rate: f64 = 0.0,
        /// Falls of `cosine_restarts`.
        cycles: usize = 1,
        /// Exponent of `polynomial`.
        power: f64 = 1.0,
        /// Share of the updates after the warm-up in which `wsd` falls.
        decay_share: f64 = 0.2,
    }

    /// What is minimised.
    ["loss"] loss: LossSettings {
        /// Kind of loss: `cross_entropy` for texts and conversations, `dpo` or `orpo` for preference pairs.
        name: LossName = LossName::CrossEntropy,
        /// How strongly `dpo` holds the model to what it was: larger allows less change.
        beta: f64 = 0.1,
        /// Factor of the odds-ratio term of `orpo`.
        lambda: f64 = 0.1,
        /// Trained positions whose logits exist at one time. Unset: all up to 128 MiB of logits (on a GPU 512 MiB), else as many as take that, at most 1024.
        chunk_tokens: Option<usize> = None,
        /// Share of the target that is spread over the whole vocabulary, from 0 to below 1; for `dpo` the share of pairs that
        /// are labelled the wrong way round, below 0.5.
        label_smoothing: f64 = 0.0,
        /// Factor of the squared log-normaliser, which keeps logits small; 0.0001 is usual, 0 = off.
        z_loss: f64 = 0.0,
    }

    /// Weighting of rows by the authority of their source.
    ["loss.distrust"] distrust: DistrustSettings {
        /// What the weights do.
        mode: DistrustMode = DistrustMode::Off,
        /// Steepness of the weighting.
        alpha: f64 = 2.7,
        /// Factor of the additive term; only with mode `additive`.
        lambda: Option<f64> = None,
        /// Function from the distrust of a row to its weight.
        link: DistrustLink = DistrustLink::Hinge,
        /// Smallest weight before the final normalisation, from 0 to below 1.
        floor: f64 = 0.1,
        /// Largest weight before the final normalisation, above 1.
        cap: f64 = 4.0,
    }

    /// Saved states that a run can resume from.
    ["checkpoint"] checkpoint: CheckpointSettings {
        /// Updates between two saved states. Unset: by time alone.
        every: Option<usize> = None,
        /// Minutes between two saved states; more where saving would take a twentieth of the time. 0 = not by time.
        every_minutes: f64 = 5.0,
        /// Saved states that are kept; older ones are removed.
        keep_last: usize = 2,
    }

    /// Where to compute.
    ["backend"] backend: BackendSettings {
        /// Device (`--backend`); `auto` takes the fastest that computes correctly.
        device: BackendDevice = BackendDevice::Auto,
        /// Most memory that MLX may use. Unset: what the machine recommends.
        memory_limit: Option<ByteSize> = None,
    }

    /// What is recorded.
    ["logging"] logging: LoggingSettings {
        /// Updates between two records in `metrics.jsonl`.
        report_every: usize = 10,
        /// Write TensorBoard event files too.
        tensorboard: bool = false,
        /// Prompts of the validation set (else of the training set) that are answered before and after training.
        samples: usize = 2,
        /// Longest answer to them, in tokens.
        sample_tokens: usize = 48,
    }
}

words! {
    /// What computes a model's blocks.
    KernelChoice {
        /// The fastest for this device and this kind of training.
        Auto = "auto",
        /// Operations of MLX.
        Composed = "composed",
        /// Our own kernels for the CPU, f32.
        Native = "native",
        /// Our own kernels for the CPU, bf16 weights and products with f32 sums; adapters only.
        NativeBf16 = "native_bf16",
        /// Fused blocks in compiled updates, with our own kernels on NVIDIA GPUs; adapters only.
        Fused = "fused",
    }
}

words! {
    /// Kind of rows in the data.
    DataFormat {
        /// `{"text"}`
        Text = "text",
        /// `{"prompt", "completion"}`
        Completions = "completions",
        /// `{"messages"}`
        Chat = "chat",
        /// `{"messages", "tools"}`
        Tools = "tools",
        /// `{"chosen", "rejected"}`
        Preference = "preference",
    }
}

words! {
    /// What happens to a row longer than the limit.
    Overlong {
        /// Cut at the end.
        Truncate = "truncate",
        /// Cut into several rows.
        Split = "split",
        /// Left out.
        Drop = "drop",
        /// Refused.
        Error = "error",
    }
}

words! {
    /// What happens where a template rewrites history.
    OnPrefixViolation {
        /// The row is refused.
        Error = "error",
        /// Each trained turn becomes an example of its own.
        Unroll = "unroll",
    }
}

words! {
    /// What happens to control tokens inside messages.
    ControlTokens {
        /// They act as control tokens, as in transformers; their rows are counted.
        Keep = "keep",
        /// They are encoded as plain text.
        Text = "text",
        /// The row is refused.
        Refuse = "refuse",
    }
}

words! {
    /// What happens to faulty rows.
    OnRowError {
        /// The run stops, with up to twenty of them named.
        Stop = "stop",
        /// They are left out and listed in `data_skipped.jsonl`; above 5 % the run stops anyway.
        Skip = "skip",
    }
}

words! {
    /// What a row without provenance is among rows that have it.
    MissingProvenance {
        /// A faulty row.
        Error = "error",
        /// A row of weight 1.
        Neutral = "neutral",
    }
}

words! {
    /// Where the update starts.
    LoraInit {
        /// `A` random, `B` zero: the model starts as it was.
        Zero = "zero",
        /// The strongest singular directions of the weight (PiSSA), taken out of the weight; saved as plain LoRA.
        Pissa = "pissa",
    }
}

words! {
    /// Whose arithmetic is used.
    Compat {
        /// planish's own.
        None = "none",
        /// mlx-lm 0.32: trains one token of padding a row, averages batches, Adam without bias correction.
        MlxLm = "mlx-lm",
    }
}

words! {
    /// Whether updates are traced and compiled.
    Compile {
        /// On a GPU, where the recipe can be.
        Auto = "auto",
        /// Always.
        True = "true",
        /// Never.
        False = "false",
    }
}

words! {
    /// Kind of trainable update.
    LoraMethod {
        /// `scale · B A`
        Lora = "lora",
        /// LoRA with a trained magnitude a row.
        Dora = "dora",
        /// All weights.
        Full = "full",
    }
}

words! {
    /// Update rule.
    OptimizerName {
        /// Adam with bias correction and decoupled weight decay.
        Adamw = "adamw",
        /// Adam with bias correction, without weight decay.
        Adam = "adam",
        /// Gradient descent with momentum.
        Sgd = "sgd",
        /// The sign of an averaged gradient; wants a learning rate some 5 times smaller.
        Lion = "lion",
        /// Averaged gradients made orthogonal, for matrices; wants a learning rate some 10 times larger.
        Muon = "muon",
        /// Adam with the second moment kept as a row and a column.
        Adafactor = "adafactor",
    }
}

words! {
    /// Shape of the learning rate after the warm-up.
    ScheduleName {
        /// Stays.
        Constant = "constant",
        /// Falls on a straight line.
        Linear = "linear",
        /// Falls on half a cosine wave.
        Cosine = "cosine",
        /// The same several times.
        CosineRestarts = "cosine_restarts",
        /// Falls as a power of what is left.
        Polynomial = "polynomial",
        /// Stays, then falls on a straight line.
        Wsd = "wsd",
    }
}

words! {
    /// Kind of loss.
    LossName {
        /// Mean over trained tokens of −log p(token).
        CrossEntropy = "cross_entropy",
        /// Direct preference optimisation against the model as it was loaded.
        Dpo = "dpo",
        /// Odds-ratio preference optimisation, without a reference.
        Orpo = "orpo",
    }
}

words! {
    /// What distrust weights do.
    DistrustMode {
        /// Nothing.
        Off = "off",
        /// Multiply each row's loss.
        Weight = "weight",
        /// Add a constant to the reported loss; no effect on the gradient.
        Additive = "additive",
        /// Decide how often a row is drawn.
        Sampler = "sampler",
    }
}

words! {
    /// Function from a row's distrust to its weight.
    DistrustLink {
        /// `max(c, 0)²`
        Hinge = "hinge",
        /// `c²`
        Literal = "literal",
        /// A softened exponential.
        Tempered = "tempered",
    }
}

words! {
    /// Where to compute.
    BackendDevice {
        /// The fastest that computes correctly.
        Auto = "auto",
        /// Main processor.
        Cpu = "cpu",
        /// Apple GPU.
        Metal = "metal",
        /// NVIDIA GPU.
        Cuda = "cuda",
    }
}

impl RunConfig {
    /// Collects values from their sources.
    pub fn builder() -> RunConfigBuilder {
        RunConfigBuilder::default()
    }

    /// The whole configuration as TOML, defaults included; reading it again gives an equal one. Unset keys are comments.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for (key, value) in Self::keys().iter().zip(self.values()) {
            if key.section != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                text.push_str(&format!("{gap}[{}]\n", key.section));
                section = key.section;
            }
            match value {
                Some(value) => text.push_str(&format!("{} = {value}\n", key.name)),
                None => text.push_str(&format!("# {} is unset\n", key.name)),
            }
        }
        text
    }
}

impl LoraSettings {
    /// The factor of the update: as given, else `alpha / rank`.
    pub fn scale(&self) -> f64 {
        match (self.scale, self.alpha) {
            (Some(scale), _) => scale,
            (None, alpha) if self.rank_stabilized => alpha.unwrap_or_default() / (self.rank as f64).sqrt(),
            (None, alpha) => alpha.unwrap_or_default() / self.rank as f64,
        }
    }
}

/// Doc lines as one paragraph.
fn joined(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_defaults_read_back_as_the_defaults() {
        let text = RunConfig::default().to_toml();
        assert_eq!(
            RunConfig::builder().text(&text, "x").unwrap().build().unwrap(),
            RunConfig::default()
        );
    }

    #[test]
    fn every_key_is_written_and_documented() {
        let text = RunConfig::default().to_toml();
        for key in RunConfig::keys() {
            assert!(text.contains(&format!("\n{} = ", key.name)) || text.contains(&format!("# {} is unset", key.name)));
            assert!(key.doc.ends_with('.'), "{}.{}: {}", key.section, key.name, key.doc);
        }
    }

    #[test]
    fn keys_that_scripts_rely_on_exist() {
        let known: Vec<String> = RunConfig::keys()
            .iter()
            .map(|key| format!("{}.{}", key.section, key.name))
            .collect();
        let promised = "train.steps train.epochs train.batch_size train.accumulation train.max_seq_length train.seed
            train.eval_every train.save_best train.checkpointing train.compile optimizer.name optimizer.learning_rate
            optimizer.weight_decay optimizer.betas optimizer.eps optimizer.clip_norm schedule.name schedule.warmup_steps
            schedule.min_learning_rate lora.method lora.rank lora.alpha lora.scale lora.dropout lora.targets lora.layers
            data.format data.packing data.overlong data.train_roles loss.name loss.chunk_tokens loss.distrust.mode
            loss.distrust.alpha loss.distrust.lambda loss.distrust.link loss.distrust.floor loss.distrust.cap
            checkpoint.every checkpoint.keep_last backend.device backend.memory_limit logging.report_every
            logging.tensorboard";
        for key in promised.split_whitespace() {
            assert!(known.iter().any(|name| name == key), "{key}");
        }
    }
}

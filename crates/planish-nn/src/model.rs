use std::path::Path;
use std::sync::Arc;

use planish_core::model_config::ModelConfig;
use planish_core::target_modules::resolve;
use planish_kernels::PackedLinear;
use planish_loss::{Head, HeadKernel, HeadLoss, TokenLoss, TrainedPositions};
use planish_mlx::cuda_kernel;
use planish_mlx::device::{self, DeviceKind};
use planish_mlx::{Array, Dtype};
use planish_tensors::{LoadReport, LoadRules, ModelWeights, TensorStore};

use crate::decoder::{Decoder, Fused, TrainingPass};
use crate::fused::{FusedAttention, FusedFeedForward};
use crate::joint::Joint;
use crate::lora::LoraAdapter;
use crate::native::Kernels;
use crate::parameters::{Parameters, Trainable};
use crate::plan::{ChosenKernels, Plan, Purpose};
use crate::weights::{Weights, mlx_dtype};
use crate::{AttentionMask, Error, KvCache, LoraConfig, LoraInit, Result, build};

/// How to load a model.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// Element type of the weights and activations. `None`: f32 on the CPU, where 16-bit products are some 50 times
    /// slower, and the stored type on a GPU.
    pub dtype: Option<Dtype>,
    /// What computes the blocks. `None`: the fastest on the default device for this dtype and purpose.
    pub kernels: Option<Kernels>,
    /// What the model is for.
    pub purpose: Purpose,
    /// Whether its updates are to be compiled, which not all kernels can be.
    pub is_compiled: bool,
    /// What a checkpoint may lack or have beyond what the model needs.
    pub rules: LoadRules,
}

impl LoadOptions {
    /// For evaluation and generation.
    pub fn for_inference() -> Self {
        Self {
            purpose: Purpose::Inference,
            ..Self::default()
        }
    }

    /// With these kernels, whatever is fastest.
    pub fn with_kernels(kernels: Kernels) -> Self {
        Self {
            kernels: Some(kernels),
            ..Self::default()
        }
    }

    fn choose(&self, dtype: Dtype) -> Result<ChosenKernels> {
        match self.kernels {
            Some(kernels) => Ok(ChosenKernels {
                kernels,
                obstacle: None,
            }),
            None => ChosenKernels::fastest(dtype, self.purpose, self.is_compiled),
        }
    }
}

/// How a forward pass for training runs.
#[derive(Debug, Clone, Copy, Default)]
pub struct Training<'a> {
    /// u32 `[2]`: decides every dropout mask of the pass. `None` = no dropout.
    pub dropout_key: Option<&'a Array>,
    /// Keep only the inputs of blocks for the backward pass, and compute the rest again.
    pub activation_checkpointing: bool,
}

/// A decoder with its configuration, and adapters if any are attached.
///
/// # Example
/// ```no_run
/// use planish_mlx::Array;
/// use planish_nn::{AttentionMask, LoadOptions, Model};
/// let (model, report) = Model::load("SmolLM2-135M".as_ref(), &LoadOptions::default())?;
/// let ids = model.token_array(&[&[1, 2, 3]])?;
/// let hidden = model.hidden(&ids, &AttentionMask::Causal, None)?; // [1, 3, d]
/// let logits = model.logits(&hidden)?; // [1, 3, v]
/// # Ok::<(), planish_nn::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Model {
    config: ModelConfig,
    dtype: Dtype,
    choice: ChosenKernels,
    pub(crate) decoder: Decoder,
    trainable: Trainable,
    /// The trainable arrays' positions in the walk over the model, ordered by name.
    order: Vec<usize>,
}

impl Model {
    /// Reads a Hugging Face folder: `config.json` and safetensors files, whose tensors must be exactly those of the model.
    ///
    /// What may be called otherwise, or be there without need, is [`ModelWeights::open`]'s to say.
    ///
    /// # Errors
    /// [`Error::Config`] for the configuration; [`Error::Tensors`] for files that are damaged, for missing, unexpected or
    /// mis-shaped tensors (all named), for NaN or infinite weights; [`Error::ComputeDtype`]; [`Error::NativeKernels`].
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<(Self, LoadReport)> {
        let config = ModelConfig::from_file(&dir.join("config.json"))?;
        let (mut stored, report) = ModelWeights::open(dir, &config, &options.rules)?;
        let dtype = match options.dtype {
            Some(dtype) => dtype,
            None => default_dtype(stored.store(), &config.arch.embedding_path())?,
        };
        let choice = options.choose(dtype)?;
        let mut weights = Weights::from_store(&config, stored.store_mut(), dtype, choice.kernels);
        let model = Self::build(&config, dtype, choice, &mut weights)?;
        Ok((model, report))
    }

    /// A model of random weights, a function of `seed`: for benchmarks and tests only.
    ///
    /// # Errors
    /// [`Error::ComputeDtype`]; [`Error::Quantized`] for a configuration with quantised weights; [`Error::Mlx`].
    pub fn random(config: &ModelConfig, dtype: Dtype, seed: u64) -> Result<Self> {
        Self::random_with(config, dtype, Kernels::Composed, seed)
    }

    /// The same with a choice of kernels.
    ///
    /// # Errors
    /// As [`random`](Self::random), and [`Error::NativeKernels`].
    pub fn random_with(config: &ModelConfig, dtype: Dtype, kernels: Kernels, seed: u64) -> Result<Self> {
        if config.quantization.is_some() {
            return Err(Error::Quantized {
                path: "the configured model".to_owned(),
                operation: "a random model",
            });
        }
        let choice = ChosenKernels {
            kernels,
            obstacle: None,
        };
        Self::build(
            config,
            dtype,
            choice,
            &mut Weights::random(config, dtype, kernels, seed),
        )
    }

    fn build(config: &ModelConfig, dtype: Dtype, choice: ChosenKernels, weights: &mut Weights<'_>) -> Result<Self> {
        if !matches!(dtype, Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16) {
            return Err(Error::ComputeDtype { dtype });
        }
        choice.kernels.check(dtype)?;
        let decoder = build::decoder(&config.arch, weights)?;
        Ok(Model {
            config: config.clone(),
            dtype,
            choice,
            decoder,
            trainable: Trainable::Adapters,
            order: Vec::new(),
        })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Element type of weights and activations.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// What computes the blocks.
    pub fn kernels(&self) -> Kernels {
        self.choice.kernels
    }

    /// What was chosen to compute the blocks, and what stood in the way of more.
    pub fn choice(&self) -> ChosenKernels {
        self.choice
    }

    /// What computes each kind of part in training, adapters included.
    ///
    /// # Errors
    /// [`Error::Mlx`] when the device cannot be asked.
    pub fn plan(&self) -> Result<Plan> {
        let is_fused = self.trainable == Trainable::Adapters && self.is_even();
        Ok(Plan::of(self.choice, &self.decoder, is_fused, &self.head_kernel()?))
    }

    /// Fused kernels read eight numbers at a time, also from the one array that an optimizer lays all adapters in.
    fn is_even(&self) -> bool {
        let trainables = self.trainables();
        trainables.iter().all(|(_, array)| array.size().is_multiple_of(8))
    }

    /// Token ids as i32 `[b, s]`, each checked against the vocabulary.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`]; [`Error::TokenOutOfRange`]; [`Error::RaggedRows`].
    pub fn token_array(&self, rows: &[&[u32]]) -> Result<Array> {
        let length = rows.first().map_or(0, |row| row.len());
        if length == 0 {
            return Err(Error::EmptyPrompt);
        }
        let mut ids = Vec::with_capacity(rows.len() * length);
        for (row_idx, row) in rows.iter().enumerate() {
            if row.len() != length {
                return Err(Error::RaggedRows {
                    row: row_idx,
                    expected: length,
                    found: row.len(),
                });
            }
            self.check_tokens(row)?;
            ids.extend(row.iter().map(|&token| token as i32));
        }
        Ok(Array::from_slice(&ids, &[rows.len() as i32, length as i32]))
    }

    /// Refuses tokens outside the vocabulary, which MLX would read as other memory.
    pub(crate) fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.config.arch.vocab_size;
        match tokens.iter().position(|&token| token as usize >= vocab_size) {
            Some(position) => Err(Error::TokenOutOfRange {
                token: tokens[position],
                position,
                vocab_size,
            }),
            None => Ok(()),
        }
    }

    /// Hidden states after the final norm: ids i32 `[b, s]` → `[b, s, d]`. With a cache, `ids` continue what it holds.
    ///
    /// The ids are not looked at; [`token_array`](Self::token_array) checks them.
    ///
    /// # Errors
    /// [`Error::PackedWithCache`]; [`Error::Mlx`].
    pub fn hidden(&self, ids: &Array, mask: &AttentionMask, cache: Option<&mut KvCache>) -> Result<Array> {
        self.decoder.hidden(ids, mask, cache)
    }

    /// The same for training, with dropout and activation checkpointing as `training` says.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn hidden_for_training(&self, ids: &Array, mask: &AttentionMask, training: Training<'_>) -> Result<Array> {
        let pass = TrainingPass {
            trainable: self.trainable,
            dropout_key: training.dropout_key.filter(|_| self.has_dropout()),
            activation_checkpointing: training.activation_checkpointing,
        };
        self.decoder.hidden_for_training(ids, mask, pass)
    }

    /// Logits of hidden states: `[..., d]` → `[..., v]`.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn logits(&self, hidden: &Array) -> Result<Array> {
        self.decoder.logits(hidden)
    }

    /// Cross-entropy of the trained positions from [`hidden`](Self::hidden) states `[b, l, d]`: `[t]`, f32, in nats.
    ///
    /// # Errors
    /// [`Error::Loss`] when the positions were made for another batch; [`Error::Mlx`].
    pub fn head_loss(&self, hidden: &Array, positions: &TrainedPositions, how: &HeadLoss) -> Result<TokenLoss> {
        let head = Head {
            project: &|states: &Array| self.logits(states),
            vocab_size: self.config.arch.vocab_size,
            kernel: self.head_kernel()?,
        };
        planish_loss::head_loss(hidden, &head, positions, how)
    }

    fn head_kernel(&self) -> Result<HeadKernel> {
        Ok(match self.kernels() {
            Kernels::Composed => HeadKernel::Composed,
            Kernels::Native | Kernels::NativeBf16 => self.packed_head().map_or(HeadKernel::Cpu, HeadKernel::Packed),
            Kernels::Fused if cuda_kernel::is_supported()? => HeadKernel::Cuda,
            Kernels::Fused => HeadKernel::Composed,
        })
    }

    /// The output head packed in bf16, if logits are a product with it and nothing else.
    fn packed_head(&self) -> Option<Arc<PackedLinear>> {
        let head = &self.decoder.head;
        if head.factor != 1.0 || head.softcap.is_some() {
            return None;
        }
        match &head.matrix {
            Some(matrix) if matrix.adapter.is_some() || matrix.bias.is_some() => None,
            Some(matrix) => match &matrix.base {
                crate::LinearBase::Packed(packed) => Some(packed.clone()),
                _ => None,
            },
            None => self.decoder.embedding.packed_head.clone(),
        }
    }

    /// Attaches fresh adapters to the modules that `config` targets, and returns their paths in the order of the model.
    ///
    /// `A` depends on `seed` and the module's path alone. The adapters become the trainable parameters.
    ///
    /// # Errors
    /// [`Error::Config`] for a pattern without match (the nearest name is given); [`Error::ZeroRank`];
    /// [`Error::DropoutRange`]; [`Error::AdaptersAttached`]; with [`LoraInit::Pissa`] also [`Error::Quantized`] and
    /// [`Error::RankTooLarge`].
    pub fn attach_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<Vec<String>> {
        if !(0.0..1.0).contains(&config.dropout) {
            return Err(Error::DropoutRange {
                dropout: config.dropout,
            });
        }
        self.require_no_adapters()?;
        let targets = resolve(&config.targets, &self.linear_paths())?;
        let ranks = config.ranks.resolve(config.rank, &targets)?;
        let alphas = config.alphas.resolve(config.scale.value(), &targets)?;
        let mut fresh = Vec::with_capacity(targets.len());
        for (path, linear) in self.decoder.linears_mut() {
            if let Some(index) = targets.iter().position(|target| *target == path) {
                let scale = config.scale.factor(alphas[index], ranks[index]);
                fresh.push((
                    LoraAdapter::fresh(linear, &path, ranks[index], scale, config, seed)?,
                    linear,
                ));
            }
        }
        for (adapter, linear) in fresh {
            if config.init == LoraInit::Pissa {
                linear.base.subtract(&adapter.delta()?)?;
            }
            linear.adapter = Some(adapter);
        }
        self.train(Trainable::Adapters)?;
        Ok(targets)
    }

    /// Removes all adapters and returns how many there were.
    pub fn detach_adapters(&mut self) -> usize {
        let removed = self
            .decoder
            .linears_mut()
            .filter_map(|(_, linear)| linear.adapter.take())
            .count();
        self.reorder();
        removed
    }

    /// Chooses what trains.
    ///
    /// # Errors
    /// [`Error::Quantized`] when all weights shall train and some are packed.
    pub fn train(&mut self, trainable: Trainable) -> Result<()> {
        if trainable == Trainable::Weights {
            let table = &self.decoder.embedding.table;
            table.require_dense(&self.decoder.embedding_path, "full fine-tuning")?;
            for (path, linear) in self.decoder.linears_mut() {
                linear.base.require_dense(&path, "full fine-tuning")?;
            }
        }
        self.trainable = trainable;
        self.reorder();
        Ok(())
    }

    /// The trainable arrays with their names, sorted by name, layer 2 before layer 10. Names are those of the files:
    /// `….q_proj.lora_a`, `….weight`.
    pub fn trainables(&self) -> Vec<(String, Array)> {
        let mut found = self.decoder.collect(self.trainable);
        found.sort_by(|(one, _), (other, _)| by_layer(one).cmp(by_layer(other)));
        found
    }

    /// Replaces the trainable arrays by `values`, in the order of [`trainables`](Self::trainables).
    ///
    /// # Errors
    /// [`Error::TrainableCount`].
    pub fn set_trainables(&mut self, values: &[Array]) -> Result<()> {
        if values.len() != self.order.len() {
            return Err(Error::TrainableCount {
                expected: self.order.len(),
                found: values.len(),
            });
        }
        let in_walk: Vec<Array> = self.order.iter().map(|&position| values[position].clone()).collect();
        self.decoder.replace(self.trainable, &in_walk);
        Ok(())
    }

    /// Computes every array of the model that is not computed yet.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn materialize(&self) -> Result<()> {
        let mut arrays = Vec::new();
        let mut decoder = self.decoder.clone();
        decoder.visit("", &mut |_, _, array| arrays.push(array.clone()));
        Ok(mlx_rs::transforms::eval(&arrays)?)
    }

    /// A copy for training adapters: with [`Kernels::Fused`] of fused blocks, else one that multiplies by the weights of query,
    /// key and value at once.
    ///
    /// These weights are laid end to end, and this model's become views of them. The copy must not outlive
    /// a change of these weights. Where the weights themselves train, it is an ordinary copy, and so it is in f32 without
    /// fused blocks.
    ///
    /// # Errors
    /// [`Error::Mlx`].
    pub fn joined(&mut self) -> Result<Model> {
        let is_fused = self.kernels() == Kernels::Fused && self.is_even() && self.decoder.has_one_rope();
        if self.trainable != Trainable::Adapters || (self.dtype == Dtype::Float32 && !is_fused) {
            return Ok(self.clone());
        }
        let (mut joints, mut fused) = (Vec::new(), Vec::new());
        for block in &mut self.decoder.blocks {
            let own = match is_fused && block.plain_norms().is_some() {
                true => Fused {
                    attention: FusedAttention::of(&mut block.attention)?,
                    feed_forward: FusedFeedForward::of(&block.feed_forward)?,
                },
                false => Fused::default(),
            };
            let attention = &mut block.attention;
            joints.push(match own.attention {
                Some(_) => None,
                None => Joint::of([&mut attention.query, &mut attention.key, &mut attention.value])?,
            });
            fused.push(own);
        }
        let mut copy = self.clone();
        for ((block, joint), fused) in copy.decoder.blocks.iter_mut().zip(joints).zip(fused) {
            block.attention.joint = joint;
            block.fused = fused;
        }
        Ok(copy)
    }

    /// Paths of the linear layers that can take an adapter, in the order of the computation; the head only where it has a
    /// weight of its own.
    pub fn linear_paths(&self) -> Vec<String> {
        let head = self.decoder.head.matrix.iter().map(|_| self.decoder.head.path.clone());
        let linears = self.config.arch.linears().into_iter();
        linears.map(|linear| linear.path).chain(head).collect()
    }

    pub(crate) fn require_no_adapters(&mut self) -> Result<()> {
        match self.decoder.linears_mut().any(|(_, linear)| linear.adapter.is_some()) {
            true => Err(Error::AdaptersAttached),
            false => Ok(()),
        }
    }

    fn has_dropout(&self) -> bool {
        let mut decoder = self.decoder.clone();
        decoder
            .linears_mut()
            .any(|(_, linear)| linear.adapter.as_ref().is_some_and(|adapter| adapter.dropout > 0.0))
    }

    /// For each trainable array of the walk, its rank by name.
    fn reorder(&mut self) {
        let names: Vec<String> = self
            .decoder
            .collect(self.trainable)
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        let mut by_name: Vec<usize> = (0..names.len()).collect();
        by_name.sort_by(|&one, &other| by_layer(&names[one]).cmp(by_layer(&names[other])));
        self.order = vec![0; names.len()];
        for (rank, walk_position) in by_name.into_iter().enumerate() {
            self.order[walk_position] = rank;
        }
    }
}

/// What names are compared by: numbers by their value.
///
/// MLX computes the gradients of a concatenation from its last part to its first. In the order of the layers, a layer's
/// gradients are computed when the backward pass is there; in another, what they are made of is kept until the end.
fn by_layer(name: &str) -> impl Iterator<Item = Result<usize, &str>> {
    name.split('.').map(|word| word.parse().map_err(|_| word))
}

/// f32 on the CPU; on a GPU what the embedding is stored in.
fn default_dtype(store: &TensorStore, embedding: &str) -> Result<Dtype> {
    if device::default_kind()? == DeviceKind::Cpu {
        return Ok(Dtype::Float32);
    }
    // Of a quantised model, the scales have the type that activations shall have.
    let (scales, weight) = (format!("{embedding}.scales"), format!("{embedding}.weight"));
    let view = store.require(if store.contains(&scales) { &scales } else { &weight })?;
    mlx_dtype(view.name, view.dtype)
}

use planish_mlx::Dtype;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong while a model is loaded, adapted or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An adapter that starts from the weight's own directions has a larger rank than the weight.
    #[error("{path}: rank {rank} is larger than that of the weight, {most}; lower lora.rank")]
    RankTooLarge {
        /// The layer.
        path: String,
        /// The rank asked for.
        rank: usize,
        /// The smaller side of the weight.
        most: usize,
    },

    /// MLX failed.
    #[error(transparent)]
    Mlx(#[from] planish_mlx::Error),

    /// A loss was given what it cannot take.
    #[error(transparent)]
    Loss(#[from] planish_loss::Error),

    /// The configuration or the target modules are wrong.
    #[error(transparent)]
    Config(#[from] planish_core::Error),

    /// The tensor files are wrong.
    #[error(transparent)]
    Tensors(#[from] planish_tensors::Error),

    /// An adapter of rank 0.
    #[error("rank 0 for {path}: an adapter needs a rank of at least 1")]
    ZeroRank {
        /// The module.
        path: String,
    },

    /// A dropout probability outside `[0, 1)`.
    #[error("dropout {dropout} is not in [0, 1)")]
    DropoutRange {
        /// The refused value.
        dropout: f32,
    },

    /// Two tensors that do not fit each other.
    #[error("{path}: expected shape {expected:?}, found {found:?}")]
    ShapeMismatch {
        /// The module or tensor.
        path: String,
        /// What fits.
        expected: Vec<usize>,
        /// What was given.
        found: Vec<usize>,
    },

    /// An element type that a model cannot be computed in.
    #[error("a model cannot be computed in {dtype:?}: choose Float32, Float16 or Bfloat16")]
    ComputeDtype {
        /// The refused type.
        dtype: Dtype,
    },

    /// A tensor of an element type that MLX does not have.
    #[error("{path}: MLX has no arrays of type {dtype}")]
    ForeignDtype {
        /// The tensor.
        path: String,
        /// Its type in the file.
        dtype: planish_tensors::Dtype,
    },

    /// A quantisation mode that the linear layer does not compute.
    #[error(
        "{path}: weights quantised as {mode} are not supported yet; dequantise the model, or use affine quantisation"
    )]
    QuantizationMode {
        /// The module.
        path: String,
        /// Its mode.
        mode: &'static str,
    },

    /// An operation that needs unquantised weights.
    #[error("{path} is quantised; {operation} needs plain weights")]
    Quantized {
        /// The module.
        path: String,
        /// What was asked for.
        operation: &'static str,
    },

    /// An operation that needs weights as they were stored, on a model that packed them.
    #[error(
        "the weights are packed in bf16 for training adapters; {operation} needs them unpacked: load with Kernels::Native or Composed"
    )]
    PackedWeights {
        /// What was asked for.
        operation: &'static str,
    },

    /// Our own kernels where they do not run.
    #[error("native kernels compute in Float32 on the CPU; asked for {dtype:?}, or the default device is a GPU")]
    NativeKernels {
        /// The model's element type.
        dtype: Dtype,
    },

    /// A token outside the vocabulary.
    #[error("token {token} at position {position} is outside the model's vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Where it stands.
        position: usize,
        /// Rows of the embedding.
        vocab_size: usize,
    },

    /// A model's output is NaN.
    #[error("the model's logits are not finite: its weights or its adapter come from a run that has diverged")]
    LogitsNotFinite,
    /// Nothing to run the model on.
    #[error("no tokens: a model needs at least one")]
    EmptyPrompt,

    /// Rows of different lengths where one array is wanted.
    #[error("row {row} has {found} tokens, row 0 has {expected}; pad the rows to one length")]
    RaggedRows {
        /// The first row that differs.
        row: usize,
        /// Length of row 0.
        expected: usize,
        /// Its length.
        found: usize,
    },

    /// Packed rows longer than the context up to which a model's rotation is the same for all sequences.
    #[error(
        "packed rows of {length} tokens: beyond {limit} tokens this model's rotation depends on the length of each sequence; \
         pack at most {limit} tokens per row, or do not pack"
    )]
    PackedBeyondContext {
        /// Tokens per row.
        length: i32,
        /// The original context.
        limit: usize,
    },

    /// A packed batch together with a cache.
    #[error("a packed batch cannot continue a cache: segments start at position 0")]
    PackedWithCache,

    /// A number of arrays other than that of the trainable parameters.
    #[error("{found} arrays given for {expected} trainable parameters")]
    TrainableCount {
        /// How many there are.
        expected: usize,
        /// How many were given.
        found: usize,
    },

    /// Adapters were attached twice.
    #[error("the model already has adapters; detach them first")]
    AdaptersAttached,

    /// An adapter tensor for a module that the model does not have.
    #[error("the adapter has {tensor:?}, but the model has no such module{}", hint(.nearest))]
    UnknownAdapterModule {
        /// The tensor.
        tensor: String,
        /// The most similar module.
        nearest: Option<String>,
    },

    /// Half of an adapter.
    #[error("the adapter of {module} has no {part}")]
    IncompleteAdapter {
        /// The module.
        module: String,
        /// `lora_a`, `lora_b` or `m`.
        part: &'static str,
    },

    /// Sampling settings that make no distribution.
    #[error("{what} {value} is not in {range}")]
    SamplingRange {
        /// Which setting.
        what: &'static str,
        /// The refused value.
        value: f32,
        /// What is allowed.
        range: &'static str,
    },
}

impl From<mlx_rs::error::Exception> for Error {
    fn from(exception: mlx_rs::error::Exception) -> Self {
        Error::Mlx(exception.into())
    }
}

fn hint(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!("; the nearest is {name:?}"))
        .unwrap_or_default()
}

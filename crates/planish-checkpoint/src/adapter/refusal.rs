use planish_tensors::MAX_LISTED;

/// Why an adapter cannot be read, converted or written without losing something.
///
/// [`id`](Self::id) is stable and meant for scripts; the text names what caused it; [`way_out`](Self::way_out) says
/// what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Refusal {
    /// Whole tensors beside the low-rank ones.
    #[error("it holds whole tensors, not only low-rank updates: {}", list(names))]
    ModulesToSave { names: Vec<String> },
    /// A trained bias of the low-rank update.
    #[error("it trains biases ({cause})")]
    LoraBias { cause: String },
    /// The base weights were changed at initialisation.
    #[error("`init_lora_weights` is {init:?}: the adapter belongs to a changed (residual) base, not to the original")]
    ResidualInit { init: String },
    /// Experts have no counterpart in PEFT.
    #[error("{name} is a low-rank update of experts (3 axes), which PEFT cannot hold")]
    SwitchLoraToPeft { name: String },
    /// Base and adapter cut the projections differently.
    #[error("the adapter has {module}, the base has {base_has} there")]
    FusedProjection { module: String, base_has: String },
    /// A pickle file can run code when read.
    #[error("adapter_model.bin is a pickle file, which can run code when it is read")]
    Pickle,
    /// Another method than LoRA.
    #[error("peft_type is {found:?}; only LORA is supported")]
    UnsupportedPeftType { found: String },
    /// A PEFT option that changes the computation and that planish does not have.
    #[error("the option `{key}` = {value} is not supported")]
    UnsupportedPeftOption { key: String, value: String },
    /// Names that the model does not have, or that are no adapter tensors.
    #[error("these names are not modules of the model: {}", list(names))]
    UnknownModule { names: Vec<String> },
    /// A tensor of another size than the base asks for.
    #[error("{name} has the shape {found:?}, expected {expected:?}")]
    ShapeMismatch {
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    /// Shapes and configuration name different ranks.
    #[error("{module} has rank {found} by its shapes and rank {expected} by the configuration")]
    RankConflict {
        module: String,
        found: usize,
        expected: usize,
    },
    /// mlx-lm 0.32 computes the wrong input size for such a base.
    #[error("DoRA on {module}, which is quantised to {bits} bits: mlx-lm cannot load that")]
    DoraBits { module: String, bits: usize },
    /// A whole fine-tuned model is no adapter.
    #[error("`fine_tune_type` is \"full\": these are whole weights")]
    FullAsAdapter,
    /// The two ecosystems may treat the head differently.
    #[error(
        "{module} is an embedding whose head is, or may be, tied to it; the formats differ in whether the head is adapted too"
    )]
    TiedEmbeddingLora { module: String },
    /// The magnitude runs along different axes.
    #[error("{module} is an embedding with DoRA, whose magnitudes the two formats define along different axes")]
    DoraEmbedding { module: String },
    /// Nothing to load.
    #[error("{reason}")]
    EmptyAdapter { reason: String },
    /// Trained on another base model.
    #[error("it was trained on another base model: {what} is {found}, expected {expected}")]
    BaseMismatch {
        what: String,
        expected: String,
        found: String,
    },
}

impl Refusal {
    /// The stable name of the refusal.
    pub fn id(&self) -> &'static str {
        match self {
            Self::ModulesToSave { .. } => "modules-to-save",
            Self::LoraBias { .. } => "lora-bias",
            Self::ResidualInit { .. } => "residual-init",
            Self::SwitchLoraToPeft { .. } => "switch-lora-to-peft",
            Self::FusedProjection { .. } => "fused-projection",
            Self::Pickle => "pickle",
            Self::UnsupportedPeftType { .. } => "unsupported-peft-type",
            Self::UnsupportedPeftOption { .. } => "unsupported-peft-option",
            Self::UnknownModule { .. } => "unknown-module",
            Self::ShapeMismatch { .. } => "shape-mismatch",
            Self::RankConflict { .. } => "rank-conflict",
            Self::DoraBits { .. } => "dora-bits",
            Self::FullAsAdapter => "full-as-adapter",
            Self::TiedEmbeddingLora { .. } => "tied-embedding-lora",
            Self::DoraEmbedding { .. } => "dora-embedding",
            Self::EmptyAdapter { .. } => "empty-adapter",
            Self::BaseMismatch { .. } => "base-mismatch",
        }
    }

    /// What the user can do.
    pub fn way_out(&self) -> &'static str {
        match self {
            Self::ModulesToSave { .. } => {
                "name its base, so that copies of the base's tensors are told from trained ones; else fuse it with PEFT and use the fused model"
            }
            Self::LoraBias { .. } => "fuse it into its base with PEFT and use the fused model",
            Self::ResidualInit { .. } => {
                "save it again with PEFT's `path_initial_model_for_weight_conversion`, which turns it into a plain LoRA"
            }
            Self::SwitchLoraToPeft { .. } => "keep the mlx-lm format, or fuse",
            Self::FusedProjection { .. } => "fuse it in its own ecosystem and use the fused model",
            Self::Pickle => "save it again as safetensors (`safe_serialization=True`)",
            Self::UnsupportedPeftType { .. } => "train a LoRA; there is no conversion",
            Self::UnsupportedPeftOption { .. } => "fuse it with PEFT and use the fused model",
            Self::UnknownModule { .. } | Self::ShapeMismatch { .. } => {
                "give the base model that the adapter was trained on"
            }
            Self::RankConflict { .. } => "correct the rank in the configuration",
            Self::DoraBits { .. } => "use LoRA, or a base with 4 or 8 bits",
            Self::FullAsAdapter => "export the model instead",
            Self::TiedEmbeddingLora { .. } => "name an untied base, leave the embedding out of the targets, or fuse",
            Self::DoraEmbedding { .. } => "leave the embedding out of the targets, or fuse",
            Self::EmptyAdapter { .. } => "check that the run that made it trained anything",
            Self::BaseMismatch { .. } => "give the base model that the adapter was trained on",
        }
    }
}

fn list(names: &[String]) -> String {
    let mut text = names.iter().take(MAX_LISTED).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > MAX_LISTED {
        text.push_str(&format!(" … and {} more", names.len() - MAX_LISTED));
    }
    text
}

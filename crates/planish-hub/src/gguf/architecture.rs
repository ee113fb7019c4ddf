//! Which model families of GGUF files can be converted.

use planish_core::model_config::ModelFamily;

/// `general.architecture`: decides the names of the metadata keys, and whether q and k rows are permuted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama and, since GGUF does not tell them apart, Mistral.
    Llama,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3, dense.
    Qwen3,
}

impl Architecture {
    /// Every supported architecture.
    pub const ALL: [Self; 3] = [Self::Llama, Self::Qwen2, Self::Qwen3];

    /// The word in the file, which is also the first part of its metadata keys.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The architecture of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// How a family of Hugging Face models is stored.
    pub(crate) fn of_family(family: ModelFamily) -> Self {
        match family {
            ModelFamily::Llama | ModelFamily::Mistral => Self::Llama,
            ModelFamily::Qwen2 => Self::Qwen2,
            ModelFamily::Qwen3 => Self::Qwen3,
        }
    }

    /// `model_type` and class name for `config.json`.
    pub(crate) fn hugging_face(self) -> (&'static str, &'static str) {
        match self {
            Self::Llama => ("llama", "LlamaForCausalLM"),
            Self::Qwen2 => ("qwen2", "Qwen2ForCausalLM"),
            Self::Qwen3 => ("qwen3", "Qwen3ForCausalLM"),
        }
    }

    /// Whether the rows of q and k are stored in rope's interleaved order.
    pub(crate) fn permutes_q_and_k(self) -> bool {
        self == Self::Llama
    }
}

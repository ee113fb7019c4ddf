//! One file a family. Each says how a block of that family is made; the decoder around the blocks is the same for all.

mod llama;
mod mistral;
mod qwen2;
mod qwen3;

use planish_core::model_config::{ModelConfig, ModelFamily};

use crate::decoder::{Block, Decoder};
use crate::weights::Weights;
use crate::{Result, Rope};

/// The decoder that `config` describes, from `weights`.
pub(crate) fn decoder(config: &ModelConfig, weights: &mut Weights<'_>) -> Result<Decoder> {
    let rope = Rope::new(&config.rope, config.head_dim);
    let make_block = match config.family {
        ModelFamily::Llama => llama::block,
        ModelFamily::Mistral => mistral::block,
        ModelFamily::Qwen2 => qwen2::block,
        ModelFamily::Qwen3 => qwen3::block,
    };
    let embedding = weights.embedding("model.embed_tokens")?;
    let blocks = (0..config.n_layers)
        .map(|layer_idx| make_block(config, &rope, weights, &format!("model.layers.{layer_idx}")))
        .collect::<Result<Vec<Block>>>()?;
    let norm = weights.rms_norm("model.norm")?;
    let head = if config.tie_word_embeddings {
        None
    } else {
        Some(weights.linear("lm_head", false)?)
    };
    Ok(Decoder {
        embedding,
        blocks,
        norm,
        head,
    })
}

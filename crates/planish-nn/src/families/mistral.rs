//! Mistral 7B and its kin: Llama without biases, with a window on attention, which the model's mask applies.

use planish_core::model_config::ModelConfig;

use crate::attention::Attention;
use crate::decoder::{Block, Fused};
use crate::mlp::SwiGlu;
use crate::weights::Weights;
use crate::{Result, Rope};

/// The block at `path`, such as `model.layers.0`.
pub(super) fn block(config: &ModelConfig, rope: &Rope, weights: &mut Weights<'_>, path: &str) -> Result<Block> {
    Ok(Block {
        attention_norm: weights.rms_norm(&format!("{path}.input_layernorm"))?,
        attention: Attention {
            query: weights.linear(&format!("{path}.self_attn.q_proj"), false)?,
            key: weights.linear(&format!("{path}.self_attn.k_proj"), false)?,
            value: weights.linear(&format!("{path}.self_attn.v_proj"), false)?,
            output: weights.linear(&format!("{path}.self_attn.o_proj"), false)?,
            joint: None,
            query_norm: None,
            key_norm: None,
            n_heads: config.n_heads as i32,
            n_kv_heads: config.n_kv_heads as i32,
            head_dim: config.head_dim as i32,
            rope: rope.clone(),
            kernels: weights.kernels(),
        },
        feed_forward_norm: weights.rms_norm(&format!("{path}.post_attention_layernorm"))?,
        feed_forward: SwiGlu {
            gate: weights.linear(&format!("{path}.mlp.gate_proj"), false)?,
            up: weights.linear(&format!("{path}.mlp.up_proj"), false)?,
            down: weights.linear(&format!("{path}.mlp.down_proj"), false)?,
            kernels: weights.kernels(),
        },
        fused: Fused::default(),
    })
}

//! What tensors are called in a GGUF file.

use planish_core::arch::{Arch, Mixer, Part, QkvProjections, Role};
use planish_core::families;

/// The name of a module's `weight` or `bias`.
///
/// ```
/// use planish_core::arch::{Part, Role};
/// use planish_hub::gguf::gguf_name;
/// assert_eq!(gguf_name(Role::Layer(3, Part::Query), "bias"), "blk.3.attn_q.bias");
/// assert_eq!(gguf_name(Role::Head, "weight"), "output.weight");
/// ```
pub fn gguf_name(role: Role, kind: &str) -> String {
    match role {
        Role::Embedding => format!("token_embd.{kind}"),
        Role::FinalNorm => format!("output_norm.{kind}"),
        Role::Head => format!("output.{kind}"),
        Role::Layer(layer_idx, part) => format!("blk.{layer_idx}.{}.{kind}", name_of_part(part)),
    }
}

fn name_of_part(part: Part) -> &'static str {
    match part {
        Part::PreMixerNorm => "attn_norm",
        Part::Query => "attn_q",
        Part::Key => "attn_k",
        Part::Value => "attn_v",
        Part::QueryNorm => "attn_q_norm",
        Part::KeyNorm => "attn_k_norm",
        Part::AttentionOutput => "attn_output",
        Part::PostMixerNorm => "post_attention_norm",
        Part::PreFeedForwardNorm => "ffn_norm",
        Part::Gate => "ffn_gate",
        Part::Up => "ffn_up",
        Part::Down => "ffn_down",
        Part::PostFeedForwardNorm => "post_ffw_norm",
    }
}

/// How many heads' rows are stored in another order than Hugging Face's; `None` = the tensor is stored as it is.
pub(super) fn permuted_heads(form: families::Gguf, arch: &Arch, role: Role) -> Option<usize> {
    let Role::Layer(layer_idx, part) = role else {
        return None;
    };
    let Mixer::Attention(attention) = &arch.layers.get(layer_idx)?.mixer;
    let QkvProjections::Separate { .. } = attention.projections;
    match part {
        Part::Query if form.permutes_query_and_key => Some(attention.n_heads),
        Part::Key if form.permutes_query_and_key => Some(attention.n_kv_heads),
        _ => None,
    }
}

//! Tensor names: Hugging Face's and GGUF's.

/// Tensors that a model has once.
const WHOLE_MODEL: [(&str, &str); 3] = [
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Tensors that every block has: after `model.layers.<i>.` there, `blk.<i>.` here.
const PER_BLOCK: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// What a Hugging Face tensor is called in a GGUF file.
///
/// ```
/// use planish_hub::gguf::gguf_name;
/// assert_eq!(gguf_name("model.layers.3.self_attn.q_proj.bias").as_deref(), Some("blk.3.attn_q.bias"));
/// assert_eq!(gguf_name("lm_head.weight").as_deref(), Some("output.weight"));
/// assert_eq!(gguf_name("visual.patch_embed.weight"), None);
/// ```
pub fn gguf_name(hugging_face: &str) -> Option<String> {
    let (module, suffix) = hugging_face.rsplit_once('.')?;
    if !matches!(suffix, "weight" | "bias") {
        return None;
    }
    let find = |table: &[(&str, &'static str)], name: &str| {
        table.iter().find(|(theirs, _)| *theirs == name).map(|(_, ours)| *ours)
    };
    let Some(in_block) = module.strip_prefix("model.layers.") else {
        return find(&WHOLE_MODEL, module).map(|name| format!("{name}.{suffix}"));
    };
    let (layer, part) = in_block.split_once('.')?;
    let layer_idx: usize = layer.parse().ok()?;
    find(&PER_BLOCK, part).map(|name| format!("blk.{layer_idx}.{name}.{suffix}"))
}

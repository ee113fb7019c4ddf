//! Keys that change the computation of some architecture: refused where the family's reader did not ask for them.

use serde_json::Value;

use super::keys::Keys;
use crate::Result;
use crate::families::Family;

/// The value at which a key changes nothing.
enum Neutral {
    /// Absent or null alone.
    Null,
    /// False.
    False,
    /// 0.
    Zero,
    /// 1.
    One,
    /// A list of ones.
    Ones,
    /// `silu`, under either of its names.
    Silu,
    /// A list of `full_attention`.
    FullAttention,
}

const KEYS: [(&str, Neutral); 35] = [
    ("hidden_act", Neutral::Silu),
    ("hidden_activation", Neutral::Silu),
    ("num_experts", Neutral::Zero),
    ("num_local_experts", Neutral::Zero),
    ("n_routed_experts", Neutral::Zero),
    ("moe_num_experts", Neutral::Zero),
    ("partial_rotary_factor", Neutral::One),
    ("rotary_pct", Neutral::One),
    ("embedding_multiplier", Neutral::One),
    ("residual_multiplier", Neutral::One),
    ("logits_scaling", Neutral::One),
    ("logit_scale", Neutral::One),
    ("scale_emb", Neutral::One),
    ("scale_depth", Neutral::Null),
    ("dim_model_base", Neutral::Null),
    ("final_logit_softcapping", Neutral::Null),
    ("attn_logit_softcapping", Neutral::Null),
    ("attention_multiplier", Neutral::Null),
    ("clip_qkv", Neutral::Null),
    ("query_pre_attn_scalar", Neutral::Null),
    ("rope_local_base_freq", Neutral::Null),
    ("sliding_window_pattern", Neutral::Null),
    ("use_qk_norm", Neutral::False),
    ("qk_norm", Neutral::False),
    ("attention_bias", Neutral::False),
    ("mlp_bias", Neutral::False),
    ("use_bias", Neutral::False),
    ("is_encoder_decoder", Neutral::False),
    ("add_cross_attention", Neutral::False),
    ("use_mrope", Neutral::False),
    ("use_parallel_residual", Neutral::False),
    ("use_bidirectional_attention", Neutral::False),
    ("no_rope_layers", Neutral::Ones),
    ("layer_types", Neutral::FullAttention),
    ("text_config", Neutral::Null),
];

impl Neutral {
    fn admits(&self, value: &Value) -> bool {
        let all = |word: fn(&Value) -> bool| value.as_array().is_some_and(|list| list.iter().all(word));
        match self {
            Neutral::Null => false,
            Neutral::False => value.as_bool() == Some(false),
            Neutral::Zero => value.as_u64() == Some(0),
            Neutral::One => value.as_f64() == Some(1.0),
            Neutral::Ones => all(|value| value.as_u64() == Some(1)),
            Neutral::Silu => matches!(value.as_str(), Some("silu" | "swish")),
            Neutral::FullAttention => all(|value| value.as_str() == Some("full_attention")),
        }
    }

    fn expectation(&self) -> &'static str {
        match self {
            Neutral::Null => "null or no such key",
            Neutral::False => "false or no such key",
            Neutral::Zero => "0 or no such key",
            Neutral::One => "1 or no such key",
            Neutral::Ones => "1 for every layer, or no such key",
            Neutral::Silu => "silu or no such key",
            Neutral::FullAttention => "full_attention for every layer, or no such key",
        }
    }
}

/// Refuses every key known to change the computation that `family` did not ask for, unless its value changes nothing.
pub(super) fn refuse(keys: &Keys<'_>, family: &Family) -> Result<()> {
    for (key, neutral) in &KEYS {
        if !keys.was_read(key) && keys.present(key).is_some_and(|value| !neutral.admits(value)) {
            let reason = format!("{} must have {}", family.model_type, neutral.expectation());
            return Err(keys.unsupported(key, &reason));
        }
    }
    Ok(())
}

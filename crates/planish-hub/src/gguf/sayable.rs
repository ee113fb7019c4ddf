//! What GGUF's metadata say of a model: one number for all layers, and no word for many things.

use planish_core::arch::{
    Activation, Attention, FeedForward, Layer, Mixer, NormKind, QkNormScope, Residual, Rope, RopePairs, RopeScaling,
};
use planish_core::families;
use planish_core::model_config::ModelConfig;

/// A model that can be written, and the numbers that its layers share.
pub(super) struct Sayable<'a> {
    pub(super) form: families::Gguf,
    pub(super) attention: &'a Attention,
    pub(super) rope: &'a Rope,
    pub(super) feed_forward_dims: usize,
    pub(super) eps: f32,
}

impl<'a> Sayable<'a> {
    /// # Errors
    /// What would be lost without a word, and then change the model's numbers in llama.cpp.
    pub(super) fn of(config: &'a ModelConfig) -> Result<Self, String> {
        let arch = &config.arch;
        let Some(form) = config.family.gguf else {
            return Err(format!("{} models are not written as GGUF", config.family.model_type));
        };
        let Some(first) = arch.layers.first() else {
            return Err("the model has no layers".into());
        };
        let sayable = SayableLayer::of(first)?;
        for layer in &arch.layers {
            if SayableLayer::of(layer)? != sayable {
                return Err("its layers differ, and GGUF has one number for all".into());
            }
        }
        let Some(rope) = &sayable.attention.rope else {
            return Err("GGUF has no attention without rotation".into());
        };
        let NormKind::Rms { offset } = arch.norm.kind;
        let unsayable = [
            (arch.embedding_factor != 1.0, "a factor on the embedding"),
            (arch.head.factor != 1.0, "a factor on the logits"),
            (arch.head.softcap.is_some(), "a soft cap on the logits"),
            (offset != 0.0, "norms with an offset"),
            (arch.norm.eps != sayable.eps, "norms with different epsilons"),
            (!arch.prefix.is_empty(), "a text model inside a larger one"),
            (rope.dims != sayable.attention.head_dim, "rotating a part of each head"),
            (rope.pairs != RopePairs::Halves, "rotating adjacent pairs"),
        ];
        refuse(&unsayable)?;
        match rope.scaling {
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => {}
            RopeScaling::Dynamic { .. } => return Err("GGUF has no dynamic rope scaling".into()),
            RopeScaling::Yarn { .. } => return Err("YaRN is not written as GGUF".into()),
            RopeScaling::LongRope { .. } => return Err("longrope is not written as GGUF".into()),
        }
        if sayable
            .attention
            .window
            .is_some_and(|window| window < config.max_position_embeddings)
        {
            return Err("llama.cpp has no sliding_window for this family: lower max_position_embeddings to the window (then nothing changes), or set sliding_window to null".into());
        }
        if sayable.attention.output.has_bias && !form.reads_attention_biases {
            let family = config.family.model_type;
            return Err(format!("llama.cpp reads no attention biases in {family} models"));
        }
        Ok(Self {
            form,
            attention: sayable.attention,
            rope,
            feed_forward_dims: sayable.feed_forward_dims,
            eps: sayable.eps,
        })
    }
}

/// What a layer says, to be the same in all.
#[derive(PartialEq)]
struct SayableLayer<'a> {
    attention: &'a Attention,
    feed_forward_dims: usize,
    eps: f32,
}

impl<'a> SayableLayer<'a> {
    fn of(layer: &'a Layer) -> Result<Self, String> {
        let Mixer::Attention(attention) = &layer.mixer;
        let FeedForward::Gated { activation, .. } = &layer.feed_forward;
        let activation = match activation {
            Activation::Silu => None,
            Activation::GeluTanh => Some("GELU"),
        };
        let is_parallel = match layer.residual {
            Residual::Sequential => false,
            Residual::Parallel => true,
        };
        let (Some(pre_mixer), Some(pre_feed_forward)) = (&layer.pre_mixer_norm, &layer.pre_feed_forward_norm) else {
            return Err("GGUF has no layers without a norm before each half in this family".into());
        };
        let head_norms = attention.qk_norm.iter().flat_map(|norms| [&norms.query, &norms.key]);
        let norms: Vec<_> = [pre_mixer, pre_feed_forward].into_iter().chain(head_norms).collect();
        let has_offset = norms.iter().any(|norm| match norm.kind {
            NormKind::Rms { offset } => offset != 0.0,
        });
        let is_usual_scale = (attention.scale * (attention.head_dim as f32).sqrt() - 1.0).abs() < 1e-6;
        refuse(&[
            (activation.is_some(), activation.unwrap_or_default()),
            (is_parallel, "attention and feed-forward side by side"),
            (
                layer.post_mixer_norm.is_some() || layer.post_feed_forward_norm.is_some(),
                "norms after attention or feed-forward",
            ),
            (has_offset, "norms with an offset"),
            (
                norms.iter().any(|norm| norm.eps != pre_mixer.eps),
                "norms with different epsilons",
            ),
            (layer.residual_factor != 1.0, "a factor on the residual"),
            (
                attention
                    .qk_norm
                    .as_ref()
                    .is_some_and(|norms| norms.scope != QkNormScope::Head),
                "a norm over all heads together",
            ),
            (!is_usual_scale, "a scale of attention"),
            (attention.softcap.is_some(), "a soft cap on attention"),
        ])?;
        Ok(Self {
            attention,
            feed_forward_dims: layer.feed_forward.width(),
            eps: pre_mixer.eps,
        })
    }
}

fn refuse(unsayable: &[(bool, &str)]) -> Result<(), String> {
    match unsayable.iter().find(|(is_there, _)| *is_there) {
        Some((_, capability)) => Err(format!("the GGUF export has no {capability}")),
        None => Ok(()),
    }
}

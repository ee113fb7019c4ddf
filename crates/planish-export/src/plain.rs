//! Which architectures can be exported: layers that are alike, and have nothing but what the graph says.

use planish_core::arch::{
    Activation, Arch, Attention, FeedForward, GateUp, Layer, Linear, Mixer, Norm, NormKind, QkNormScope,
    QkvProjections, Residual, Rope, RopePairs,
};
use planish_core::model_config::ModelConfig;

use crate::{Error, Result};

/// A model whose graph can be built, taken apart.
#[derive(Debug)]
pub(crate) struct Plain<'a> {
    pub(crate) config: &'a ModelConfig,
    pub(crate) arch: &'a Arch,
    pub(crate) layers: Vec<PlainLayer<'a>>,
    /// Of every layer.
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope: &'a Rope,
    pub(crate) window: Option<usize>,
    /// The smallest of all norms.
    pub(crate) eps: f32,
    /// Width of the widest feed-forward network.
    pub(crate) feed_forward_dims: usize,
}

/// A layer with a norm before each half, separate projections and a gated network.
#[derive(Debug)]
pub(crate) struct PlainLayer<'a> {
    pub(crate) path: String,
    pub(crate) mixer_norm: &'a Norm,
    pub(crate) attention: &'a Attention,
    pub(crate) query: &'a Linear,
    pub(crate) key: &'a Linear,
    pub(crate) value: &'a Linear,
    pub(crate) feed_forward_norm: &'a Norm,
    pub(crate) gate: &'a Linear,
    pub(crate) up: &'a Linear,
    pub(crate) down: &'a Linear,
}

impl<'a> Plain<'a> {
    /// Takes a model apart.
    ///
    /// # Errors
    /// [`Error::Unsupported`], which names what the export does not have.
    pub(crate) fn of(config: &'a ModelConfig) -> Result<Self> {
        let arch = &config.arch;
        let layers = arch.layers.iter().enumerate();
        let layers = layers.map(|(layer_idx, layer)| PlainLayer::of(layer, arch.layer_path(layer_idx)));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        refuse(arch.embedding_factor != 1.0, "a factor on the embedding")?;
        refuse(arch.head.factor != 1.0, "a factor on the logits")?;
        refuse(arch.head.softcap.is_some(), "a soft cap on the logits")?;
        refuse(!is_plain(&arch.norm), "norms with an offset")?;
        refuse(!arch.prefix.is_empty(), "a text model inside a larger one")?;
        let Some(first) = layers.first().map(|layer| layer.attention) else {
            return Err(Error::internal("a model without layers"));
        };
        let Some(rope) = &first.rope else {
            return refused("attention without rotation");
        };
        let differs =
            |what: fn(&Attention, &Attention) -> bool| layers.iter().any(|layer| what(layer.attention, first));
        refuse(
            differs(|one, other| one.rope != other.rope),
            "layers with different rotations",
        )?;
        refuse(
            differs(|one, other| one.window != other.window),
            "layers with different windows",
        )?;
        let heads = |one: &Attention, other: &Attention| {
            (one.n_heads, one.n_kv_heads, one.head_dim) != (other.n_heads, other.n_kv_heads, other.head_dim)
        };
        refuse(differs(heads), "layers with different heads")?;
        refuse(rope.dims != first.head_dim, "rotating a part of each head")?;
        refuse(rope.pairs != RopePairs::Halves, "rotating adjacent pairs")?;
        let norms = layers
            .iter()
            .flat_map(|layer| [layer.mixer_norm.eps, layer.feed_forward_norm.eps]);
        Ok(Self {
            config,
            arch,
            n_heads: first.n_heads,
            n_kv_heads: first.n_kv_heads,
            head_dim: first.head_dim,
            rope,
            window: first.window,
            eps: norms.fold(arch.norm.eps, f32::min),
            feed_forward_dims: layers.iter().map(|layer| layer.down.input_dims).max().unwrap_or(0),
            layers,
        })
    }

    /// Query heads that share one key and value head.
    pub(crate) fn n_queries_per_kv(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
}

impl<'a> PlainLayer<'a> {
    fn of(layer: &'a Layer, path: String) -> Result<Self> {
        let Mixer::Attention(attention) = &layer.mixer;
        let QkvProjections::Separate { query, key, value } = &attention.projections;
        let FeedForward::Gated {
            activation,
            gate_up,
            down,
        } = &layer.feed_forward;
        let GateUp::Separate { gate, up } = gate_up;
        match activation {
            Activation::Silu => {}
            Activation::GeluTanh => return refused("GELU"),
        }
        match layer.residual {
            Residual::Sequential => {}
            Residual::Parallel => return refused("attention and feed-forward side by side"),
        }
        let has_post_norms = layer.post_mixer_norm.is_some() || layer.post_feed_forward_norm.is_some();
        refuse(has_post_norms, "norms after attention or feed-forward")?;
        let (Some(mixer_norm), Some(feed_forward_norm)) = (&layer.pre_mixer_norm, &layer.pre_feed_forward_norm) else {
            return refused("layers without a norm before each half");
        };
        let head_norms = attention.qk_norm.as_ref();
        let mut norms = [mixer_norm, feed_forward_norm]
            .into_iter()
            .chain(head_norms.map(|norms| &norms.query));
        refuse(!norms.all(is_plain), "norms with an offset")?;
        refuse(
            head_norms.is_some_and(|norms| norms.scope != QkNormScope::Head),
            "a norm over all heads together",
        )?;
        refuse(layer.residual_factor != 1.0, "a factor on the residual")?;
        refuse(attention.softcap.is_some(), "a soft cap on attention")?;
        Ok(Self {
            path,
            mixer_norm,
            attention,
            query,
            key,
            value,
            feed_forward_norm,
            gate,
            up,
            down,
        })
    }
}

fn is_plain(norm: &Norm) -> bool {
    match norm.kind {
        NormKind::Rms { offset } => offset == 0.0,
    }
}

fn refuse(is_there: bool, capability: &str) -> Result<()> {
    if is_there { refused(capability) } else { Ok(()) }
}

fn refused<T>(capability: &str) -> Result<T> {
    Err(Error::Unsupported {
        what: format!("Core ML export: {capability}"),
    })
}

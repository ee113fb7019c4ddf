//! What a decoder computes, layer by layer: the one description that loading, adapters, training, estimates and exports walk.
//!
//! [`families`](crate::families) read a `config.json` into an [`Arch`]; nothing after them asks for the family. What differs between
//! layers stands in the layer: its mixer, its feed-forward network, norms, window and rotation. Consumers match the enums
//! exhaustively, so the compiler lists who does not know a new variant, and users are told which capability is missing.

mod rope;
mod walk;

pub use rope::{Rope, RopePairs, RopeScaling};
pub use walk::{ArchTensor, LinearSpec, Part, Role};

/// A decoder: embedding, layers, norm, head.
#[derive(Clone, Debug, PartialEq)]
pub struct Arch {
    /// What every tensor name begins with; empty but for a text model inside another one.
    pub prefix: &'static str,
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream, `d`.
    pub hidden_size: usize,
    /// What the embedding's vectors are multiplied by, in the dtype of the weights.
    pub embedding_factor: f32,
    /// In the order of the computation.
    pub layers: Vec<Layer>,
    /// After the last layer.
    pub norm: Norm,
    /// From hidden states to logits.
    pub head: Head,
}

/// One layer: `x + mixer(x)`, then `x + feed_forward(x)`, with norms before, after, or both.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// What lets tokens see one another.
    pub mixer: Mixer,
    /// What works on each token alone.
    pub feed_forward: FeedForward,
    /// On the mixer's input.
    pub pre_mixer_norm: Option<Norm>,
    /// On the mixer's output, before it is added.
    pub post_mixer_norm: Option<Norm>,
    /// On the feed-forward network's input.
    pub pre_feed_forward_norm: Option<Norm>,
    /// On the feed-forward network's output, before it is added.
    pub post_feed_forward_norm: Option<Norm>,
    /// How the two are joined.
    pub residual: Residual,
    /// What each of the two is multiplied by before it is added.
    pub residual_factor: f32,
}

/// How mixer and feed-forward network of a layer are joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// `h = x + mixer(x)`, `y = h + feed_forward(h)`.
    Sequential,
    /// `y = x + mixer(n) + feed_forward(n)`, `n` the mixer's norm of `x`.
    Parallel,
}

/// What lets tokens see one another.
#[derive(Clone, Debug, PartialEq)]
pub enum Mixer {
    /// Grouped-query self-attention.
    Attention(Attention),
}

/// Grouped-query attention: `softmax(cap(scale · q kᵀ) + mask) v`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head; `n_heads · head_dim` need not be the hidden size.
    pub head_dim: usize,
    /// From hidden states to queries, keys and values.
    pub projections: QkvProjections,
    /// From the heads' outputs back to the residual stream.
    pub output: Linear,
    /// Norms of q and k, before the rotation.
    pub qk_norm: Option<QkNorm>,
    /// Rotation of q and k by position; `None` = without.
    pub rope: Option<Rope>,
    /// A token attends to itself and the `window − 1` tokens before it; `None` = to all.
    pub window: Option<usize>,
    /// What scores are multiplied by; `1 / sqrt(head_dim)` unless the family says otherwise.
    pub scale: f32,
    /// Scores `z` become `c · tanh(z / c)` before the mask.
    pub softcap: Option<f32>,
}

/// How queries, keys and values are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum QkvProjections {
    /// Three matrices.
    Separate {
        /// `[n_heads · head_dim, d]`.
        query: Linear,
        /// `[n_kv_heads · head_dim, d]`.
        key: Linear,
        /// `[n_kv_heads · head_dim, d]`.
        value: Linear,
    },
}

/// Norms of queries and keys.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm {
    /// What one mean square is taken over.
    pub scope: QkNormScope,
    /// Of the queries.
    pub query: Norm,
    /// Of the keys.
    pub key: Norm,
}

/// What a norm of queries and keys is taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormScope {
    /// Each head alone; one gain of `head_dim` for all heads.
    Head,
    /// All heads together; a gain for each of their numbers.
    Width,
}

/// What works on each token alone.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForward {
    /// `down(act(gate x) ⊙ up x)`.
    Gated {
        /// `act`.
        activation: Activation,
        /// How gate and up are stored.
        gate_up: GateUp,
        /// Back to the residual stream.
        down: Linear,
    },
}

/// How the two projections of a gated network are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum GateUp {
    /// Two matrices.
    Separate {
        /// What passes the activation.
        gate: Linear,
        /// What it is multiplied by.
        up: Linear,
    },
}

/// Nonlinearity of a feed-forward network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `z · sigmoid(z)`.
    Silu,
    /// `z / 2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))`.
    GeluTanh,
}

/// A normalisation over the last axis, with a gain.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// Module name, relative to its layer; the final norm's whole path.
    pub name: &'static str,
    /// Width.
    pub dims: usize,
    /// Added to the mean square or variance.
    pub eps: f32,
    /// Its formula.
    pub kind: NormKind,
}

/// Formula of a norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + eps) · (offset + weight)`.
    Rms {
        /// 0, or 1 where the file holds the gain minus one.
        offset: f32,
    },
}

/// From hidden states to logits: `cap(factor · hidden Wᵀ)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Head {
    /// `W` is the embedding; there is no `lm_head.weight`.
    pub is_tied: bool,
    /// What logits are multiplied by.
    pub factor: f32,
    /// Logits `z` become `c · tanh(z / c)`.
    pub softcap: Option<f32>,
}

/// One linear layer of a layer: `y = x Wᵀ (+ bias)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linear {
    /// Module name, relative to its layer, such as `self_attn.q_proj`.
    pub name: &'static str,
    /// Width of `x`.
    pub input_dims: usize,
    /// Width of `y`.
    pub output_dims: usize,
    /// Whether there is a bias `[output_dims]`.
    pub has_bias: bool,
}

impl Attention {
    /// Query heads that share one key and value head.
    pub fn n_queries_per_kv(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }
}

impl FeedForward {
    /// Width between the projections.
    pub fn width(&self) -> usize {
        match self {
            FeedForward::Gated { down, .. } => down.input_dims,
        }
    }
}

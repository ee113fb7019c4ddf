use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use planish_mlx::Array;

use crate::cache::LayerCache;
use crate::dropout::DropoutKeys;
use crate::joint::Joint;
use crate::mask::{MaskRule, ReadyMask};
use crate::native::{self, Kernels};
use crate::parameters::{Parameters, Visitor, join};
use crate::{Linear, Result, RmsNorm, Rope};

/// Grouped-query self-attention with rotary positions.
///
/// `softmax(q kᵀ / sqrt(h_d) + mask) v`, computed in f32 inside; `n_h / n_kv` query heads share a key and value head.
///
/// # Reference
/// Ainslie et al. 2023, arXiv 2305.13245.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    /// Weights of query, key and value once more, as one matrix, of which they are views.
    pub(crate) joint: Option<Joint>,
    /// Norms over each head's q and k, before the rotation.
    pub(crate) query_norm: Option<RmsNorm>,
    pub(crate) key_norm: Option<RmsNorm>,
    pub(crate) n_heads: i32,
    pub(crate) n_kv_heads: i32,
    pub(crate) head_dim: i32,
    pub(crate) rope: Rope,
    pub(crate) kernels: Kernels,
}

/// Where a call stands: what may be attended to, and what came before.
pub(crate) struct Position<'a> {
    pub(crate) mask: &'a ReadyMask,
    pub(crate) offset: i32,
    pub(crate) cache: Option<&'a mut LayerCache>,
}

impl Attention {
    /// `x` `[b, s, d]` → `[b, s, d]`.
    pub(crate) fn forward(&self, x: &Array, position: Position<'_>, keys: Option<&DropoutKeys>) -> Result<Array> {
        let (rows, length) = (x.dim(0), x.dim(1));
        let layers = [&self.query, &self.key, &self.value];
        let [query, key, value] = Joint::forward_layers(self.joint.as_ref(), layers, x, keys)?;
        if self.kernels.is_native() && position.cache.is_none() && position.offset == 0 {
            let attended = self.attend_natively(&query, &key, &value, position.mask)?;
            return self.output.forward_with(&attended, keys);
        }
        let query = self.rotated_heads(&query, self.n_heads, self.query_norm.as_ref(), &position)?;
        let key = self.rotated_heads(&key, self.n_kv_heads, self.key_norm.as_ref(), &position)?;
        let value = self.heads(&value, self.n_kv_heads, None)?;
        let (key, value) = match position.cache {
            Some(cache) => cache.extend(&key, &value, position.offset)?, // [b, n_kv, t, h_d]
            None => (key, value),
        };
        let attended = self
            .attend(&query, &key, &value, position.mask)?
            .transpose_axes(&[0, 2, 1, 3])? // [b, s, n_h, h_d]
            .reshape(&[rows, length, self.n_heads * self.head_dim])?; // [b, s, n_h · h_d]
        self.output.forward_with(&attended, keys)
    }

    /// Rotation, scores and weighted sum in one kernel: projections as they come → `[b, s, n_h · h_d]`.
    fn attend_natively(&self, query: &Array, key: &Array, value: &Array, mask: &ReadyMask) -> Result<Array> {
        let normed = |projected: &Array, norm: Option<&RmsNorm>| -> Result<Array> {
            let Some(norm) = norm else { return Ok(projected.clone()) };
            let by_head = projected.reshape(&[-1, self.head_dim])?;
            Ok(norm.forward(&by_head)?.reshape(projected.shape())?)
        };
        let rule = match mask {
            ReadyMask::Full | ReadyMask::Causal => MaskRule::default(),
            ReadyMask::Array { rule, .. } => rule.clone(),
        };
        native::attention(
            native::Heads {
                n_heads: self.n_heads,
                n_kv_heads: self.n_kv_heads,
                head_dim: self.head_dim,
            },
            &self.rope.angles(query.dim(1) as usize),
            &rule,
            &normed(query, self.query_norm.as_ref())?,
            &normed(key, self.key_norm.as_ref())?,
            value,
        )
    }

    /// The same, rotated: from the call's position on, or from the beginning of each segment.
    fn rotated_heads(
        &self,
        projected: &Array,
        n_heads: i32,
        norm: Option<&RmsNorm>,
        position: &Position<'_>,
    ) -> Result<Array> {
        let heads = self.heads(projected, n_heads, norm)?;
        match position.mask {
            ReadyMask::Array {
                rule:
                    MaskRule {
                        positions: Some(positions),
                        ..
                    },
                ..
            } => self.rope.forward_at(&heads, positions),
            _ => self.rope.forward(&heads, position.offset),
        }
    }

    /// `[b, s, n · h_d]` → `[b, n, s, h_d]`.
    fn heads(&self, projected: &Array, n_heads: i32, norm: Option<&RmsNorm>) -> Result<Array> {
        let (rows, length) = (projected.dim(0), projected.dim(1));
        let split = projected.reshape(&[rows, length, n_heads, self.head_dim])?; // [b, s, n, h_d]
        let split = norm.map_or(Ok(split.clone()), |norm| norm.forward(&split))?;
        Ok(split.transpose_axes(&[0, 2, 1, 3])?)
    }

    pub(crate) fn attend(&self, query: &Array, key: &Array, value: &Array, mask: &ReadyMask) -> Result<Array> {
        let scale = (self.head_dim as f32).sqrt().recip();
        let mask = match mask {
            ReadyMask::Full => None,
            ReadyMask::Causal => Some(ScaledDotProductAttentionMask::Causal),
            ReadyMask::Array { allowed, .. } => Some(ScaledDotProductAttentionMask::Array(allowed)),
        };
        Ok(scaled_dot_product_attention(query, key, value, scale, mask, None)?)
    }
}

impl Parameters for Attention {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.query.visit(&join(path, "q_proj"), visitor);
        self.key.visit(&join(path, "k_proj"), visitor);
        self.value.visit(&join(path, "v_proj"), visitor);
        self.output.visit(&join(path, "o_proj"), visitor);
        if let Some(norm) = &mut self.query_norm {
            norm.visit(&join(path, "q_norm"), visitor);
        }
        if let Some(norm) = &mut self.key_norm {
            norm.visit(&join(path, "k_norm"), visitor);
        }
    }
}

use mlx_rs::fast::{ScaledDotProductAttentionMask, scaled_dot_product_attention};
use mlx_rs::ops::softmax_axis;
use planish_mlx::{Array, Dtype};

use crate::cache::LayerCache;
use crate::dropout::DropoutKeys;
use crate::joint::Joint;
use crate::mask::{MaskRule, ReadyMask, positions_allowed};
use crate::native::{self, Kernels};
use crate::parameters::{Named, Parameters, Visitor};
use crate::{Linear, Result, RmsNorm, Rope, softcapped};

/// Grouped-query self-attention.
///
/// `softmax(cap(scale · q kᵀ) + mask) v`, computed in f32 inside; `n_h / n_kv` query heads share a key and value head.
///
/// # Reference
/// Ainslie et al. 2023, arXiv 2305.13245.
#[derive(Debug, Clone)]
pub(crate) struct Attention {
    pub(crate) query: Named<Linear>,
    pub(crate) key: Named<Linear>,
    pub(crate) value: Named<Linear>,
    pub(crate) output: Named<Linear>,
    /// Weights of query, key and value once more, as one matrix, of which they are views.
    pub(crate) joint: Option<Joint>,
    /// Before the rotation.
    pub(crate) head_norms: Option<HeadNorms>,
    pub(crate) n_heads: i32,
    pub(crate) n_kv_heads: i32,
    pub(crate) head_dim: i32,
    /// `None` = q and k are not rotated.
    pub(crate) rope: Option<Rope>,
    /// How many of the latest tokens, itself among them, a token attends to.
    pub(crate) window: Option<i32>,
    pub(crate) scale: f32,
    pub(crate) softcap: Option<f32>,
    pub(crate) kernels: Kernels,
}

/// Norms of q and k.
#[derive(Debug, Clone)]
pub(crate) struct HeadNorms {
    /// Over each head alone, else over all of them together.
    pub(crate) is_per_head: bool,
    pub(crate) query: Named<RmsNorm>,
    pub(crate) key: Named<RmsNorm>,
}

/// Where a call stands: what may be attended to, and what came before.
pub(crate) struct Position<'a> {
    pub(crate) mask: &'a ReadyMask,
    pub(crate) offset: i32,
    pub(crate) cache: Option<&'a mut LayerCache>,
}

impl Attention {
    pub(crate) const N_LINEARS: usize = 4;

    /// `x` `[b, s, d]` → `[b, s, d]`.
    pub(crate) fn forward(&self, x: &Array, position: Position<'_>, keys: Option<&DropoutKeys>) -> Result<Array> {
        let layers = [&*self.query, &self.key, &self.value];
        let [query, key, value] = Joint::forward_layers(self.joint.as_ref(), layers, x, keys)?;
        let query = self.normed(query, |norms| &norms.query)?;
        let key = self.normed(key, |norms| &norms.key)?;
        let attended = match self.has_native_kernel(&position) {
            true => self.attend_natively(&query, &key, &value, position.mask)?,
            false => self.attend_composed(&query, &key, &value, position)?,
        };
        self.output.forward_with(&attended, keys)
    }

    /// Whether our own kernel of the CPU applies: to whole rows, from their beginning.
    fn has_native_kernel(&self, position: &Position<'_>) -> bool {
        let is_whole = position.cache.is_none() && position.offset == 0;
        self.kernels.is_native() && is_whole && self.native_obstacle().is_none()
    }

    /// What our own kernel of the CPU is not written for, where there is something.
    pub(crate) fn native_obstacle(&self) -> Option<&'static str> {
        match &self.rope {
            None => Some("no rotation"),
            Some(rope) if !rope.turns_halves() => Some("a rotation that does not turn halves of whole heads"),
            Some(_) => self.softcap.map(|_| "a soft cap on scores"),
        }
    }

    /// Rotation, scores and weighted sum in one kernel: projections as they come → `[b, s, n_h · h_d]`.
    fn attend_natively(&self, query: &Array, key: &Array, value: &Array, mask: &ReadyMask) -> Result<Array> {
        let rule = match mask {
            ReadyMask::Full | ReadyMask::Causal => MaskRule::default(),
            ReadyMask::Array { rule, .. } => rule.clone(),
        };
        let heads = native::Heads {
            n_heads: self.n_heads,
            n_kv_heads: self.n_kv_heads,
            head_dim: self.head_dim,
        };
        let angles = self
            .rope
            .as_ref()
            .map(|rope| rope.angles(query.dim(1) as usize))
            .unwrap_or_default();
        // The kernel multiplies scores by 1 / sqrt(h_d).
        let query = match self.scale * (self.head_dim as f32).sqrt() {
            factor if (factor - 1.0).abs() < f32::EPSILON => query.clone(),
            factor => query.multiply(Array::from_f32(factor))?,
        };
        native::attention(heads, &angles, &rule, &query, key, value)
    }

    /// The same by MLX's operations, after what the cache holds.
    fn attend_composed(&self, query: &Array, key: &Array, value: &Array, position: Position<'_>) -> Result<Array> {
        let shape = query.shape().to_vec();
        let query = self.rotated(&self.heads(query, self.n_heads)?, &position)?;
        let key = self.rotated(&self.heads(key, self.n_kv_heads)?, &position)?;
        let value = self.heads(value, self.n_kv_heads)?;
        let (key, value) = match position.cache {
            Some(cache) => cache.extend(&key, &value, position.offset, self.window)?, // [b, n_kv, t, h_d]
            None => (key, value),
        };
        let attended = self.attend(&query, &key, &value, position.mask)?;
        Ok(attended.transpose_axes(&[0, 2, 1, 3])?.reshape(&shape)?) // [b, s, n_h · h_d]
    }

    /// `[b, s, n · h_d]` → the same, normed.
    fn normed(&self, projected: Array, norm: impl Fn(&HeadNorms) -> &RmsNorm) -> Result<Array> {
        match &self.head_norms {
            None => Ok(projected),
            Some(norms) if norms.is_per_head => {
                let by_head = projected.reshape(&[projected.dim(0), projected.dim(1), -1, self.head_dim])?;
                Ok(norm(norms).forward(&by_head)?.reshape(projected.shape())?)
            }
            Some(norms) => norm(norms).forward(&projected),
        }
    }

    /// `[b, n, s, h_d]`, rotated from the call's position on, or from the beginning of each segment.
    fn rotated(&self, heads: &Array, position: &Position<'_>) -> Result<Array> {
        let Some(rope) = &self.rope else {
            return Ok(heads.clone());
        };
        match position.mask {
            ReadyMask::Array {
                rule:
                    MaskRule {
                        positions: Some(positions),
                        ..
                    },
                ..
            } => rope.forward_at(heads, positions),
            _ => rope.forward(heads, position.offset),
        }
    }

    /// `[b, s, n · h_d]` → `[b, n, s, h_d]`.
    fn heads(&self, projected: &Array, n_heads: i32) -> Result<Array> {
        let (rows, length) = (projected.dim(0), projected.dim(1));
        let split = projected.reshape(&[rows, length, n_heads, self.head_dim])?; // [b, s, n, h_d]
        Ok(split.transpose_axes(&[0, 2, 1, 3])?)
    }

    /// Scores and weighted sum: `query` `[b, n_h, s, h_d]`, `key` and `value` `[b, n_kv, t, h_d]` → `[b, n_h, s, h_d]`.
    pub(crate) fn attend(&self, query: &Array, key: &Array, value: &Array, mask: &ReadyMask) -> Result<Array> {
        if let Some(cap) = self.softcap {
            return self.attend_capped(query, key, value, mask, cap);
        }
        let mask = match mask {
            ReadyMask::Full => None,
            ReadyMask::Causal => Some(ScaledDotProductAttentionMask::Causal),
            ReadyMask::Array { allowed, .. } => Some(ScaledDotProductAttentionMask::Array(allowed)),
        };
        Ok(scaled_dot_product_attention(query, key, value, self.scale, mask, None)?)
    }

    /// The same with all scores in memory, which a cap needs: MLX's fused attention has none.
    fn attend_capped(&self, query: &Array, key: &Array, value: &Array, mask: &ReadyMask, cap: f32) -> Result<Array> {
        let (length, total) = (query.dim(2), key.dim(2));
        let by_group = [query.dim(0), self.n_kv_heads, -1, length, self.head_dim];
        let query = query.multiply(Array::from_f32(self.scale).as_dtype(query.dtype())?)?;
        let grouped = query.reshape(&by_group)?; // [b, n_kv, n_h / n_kv, s, h_d]
        let scores = grouped.matmul(key.expand_dims(2)?.swap_axes(-1, -2)?)?; // [b, n_kv, n_h / n_kv, s, t]
        let scores = softcapped(&scores.as_dtype(Dtype::Float32)?, cap)?;
        let scores = match mask {
            ReadyMask::Full => scores,
            ReadyMask::Causal => visible(&scores, &positions_allowed(total - length, length, None)?)?,
            ReadyMask::Array { allowed, .. } => visible(&scores, allowed)?,
        };
        let weights = softmax_axis(scores, -1, true)?.as_dtype(value.dtype())?;
        Ok(weights.matmul(value.expand_dims(2)?)?.reshape(query.shape())?)
    }

    /// Its linear layers, in the order of the computation.
    pub(crate) fn linears_mut(&mut self) -> [&mut Named<Linear>; Self::N_LINEARS] {
        [&mut self.query, &mut self.key, &mut self.value, &mut self.output]
    }
}

/// Scores `[b, n_kv, g, s, t]`, those not allowed by `[1 or b, 1, s, t]` too low to count.
fn visible(scores: &Array, allowed: &Array) -> Result<Array> {
    Ok(mlx_rs::ops::select(
        allowed.expand_dims(2)?,
        scores,
        Array::from_f32(f32::MIN),
    )?)
}

impl Parameters for Attention {
    /// `path` is that of the layer.
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.linears_mut()
            .into_iter()
            .for_each(|linear| linear.visit(path, visitor));
        if let Some(norms) = &mut self.head_norms {
            norms.query.visit(path, visitor);
            norms.key.visit(path, visitor);
        }
    }
}

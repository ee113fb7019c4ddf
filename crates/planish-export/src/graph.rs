//! The decoder as MIL operations: what the Neural Engine is reported to like.
//!
//! Hidden states are `[1, t, d]`, every linear layer is a 1×1 convolution on `[1, c, 1, t]`, and no tensor has more than
//! four dimensions. Letters: `t` tokens of a call, `d` hidden size, `h` query heads, `kv` key and value heads, `hd` head
//! size, `ctx` context length, `v` vocabulary.

use std::ops::Range;

use coreml_mil::{DType, Error, FunctionBuilder, Result, State, Tensor, TensorType};
use half::f16;
use planish_core::arch::{Linear, LinearSpec, Norm};
use planish_tensors::LowRank;

use crate::{
    plain::Plain,
    rope::rope_tables,
    weights::{Encoded, WeightFormat, WeightPlan},
};

/// What all functions of an export have in common.
pub(crate) struct Decoder<'a> {
    pub(crate) model: &'a Plain<'a>,
    /// Positions that the cache holds.
    pub(crate) context: usize,
    /// Parts of the head; divides the vocabulary.
    pub(crate) head_parts: usize,
    /// Form of the linear layers; that of the head follows from it.
    pub(crate) format: WeightFormat,
    /// Epsilon of every norm, at least.
    pub(crate) min_epsilon: f32,
    /// Low-rank updates kept beside the base weights: `(name of the adapter, its layers)`.
    pub(crate) kept: Option<(&'a str, &'a std::collections::BTreeMap<String, LowRank>)>,
}

/// Where keys and values of earlier tokens are.
pub(crate) enum Cache<'a> {
    /// In a Core ML state; `position` `[1]` is where this call writes.
    State { state: &'a State, position: &'a Tensor },
    /// In an input `[2·layers, kv, ctx, hd]`; new ones are returned.
    Host { cache: &'a Tensor },
}

/// Inputs that every layer reads.
pub(crate) struct Context {
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    /// Cache window of this call: `(pos, pos + t)`, both `[1]`; state only.
    span: Option<(Tensor, Tensor)>,
}

impl Decoder<'_> {
    /// Type of the cache, `[2·layers, kv, ctx, hd]`: keys of layer i in row i, values in row layers + i.
    pub(crate) fn cache_type(&self) -> TensorType {
        let c = self.model;
        TensorType::new(
            DType::F16,
            &[2 * c.layers.len(), c.n_kv_heads, self.context, c.head_dim],
        )
    }

    /// Rows of the embedding, `[.., d]`.
    pub(crate) fn embed(&self, b: &mut FunctionBuilder, plan: &mut WeightPlan, ids: &Tensor) -> Result<Tensor> {
        b.scope("embed_tokens_");
        let arch = self.model.arch;
        let (v, d) = (arch.vocab_size, arch.hidden_size);
        let table = b.blob(&plan.dense(&format!("{}.weight", arch.embedding_path()), 0..v, &[v, d])?)?;
        b.gather(&table, ids)
    }

    /// Rotary rows, mask and cache window, once a call.
    pub(crate) fn context(
        &self,
        b: &mut FunctionBuilder,
        plan: &mut WeightPlan,
        positions: &Tensor,
        mask: &Tensor,
        cache: &Cache,
    ) -> Result<Context> {
        b.scope("rotary_");
        let tokens = positions.shape()[0];
        let [cos, sin] = self.rotary(b, plan, positions)?;
        b.scope("mask_");
        // Query heads that share a key head become rows of one matrix, so the mask is repeated, not the cache.
        let ratio = self.model.n_queries_per_kv();
        let mask = if ratio > 1 {
            b.tile(mask, &[1, 1, ratio, 1])?
        } else {
            mask.clone()
        };
        b.scope("cache_");
        let span = match cache {
            Cache::State { position, .. } => {
                let count = b.scalar_i32(tokens as i32)?;
                Some(((*position).clone(), b.add(position, &count)?))
            }
            Cache::Host { .. } => None,
        };
        Ok(Context { cos, sin, mask, span })
    }

    /// Rows of the rotary tables for the given positions, `[1, 1, t, hd]` each.
    ///
    /// A table is the sum of two: its numbers rounded to fp16, and what the rounding left. In fp16 arithmetic the sum is
    /// the first table again; in f32 it is exact to 2⁻²². Rounded tables alone moved SmolLM2's
    /// logits by 0.01; nearly all of what f32 arithmetic errs on stored weights.
    fn rotary(&self, b: &mut FunctionBuilder, plan: &mut WeightPlan, positions: &Tensor) -> Result<[Tensor; 2]> {
        let mut table = |label: &str, sine: bool| -> Result<Tensor> {
            let main = self.rotary_rows(b, plan, positions, label, sine, f16::from_f32)?;
            let rest = |v: f32| f16::from_f32(v - f16::from_f32(v).to_f32());
            let rest = self.rotary_rows(b, plan, positions, &format!("{label} rest"), sine, rest)?;
            let rows = b.add(&main, &rest)?; // [t, hd]
            b.reshape(&rows, &[1, 1, positions.shape()[0], self.model.head_dim])
        };
        Ok([table("rotary cos", false)?, table("rotary sin", true)?])
    }

    fn rotary_rows(
        &self,
        b: &mut FunctionBuilder,
        plan: &mut WeightPlan,
        positions: &Tensor,
        label: &str,
        sine: bool,
        part: impl Fn(f32) -> f16,
    ) -> Result<Tensor> {
        let values = || {
            let (cos, sin) = rope_tables(self.model.rope, self.context);
            (if sine { sin } else { cos }).into_iter().map(part).collect()
        };
        let table = b.blob(&plan.table(label, values, &[self.context, self.model.head_dim])?)?;
        b.gather(&table, positions)
    }

    /// Layers of the decoder on `x [1, t, d]`. With a host cache also the new keys and values `[2·layers, kv, t, hd]`.
    pub(crate) fn layers(
        &self,
        b: &mut FunctionBuilder,
        plan: &mut WeightPlan,
        x: &Tensor,
        context: &Context,
        cache: &Cache,
        layers: Range<usize>,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let mut x = x.clone();
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for layer_idx in layers {
            let (attended, k, v) = self.attention(b, plan, &x, context, cache, layer_idx)?;
            x = b.add(&x, &attended)?;
            let mlp = self.mlp(b, plan, &x, layer_idx)?;
            x = b.add(&x, &mlp)?;
            keys.push(k);
            values.push(v);
        }
        if matches!(cache, Cache::State { .. }) {
            return Ok((x, None));
        }
        b.scope("cache_");
        let rows: Vec<&Tensor> = keys.iter().chain(&values).collect();
        Ok((x, Some(b.concat(&rows, 0)?)))
    }

    fn attention(
        &self,
        b: &mut FunctionBuilder,
        plan: &mut WeightPlan,
        x: &Tensor,
        context: &Context,
        cache: &Cache,
        layer_idx: usize,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let (c, layer) = (self.model, &self.model.layers[layer_idx]);
        let (tokens, hd) = (x.shape()[1], c.head_dim);
        b.scope(format!("layers_{layer_idx}_attention_"));
        let normed = self.norm(b, plan, x, layer.mixer_norm, &layer.path)?;
        let normed = to_channels(b, &normed)?; // [1, d, 1, t]
        let (h, kv) = (c.n_heads, c.n_kv_heads);
        let mut project =
            |b: &mut FunctionBuilder, linear: &Linear, heads: usize, norm: Option<&Norm>| -> Result<Tensor> {
                let y = self.linear(b, plan, &normed, &linear.at(&layer.path))?;
                let y = b.reshape(&y, &[1, heads, hd, tokens])?;
                let y = b.transpose(&y, &[0, 1, 3, 2])?; // [1, heads, t, hd]
                match norm {
                    Some(norm) => self.norm(b, plan, &y, norm, &layer.path),
                    None => Ok(y),
                }
            };
        let norms = layer.attention.qk_norm.as_ref();
        let q = project(b, layer.query, h, norms.map(|norms| &norms.query))?;
        let k = project(b, layer.key, kv, norms.map(|norms| &norms.key))?;
        let new_v = project(b, layer.value, kv, None)?;
        let q = rotate(b, &q, context)?;
        let new_k = rotate(b, &k, context)?;
        let (k, v) = self.remember(b, context, cache, layer_idx, &new_k, &new_v)?; // [1, kv, ctx (+ t), hd]
        let q = b.scale(&q, layer.attention.scale)?;
        let q = b.reshape(&q, &[1, kv, h / kv * tokens, hd])?;
        let scores = b.matmul(&q, &k, true)?;
        let scores = b.add(&scores, &context.mask)?;
        let weights = b.softmax(&scores, -1)?;
        let y = b.matmul(&weights, &v, false)?;
        let y = b.reshape(&y, &[1, h, tokens, hd])?;
        let y = b.transpose(&y, &[0, 1, 3, 2])?;
        let y = b.reshape(&y, &[1, h * hd, 1, tokens])?;
        let y = self.linear(b, plan, &y, &layer.attention.output.at(&layer.path))?;
        Ok((to_tokens(b, &y)?, new_k, new_v))
    }

    fn mlp(&self, b: &mut FunctionBuilder, plan: &mut WeightPlan, x: &Tensor, layer_idx: usize) -> Result<Tensor> {
        let layer = &self.model.layers[layer_idx];
        b.scope(format!("layers_{layer_idx}_mlp_"));
        let y = self.norm(b, plan, x, layer.feed_forward_norm, &layer.path)?;
        let y = to_channels(b, &y)?;
        let gate = self.linear(b, plan, &y, &layer.gate.at(&layer.path))?;
        let gate = b.silu(&gate)?;
        let up = self.linear(b, plan, &y, &layer.up.at(&layer.path))?;
        let y = b.mul(&gate, &up)?;
        let y = self.linear(b, plan, &y, &layer.down.at(&layer.path))?;
        to_tokens(b, &y)
    }

    /// Final norm of `x [1, t, d]`.
    pub(crate) fn final_norm(&self, b: &mut FunctionBuilder, plan: &mut WeightPlan, x: &Tensor) -> Result<Tensor> {
        b.scope("final_");
        self.norm(b, plan, x, &self.model.arch.norm, "")
    }

    /// The head on `x [1, t, d]`, as parts `[1, t, v / parts]` in the order of token ids.
    pub(crate) fn logits(&self, b: &mut FunctionBuilder, plan: &mut WeightPlan, x: &Tensor) -> Result<Vec<Tensor>> {
        let arch = self.model.arch;
        b.scope("lm_head_");
        let module = match arch.head.is_tied {
            true => arch.embedding_path(),
            false => arch.head_path(),
        };
        let tensor = format!("{module}.weight");
        let rows = arch.vocab_size / self.head_parts;
        let x = to_channels(b, x)?;
        (0..self.head_parts)
            .map(|part| {
                let weight = plan.conv(
                    &tensor,
                    part * rows..(part + 1) * rows,
                    arch.hidden_size,
                    self.format.of_head(),
                )?;
                let weight = weight_tensor(b, &weight)?;
                let y = b.conv(&x, &weight, None)?;
                to_tokens(b, &y)
            })
            .collect()
    }

    /// RMSNorm over the last axis, as a layer norm of `[x, −x]`: the mean of that is zero, so its variance is the mean
    /// square, and no square of an fp16 number is formed in the graph.
    fn norm(
        &self,
        b: &mut FunctionBuilder,
        plan: &mut WeightPlan,
        x: &Tensor,
        norm: &Norm,
        path: &str,
    ) -> Result<Tensor> {
        let shape = x.shape();
        let width = shape[shape.len() - 1];
        let negative = b.scale(x, -1.0)?;
        let mirrored = b.concat(&[x, &negative], -1)?;
        let normed = b.layer_norm(&mirrored, norm.eps.max(self.min_epsilon))?;
        let normed = b.slice(&normed, &vec![0; shape.len()], &shape)?;
        let gain = format!("{}.weight", norm.at(path));
        let gain = b.blob(&plan.dense(&gain, 0..width, &[width])?)?;
        b.mul(&normed, &gain)
    }

    /// A linear layer on `x [1, in, 1, t]`.
    fn linear(
        &self,
        b: &mut FunctionBuilder,
        plan: &mut WeightPlan,
        x: &Tensor,
        linear: &LinearSpec,
    ) -> Result<Tensor> {
        let (module, rows) = (linear.path.as_str(), linear.output_dims);
        let weight = plan.conv(&format!("{module}.weight"), 0..rows, linear.input_dims, self.format)?;
        let weight = weight_tensor(b, &weight)?;
        let bias = match linear.has_bias {
            true => Some(b.blob(&plan.dense(&format!("{module}.bias"), 0..rows, &[rows])?)?),
            false => None,
        };
        let y = b.conv(x, &weight, bias.as_ref())?;
        match self
            .kept
            .and_then(|(name, layers)| layers.get(&format!("{module}.weight")).map(|delta| (name, delta)))
        {
            Some((name, delta)) => low_rank(b, plan, x, &y, name, module, delta),
            None => Ok(y),
        }
    }

    /// Keys and values that this call attends to, `[1, kv, ctx (+ t), hd]`: the cache with the new ones.
    fn remember(
        &self,
        b: &mut FunctionBuilder,
        context: &Context,
        cache: &Cache,
        layer_idx: usize,
        new_k: &Tensor,
        new_v: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let rows = [(layer_idx, new_k), (self.model.layers.len() + layer_idx, new_v)];
        let [k, v] = match cache {
            Cache::State { state, .. } => {
                for (row, new) in rows {
                    self.write_row(b, context, state, row, new)?;
                }
                let cached = b.read_state(state)?; // after the writes, so it holds them
                rows.map(|(row, _)| self.cache_row(b, &cached, row))
            }
            Cache::Host { cache } => rows.map(|(row, new)| {
                let earlier = self.cache_row(b, cache, row)?;
                b.concat(&[&earlier, new], 2)
            }),
        };
        Ok((k?, v?))
    }

    fn write_row(
        &self,
        b: &mut FunctionBuilder,
        context: &Context,
        state: &State,
        row: usize,
        new: &Tensor,
    ) -> Result<()> {
        let (from, to) = context.span.as_ref().ok_or_else(|| Error::Internal {
            problem: "a state without a position".into(),
        })?;
        let (zero, hd) = (b.vector(&[0])?, b.vector(&[self.model.head_dim as i32])?);
        let first = b.vector(&[row as i32, 0])?;
        let last = b.vector(&[row as i32 + 1, self.model.n_kv_heads as i32])?;
        let begin = b.concat(&[&first, from, &zero], 0)?;
        let end = b.concat(&[&last, to, &hd], 0)?;
        let before = b.read_state(state)?;
        let after = b.slice_update(&before, new, &begin, &end)?;
        b.write_state(state, &after)
    }

    /// One row `[1, kv, ctx, hd]` of the cache.
    fn cache_row(&self, b: &mut FunctionBuilder, cache: &Tensor, row: usize) -> Result<Tensor> {
        let c = self.model;
        b.slice(
            cache,
            &[row, 0, 0, 0],
            &[row + 1, c.n_kv_heads, self.context, c.head_dim],
        )
    }
}

/// `y + B (A x)`: an adapter beside its base weight, so that functions with and without it share the base.
fn low_rank(
    b: &mut FunctionBuilder,
    plan: &mut WeightPlan,
    x: &Tensor,
    y: &Tensor,
    name: &str,
    module: &str,
    delta: &LowRank,
) -> Result<Tensor> {
    let ([output_dims, input_dims], rank) = (delta.shape(), delta.rank());
    let down = plan.table(
        &format!("{name} {module} A"),
        || delta.right().iter().copied().map(f16::from_f32).collect(),
        &[rank, input_dims, 1, 1],
    )?;
    let up = plan.table(
        &format!("{name} {module} B"),
        || delta.scaled_left().map(f16::from_f32).collect(),
        &[output_dims, rank, 1, 1],
    )?;
    let (down, up) = (b.blob(&down)?, b.blob(&up)?);
    let update = b.conv(x, &down, None)?;
    let update = b.conv(&update, &up, None)?;
    b.add(y, &update)
}

fn weight_tensor(b: &mut FunctionBuilder, weight: &Encoded) -> Result<Tensor> {
    match weight {
        Encoded::Plain(blob) => b.blob(blob),
        Encoded::Scaled(data, scale) => b.blockwise_shift_scale(data, scale),
        Encoded::Indexed(indices, lut) => b.lut_to_dense(indices, lut),
    }
}

/// `[1, t, c]` → `[1, c, 1, t]`
fn to_channels(b: &mut FunctionBuilder, x: &Tensor) -> Result<Tensor> {
    let x = b.transpose(x, &[0, 2, 1])?;
    b.expand_dims(&x, 2)
}

/// `[1, c, 1, t]` → `[1, t, c]`
fn to_tokens(b: &mut FunctionBuilder, x: &Tensor) -> Result<Tensor> {
    let x = b.squeeze(x, 2)?;
    b.transpose(&x, &[0, 2, 1])
}

/// `x·cos + [−high, low]·sin` on `[1, n, t, hd]`.
fn rotate(b: &mut FunctionBuilder, x: &Tensor, context: &Context) -> Result<Tensor> {
    let shape = x.shape();
    let (half, mut low_end, mut high_begin) = (shape[3] / 2, shape.clone(), vec![0; 4]);
    (low_end[3], high_begin[3]) = (half, half);
    let low = b.slice(x, &[0; 4], &low_end)?;
    let high = b.slice(x, &high_begin, &shape)?;
    let high = b.scale(&high, -1.0)?;
    let turned = b.concat(&[&high, &low], -1)?;
    let (straight, turned) = (b.mul(x, &context.cos)?, b.mul(&turned, &context.sin)?);
    b.add(&straight, &turned)
}

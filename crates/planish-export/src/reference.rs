//! The f32 forward pass that packages are judged by, written for clarity and bounded memory, without MLX.
//!
//! It reads each weight once, a few megabytes at a time, for all tokens of a call. It shares no code with the graph: it is
//! itself compared with mlx-lm's logits (tests/it).

use std::collections::BTreeMap;

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, s};
use planish_core::arch::{
    Activation, Arch, Attention, FeedForward, GateUp, Layer, LinearSpec, Mixer, Norm, NormKind, QkvProjections,
    Residual, Rope, RopePairs,
};
use planish_core::model_config::ModelConfig;
use rayon::prelude::*;

use crate::{Error, Result, rope::rope_tables, weights::Rows};

const BLOCK_ELEMENTS: usize = 1 << 19;

/// What a pass over some text showed about the activations.
#[derive(Clone, Debug, Default)]
pub struct Activations {
    /// Largest magnitude by place, such as `layers.3 residual`.
    pub peaks: BTreeMap<String, f32>,
    /// Mean share of each input in the squares of its token, by module path of the linear layer or head.
    pub importance: BTreeMap<String, Vec<f32>>,
}

/// Logits of token sequences, `[total tokens, vocab]`, one sequence after the other, each from position 0.
///
/// # Errors
/// [`Error::Unsupported`] for an architecture with parts that the pass does not have; [`Error::Option`] for a token outside
/// the vocabulary; errors of the weights ([`Rows::rows`]).
pub fn forward(
    config: &ModelConfig,
    source: &dyn Rows,
    sequences: &[&[u32]],
    mut seen: Option<&mut Activations>,
) -> Result<Array2<f32>> {
    let arch = &config.arch;
    let lengths = sequences.iter().map(|s| s.len()).collect();
    let pass = Pass { arch, source, lengths };
    let mut x = pass.embed(sequences)? * arch.embedding_factor;
    for (layer_idx, layer) in arch.layers.iter().enumerate() {
        let path = arch.layer_path(layer_idx);
        x = pass.layer(layer, &path, x, &mut seen)?;
        note(&mut seen, format!("layers.{layer_idx} residual"), &x);
    }
    let x = pass.norm(&x, Some(&arch.norm), arch.prefix.trim_end_matches('.'))?;
    pass.see_input(&head_module(config), &x, &mut seen);
    let mut logits = pass.matrix(head_tensor(config), &x)? * arch.head.factor;
    if let Some(cap) = arch.head.softcap {
        logits.mapv_inplace(|z| cap * (z / cap).tanh());
    }
    note(&mut seen, "logits".into(), &logits);
    Ok(logits)
}

/// Name under which [`Rows`] gives the head. A source may store a tied head apart from the embedding.
pub fn head_tensor(config: &ModelConfig) -> &'static str {
    match config.arch.head.is_tied {
        true => TIED_HEAD,
        false => "lm_head.weight",
    }
}

/// Module path of the matrix that the head multiplies with: the embedding's where they are tied.
fn head_module(config: &ModelConfig) -> String {
    match config.arch.head.is_tied {
        true => config.arch.embedding_path(),
        false => config.arch.head_path(),
    }
}

/// The head of a model that has no tensor of its own for it.
pub const TIED_HEAD: &str = "model.embed_tokens.weight (as head)";

/// Mean negative log-likelihood of each next token of the sequences, from their logits; and how many were counted.
pub fn next_token_loss(logits: ArrayView2<f32>, sequences: &[&[u32]]) -> (f64, usize) {
    let (mut row, mut total, mut count) = (0, 0f64, 0);
    for tokens in sequences {
        for next in &tokens[1..] {
            total += negative_log_likelihood(logits.row(row).iter().copied(), *next as usize);
            count += 1;
            row += 1;
        }
        row += 1; // the last token has no next
    }
    (total / count.max(1) as f64, count)
}

fn negative_log_likelihood(logits: impl Iterator<Item = f32> + Clone, target: usize) -> f64 {
    let max = logits.clone().fold(f32::MIN, f32::max);
    let sum: f64 = logits.clone().map(|v| f64::from(v - max).exp()).sum();
    sum.ln() - f64::from(logits.clone().nth(target).unwrap_or(f32::NAN) - max)
}

struct Pass<'a> {
    arch: &'a Arch,
    source: &'a dyn Rows,
    lengths: Vec<usize>,
}

impl Pass<'_> {
    fn embed(&self, sequences: &[&[u32]]) -> Result<Array2<f32>> {
        let (v, d) = (self.arch.vocab_size, self.arch.hidden_size);
        let table = format!("{}.weight", self.arch.embedding_path());
        let mut x = Array2::zeros((self.lengths.iter().sum(), d));
        for (mut row, &token) in x.rows_mut().into_iter().zip(sequences.iter().copied().flatten()) {
            let token = token as usize;
            if token >= v {
                return Err(Error::option("token", token, format!("0 to {}, the vocabulary", v - 1)));
            }
            row.assign(&Array1::from(self.source.rows(&table, token..token + 1)?));
        }
        Ok(x)
    }

    fn layer(
        &self,
        layer: &Layer,
        path: &str,
        x: Array2<f32>,
        seen: &mut Option<&mut Activations>,
    ) -> Result<Array2<f32>> {
        let Mixer::Attention(attention) = &layer.mixer;
        let normed = self.norm(&x, layer.pre_mixer_norm.as_ref(), path)?;
        let mixed = self.attention(attention, path, &normed, seen)?;
        let mixed = self.norm(&mixed, layer.post_mixer_norm.as_ref(), path)?;
        let joined = x + mixed * layer.residual_factor;
        let fed = match layer.residual {
            Residual::Sequential => self.norm(&joined, layer.pre_feed_forward_norm.as_ref(), path)?,
            Residual::Parallel => normed,
        };
        let fed = self.feed_forward(&layer.feed_forward, path, &fed, seen)?;
        let fed = self.norm(&fed, layer.post_feed_forward_norm.as_ref(), path)?;
        Ok(joined + fed * layer.residual_factor)
    }

    fn attention(
        &self,
        attention: &Attention,
        path: &str,
        x: &Array2<f32>,
        seen: &mut Option<&mut Activations>,
    ) -> Result<Array2<f32>> {
        let QkvProjections::Separate { query, key, value } = &attention.projections;
        let mut q = self.linear(&query.at(path), x, seen)?; // [n, heads · hd]
        let mut k = self.linear(&key.at(path), x, seen)?;
        let v = self.linear(&value.at(path), x, seen)?;
        if let Some(norms) = &attention.qk_norm {
            // A norm over all heads together is as wide as the row.
            q = self.norm(&q, Some(&norms.query), path)?;
            k = self.norm(&k, Some(&norms.key), path)?;
        }
        if let Some(rope) = &attention.rope {
            self.rotate_heads(&mut q, rope, attention.head_dim)?;
            self.rotate_heads(&mut k, rope, attention.head_dim)?;
        }
        let mut out = Array2::zeros((x.nrows(), attention.n_heads * attention.head_dim));
        let mut first = 0;
        for &length in &self.lengths {
            let span = s![first..first + length, ..];
            let attended = attend(attention, q.slice(span), k.slice(span), v.slice(span), seen);
            out.slice_mut(span).assign(&attended);
            first += length;
        }
        self.linear(&attention.output.at(path), &out, seen)
    }

    fn feed_forward(
        &self,
        feed_forward: &FeedForward,
        path: &str,
        x: &Array2<f32>,
        seen: &mut Option<&mut Activations>,
    ) -> Result<Array2<f32>> {
        let FeedForward::Gated {
            activation,
            gate_up,
            down,
        } = feed_forward;
        let GateUp::Separate { gate, up } = gate_up;
        let activate = match activation {
            Activation::Silu => |z: f32| z / (1.0 + (-z).exp()),
            Activation::GeluTanh => |z: f32| {
                let inner = (2.0 / std::f32::consts::PI).sqrt() * (z + 0.044_715 * z * z * z);
                0.5 * z * (1.0 + inner.tanh())
            },
        };
        let mut gated = self.linear(&gate.at(path), x, seen)?;
        let up = self.linear(&up.at(path), x, seen)?;
        Zip::from(&mut gated).and(&up).for_each(|g, u| *g = activate(*g) * u);
        self.linear(&down.at(path), &gated, seen)
    }

    /// Norms each part of a row that is as wide as the norm; `x` itself without one.
    fn norm(&self, x: &Array2<f32>, norm: Option<&Norm>, path: &str) -> Result<Array2<f32>> {
        let mut out = x.clone();
        let Some(norm) = norm else {
            return Ok(out);
        };
        let NormKind::Rms { offset } = norm.kind;
        let gain = self.source.all(&format!("{}.weight", norm.at(path)))?;
        for mut row in out.rows_mut() {
            for mut part in row.axis_chunks_iter_mut(Axis(0), norm.dims) {
                let squares = part.iter().map(|v| f64::from(*v) * f64::from(*v));
                let mean = squares.sum::<f64>() / norm.dims as f64;
                let scale = (1.0 / (mean + f64::from(norm.eps)).sqrt()) as f32;
                part.iter_mut().zip(&gain).for_each(|(v, g)| *v *= scale * (offset + g));
            }
        }
        Ok(out)
    }

    fn rotate_heads(&self, x: &mut Array2<f32>, rope: &Rope, head_dim: usize) -> Result<()> {
        if rope.pairs != RopePairs::Halves {
            return Err(Error::Unsupported {
                what: "the check of a rotation of adjacent pairs".into(),
            });
        }
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let (cos, sin) = rope_tables(rope, longest);
        let (dims, half) = (rope.dims, rope.dims / 2);
        let positions = self.lengths.iter().flat_map(|&length| 0..length);
        for (mut row, position) in x.rows_mut().into_iter().zip(positions) {
            for mut head in row.axis_chunks_iter_mut(Axis(0), head_dim) {
                for i in 0..half {
                    let (low, high) = (head[i], head[i + half]);
                    let (cos, sin) = (cos[position * dims + i], sin[position * dims + i]);
                    (head[i], head[i + half]) = (low * cos - high * sin, high * cos + low * sin);
                }
            }
        }
        Ok(())
    }

    /// `x Wᵀ (+ bias)` of a linear layer.
    fn linear(&self, linear: &LinearSpec, x: &Array2<f32>, seen: &mut Option<&mut Activations>) -> Result<Array2<f32>> {
        let module = &linear.path;
        self.see_input(module, x, seen);
        let mut y = self.matrix(&format!("{module}.weight"), x)?;
        if linear.has_bias {
            y += &Array1::from(self.source.all(&format!("{module}.bias"))?);
        }
        note(seen, format!("output of {module}"), &y);
        Ok(y)
    }

    fn see_input(&self, module: &str, x: &Array2<f32>, seen: &mut Option<&mut Activations>) {
        if let Some(seen) = seen {
            let mut squares = x.mapv(|v| v * v);
            for mut row in squares.rows_mut() {
                let mean = row.mean().unwrap_or(1.0).max(f32::MIN_POSITIVE);
                row /= mean;
            }
            let squares = squares.mean_axis(Axis(0)).unwrap_or_default();
            seen.importance.insert(module.into(), squares.to_vec());
            note(&mut Some(seen), format!("input of {module}"), x);
        }
    }

    /// `x Wᵀ`, the weight read in blocks of rows.
    fn matrix(&self, tensor: &str, x: &Array2<f32>) -> Result<Array2<f32>> {
        let shape = self.source.shape(tensor)?;
        let (rows, columns) = (shape[0], shape[1]);
        let step = (BLOCK_ELEMENTS / columns.max(1)).max(1);
        let starts: Vec<usize> = (0..rows).step_by(step).collect();
        let block = |&start: &usize| -> Result<Array2<f32>> {
            let end = (start + step).min(rows);
            let weight = self.source.rows(tensor, start..end)?;
            let weight = ArrayView2::from_shape((end - start, columns), &weight);
            Ok(x.dot(&weight.map_err(|e| Error::internal(e.to_string()))?.t()))
        };
        let blocks: Vec<Array2<f32>> = starts.par_iter().map(block).collect::<Result<_>>()?;
        let views: Vec<ArrayView2<f32>> = blocks.iter().map(|b| b.view()).collect();
        let joined = ndarray::concatenate(Axis(1), &views).map_err(|e| Error::internal(e.to_string()))?;
        Ok(joined.as_standard_layout().into_owned())
    }
}

/// Causal attention of one sequence; query head h reads key head h / (heads / kv heads).
fn attend(
    attention: &Attention,
    q: ArrayView2<f32>,
    k: ArrayView2<f32>,
    v: ArrayView2<f32>,
    seen: &mut Option<&mut Activations>,
) -> Array2<f32> {
    let (window, hd) = (attention.window.unwrap_or(usize::MAX), attention.head_dim);
    let mut out = Array2::zeros(q.raw_dim());
    for head in 0..attention.n_heads {
        let of = |x: ArrayView2<'_, f32>, h: usize| x.slice(s![.., h * hd..(h + 1) * hd]).to_owned();
        let kv = head / attention.n_queries_per_kv();
        let mut scores = of(q, head).dot(&of(k, kv).t()) * attention.scale;
        if let Some(cap) = attention.softcap {
            scores.mapv_inplace(|z| cap * (z / cap).tanh());
        }
        note(seen, "attention scores".into(), &scores);
        for (position, mut row) in scores.rows_mut().into_iter().enumerate() {
            softmax_visible(row.as_slice_mut().unwrap_or(&mut []), position, window);
        }
        out.slice_mut(s![.., head * hd..(head + 1) * hd])
            .assign(&scores.dot(&of(v, kv)));
    }
    out
}

/// Softmax over the columns that position `row` may see; the others become 0.
fn softmax_visible(scores: &mut [f32], row: usize, window: usize) {
    let first = (row + 1).saturating_sub(window);
    let (hidden_before, rest) = scores.split_at_mut(first);
    let (visible, hidden_after) = rest.split_at_mut(row + 1 - first);
    let max = visible.iter().copied().fold(f32::MIN, f32::max);
    visible.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum: f32 = visible.iter().sum();
    visible.iter_mut().for_each(|v| *v /= sum);
    hidden_before.fill(0.0);
    hidden_after.fill(0.0);
}

fn note(seen: &mut Option<&mut Activations>, place: String, values: &Array2<f32>) {
    if let Some(seen) = seen {
        // A NaN stays: it must not look like a small peak.
        let larger = |m: f32, v: f32| if m.is_nan() || m >= v { m } else { v };
        let peak = values.iter().fold(0f32, |m, v| larger(m, v.abs()));
        let known = seen.peaks.entry(place).or_default();
        *known = larger(*known, peak);
    }
}

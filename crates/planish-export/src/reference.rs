//! The f32 forward pass that packages are judged by, written for clarity and bounded memory, without MLX.
//!
//! It reads each weight once, a few megabytes at a time, for all tokens of a call. It shares no code with the graph: it is
//! itself compared with mlx-lm's logits (tests/it).

use std::collections::BTreeMap;

use ndarray::{Array1, Array2, ArrayView2, Axis, Zip, s};
use planish_core::arch::{LinearSpec, Norm};
use planish_core::model_config::ModelConfig;
use rayon::prelude::*;

use crate::{
    Error, Result,
    plain::{Plain, PlainLayer},
    rope::rope_tables,
    weights::Rows,
};

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
/// [`Error::Unsupported`] for an architecture that is not exported; [`Error::Option`] for a token outside the vocabulary; errors of the weights ([`Rows::rows`]).
pub fn forward(
    config: &ModelConfig,
    source: &dyn Rows,
    sequences: &[&[u32]],
    mut seen: Option<&mut Activations>,
) -> Result<Array2<f32>> {
    let model = Plain::of(config)?;
    let pass = Pass::new(&model, source, sequences);
    let mut x = pass.embed(sequences)?;
    for (layer_idx, layer) in model.layers.iter().enumerate() {
        let attended = pass.attention(layer, &x, &mut seen)?;
        x += &attended;
        let mlp = pass.mlp(layer, &x, &mut seen)?;
        x += &mlp;
        note(&mut seen, format!("layers.{layer_idx} residual"), &x);
    }
    let x = pass.norm(&x, &model.arch.norm, "")?;
    pass.see_input(&head_module(config), &x, &mut seen);
    let logits = pass.matrix(head_tensor(config), &x)?;
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
    model: &'a Plain<'a>,
    source: &'a dyn Rows,
    lengths: Vec<usize>,
    cos: Array2<f32>,
    sin: Array2<f32>,
}

impl<'a> Pass<'a> {
    fn new(model: &'a Plain<'a>, source: &'a dyn Rows, sequences: &[&[u32]]) -> Self {
        let lengths: Vec<usize> = sequences.iter().map(|s| s.len()).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let (cos, sin) = rope_tables(model.rope, longest);
        let table = |values: Vec<f32>| {
            Array2::from_shape_fn((longest, model.head_dim), |(p, i)| values[p * model.head_dim + i])
        };
        Self {
            model,
            source,
            lengths,
            cos: table(cos),
            sin: table(sin),
        }
    }

    fn embed(&self, sequences: &[&[u32]]) -> Result<Array2<f32>> {
        let (v, d) = (self.model.arch.vocab_size, self.model.arch.hidden_size);
        let table = format!("{}.weight", self.model.arch.embedding_path());
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

    fn attention(
        &self,
        layer: &PlainLayer,
        x: &Array2<f32>,
        seen: &mut Option<&mut Activations>,
    ) -> Result<Array2<f32>> {
        let (c, path) = (self.model, &layer.path);
        let normed = self.norm(x, layer.mixer_norm, path)?;
        let mut q = self.linear(&layer.query.at(path), &normed, seen)?; // [n, heads · hd]
        let mut k = self.linear(&layer.key.at(path), &normed, seen)?;
        let v = self.linear(&layer.value.at(path), &normed, seen)?;
        if let Some(norms) = &layer.attention.qk_norm {
            self.norm_heads(&mut q, &norms.query, path)?;
            self.norm_heads(&mut k, &norms.key, path)?;
        }
        self.rotate_heads(&mut q);
        self.rotate_heads(&mut k);
        let mut out = Array2::zeros((x.nrows(), c.n_heads * c.head_dim));
        let mut first = 0;
        for &length in &self.lengths {
            let span = s![first..first + length, ..];
            let attended = self.attend(layer.attention.scale, q.slice(span), k.slice(span), v.slice(span), seen);
            out.slice_mut(span).assign(&attended);
            first += length;
        }
        self.linear(&layer.attention.output.at(path), &out, seen)
    }

    /// Causal attention of one sequence; query head h reads key head h / (heads / kv heads).
    fn attend(
        &self,
        scale: f32,
        q: ArrayView2<f32>,
        k: ArrayView2<f32>,
        v: ArrayView2<f32>,
        seen: &mut Option<&mut Activations>,
    ) -> Array2<f32> {
        let (c, hd) = (self.model, self.model.head_dim);
        let mut out = Array2::zeros(q.raw_dim());
        for head in 0..c.n_heads {
            let of = |x: ArrayView2<'_, f32>, h: usize| x.slice(s![.., h * hd..(h + 1) * hd]).to_owned();
            let kv = head / c.n_queries_per_kv();
            let mut scores = of(q, head).dot(&of(k, kv).t()) * scale;
            note(seen, "attention scores".into(), &scores);
            for (position, mut row) in scores.rows_mut().into_iter().enumerate() {
                let window = c.window.unwrap_or(usize::MAX);
                softmax_visible(row.as_slice_mut().unwrap_or(&mut []), position, window);
            }
            out.slice_mut(s![.., head * hd..(head + 1) * hd])
                .assign(&scores.dot(&of(v, kv)));
        }
        out
    }

    fn mlp(&self, layer: &PlainLayer, x: &Array2<f32>, seen: &mut Option<&mut Activations>) -> Result<Array2<f32>> {
        let normed = self.norm(x, layer.feed_forward_norm, &layer.path)?;
        let mut gate = self.linear(&layer.gate.at(&layer.path), &normed, seen)?;
        let up = self.linear(&layer.up.at(&layer.path), &normed, seen)?;
        Zip::from(&mut gate)
            .and(&up)
            .for_each(|g, u| *g = *g / (1.0 + (-*g).exp()) * u);
        self.linear(&layer.down.at(&layer.path), &gate, seen)
    }

    fn norm(&self, x: &Array2<f32>, norm: &Norm, path: &str) -> Result<Array2<f32>> {
        let mut out = x.clone();
        self.norm_heads(&mut out, norm, path)?;
        Ok(out)
    }

    /// Norms each head of each row; a row of the norm's width is one head.
    fn norm_heads(&self, x: &mut Array2<f32>, norm: &Norm, path: &str) -> Result<()> {
        let gain = self.source.all(&format!("{}.weight", norm.at(path)))?;
        for mut row in x.rows_mut() {
            for mut head in row.axis_chunks_iter_mut(Axis(0), norm.dims) {
                let squares = head.iter().map(|v| f64::from(*v) * f64::from(*v));
                let mean = squares.sum::<f64>() / norm.dims as f64;
                let scale = (1.0 / (mean + f64::from(norm.eps)).sqrt()) as f32;
                head.iter_mut().zip(&gain).for_each(|(v, g)| *v *= scale * g);
            }
        }
        Ok(())
    }

    fn rotate_heads(&self, x: &mut Array2<f32>) {
        let hd = self.model.head_dim;
        let positions = self.lengths.iter().flat_map(|&length| 0..length);
        for (mut row, position) in x.rows_mut().into_iter().zip(positions) {
            for mut head in row.axis_chunks_iter_mut(Axis(0), hd) {
                for i in 0..hd / 2 {
                    let (low, high) = (head[i], head[i + hd / 2]);
                    let (cos, sin) = (self.cos[[position, i]], self.sin[[position, i]]);
                    (head[i], head[i + hd / 2]) = (low * cos - high * sin, high * cos + low * sin);
                }
            }
        }
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

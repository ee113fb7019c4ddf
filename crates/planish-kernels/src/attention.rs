//! Causal grouped-query attention with rotary positions, forward and backward, without the matrix of all scores.

#![allow(unsafe_code)] // head slices of one array, written by several threads; strided products

use std::collections::HashSet;

use rayon::prelude::*;

use crate::cross_entropy::{LANES, exponentials, highest};
use crate::elementwise::dot;
use crate::simd::multiversion;

/// Query rows whose scores exist at once.
const BLOCK: usize = 64;

/// Sizes of an attention, and what may be attended to.
#[derive(Debug, Clone)]
pub struct AttentionShape {
    /// Rows of the batch.
    pub batch: usize,
    /// Tokens a row.
    pub length: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// A query sees the `window` latest keys, itself among them; all earlier ones where it is `None`.
    pub window: Option<usize>,
    /// `[batch · length]`: a query sees keys of its own segment only. Empty = one segment a row.
    pub segments: Vec<i32>,
}

/// Cosines and sines of the rotation, `[length, head_dim / 2]` each.
#[derive(Debug, Clone, Copy)]
pub struct Rotation<'a> {
    /// Cosines.
    pub cos: &'a [f32],
    /// Sines.
    pub sin: &'a [f32],
}

impl<'a> Rotation<'a> {
    fn of(self, position: usize, half: usize) -> (&'a [f32], &'a [f32]) {
        let at = position * half;
        (&self.cos[at..at + half], &self.sin[at..at + half])
    }
}

/// Neighbouring tokens of a row that see only each other: a segment, or the whole row. Its positions count from its first
/// token, and nothing outside of it is read: the same tokens give the same bits wherever in a batch they lie.
#[derive(Debug, Clone, Copy)]
struct Span {
    row: usize,
    /// In the row.
    start: usize,
    length: usize,
    /// Whether a query must look for its segment's keys.
    is_mixed: bool,
}

/// What attention reads: projections before the rotation, heads side by side.
#[derive(Debug, Clone, Copy)]
pub struct Projections<'a> {
    /// `[batch, length, n_heads · head_dim]`.
    pub query: &'a [f32],
    /// `[batch, length, n_kv_heads · head_dim]`.
    pub key: &'a [f32],
    /// `[batch, length, n_kv_heads · head_dim]`.
    pub value: &'a [f32],
}

/// `softmax(rot(q) rot(k)ᵀ / sqrt(h_d) + mask) v`.
///
/// Writes `out` `[batch, length, n_heads · head_dim]` and, for the backward pass, the logarithm of each row's sum of
/// exponentials, `[batch, n_heads, length]`.
pub fn attention(
    shape: &AttentionShape,
    rotation: Rotation<'_>,
    inputs: Projections<'_>,
    out: &mut [f32],
    log_sums: &mut [f32],
) {
    shape.check(inputs);
    assert!(out.len() == inputs.query.len() && log_sums.len() == shape.batch * shape.n_heads * shape.length);
    let (out, log_sums) = (Shared(out.as_mut_ptr()), Shared(log_sums.as_mut_ptr()));
    shape.tasks().into_par_iter().for_each(|(span, kv_head)| {
        let mut scratch = Scratch::new(shape, span);
        shape.load_rotated(
            inputs.key,
            span,
            kv_head,
            shape.n_kv_heads,
            rotation,
            1.0,
            &mut scratch.key,
        );
        for head in shape.group(kv_head) {
            shape.load_rotated(
                inputs.query,
                span,
                head,
                shape.n_heads,
                rotation,
                shape.scale(),
                &mut scratch.query,
            );
            // SAFETY: head slices of different tasks do not overlap.
            unsafe { forward_head(shape, span, head, kv_head, inputs.value, &mut scratch, out, log_sums) };
        }
    });
}

/// What the forward pass left for the backward pass.
#[derive(Debug, Clone, Copy)]
pub struct Forward<'a> {
    /// Its output.
    pub out: &'a [f32],
    /// Its `log_sums`.
    pub log_sums: &'a [f32],
}

/// Gradients of [`attention`] with respect to the projections.
pub fn attention_backward(
    shape: &AttentionShape,
    rotation: Rotation<'_>,
    inputs: Projections<'_>,
    forward: Forward<'_>,
    d_out: &[f32],
    (d_query, d_key, d_value): (&mut [f32], &mut [f32], &mut [f32]),
) {
    shape.check(inputs);
    assert!(d_out.len() == inputs.query.len() && forward.out.len() == d_out.len() && d_query.len() == d_out.len());
    assert!(d_key.len() == inputs.key.len() && d_value.len() == inputs.value.len());
    let gradients = [d_query, d_key, d_value].map(|gradient| Shared(gradient.as_mut_ptr()));
    shape.tasks().into_par_iter().for_each(|(span, kv_head)| {
        let mut scratch = Scratch::new(shape, span);
        let mut sums = Gradients::new(shape, span);
        shape.load_rotated(
            inputs.key,
            span,
            kv_head,
            shape.n_kv_heads,
            rotation,
            1.0,
            &mut scratch.key,
        );
        for head in shape.group(kv_head) {
            shape.load_rotated(
                inputs.query,
                span,
                head,
                shape.n_heads,
                rotation,
                shape.scale(),
                &mut scratch.query,
            );
            sums.query.fill(0.0);
            backward_head(
                shape,
                span,
                head,
                kv_head,
                inputs.value,
                forward,
                d_out,
                &mut scratch,
                &mut sums,
            );
            // SAFETY: head slices of different tasks do not overlap.
            unsafe {
                shape.store_rotated_back(
                    &sums.query,
                    span,
                    head,
                    shape.n_heads,
                    rotation,
                    shape.scale(),
                    gradients[0],
                )
            };
        }
        // SAFETY: as above.
        unsafe {
            shape.store_rotated_back(&sums.key, span, kv_head, shape.n_kv_heads, rotation, 1.0, gradients[1]);
            shape.store(&sums.value, span, kv_head, shape.n_kv_heads, gradients[2]);
        }
    });
}

/// An output that several tasks write, each its own heads.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: tasks write disjoint heads.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Length of a line of so many scores: the rest is −∞, so that a sum over it is taken in the same order however many keys
/// come after those that a query sees.
fn line(seen: usize) -> usize {
    seen.next_multiple_of(LANES)
}

/// Buffers of one task.
struct Scratch {
    /// `[length, head_dim]`, rotated.
    key: Vec<f32>,
    /// `[length, head_dim]`, rotated and scaled.
    query: Vec<f32>,
    /// `[BLOCK, line(length)]`.
    scores: Vec<f32>,
    /// The same.
    d_scores: Vec<f32>,
}

impl Scratch {
    fn new(shape: &AttentionShape, span: Span) -> Self {
        let (head, block) = (
            vec![0.0; span.length * shape.head_dim],
            vec![0.0; BLOCK.min(span.length) * line(span.length)],
        );
        Self {
            key: head.clone(),
            query: head,
            scores: block.clone(),
            d_scores: block,
        }
    }
}

/// Gradient sums of one key head, `[length, head_dim]` each.
struct Gradients {
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl Gradients {
    fn new(shape: &AttentionShape, span: Span) -> Self {
        let zeros = vec![0.0; span.length * shape.head_dim];
        Self {
            query: zeros.clone(),
            key: zeros.clone(),
            value: zeros,
        }
    }
}

impl AttentionShape {
    fn check(&self, inputs: Projections<'_>) {
        let tokens = self.batch * self.length;
        assert!(self.n_heads.is_multiple_of(self.n_kv_heads) && self.head_dim.is_multiple_of(2));
        assert_eq!(inputs.query.len(), tokens * self.n_heads * self.head_dim);
        assert_eq!(inputs.key.len(), tokens * self.n_kv_heads * self.head_dim);
        assert_eq!(inputs.value.len(), inputs.key.len());
        assert!(self.segments.is_empty() || self.segments.len() == tokens);
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Every (span, key head).
    fn tasks(&self) -> Vec<(Span, usize)> {
        (0..self.batch)
            .flat_map(|row| self.spans(row))
            .flat_map(|span| (0..self.n_kv_heads).map(move |head| (span, head)))
            .collect()
    }

    fn spans(&self, row: usize) -> Vec<Span> {
        let whole = |is_mixed| Span {
            row,
            start: 0,
            length: self.length,
            is_mixed,
        };
        if self.segments.is_empty() {
            return vec![whole(false)];
        }
        let segments = &self.segments[row * self.length..][..self.length];
        let runs: Vec<&[i32]> = segments.chunk_by(|a, b| a == b).collect();
        let ids: HashSet<i32> = runs.iter().map(|run| run[0]).collect();
        if ids.len() < runs.len() {
            return vec![whole(true)]; // a segment lies in pieces
        }
        let mut start = 0;
        let span = |run: &[i32]| {
            start += run.len();
            Span {
                start: start - run.len(),
                length: run.len(),
                ..whole(false)
            }
        };
        runs.into_iter().map(span).collect()
    }

    /// Query heads that share a key head.
    fn group(&self, kv_head: usize) -> std::ops::Range<usize> {
        let size = self.n_heads / self.n_kv_heads;
        kv_head * size..(kv_head + 1) * size
    }

    /// Index of a head's first number at a token of a span.
    fn offset(&self, span: Span, token: usize, head: usize, n_heads: usize) -> usize {
        ((span.row * self.length + span.start + token) * n_heads + head) * self.head_dim
    }

    /// Index of a head's logarithm of a sum.
    fn log_sum(&self, span: Span, token: usize, head: usize) -> usize {
        (span.row * self.n_heads + head) * self.length + span.start + token
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "a head's place in the batch takes three numbers"
    )]
    fn load_rotated(
        &self,
        from: &[f32],
        span: Span,
        head: usize,
        n_heads: usize,
        rotation: Rotation<'_>,
        scale: f32,
        to: &mut [f32],
    ) {
        let half = self.head_dim / 2;
        for (token, to) in to.chunks_exact_mut(self.head_dim).enumerate() {
            let x = &from[self.offset(span, token, head, n_heads)..][..self.head_dim];
            let (cos, sin) = rotation.of(token, half);
            let (x1, x2) = x.split_at(half);
            let (y1, y2) = to.split_at_mut(half);
            for i in 0..half {
                y1[i] = (x1[i] * cos[i] - x2[i] * sin[i]) * scale;
                y2[i] = (x2[i] * cos[i] + x1[i] * sin[i]) * scale;
            }
        }
    }

    /// The transposed rotation, into a head of a gradient.
    ///
    /// # Safety
    /// Nobody else writes this head.
    #[expect(clippy::too_many_arguments, reason = "as above")]
    unsafe fn store_rotated_back(
        &self,
        from: &[f32],
        span: Span,
        head: usize,
        n_heads: usize,
        rotation: Rotation<'_>,
        scale: f32,
        to: Shared,
    ) {
        let half = self.head_dim / 2;
        for (token, y) in from.chunks_exact(self.head_dim).enumerate() {
            // SAFETY: inside the array; the head is ours.
            let x = unsafe {
                std::slice::from_raw_parts_mut(to.0.add(self.offset(span, token, head, n_heads)), self.head_dim)
            };
            let (cos, sin) = rotation.of(token, half);
            let (x1, x2) = x.split_at_mut(half);
            let (y1, y2) = y.split_at(half);
            for i in 0..half {
                x1[i] = (y1[i] * cos[i] + y2[i] * sin[i]) * scale;
                x2[i] = (y2[i] * cos[i] - y1[i] * sin[i]) * scale;
            }
        }
    }

    /// # Safety
    /// Nobody else writes this head.
    unsafe fn store(&self, from: &[f32], span: Span, head: usize, n_heads: usize, to: Shared) {
        for (token, y) in from.chunks_exact(self.head_dim).enumerate() {
            // SAFETY: inside the array; the head is ours.
            let x = unsafe {
                std::slice::from_raw_parts_mut(to.0.add(self.offset(span, token, head, n_heads)), self.head_dim)
            };
            x.copy_from_slice(y);
        }
    }

    /// Sets what query `token` of `span` must not see to −∞ in its scores of keys `0..`.
    fn mask(&self, span: Span, token: usize, scores: &mut [f32]) {
        scores[token + 1..].fill(f32::NEG_INFINITY);
        if let Some(window) = self.window {
            scores[..(token + 1).saturating_sub(window)].fill(f32::NEG_INFINITY);
        }
        if span.is_mixed {
            let segments = &self.segments[span.row * self.length..][..self.length];
            for (score, segment) in scores[..=token].iter_mut().zip(segments) {
                if *segment != segments[token] {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
}

impl Span {
    fn blocks(self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let length = self.length;
        (0..length)
            .step_by(BLOCK)
            .map(move |start| start..(start + BLOCK).min(length))
    }
}

/// # Safety
/// Nobody else writes this head of `out` and `log_sums`.
#[expect(
    clippy::too_many_arguments,
    reason = "a head's place in the batch takes three numbers"
)]
unsafe fn forward_head(
    shape: &AttentionShape,
    span: Span,
    head: usize,
    kv_head: usize,
    value: &[f32],
    scratch: &mut Scratch,
    out: Shared,
    log_sums: Shared,
) {
    let (width, kv_stride) = (shape.head_dim, shape.n_kv_heads * shape.head_dim);
    for block in span.blocks() {
        let (rows, seen) = (block.len(), block.end);
        let stride = line(seen);
        scores_of(shape, span, &block, scratch);
        for (line, token) in scratch.scores.chunks_exact_mut(stride).zip(block.clone()) {
            let log_sum = softmax(line);
            // SAFETY: inside the array; the head is ours.
            unsafe { *log_sums.0.add(shape.log_sum(span, token, head)) = log_sum };
        }
        // SAFETY: the shapes below lie inside the arrays.
        unsafe {
            product(
                (rows, width, seen),
                (scratch.scores.as_ptr(), stride, 1),
                (
                    value.as_ptr().add(shape.offset(span, 0, kv_head, shape.n_kv_heads)),
                    kv_stride,
                    1,
                ),
                (
                    out.0.add(shape.offset(span, block.start, head, shape.n_heads)),
                    shape.n_heads * width,
                    1,
                ),
                false,
            );
        }
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "a head's place in the batch takes three numbers"
)]
fn backward_head(
    shape: &AttentionShape,
    span: Span,
    head: usize,
    kv_head: usize,
    value: &[f32],
    forward: Forward<'_>,
    d_out: &[f32],
    scratch: &mut Scratch,
    sums: &mut Gradients,
) {
    let (width, kv_stride, stride) = (
        shape.head_dim,
        shape.n_kv_heads * shape.head_dim,
        shape.n_heads * shape.head_dim,
    );
    for block in span.blocks() {
        let (rows, seen) = (block.len(), block.end);
        let stride_of_scores = line(seen);
        scores_of(shape, span, &block, scratch);
        let first = shape.offset(span, block.start, head, shape.n_heads);
        // SAFETY: the shapes below lie inside the arrays; scratch and sums are ours.
        unsafe {
            let d_out_block = (d_out.as_ptr().add(first), stride, 1);
            // d_scores = d_out · vᵀ
            product(
                (rows, seen, width),
                d_out_block,
                (
                    value.as_ptr().add(shape.offset(span, 0, kv_head, shape.n_kv_heads)),
                    1,
                    kv_stride,
                ),
                (scratch.d_scores.as_mut_ptr(), stride_of_scores, 1),
                false,
            );
            let lines = scratch
                .scores
                .chunks_exact_mut(stride_of_scores)
                .zip(scratch.d_scores.chunks_exact_mut(stride_of_scores));
            for ((p, d), token) in lines.zip(block.clone()) {
                let at = shape.offset(span, token, head, shape.n_heads);
                let log_sum = forward.log_sums[shape.log_sum(span, token, head)];
                softmax_backward(p, d, log_sum, &forward.out[at..][..width], &d_out[at..][..width]);
            }
            let p_transposed = (scratch.scores.as_ptr(), 1, stride_of_scores);
            let (d, d_transposed) = (
                (scratch.d_scores.as_ptr(), stride_of_scores, 1),
                (scratch.d_scores.as_ptr(), 1, stride_of_scores),
            );
            // d_v += pᵀ · d_out;  d_q = d_s · k;  d_k += d_sᵀ · q
            product(
                (seen, width, rows),
                p_transposed,
                d_out_block,
                (sums.value.as_mut_ptr(), width, 1),
                true,
            );
            product(
                (rows, width, seen),
                d,
                (scratch.key.as_ptr(), width, 1),
                (sums.query.as_mut_ptr().add(block.start * width), width, 1),
                false,
            );
            product(
                (seen, width, rows),
                d_transposed,
                (scratch.query.as_ptr().add(block.start * width), width, 1),
                (sums.key.as_mut_ptr(), width, 1),
                true,
            );
        }
    }
}

/// Masked scores of a block of queries against all keys up to its end, `[rows, line(block.end)]`.
fn scores_of(shape: &AttentionShape, span: Span, block: &std::ops::Range<usize>, scratch: &mut Scratch) {
    let (rows, seen, width) = (block.len(), block.end, shape.head_dim);
    let stride = line(seen);
    // SAFETY: the shapes lie inside the scratch arrays.
    unsafe {
        product(
            (rows, seen, width),
            (scratch.query.as_ptr().add(block.start * width), width, 1),
            (scratch.key.as_ptr(), 1, width),
            (scratch.scores.as_mut_ptr(), stride, 1),
            false,
        );
    }
    for (line, token) in scratch.scores[..rows * stride]
        .chunks_exact_mut(stride)
        .zip(block.clone())
    {
        shape.mask(span, token, line);
    }
}

multiversion! {
    /// Softmax in place; returns the logarithm of the sum of exponentials.
    fn softmax = softmax_body(line: &mut [f32]) -> f32
}

#[inline(always)]
fn softmax_body<const FMA: bool>(line: &mut [f32]) -> f32 {
    let highest = highest(line);
    let sum = exponentials::<FMA>(line, highest);
    let scale = 1.0 / sum;
    for value in line.iter_mut() {
        *value *= scale;
    }
    highest + sum.ln()
}

multiversion! {
    /// From scores and the gradient of the probabilities: probabilities in `p`, gradient of the scores in `d`.
    fn softmax_backward = softmax_backward_body(p: &mut [f32], d: &mut [f32], log_sum: f32, out: &[f32], d_out: &[f32])
}

#[inline(always)]
fn softmax_backward_body<const FMA: bool>(p: &mut [f32], d: &mut [f32], log_sum: f32, out: &[f32], d_out: &[f32]) {
    // Σ_j p_j d_j = out · d_out, whatever the mask.
    let shift = dot::<FMA>(out, d_out);
    for (p, d) in p.iter_mut().zip(d) {
        *p = crate::simd::exp::<FMA>(*p - log_sum);
        *d = *p * (*d - shift);
    }
}

/// A matrix by its first number, and the distance of rows and of columns.
type Strided<P> = (P, usize, usize);

/// `out (+)= a · b`, `a` `[m, k]`, `b` `[k, n]`, on this thread.
///
/// # Safety
/// The pointers and strides describe memory of these shapes; `out` is not read or written by anyone else.
unsafe fn product(
    (m, n, k): (usize, usize, usize),
    a: Strided<*const f32>,
    b: Strided<*const f32>,
    out: Strided<*mut f32>,
    add: bool,
) {
    // SAFETY: passed on.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.0,
            out.2 as isize,
            out.1 as isize,
            add,
            a.0,
            a.2 as isize,
            a.1 as isize,
            b.0,
            b.2 as isize,
            b.1 as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: f64) -> Vec<f32> {
        (0..count)
            .map(|i| ((i as f64 * 0.831 + seed).sin() * 1.5) as f32)
            .collect()
    }

    fn shape(length: usize, window: Option<usize>, segments: Vec<i32>) -> AttentionShape {
        AttentionShape {
            batch: 2,
            length,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 6,
            window,
            segments,
        }
    }

    fn rotation(shape: &AttentionShape) -> (Vec<f32>, Vec<f32>) {
        let half = shape.head_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 0.37_f32.powi((i % half) as i32);
        (
            (0..shape.length * half).map(|i| angle(i).cos()).collect(),
            (0..shape.length * half).map(|i| angle(i).sin()).collect(),
        )
    }

    /// The definition in f64, one query at a time.
    fn reference(shape: &AttentionShape, cos: &[f32], sin: &[f32], q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let (hd, half) = (shape.head_dim, shape.head_dim / 2);
        let rotate = |x: &[f64], token: usize| -> Vec<f64> {
            let at = |i: usize| {
                (
                    f64::from(cos[token * half + i % half]),
                    f64::from(sin[token * half + i % half]),
                )
            };
            (0..hd)
                .map(|i| {
                    if i < half {
                        x[i] * at(i).0 - x[i + half] * at(i).1
                    } else {
                        x[i] * at(i).0 + x[i - half] * at(i).1
                    }
                })
                .collect()
        };
        let mut out = vec![0.0; q.len()];
        for row in 0..shape.batch {
            for head in 0..shape.n_heads {
                let kv = head / (shape.n_heads / shape.n_kv_heads);
                for token in 0..shape.length {
                    let at = ((row * shape.length + token) * shape.n_heads + head) * hd;
                    let query = rotate(&q[at..at + hd], token);
                    let segment = |t: usize| shape.segments.get(row * shape.length + t);
                    let seen: Vec<usize> = (0..=token)
                        .filter(|&t| shape.window.is_none_or(|w| token - t < w) && segment(t) == segment(token))
                        .collect();
                    let key = |t: usize| ((row * shape.length + t) * shape.n_kv_heads + kv) * hd;
                    let score = |t: usize| {
                        rotate(&k[key(t)..key(t) + hd], t)
                            .iter()
                            .zip(&query)
                            .map(|(a, b)| a * b)
                            .sum::<f64>()
                            / (hd as f64).sqrt()
                    };
                    let weights: Vec<f64> = seen.iter().map(|&t| score(t).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    for (weight, &t) in weights.iter().zip(&seen) {
                        for i in 0..hd {
                            out[at + i] += weight / total * v[key(t) + i];
                        }
                    }
                }
            }
        }
        out
    }

    fn check(shape: &AttentionShape) {
        let (cos, sin) = rotation(shape);
        let tokens = shape.batch * shape.length;
        let (q, k, v) = (
            numbers(tokens * shape.n_heads * shape.head_dim, 0.1),
            numbers(tokens * shape.n_kv_heads * shape.head_dim, 0.7),
            numbers(tokens * shape.n_kv_heads * shape.head_dim, 1.3),
        );
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let (rotation, inputs) = (
            Rotation { cos: &cos, sin: &sin },
            Projections {
                query: &q,
                key: &k,
                value: &v,
            },
        );
        let (mut out, mut log_sums) = (vec![0.0; q.len()], vec![0.0; tokens * shape.n_heads]);
        attention(shape, rotation, inputs, &mut out, &mut log_sums);
        let expect = reference(shape, &cos, &sin, &wide(&q), &wide(&k), &wide(&v));
        assert!(out.iter().zip(&expect).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-5));

        let d_out = numbers(q.len(), 2.2);
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        let forward = Forward {
            out: &out,
            log_sums: &log_sums,
        };
        attention_backward(shape, rotation, inputs, forward, &d_out, (&mut dq, &mut dk, &mut dv));
        let total = |q: &[f64], k: &[f64], v: &[f64]| -> f64 {
            reference(shape, &cos, &sin, q, k, v)
                .iter()
                .zip(&d_out)
                .map(|(y, d)| y * f64::from(*d))
                .sum()
        };
        for (which, gradient) in [&dq, &dk, &dv].into_iter().enumerate() {
            for index in (0..gradient.len()).step_by(gradient.len() / 9) {
                let slope = |by: f64| {
                    let mut inputs = [wide(&q), wide(&k), wide(&v)];
                    inputs[which][index] += by;
                    total(&inputs[0], &inputs[1], &inputs[2])
                };
                let expect = (slope(1e-5) - slope(-1e-5)) / 2e-5;
                assert!(
                    (f64::from(gradient[index]) - expect).abs() < 1e-4,
                    "{which} {index}: {} {expect}",
                    gradient[index]
                );
            }
        }
    }

    #[test]
    fn values_and_gradients_match_the_definition() {
        check(&shape(5, None, Vec::new()));
        check(&shape(70, None, Vec::new()));
    }

    /// What a segment computes does not depend on where it lies, nor on what lies around it.
    #[test]
    fn segment_has_the_same_bits_alone_and_between_others() {
        let (before, own, after) = (21, 75, 13);
        let packed_ids: Vec<i32> = [(before, 4), (own, 9), (after, 2)]
            .into_iter()
            .flat_map(|(n, id)| vec![id; n])
            .collect();
        let run = |length: usize, segments: Vec<i32>, first: usize| {
            let shape = AttentionShape {
                batch: 1,
                ..shape(length, None, segments)
            };
            let (cos, sin) = rotation(&shape);
            let (q_width, k_width) = (shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim);
            // Token `first` of this row has the numbers of token 0 of the segment.
            let part = |width: usize, seed: f64| {
                let all = numbers((before + own + after) * width, seed);
                all[(before - first) * width..][..length * width].to_vec()
            };
            let (q, k, v) = (part(q_width, 0.1), part(k_width, 0.7), part(k_width, 1.3));
            let projections = Projections {
                query: &q,
                key: &k,
                value: &v,
            };
            let (mut out, mut log_sums) = (vec![0.0; q.len()], vec![0.0; shape.n_heads * length]);
            let table = Rotation { cos: &cos, sin: &sin };
            attention(&shape, table, projections, &mut out, &mut log_sums);
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
            let saved = Forward {
                out: &out,
                log_sums: &log_sums,
            };
            attention_backward(
                &shape,
                table,
                projections,
                saved,
                &part(q_width, 2.1),
                (&mut dq, &mut dk, &mut dv),
            );
            let own = |all: &[f32], width: usize| all[first * width..(first + own) * width].to_vec();
            [
                own(&out, q_width),
                own(&dq, q_width),
                own(&dk, k_width),
                own(&dv, k_width),
            ]
        };
        let alone = run(own, Vec::new(), 0);
        let packed = run(before + own + after, packed_ids, before);
        assert!(alone == packed);
    }

    #[test]
    fn windows_and_segments_are_respected() {
        check(&shape(70, Some(9), Vec::new()));
        let segments = (0..2 * 70).map(|i| i % 70 / 23).collect();
        check(&shape(70, None, segments));
        // A segment in two pieces.
        let segments = (0..2 * 70).map(|i| i % 70 / 23 % 2).collect();
        check(&shape(70, Some(40), segments));
    }
}

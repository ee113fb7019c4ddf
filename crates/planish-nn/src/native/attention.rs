use std::sync::Arc;

use planish_kernels::{AttentionShape, Forward, Projections, Rotation};
use planish_mlx::Array;
use planish_mlx::host_kernel::Input;
use planish_mlx::transforms::custom_vjp;

use super::kernel;
use crate::Result;
use crate::mask::MaskRule;
use crate::rope::Angles;

/// Heads of an attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) n_heads: i32,
    pub(crate) n_kv_heads: i32,
    pub(crate) head_dim: i32,
}

/// `softmax(rot(q) rot(k)ᵀ / sqrt(h_d) + mask) v` for whole rows from position 0, f32.
///
/// `query` `[b, s, n_h · h_d]`, `key` and `value` `[b, s, n_kv · h_d]`, before the rotation → `[b, s, n_h · h_d]`.
pub(crate) fn attention(
    heads: Heads,
    angles: &Arc<Angles>,
    mask: &MaskRule,
    query: &Array,
    key: &Array,
    value: &Array,
) -> Result<Array> {
    let call = Arc::new(Call {
        heads,
        angles: angles.clone(),
        batch: query.dim(0) as usize,
        length: query.dim(1) as usize,
        window: mask.window.map(|window| window as usize),
        has_segments: mask.segment_ids.is_some(),
    });
    // Something has to be in its place.
    let segments = mask.segment_ids.as_ref().unwrap_or(query).clone();
    let (forward_call, forward_segments) = (call.clone(), segments.clone());
    let [attended, _] = custom_vjp(
        move |inputs: &[Array; 3]| forward(inputs, &forward_segments, &forward_call),
        move |inputs: &[Array; 3], [d_out, _]: &[Array; 2], outputs: &[Array; 2]| {
            backward(inputs, d_out, outputs, &segments, &call)
        },
        [query, key, value],
    )?;
    Ok(attended)
}

/// What a call knows beside arrays.
struct Call {
    heads: Heads,
    angles: Arc<Angles>,
    batch: usize,
    length: usize,
    window: Option<usize>,
    has_segments: bool,
}

impl Call {
    fn shape(&self, segments: &Input<'_>) -> AttentionShape {
        AttentionShape {
            batch: self.batch,
            length: self.length,
            n_heads: self.heads.n_heads as usize,
            n_kv_heads: self.heads.n_kv_heads as usize,
            head_dim: self.heads.head_dim as usize,
            window: self.window,
            segments: if self.has_segments {
                segments.i32().to_vec()
            } else {
                Vec::new()
            },
        }
    }

    fn rotation(&self) -> Rotation<'_> {
        Rotation {
            cos: &self.angles.cos,
            sin: &self.angles.sin,
        }
    }
}

/// The output, and each row's logarithm of its sum of exponentials for the backward pass.
fn forward([query, key, value]: &[Array; 3], segments: &Array, call: &Arc<Call>) -> Result<[Array; 2]> {
    let log_sums = [call.batch as i32, call.heads.n_heads, call.length as i32];
    let (inputs, shapes) = ([query, key, value, segments], [query.shape(), &log_sums]);
    let call = call.clone();
    kernel(
        "attention",
        inputs,
        shapes,
        move |[query, key, value, segments], [out, log_sums]| {
            let projections = Projections {
                query: query.f32(),
                key: key.f32(),
                value: value.f32(),
            };
            planish_kernels::attention(&call.shape(segments), call.rotation(), projections, out, log_sums);
        },
    )
}

fn backward(
    [query, key, value]: &[Array; 3],
    d_out: &Array,
    [out, log_sums]: &[Array; 2],
    segments: &Array,
    call: &Arc<Call>,
) -> Result<[Array; 3]> {
    let inputs = [query, key, value, out, log_sums, d_out, segments];
    let shapes = [query.shape(), key.shape(), value.shape()];
    let call = call.clone();
    kernel(
        "attention_backward",
        inputs,
        shapes,
        move |inputs, [d_query, d_key, d_value]| {
            let [query, key, value, out, log_sums, d_out, segments] = inputs;
            let projections = Projections {
                query: query.f32(),
                key: key.f32(),
                value: value.f32(),
            };
            let forward = Forward {
                out: out.f32(),
                log_sums: log_sums.f32(),
            };
            let gradients = (d_query, d_key, d_value);
            let (shape, rotation) = (call.shape(segments), call.rotation());
            planish_kernels::attention_backward(&shape, rotation, projections, forward, d_out.f32(), gradients);
        },
    )
}

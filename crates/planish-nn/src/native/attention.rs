use std::sync::Arc;

use planish_kernels::{AttentionShape, Forward, Projections, Rotation};
use planish_mlx::Array;
use planish_mlx::host_kernel::Input;

use super::{kernel, only, slices, with_gradient};
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
    });
    let segments = mask.segment_ids.clone();
    let (forward_call, forward_segments) = (call.clone(), segments.clone());
    let outputs = with_gradient(
        move |inputs| forward(inputs, &forward_call, forward_segments.as_ref()),
        move |inputs, cotangents, outputs| backward(inputs, &cotangents[0], outputs, &call, segments.as_ref()),
        &[query.clone(), key.clone(), value.clone()],
    )?;
    only(outputs)
}

/// What a call knows beside arrays.
struct Call {
    heads: Heads,
    angles: Arc<Angles>,
    batch: usize,
    length: usize,
    window: Option<usize>,
}

impl Call {
    fn shape(&self, segments: Option<&Input<'_>>) -> AttentionShape {
        AttentionShape {
            batch: self.batch,
            length: self.length,
            n_heads: self.heads.n_heads as usize,
            n_kv_heads: self.heads.n_kv_heads as usize,
            head_dim: self.heads.head_dim as usize,
            window: self.window,
            segments: segments.map(|ids| ids.i32().to_vec()).unwrap_or_default(),
        }
    }

    fn rotation(&self) -> Rotation<'_> {
        Rotation {
            cos: &self.angles.cos,
            sin: &self.angles.sin,
        }
    }
}

fn projections<'a>(inputs: &'a [Input<'_>]) -> Projections<'a> {
    Projections {
        query: inputs[0].f32(),
        key: inputs[1].f32(),
        value: inputs[2].f32(),
    }
}

/// The output, and each row's logarithm of its sum of exponentials for the backward pass.
fn forward(inputs: &[Array], call: &Arc<Call>, segments: Option<&Array>) -> Result<Vec<Array>> {
    let log_sums = [call.batch as i32, call.heads.n_heads, call.length as i32].to_vec();
    let shapes = [inputs[0].shape().to_vec(), log_sums];
    let all: Vec<Array> = inputs.iter().chain(segments).cloned().collect();
    let run = call.clone();
    kernel("attention", &all, &shapes, move |inputs, outputs| {
        let mut outputs = slices(outputs);
        if let (Some(out), Some(log_sums)) = (outputs.next(), outputs.next()) {
            let shape = run.shape(inputs.get(3));
            planish_kernels::attention(&shape, run.rotation(), projections(inputs), out, log_sums);
        }
    })
}

fn backward(
    inputs: &[Array],
    d_out: &Array,
    outputs: &[Array],
    call: &Arc<Call>,
    segments: Option<&Array>,
) -> Result<Vec<Array>> {
    let shapes: Vec<Vec<i32>> = inputs.iter().map(|input| input.shape().to_vec()).collect();
    let saved = [&outputs[0], &outputs[1], d_out];
    let all: Vec<Array> = inputs.iter().chain(saved).chain(segments).cloned().collect();
    let run = call.clone();
    kernel("attention_backward", &all, &shapes, move |inputs, outputs| {
        let forward = Forward {
            out: inputs[3].f32(),
            log_sums: inputs[4].f32(),
        };
        let mut gradients = slices(outputs);
        if let (Some(dq), Some(dk), Some(dv)) = (gradients.next(), gradients.next(), gradients.next()) {
            let shape = run.shape(inputs.get(6));
            planish_kernels::attention_backward(
                &shape,
                run.rotation(),
                projections(inputs),
                forward,
                inputs[5].f32(),
                (dq, dk, dv),
            );
        }
    })
}

use mlx_rs::ops::sigmoid;
use planish_mlx::cuda_kernel::{CudaKernel, Launch, VECTORS};
use planish_mlx::ops::exactly;
use planish_mlx::transforms::custom_vjp_many;
use planish_mlx::{Array, Dtype};

use super::{kernel_or, wrong_count};
use crate::{Error, Result};

/// Rows that a block of threads does: what it reads of `A` and `B` is read once for all of them.
const ROWS: usize = 16;
const THREADS: usize = 128;

const FORWARD: CudaKernel = CudaKernel {
    name: "planish_swiglu",
    inputs: &["gate", "up", "u", "b_gate", "b_up"],
    outputs: &["h"],
    header: VECTORS,
    source: include_str!("swiglu.cu"),
};

const BACKWARD: CudaKernel = CudaKernel {
    name: "planish_swiglu_back",
    inputs: &["gate", "up", "u", "b_gate", "b_up", "dh", "du", "a"],
    outputs: &["d_gate", "d_up", "h"],
    header: VECTORS,
    source: include_str!("swiglu_back.cu"),
};

/// `h = silu(g) · p` for `g = gate + u₁ b₁`, `p = up + u₂ b₂`, and `h aᵀ`.
///
/// `gate`, `up` `[rows, f]` · `update`: `[u₁ | u₂]` `[rows, 2r]`, `b₁` and `b₂` `[r, f]`, where gate or up have adapters · `a`
/// `[r', f]` where down has one. `h` is computed again in the backward pass.
pub(super) fn swiglu(
    gate: &Array,
    up: &Array,
    update: Option<[&Array; 3]>,
    a: Option<&Array>,
) -> Result<(Array, Option<Array>)> {
    let mut inputs = vec![gate.clone(), up.clone()];
    inputs.extend(update.into_iter().flatten().cloned());
    inputs.extend(a.cloned());
    let (is_updated, is_read) = (update.is_some(), a.is_some());
    let forward = move |inputs: &[Array]| {
        let (parts, update, a) = cut(inputs, is_updated, is_read)?;
        let h = gated(parts, update)?;
        let inner = a.map(|a| h.matmul(a.t())).transpose()?;
        Ok::<_, Error>(std::iter::once(h).chain(inner).collect())
    };
    let backward = move |inputs: &[Array], cotangents: &[Array], _: &[Array]| {
        let (parts, update, a) = cut(inputs, is_updated, is_read)?;
        let Some((dh, of_inner)) = cotangents.split_first() else {
            return Err(wrong_count(1, cotangents));
        };
        let below = a.zip(of_inner.first());
        let [d_gate, d_up, h] = gated_back(parts, update, dh, below)?;
        let mut gradients = vec![d_gate.clone(), d_up.clone()];
        if let Some([u, b_gate, b_up]) = update {
            gradients.extend(update_gradients([&d_gate, &d_up], u, [b_gate, b_up])?);
        }
        if let Some((_, du)) = below {
            gradients.push(du.t().matmul(h)?);
        }
        Ok::<_, Error>(gradients)
    };
    let mut outputs = custom_vjp_many(forward, backward, &inputs)?;
    let inner = a.and_then(|_| outputs.pop());
    let [h] = exactly(outputs)?;
    Ok((h, inner))
}

/// Gate and up, the update, a.
type Parts<'a> = ([&'a Array; 2], Option<[&'a Array; 3]>, Option<&'a Array>);

fn cut(inputs: &[Array], is_updated: bool, is_read: bool) -> Result<Parts<'_>> {
    match (inputs, is_updated, is_read) {
        ([gate, up], false, false) => Ok(([gate, up], None, None)),
        ([gate, up, a], false, true) => Ok(([gate, up], None, Some(a))),
        ([gate, up, u, b_gate, b_up], true, false) => Ok(([gate, up], Some([u, b_gate, b_up]), None)),
        ([gate, up, u, b_gate, b_up, a], true, true) => Ok(([gate, up], Some([u, b_gate, b_up]), Some(a))),
        _ => Err(wrong_count(2, inputs)),
    }
}

/// Of `u` and of both `b`.
fn update_gradients(gradients: [&Array; 2], u: &Array, b: [&Array; 2]) -> Result<[Array; 3]> {
    let rank = b[0].dim(0);
    let of_u = [gradients[0].matmul(b[0].t())?, gradients[1].matmul(b[1].t())?];
    // All rows of `u`: a half of them would have to be copied out first, and reading the gradient is the work.
    let of_b = |part: usize| -> Result<Array> {
        let all = u.t().matmul(gradients[part])?;
        let top = part as i32 * rank;
        Ok(planish_mlx::ops::slice(&all, &[top, 0], &[top + rank, all.dim(1)])?)
    };
    Ok([mlx_rs::ops::concatenate(&of_u, 1)?, of_b(0)?, of_b(1)?])
}

fn blocks(n: i32, f: i32) -> [usize; 2] {
    [(n as usize).div_ceil(ROWS), (f as usize / 4).div_ceil(THREADS)]
}

/// Constants of both kernels; the forward one does not read the last rank.
fn constants(n: i32, f: i32, rank: usize, rank_below: usize) -> [(&'static str, usize); 6] {
    [
        ("N", n as usize),
        ("F", f as usize),
        ("R", rank),
        ("RD", rank_below),
        ("ROWS", ROWS),
        ("THREADS", THREADS),
    ]
}

fn rank_of(update: Option<[&Array; 3]>) -> usize {
    update.map_or(0, |[_, b, _]| b.dim(0) as usize)
}

fn gated([gate, up]: [&Array; 2], update: Option<[&Array; 3]>) -> Result<Array> {
    let (n, f, dtype) = (gate.dim(0), gate.dim(1), gate.dtype());
    let launch = Launch {
        blocks: blocks(n, f),
        threads: THREADS,
        constants: &constants(n, f, rank_of(update), 0),
        element: dtype,
        outputs: &[(&[n, f], dtype)],
    };
    let [u, b_gate, b_up] = update.unwrap_or([gate; 3]);
    let [h] = kernel_or(&FORWARD, [gate, up, u, b_gate, b_up], &launch, || {
        let [gate, up] = updated([gate, up], update)?;
        Ok([gate.multiply(sigmoid(&gate)?)?.multiply(up)?.as_dtype(dtype)?])
    })?;
    Ok(h)
}

/// Gradients of gate and up, and `h` once more. `below`: `a` and the gradient of the product with it.
fn gated_back(
    [gate, up]: [&Array; 2],
    update: Option<[&Array; 3]>,
    dh: &Array,
    below: Option<(&Array, &Array)>,
) -> Result<[Array; 3]> {
    let (n, f, dtype) = (gate.dim(0), gate.dim(1), gate.dtype());
    let rank_below = below.map_or(0, |(a, _)| a.dim(0) as usize);
    let shape = [n, f];
    let launch = Launch {
        blocks: blocks(n, f),
        threads: THREADS,
        constants: &constants(n, f, rank_of(update), rank_below),
        element: dtype,
        outputs: &[(&shape, dtype), (&shape, dtype), (&shape, dtype)],
    };
    let [u, b_gate, b_up] = update.unwrap_or([gate; 3]);
    let (a, du) = below.unwrap_or((gate, gate));
    kernel_or(&BACKWARD, [gate, up, u, b_gate, b_up, dh, du, a], &launch, || {
        composed_back([gate, up], update, dh, below)
    })
}

fn composed_back(
    parts: [&Array; 2],
    update: Option<[&Array; 3]>,
    dh: &Array,
    below: Option<(&Array, &Array)>,
) -> Result<[Array; 3]> {
    let dtype = dh.dtype();
    let [gate, up] = updated(parts, update)?;
    let mut dh = dh.as_dtype(Dtype::Float32)?;
    if let Some((a, du)) = below {
        dh = dh.add(du.as_dtype(Dtype::Float32)?.matmul(a.as_dtype(Dtype::Float32)?)?)?;
    }
    let (s, one) = (sigmoid(&gate)?, Array::from_f32(1.0));
    let silu = gate.multiply(&s)?;
    let slope = s.multiply(one.add(gate.multiply(one.subtract(&s)?)?)?)?;
    let of_gate = dh.multiply(&up)?.multiply(slope)?.as_dtype(dtype)?;
    Ok([
        of_gate,
        dh.multiply(&silu)?.as_dtype(dtype)?,
        silu.multiply(up)?.as_dtype(dtype)?,
    ])
}

/// Gate and up with their updates, in f32.
fn updated([gate, up]: [&Array; 2], update: Option<[&Array; 3]>) -> Result<[Array; 2]> {
    let wide = |array: &Array| array.as_dtype(Dtype::Float32);
    let (gate, up) = (wide(gate)?, wide(up)?);
    let Some([u, b_gate, b_up]) = update else {
        return Ok([gate, up]);
    };
    let [of_gate, of_up] = exactly(wide(u)?.split_at_indices(&[b_gate.dim(0)], -1)?)?;
    Ok([
        gate.add(of_gate.matmul(wide(b_gate)?)?)?,
        up.add(of_up.matmul(wide(b_up)?)?)?,
    ])
}

use mlx_rs::ops::sigmoid;
use planish_mlx::cuda_kernel::{CudaKernel, Launch, VECTORS};
use planish_mlx::transforms::custom_vjp;
use planish_mlx::{Array, Dtype};

use super::kernel_or;
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
    // Of the inputs: gate and up, the update, a.
    let cut = move |inputs: &[Array]| {
        let update = if is_updated { inputs[2..5].to_vec() } else { Vec::new() };
        let a = is_read.then(|| inputs[inputs.len() - 1].clone());
        ([inputs[0].clone(), inputs[1].clone()], update, a)
    };
    let forward = move |inputs: &[Array]| {
        let (parts, update, a) = cut(inputs);
        let mut outputs = vec![gated(&parts, &update)?];
        if let Some(a) = a {
            outputs.push(outputs[0].matmul(a.t())?);
        }
        Ok::<_, Error>(outputs)
    };
    let backward = move |inputs: &[Array], cotangents: &[Array], _: &[Array]| {
        let (parts, update, a) = cut(inputs);
        let below = a.as_ref().zip(cotangents.get(1));
        let [d_gate, d_up, h] = gated_back(&parts, &update, &cotangents[0], below)?;
        let mut gradients = vec![d_gate.clone(), d_up.clone()];
        if let [u, b_gate, b_up] = update.as_slice() {
            gradients.extend(update_gradients([&d_gate, &d_up], u, [b_gate, b_up])?);
        }
        if let Some((_, du)) = below {
            gradients.push(du.t().matmul(h)?);
        }
        Ok::<_, Error>(gradients)
    };
    let mut outputs = custom_vjp(forward, backward, &inputs)?.into_iter();
    let h = outputs.next().ok_or(Error::TrainableCount { expected: 1, found: 0 })?;
    Ok((h, outputs.next()))
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

fn rank_of(update: &[Array]) -> usize {
    update.get(1).map_or(0, |b| b.dim(0) as usize)
}

/// `update`, or something in its place.
fn or_unused<'a>(update: &'a [Array], unused: &'a Array) -> [&'a Array; 3] {
    match update {
        [u, b_gate, b_up] => [u, b_gate, b_up],
        _ => [unused; 3],
    }
}

fn gated(parts: &[Array; 2], update: &[Array]) -> Result<Array> {
    let (n, f, dtype) = (parts[0].dim(0), parts[0].dim(1), parts[0].dtype());
    let rank = rank_of(update);
    let launch = Launch {
        blocks: blocks(n, f),
        threads: THREADS,
        constants: &constants(n, f, rank, 0),
        element: dtype,
        outputs: &[(&[n, f], dtype)],
    };
    let [u, b_gate, b_up] = or_unused(update, &parts[0]);
    let arguments = [&parts[0], &parts[1], u, b_gate, b_up].map(Array::clone);
    let mut outputs = kernel_or(&FORWARD, &arguments, &launch, |arguments| {
        let [gate, up] = updated(arguments, rank)?;
        Ok(vec![gate.multiply(sigmoid(&gate)?)?.multiply(up)?.as_dtype(dtype)?])
    })?;
    Ok(outputs.swap_remove(0))
}

/// Gradients of gate and up, and `h` once more. `below`: `a` and the gradient of the product with it.
fn gated_back(parts: &[Array; 2], update: &[Array], dh: &Array, below: Option<(&Array, &Array)>) -> Result<[Array; 3]> {
    let (n, f, dtype) = (parts[0].dim(0), parts[0].dim(1), parts[0].dtype());
    let (rank, rank_below) = (rank_of(update), below.map_or(0, |(a, _)| a.dim(0) as usize));
    let shape = [n, f];
    let launch = Launch {
        blocks: blocks(n, f),
        threads: THREADS,
        constants: &constants(n, f, rank, rank_below),
        element: dtype,
        outputs: &[(&shape, dtype), (&shape, dtype), (&shape, dtype)],
    };
    let [u, b_gate, b_up] = or_unused(update, &parts[0]);
    let (a, du) = below.unwrap_or((&parts[0], &parts[0]));
    let arguments = [&parts[0], &parts[1], u, b_gate, b_up, dh, du, a].map(Array::clone);
    let outputs = kernel_or(&BACKWARD, &arguments, &launch, |arguments| {
        composed_back(arguments, rank, rank_below)
    })?;
    outputs.try_into().map_err(|outputs: Vec<Array>| Error::TrainableCount {
        expected: 3,
        found: outputs.len(),
    })
}

fn composed_back(arguments: &[Array], rank: usize, rank_below: usize) -> Result<Vec<Array>> {
    let dtype = arguments[0].dtype();
    let [gate, up] = updated(arguments, rank)?;
    let mut dh = arguments[5].as_dtype(Dtype::Float32)?;
    if rank_below > 0 {
        let [du, a] = [&arguments[6], &arguments[7]].map(|array| array.as_dtype(Dtype::Float32));
        dh = dh.add(du?.matmul(a?)?)?;
    }
    let (s, one) = (sigmoid(&gate)?, Array::from_f32(1.0));
    let silu = gate.multiply(&s)?;
    let slope = s.multiply(one.add(gate.multiply(one.subtract(&s)?)?)?)?;
    let of_gate = dh.multiply(&up)?.multiply(slope)?;
    let of_up = dh.multiply(&silu)?;
    [of_gate, of_up, silu.multiply(up)?]
        .iter()
        .map(|array| Ok(array.as_dtype(dtype)?))
        .collect()
}

/// Gate and up with their updates in f32, from gate, up, u and both b.
fn updated(arguments: &[Array], rank: usize) -> Result<[Array; 2]> {
    let wide = |array: &Array| array.as_dtype(Dtype::Float32);
    let (mut gate, mut up) = (wide(&arguments[0])?, wide(&arguments[1])?);
    if rank > 0 {
        let halves = wide(&arguments[2])?.split_at_indices(&[rank as i32], -1)?;
        gate = gate.add(halves[0].matmul(wide(&arguments[3])?)?)?;
        up = up.add(halves[1].matmul(wide(&arguments[4])?)?)?;
    }
    Ok([gate, up])
}

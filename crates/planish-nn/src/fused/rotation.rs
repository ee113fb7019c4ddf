use planish_mlx::cuda_kernel::{CudaKernel, Launch, VECTORS};
use planish_mlx::transforms::custom_vjp;
use planish_mlx::{Array, Dtype};

use super::{kernel_or, none};
use crate::mask::{MaskRule, ReadyMask};
use crate::rope::Rope;
use crate::{Error, Result};

/// Most rows that a block of threads does: what it reads of `B` is read once for all of them.
const ROWS: usize = 8;
const THREADS: usize = 128;

const FORWARD: CudaKernel = CudaKernel {
    name: "planish_rotate",
    inputs: &["y", "u", "b", "cosines", "sines"],
    outputs: &["q", "k", "v"],
    header: VECTORS,
    source: include_str!("rotate.cu"),
};

const BACKWARD: CudaKernel = CudaKernel {
    name: "planish_rotate_back",
    inputs: &["dq", "dk", "dv", "cosines", "sines"],
    outputs: &["dy"],
    header: VECTORS,
    source: include_str!("rotate_back.cu"),
};

/// Cosines and sines by which tokens are turned, f32 `[tokens, h_d / 2]` each; tokens beyond the table begin it again.
#[derive(Debug, Clone)]
pub(crate) struct Turns {
    cosines: Array,
    sines: Array,
}

impl Turns {
    /// For rows of `length` tokens under `mask`.
    pub(crate) fn new(rope: &Rope, length: usize, mask: &ReadyMask) -> Result<Self> {
        let angles = rope.angles(length);
        let shape = [length as i32, (angles.cos.len() / length.max(1)) as i32];
        let of_length = [&angles.cos, &angles.sin].map(|table| Array::from_slice(table, &shape));
        let [cosines, sines] = match mask {
            ReadyMask::Array {
                rule:
                    MaskRule {
                        positions: Some(positions),
                        ..
                    },
                ..
            } => {
                let [cos, sin] = of_length;
                [cos.take_axis(positions, 0)?, sin.take_axis(positions, 0)?]
            }
            _ => of_length,
        };
        Ok(Self { cosines, sines })
    }
}

/// Heads of query and of key and value, and their size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) query: usize,
    pub(super) key_value: usize,
    pub(super) size: usize,
}

impl Heads {
    fn width(self) -> usize {
        (self.query + 2 * self.key_value) * self.size
    }

    fn widths(self) -> [i32; 3] {
        [self.query, self.key_value, self.key_value].map(|heads| (heads * self.size) as i32)
    }
}

/// Query, key and value `[rows, heads · h_d]` from `y + u b`, query and key turned.
///
/// `y` `[rows, q + k + v]` · `u` `[rows, 3r]`, `b` `[3r, q + k + v]`, where there are adapters, of rank `r` each.
pub(super) fn rotated(y: &Array, update: Option<(&Array, &Array)>, turns: &Turns, heads: Heads) -> Result<[Array; 3]> {
    let mut inputs = vec![y.clone(), turns.cosines.clone(), turns.sines.clone()];
    if let Some((u, b)) = update {
        inputs.extend([u.clone(), b.clone()]);
    }
    let forward = move |inputs: &[Array]| turned(inputs, heads);
    let backward = move |inputs: &[Array], cotangents: &[Array], _: &[Array]| {
        let dy = turned_back(inputs, cotangents, heads)?;
        let mut gradients = vec![dy.clone(), none(&inputs[1])?, none(&inputs[2])?];
        if let [_, _, _, u, b] = inputs {
            gradients.extend([dy.matmul(b.t())?, u.t().matmul(&dy)?]);
        }
        Ok::<_, Error>(gradients)
    };
    let outputs = custom_vjp(forward, backward, &inputs)?;
    outputs.try_into().map_err(|outputs: Vec<Array>| Error::TrainableCount {
        expected: 3,
        found: outputs.len(),
    })
}

fn constants(inputs: &[Array], heads: Heads, rank: usize) -> [(&'static str, usize); 9] {
    [
        ("N", inputs[0].dim(0) as usize),
        ("D", heads.width()),
        ("H", heads.query),
        ("K", heads.key_value),
        ("HD", heads.size),
        ("R", rank),
        ("TABLE", inputs[1].dim(0) as usize),
        ("ROWS", ROWS),
        ("THREADS", THREADS),
    ]
}

fn blocks(n: usize, heads: Heads) -> [usize; 2] {
    [n.div_ceil(ROWS), (heads.width() / 8).div_ceil(THREADS)]
}

/// `inputs`: y, cosines, sines, u, b.
fn turned(inputs: &[Array], heads: Heads) -> Result<Vec<Array>> {
    let (n, dtype) = (inputs[0].dim(0), inputs[0].dtype());
    let rank = inputs.get(3).map_or(0, |u| u.dim(1) as usize / 3);
    let shapes = heads.widths().map(|width| [n, width]);
    let launch = Launch {
        blocks: blocks(n as usize, heads),
        threads: THREADS,
        constants: &constants(inputs, heads, rank),
        element: dtype,
        outputs: &[(&shapes[0], dtype), (&shapes[1], dtype), (&shapes[2], dtype)],
    };
    let of = |i: usize| inputs.get(i).unwrap_or(&inputs[0]).clone();
    let arguments = [of(0), of(3), of(4), of(1), of(2)];
    kernel_or(&FORWARD, &arguments, &launch, |arguments| {
        let mut y = arguments[0].clone();
        if rank > 0 {
            y = mlx_rs::ops::addmm(y, &arguments[1], &arguments[2], None, None)?;
        }
        let [q, k, v] = split(&y, heads)?;
        let (cosines, sines) = (&arguments[3], &arguments[4]);
        Ok(vec![
            turn(&q, heads, cosines, sines)?,
            turn(&k, heads, cosines, sines)?,
            v,
        ])
    })
}

/// `inputs` as in [`turned`] · `cotangents`: of query, key and value → of `y`.
fn turned_back(inputs: &[Array], cotangents: &[Array], heads: Heads) -> Result<Array> {
    let (shape, dtype) = (inputs[0].shape(), inputs[0].dtype());
    let launch = Launch {
        blocks: blocks(shape[0] as usize, heads),
        threads: THREADS,
        constants: &constants(inputs, heads, 0),
        element: dtype,
        outputs: &[(shape, dtype)],
    };
    let mut arguments = cotangents.to_vec();
    arguments.extend_from_slice(&inputs[1..3]);
    let outputs = kernel_or(&BACKWARD, &arguments, &launch, |arguments| {
        let (cosines, back) = (&arguments[3], arguments[4].negative()?);
        let [dq, dk] = [&arguments[0], &arguments[1]].map(|x| turn(x, heads, cosines, &back));
        Ok(vec![mlx_rs::ops::concatenate(&[dq?, dk?, arguments[2].clone()], -1)?])
    })?;
    Ok(outputs[0].clone())
}

fn split(y: &Array, heads: Heads) -> Result<[Array; 3]> {
    let [q, k, _] = heads.widths();
    let parts = y.split_at_indices(&[q, q + k], -1)?;
    Ok([0, 1, 2].map(|i: usize| parts[i].clone()))
}

/// Turns heads `[rows, n · h_d]`.
fn turn(x: &Array, heads: Heads, cosines: &Array, sines: &Array) -> Result<Array> {
    let half = (heads.size / 2) as i32;
    let table = cosines.dim(0);
    // [repeats of the table, tokens of the table, heads, halves, h_d / 2]
    let parts = x
        .as_dtype(Dtype::Float32)?
        .reshape(&[-1, table, x.dim(-1) / (2 * half), 2, half])?
        .split_at_indices(&[1], 3)?;
    let [c, s] = [cosines, sines].map(|table| table.reshape(&[1, -1, 1, 1, half]));
    let (c, s) = (c?, s?);
    let one = parts[0].multiply(&c)?.subtract(parts[1].multiply(&s)?)?;
    let other = parts[1].multiply(&c)?.add(parts[0].multiply(&s)?)?;
    let turned = mlx_rs::ops::concatenate(&[one, other], 3)?;
    Ok(turned.reshape(x.shape())?.as_dtype(x.dtype())?)
}

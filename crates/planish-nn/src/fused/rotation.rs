use planish_mlx::cuda_kernel::{CudaKernel, Launch, VECTORS};
use planish_mlx::ops::exactly;
use planish_mlx::transforms::custom_vjp_many;
use planish_mlx::{Array, Dtype};

use super::{kernel_or, none, wrong_count};
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
    let forward = move |inputs: &[Array]| {
        let (y, turns, update) = cut(inputs)?;
        Ok(turned(y, turns, update, heads)?.to_vec())
    };
    let backward = move |inputs: &[Array], cotangents: &[Array], _: &[Array]| {
        let (y, [cosines, sines], update) = cut(inputs)?;
        let dy = turned_back(y, [cosines, sines], cotangents, heads)?;
        let mut gradients = vec![dy.clone(), none(cosines)?, none(sines)?];
        if let Some([u, b]) = update {
            gradients.extend([dy.matmul(b.t())?, u.t().matmul(&dy)?]);
        }
        Ok::<_, Error>(gradients)
    };
    Ok(exactly(custom_vjp_many(forward, backward, &inputs)?)?)
}

/// `y`, cosines and sines, and the update where there is one.
type Parts<'a> = (&'a Array, [&'a Array; 2], Option<[&'a Array; 2]>);

fn cut(inputs: &[Array]) -> Result<Parts<'_>> {
    match inputs {
        [y, cosines, sines] => Ok((y, [cosines, sines], None)),
        [y, cosines, sines, u, b] => Ok((y, [cosines, sines], Some([u, b]))),
        _ => Err(wrong_count(5, inputs)),
    }
}

fn constants(y: &Array, [cosines, _]: [&Array; 2], heads: Heads, rank: usize) -> [(&'static str, usize); 9] {
    [
        ("N", y.dim(0) as usize),
        ("D", heads.width()),
        ("H", heads.query),
        ("K", heads.key_value),
        ("HD", heads.size),
        ("R", rank),
        ("TABLE", cosines.dim(0) as usize),
        ("ROWS", ROWS),
        ("THREADS", THREADS),
    ]
}

fn blocks(n: usize, heads: Heads) -> [usize; 2] {
    [n.div_ceil(ROWS), (heads.width() / 8).div_ceil(THREADS)]
}

fn turned(y: &Array, turns: [&Array; 2], update: Option<[&Array; 2]>, heads: Heads) -> Result<[Array; 3]> {
    let (n, dtype) = (y.dim(0), y.dtype());
    let rank = update.map_or(0, |[u, _]| u.dim(1) as usize / 3);
    let shapes = heads.widths().map(|width| [n, width]);
    let launch = Launch {
        blocks: blocks(n as usize, heads),
        threads: THREADS,
        constants: &constants(y, turns, heads, rank),
        element: dtype,
        outputs: &shapes.each_ref().map(|shape| (&shape[..], dtype)),
    };
    let ([cosines, sines], [u, b]) = (turns, update.unwrap_or([y, y]));
    kernel_or(&FORWARD, [y, u, b, cosines, sines], &launch, || {
        let y = match update {
            Some([u, b]) => mlx_rs::ops::addmm(y, u, b, None, None)?,
            None => y.clone(),
        };
        let [q, k, v] = split(&y, heads)?;
        Ok([turn(&q, heads, cosines, sines)?, turn(&k, heads, cosines, sines)?, v])
    })
}

/// `cotangents` of query, key and value → of `y`.
fn turned_back(y: &Array, turns: [&Array; 2], cotangents: &[Array], heads: Heads) -> Result<Array> {
    let ([dq, dk, dv], [cosines, sines]) = (cotangents, turns) else {
        return Err(wrong_count(3, cotangents));
    };
    let (shape, dtype) = (y.shape(), y.dtype());
    let launch = Launch {
        blocks: blocks(shape[0] as usize, heads),
        threads: THREADS,
        constants: &constants(y, turns, heads, 0),
        element: dtype,
        outputs: &[(shape, dtype)],
    };
    let [dy] = kernel_or(&BACKWARD, [dq, dk, dv, cosines, sines], &launch, || {
        let back = sines.negative()?;
        let [dq, dk] = [dq, dk].map(|x| turn(x, heads, cosines, &back));
        Ok([mlx_rs::ops::concatenate(&[dq?, dk?, dv.clone()], -1)?])
    })?;
    Ok(dy)
}

fn split(y: &Array, heads: Heads) -> Result<[Array; 3]> {
    let [q, k, _] = heads.widths();
    Ok(exactly(y.split_at_indices(&[q, q + k], -1)?)?)
}

/// Turns heads `[rows, n · h_d]`.
fn turn(x: &Array, heads: Heads, cosines: &Array, sines: &Array) -> Result<Array> {
    let half = (heads.size / 2) as i32;
    let table = cosines.dim(0);
    // [repeats of the table, tokens of the table, heads, halves, h_d / 2]
    let halves = x
        .as_dtype(Dtype::Float32)?
        .reshape(&[-1, table, x.dim(-1) / (2 * half), 2, half])?
        .split_at_indices(&[1], 3)?;
    let [first, second] = exactly(halves)?;
    let [c, s] = [cosines, sines].map(|table| table.reshape(&[1, -1, 1, 1, half]));
    let (c, s) = (c?, s?);
    let one = first.multiply(&c)?.subtract(second.multiply(&s)?)?;
    let other = second.multiply(&c)?.add(first.multiply(&s)?)?;
    let turned = mlx_rs::ops::concatenate(&[one, other], 3)?;
    Ok(turned.reshape(x.shape())?.as_dtype(x.dtype())?)
}

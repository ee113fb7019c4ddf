use planish_mlx::cuda_kernel::{CudaKernel, Launch, VECTORS};
use planish_mlx::transforms::custom_vjp;
use planish_mlx::{Array, Dtype};

use super::output::Pending;
use super::{kernel_or, none};
use crate::{Error, Result, RmsNorm};

const FORWARD: CudaKernel = CudaKernel {
    name: "planish_norm",
    inputs: &["x", "y", "u", "b", "w"],
    outputs: &["h", "n"],
    header: VECTORS,
    source: include_str!("norm.cu"),
};

const BACKWARD: CudaKernel = CudaKernel {
    name: "planish_norm_back",
    inputs: &["x", "w", "dh", "dn", "du", "a"],
    outputs: &["dx", "n"],
    header: VECTORS,
    source: include_str!("norm_back.cu"),
};

/// Whether the kernels take rows of `d` numbers: whole vectors, and not more than the registers of a block hold.
pub(super) fn can_norm(d: usize) -> bool {
    d.is_multiple_of(8) && d <= 16384
}

/// What reads `h` at the beginning of a sub-layer, `[rows, ...]` all.
pub(super) struct Normed {
    /// `h` itself, for the residual.
    pub(super) residual: Array,
    /// `norm(h)`.
    pub(super) normed: Array,
    /// `norm(h) aᵀ`, `[rows, r]`, if there is an `a`.
    pub(super) inner: Option<Array>,
}

/// Where the optional inputs are.
#[derive(Debug, Clone, Copy)]
struct Given {
    a: bool,
    base: bool,
    update: bool,
}

/// The optional inputs.
struct Inputs<'a> {
    h: &'a Array,
    weight: &'a Array,
    a: Option<&'a Array>,
    base: Option<&'a Array>,
    update: Option<(&'a Array, &'a Array)>,
}

impl Given {
    fn of(self, inputs: &[Array]) -> Option<Inputs<'_>> {
        let mut rest = inputs.iter();
        let (h, weight) = (rest.next()?, rest.next()?);
        let mut next = |is_given: bool| if is_given { rest.next() } else { None };
        let (a, base) = (next(self.a), next(self.base));
        let update = next(self.update).zip(next(self.update));
        Some(Inputs {
            h,
            weight,
            a,
            base,
            update,
        })
    }
}

/// `h`, the sum that is pending, its norm, and the norm's product with `a` `[r, d]`; their gradients are summed by one kernel.
pub(super) fn normed(pending: &Pending, norm: &RmsNorm, a: Option<&Array>) -> Result<Normed> {
    let eps = norm.eps;
    let given = Given {
        a: a.is_some(),
        base: pending.base.is_some(),
        update: pending.update.is_some(),
    };
    let mut inputs = vec![pending.residual.clone(), norm.weight.clone()];
    inputs.extend(a.cloned());
    inputs.extend(pending.base.clone());
    inputs.extend(pending.update.iter().flat_map(|(u, b)| [u.clone(), b.clone()]));
    let forward = move |inputs: &[Array]| {
        let inputs = given.of(inputs).ok_or_else(incomplete)?;
        let [h, normed] = summed(&inputs, eps)?;
        let mut outputs = vec![h, normed];
        if let Some(a) = inputs.a {
            outputs.push(outputs[1].matmul(a.t())?);
        }
        Ok::<_, Error>(outputs)
    };
    let backward = move |inputs: &[Array], cotangents: &[Array], outputs: &[Array]| {
        let inputs = given.of(inputs).ok_or_else(incomplete)?;
        let of_inner = inputs.a.zip(cotangents.get(2));
        let [dh, normed] = input_gradient(&outputs[0], inputs.weight, &cotangents[..2], of_inner, eps)?;
        let mut gradients = vec![dh.clone(), none(inputs.weight)?];
        if let Some((_, of_inner)) = of_inner {
            gradients.push(of_inner.t().matmul(normed)?);
        }
        gradients.extend(inputs.base.map(|_| dh.clone()));
        if let Some((u, b)) = inputs.update {
            gradients.extend([dh.matmul(b.t())?, u.t().matmul(&dh)?]);
        }
        Ok::<_, Error>(gradients)
    };
    let mut outputs = custom_vjp(forward, backward, &inputs)?.into_iter();
    let (Some(residual), Some(normed)) = (outputs.next(), outputs.next()) else {
        return Err(incomplete());
    };
    Ok(Normed {
        residual,
        normed,
        inner: outputs.next(),
    })
}

fn incomplete() -> Error {
    Error::TrainableCount { expected: 2, found: 0 }
}

fn constants(h: &Array, eps: f32, rank: i32) -> [(&'static str, usize); 6] {
    let (n, d) = (h.dim(0) as usize, h.dim(1) as usize);
    let (threads, rows) = block(d);
    [
        ("N", n),
        ("D", d),
        ("R", rank as usize),
        ("EPS_BITS", eps.to_bits() as usize),
        ("ROWS", rows),
        ("THREADS", threads),
    ]
}

/// Threads of a block, and its rows: more of both would leave a thread too few registers.
fn block(d: usize) -> (usize, usize) {
    let threads = d.div_ceil(8).next_multiple_of(32).min(512);
    (threads, if d <= threads * 8 { 2 } else { 1 })
}

/// The sum and its norm.
fn summed(inputs: &Inputs<'_>, eps: f32) -> Result<[Array; 2]> {
    let Some(base) = inputs.base else {
        let normed = mlx_rs::fast::rms_norm(inputs.h, Some(inputs.weight), eps)?;
        return Ok([inputs.h.clone(), normed]);
    };
    let (n, d) = (inputs.h.dim(0) as usize, inputs.h.dim(1) as usize);
    let rank = inputs.update.map_or(0, |(u, _)| u.dim(1));
    let (u, b) = inputs.update.unwrap_or((inputs.h, inputs.h));
    let (threads, rows) = block(d);
    let dtype = inputs.h.dtype();
    let launch = Launch {
        blocks: [n.div_ceil(rows), 1],
        threads,
        constants: &constants(inputs.h, eps, rank),
        element: dtype,
        outputs: &[(inputs.h.shape(), dtype), (inputs.h.shape(), dtype)],
    };
    let arguments = [inputs.h, base, u, b, inputs.weight].map(Array::clone);
    let outputs = kernel_or(&FORWARD, &arguments, &launch, |_| {
        let mut h = inputs.h.add(base)?;
        if rank > 0 {
            h = mlx_rs::ops::addmm(h, u, b, None, None)?;
        }
        let normed = mlx_rs::fast::rms_norm(&h, Some(inputs.weight), eps)?;
        Ok(vec![h, normed])
    })?;
    Ok([outputs[0].clone(), outputs[1].clone()])
}

/// The gradient of `h`, and its norm once more, which is cheaper to compute again than to keep.
///
/// `cotangents` of the sum and of its norm · `of_inner`: `a` and the cotangent of the product with it.
fn input_gradient(
    h: &Array,
    weight: &Array,
    cotangents: &[Array],
    of_inner: Option<(&Array, &Array)>,
    eps: f32,
) -> Result<[Array; 2]> {
    let (n, d, dtype) = (h.dim(0) as usize, h.dim(1) as usize, h.dtype());
    let rank = of_inner.map_or(0, |(a, _)| a.dim(0));
    let (a, du) = of_inner.unwrap_or((h, h));
    let (threads, rows) = block(d);
    let launch = Launch {
        blocks: [n.div_ceil(rows), 1],
        threads,
        constants: &constants(h, eps, rank),
        element: dtype,
        outputs: &[(h.shape(), dtype), (if rank > 0 { h.shape() } else { &[1] }, dtype)],
    };
    let arguments = [h, weight, &cotangents[0], &cotangents[1], du, a].map(Array::clone);
    let composed = |arguments: &[Array]| composed_gradient(arguments, rank, eps);
    let outputs = kernel_or(&BACKWARD, &arguments, &launch, composed)?;
    Ok([outputs[0].clone(), outputs[1].clone()])
}

/// `dh + s·g − s³·x·mean(g·x)`, `g = w·(dn + du a)`, `s = 1/sqrt(mean(x²) + eps)`.
fn composed_gradient(arguments: &[Array], rank: i32, eps: f32) -> Result<Vec<Array>> {
    let wide = |i: usize| arguments[i].as_dtype(Dtype::Float32);
    let (x, w, dh, mut of_norm) = (wide(0)?, wide(1)?, wide(2)?, wide(3)?);
    if rank > 0 {
        of_norm = of_norm.add(wide(4)?.matmul(wide(5)?)?)?;
    }
    let g = of_norm.multiply(w)?;
    let scale = x.square()?.mean_axis(-1, true)?.add(Array::from_f32(eps))?.rsqrt()?;
    let cube = scale.square()?.multiply(&scale)?;
    let slope = g.multiply(&x)?.mean_axis(-1, true)?.multiply(cube)?;
    let dx = dh.add(g.multiply(scale)?)?.subtract(x.multiply(slope)?)?;
    let normed = mlx_rs::fast::rms_norm(&arguments[0], Some(&arguments[1]), eps)?;
    Ok(vec![dx.as_dtype(arguments[0].dtype())?, normed])
}

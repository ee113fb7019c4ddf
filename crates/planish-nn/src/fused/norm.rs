use planish_mlx::cuda_kernel::{CudaKernel, Launch, VECTORS};
use planish_mlx::ops::exactly;
use planish_mlx::transforms::custom_vjp_many;
use planish_mlx::{Array, Dtype};

use super::output::Pending;
use super::{kernel_or, none, wrong_count};
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
        let inputs = given.of(inputs).ok_or_else(|| wrong_count(2, inputs))?;
        let [h, normed] = summed(&inputs, eps)?;
        let inner = inputs.a.map(|a| normed.matmul(a.t())).transpose()?;
        Ok::<_, Error>([h, normed].into_iter().chain(inner).collect())
    };
    let backward = move |inputs: &[Array], cotangents: &[Array], outputs: &[Array]| {
        let inputs = given.of(inputs).ok_or_else(|| wrong_count(2, inputs))?;
        let of_inner = inputs.a.zip(cotangents.get(2));
        let ([h, ..], [of_h, of_normed, ..]) = (outputs, cotangents) else {
            return Err(wrong_count(2, cotangents));
        };
        let [dh, normed] = input_gradient(h, inputs.weight, [of_h, of_normed], of_inner, eps)?;
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
    let mut outputs = custom_vjp_many(forward, backward, &inputs)?;
    let inner = a.and_then(|_| outputs.pop());
    let [residual, normed] = exactly(outputs)?;
    Ok(Normed {
        residual,
        normed,
        inner,
    })
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
    kernel_or(&FORWARD, [inputs.h, base, u, b, inputs.weight], &launch, || {
        let mut h = inputs.h.add(base)?;
        if rank > 0 {
            h = mlx_rs::ops::addmm(h, u, b, None, None)?;
        }
        let normed = mlx_rs::fast::rms_norm(&h, Some(inputs.weight), eps)?;
        Ok([h, normed])
    })
}

/// The gradient of `h`, and its norm once more, which is cheaper to compute again than to keep.
///
/// `of_h`, `of_normed`: cotangents of the sum and of its norm · `of_inner`: `a` and the cotangent of the product with it.
fn input_gradient(
    h: &Array,
    weight: &Array,
    [of_h, of_normed]: [&Array; 2],
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
    let inputs = [h, weight, of_h, of_normed, du, a];
    kernel_or(&BACKWARD, inputs, &launch, || composed_gradient(inputs, rank, eps))
}

/// `dh + s·g − s³·x·mean(g·x)`, `g = w·(dn + du a)`, `s = 1/sqrt(mean(x²) + eps)`.
fn composed_gradient([x, w, dh, dn, du, a]: [&Array; 6], rank: i32, eps: f32) -> Result<[Array; 2]> {
    let normed = mlx_rs::fast::rms_norm(x, Some(w), eps)?;
    let dtype = x.dtype();
    let wide = |array: &Array| array.as_dtype(Dtype::Float32);
    let (x, w, dh, mut of_norm) = (wide(x)?, wide(w)?, wide(dh)?, wide(dn)?);
    if rank > 0 {
        of_norm = of_norm.add(wide(du)?.matmul(wide(a)?)?)?;
    }
    let g = of_norm.multiply(w)?;
    let scale = x.square()?.mean_axis(-1, true)?.add(Array::from_f32(eps))?.rsqrt()?;
    let cube = scale.square()?.multiply(&scale)?;
    let slope = g.multiply(&x)?.mean_axis(-1, true)?.multiply(cube)?;
    let dx = dh.add(g.multiply(scale)?)?.subtract(x.multiply(slope)?)?;
    Ok([dx.as_dtype(dtype)?, normed])
}

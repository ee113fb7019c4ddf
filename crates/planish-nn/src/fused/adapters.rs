//! The adapters of layers that read one input, laid together.

use mlx_rs::ops::concatenate;
use planish_mlx::cuda_kernel::{CudaKernel, Launch};
use planish_mlx::ops::exactly;
use planish_mlx::transforms::{custom_vjp, custom_vjp_many};
use planish_mlx::{Array, Dtype};

use super::{LARGEST_RANK, kernel_or, on_device};
use crate::joint;
use crate::linear::Linear;
use crate::weight::LinearBase;
use crate::{Error, Result};

/// Layers that read one input, at most.
const MOST: usize = 3;
const THREADS: usize = 256;

const PACK: CudaKernel = CudaKernel {
    name: "planish_pack",
    inputs: &["a0", "a1", "a2", "scales", "sizes"],
    outputs: &["packed"],
    header: "",
    source: include_str!("pack.cu"),
};

const UNPACK: CudaKernel = CudaKernel {
    name: "planish_unpack",
    inputs: &["packed", "scales", "sizes"],
    outputs: &["a0", "a1", "a2"],
    header: "",
    source: include_str!("unpack.cu"),
};

const DIAGONAL: CudaKernel = CudaKernel {
    name: "planish_diagonal",
    inputs: &["b0", "b1", "b2", "sizes"],
    outputs: &["matrix"],
    header: "",
    source: include_str!("diagonal.cu"),
};

const DIAGONAL_BACK: CudaKernel = CudaKernel {
    name: "planish_diagonal_back",
    inputs: &["matrix", "sizes"],
    outputs: &["b0", "b1", "b2"],
    header: "",
    source: include_str!("diagonal_back.cu"),
};

/// The rank that all adapters of `layers` have, 0 if there are none; else why these layers are to be computed otherwise.
pub(super) fn common_rank(layers: &[&Linear]) -> Result<i32, &'static str> {
    let mut rank = 0;
    for layer in layers {
        let LinearBase::Dense { .. } = &layer.base else {
            return Err("quantised weights");
        };
        let Some(adapter) = &layer.adapter else { continue };
        let own = adapter.rank() as i32;
        if adapter.magnitude.is_some() {
            return Err("DoRA");
        }
        if own > LARGEST_RANK {
            return Err("ranks above 16");
        }
        if rank != 0 && own != rank {
            return Err("ranks that differ");
        }
        rank = own;
    }
    Ok(rank)
}

/// Whether a pass with dropout would drop inputs of an adapter of `layers`.
pub(super) fn drops(layers: &[&Linear]) -> bool {
    layers
        .iter()
        .any(|layer| layer.adapter.as_ref().is_some_and(|adapter| adapter.dropout > 0.0))
}

/// How the adapters of layers that read one input are laid together.
#[derive(Debug, Clone)]
pub(super) struct Packing {
    rank: i32,
    scales: Vec<f32>,
    /// The scales, filled up to four.
    factors: Array,
    /// Width of the input, rank, number of layers.
    sizes: Array,
}

impl Packing {
    /// For layers of one rank; `None` where none has an adapter.
    pub(super) fn of(layers: &[&Linear], rank: i32) -> Result<Option<Self>> {
        if rank == 0 {
            return Ok(None);
        }
        let scale = |layer: &&Linear| layer.adapter.as_ref().map_or(1.0, |adapter| adapter.scale as f32);
        let scales: Vec<f32> = layers.iter().map(scale).collect();
        let mut factors = [1.0; MOST + 1];
        factors[..scales.len()].copy_from_slice(&scales);
        let sizes = [layers[0].input_dims() as i32, rank, layers.len() as i32, 0];
        Ok(Some(Self {
            rank,
            scales,
            factors: on_device(&Array::from_slice(&factors, &[4]))?,
            sizes: on_device(&Array::from_slice(&sizes, &[4]))?,
        }))
    }

    /// The rank.
    pub(super) fn rank(&self) -> i32 {
        self.rank
    }
}

/// `scale · Aᵀ` of each layer below the other, `[layers · rank, input_dims]`; zeros for a layer without adapter.
pub(super) fn inner(layers: &[&Linear], packing: &Packing, dtype: Dtype) -> Result<Array> {
    let rank = packing.rank;
    let parts: Vec<Array> = layers
        .iter()
        .map(|layer| match &layer.adapter {
            Some(adapter) => Ok(adapter.a.as_dtype(dtype)?),
            None => zeros(&[layer.input_dims() as i32, rank], dtype),
        })
        .collect::<Result<_>>()?;
    let (packing, again) = (packing.clone(), packing.clone());
    let forward = move |parts: &[Array]| Ok::<_, Error>(vec![packed(parts, &packing)?]);
    let backward = move |parts: &[Array], cotangents: &[Array], _: &[Array]| unpacked(&cotangents[0], parts, &again);
    let [packed] = exactly(custom_vjp_many(forward, backward, &parts)?)?;
    Ok(packed)
}

/// `B` of a layer `[rank, output_dims]`; zeros without adapter.
pub(super) fn outer(layer: &Linear, rank: i32, dtype: Dtype) -> Result<Array> {
    match &layer.adapter {
        Some(adapter) => Ok(adapter.b.as_dtype(dtype)?),
        None => zeros(&[rank, layer.output_dims() as i32], dtype),
    }
}

/// Rank and widths of three layers, for [`outer_diagonal`].
pub(super) fn diagonal_sizes(layers: [&Linear; MOST], rank: i32) -> Result<Array> {
    let [one, two, three] = layers.map(|layer| layer.output_dims() as i32);
    on_device(&Array::from_slice(&[rank, one, two, three], &[4]))
}

/// `B` of three layers on the diagonal, `[3 · rank, sum of output_dims]`.
pub(super) fn outer_diagonal(layers: [&Linear; MOST], sizes: &Array, rank: i32, dtype: Dtype) -> Result<Array> {
    let [one, two, three] = layers.map(|layer| outer(layer, rank, dtype));
    let (sizes, again) = (sizes.clone(), sizes.clone());
    let [matrix] = custom_vjp(
        move |parts: &[Array; MOST]| diagonal(parts, &sizes),
        move |parts: &[Array; MOST], [of_matrix]: &[Array; 1], _: &[Array; 1]| diagonal_back(of_matrix, parts, &again),
        [&one?, &two?, &three?],
    )?;
    Ok(matrix)
}

fn launch<'a>([width, rows]: [i32; 2], element: Dtype, outputs: &'a [(&'a [i32], Dtype)]) -> Launch<'a> {
    Launch {
        blocks: [(width as usize).div_ceil(THREADS), rows as usize],
        threads: THREADS,
        constants: &[("THREADS", THREADS)],
        element,
        outputs,
    }
}

fn packed(parts: &[Array], packing: &Packing) -> Result<Array> {
    let first = &parts[0];
    let (width, rows, dtype) = (first.dim(0), first.dim(1) * parts.len() as i32, first.dtype());
    let [one, two, three] = [0, 1, 2].map(|i: usize| parts.get(i).unwrap_or(first));
    let outputs = [(&[rows, width][..], dtype)];
    let [packed] = kernel_or(
        &PACK,
        [one, two, three, &packing.factors, &packing.sizes],
        &launch([width, rows], dtype, &outputs),
        || {
            let bands = parts.iter().zip(&packing.scales).map(|(part, &scale)| {
                let scaled = part.as_dtype(Dtype::Float32)?.multiply(Array::from_f32(scale))?;
                Ok(scaled.as_dtype(dtype)?.t())
            });
            Ok([concatenate(&bands.collect::<Result<Vec<_>>>()?, 0)?])
        },
    )?;
    Ok(packed)
}

/// Gradients of the matrices from that of what they were packed to.
fn unpacked(gradient: &Array, parts: &[Array], packing: &Packing) -> Result<Vec<Array>> {
    let (width, rank, dtype) = (parts[0].dim(0), parts[0].dim(1), parts[0].dtype());
    let shape = |i: usize| if i < parts.len() { vec![width, rank] } else { vec![1] };
    let shapes = [shape(0), shape(1), shape(2)];
    let outputs = shapes.each_ref().map(|shape| (&shape[..], dtype));
    let launch = launch([width, rank * parts.len() as i32], dtype, &outputs);
    let unpacked: [Array; MOST] = kernel_or(&UNPACK, [gradient, &packing.factors, &packing.sizes], &launch, || {
        let cuts: Vec<i32> = (1..parts.len() as i32).map(|i| i * rank).collect();
        let bands = match cuts.as_slice() {
            [] => vec![gradient.clone()],
            cuts => gradient.split_at_indices(cuts, 0)?,
        };
        let scaled = bands.iter().zip(&packing.scales).map(|(band, &scale)| {
            let scaled = band.as_dtype(Dtype::Float32)?.multiply(Array::from_f32(scale))?;
            Ok(scaled.as_dtype(dtype)?.t())
        });
        let mut unpacked: Vec<Array> = scaled.collect::<Result<_>>()?;
        unpacked.resize(MOST, gradient.clone()); // as the kernel gives something for layers that are not there
        Ok(exactly(unpacked)?)
    })?;
    Ok(unpacked.into_iter().take(parts.len()).collect())
}

fn diagonal([one, two, three]: &[Array; MOST], sizes: &Array) -> Result<[Array; 1]> {
    let (rank, dtype) = (one.dim(0), one.dtype());
    let total = one.dim(1) + two.dim(1) + three.dim(1);
    let outputs = [(&[MOST as i32 * rank, total][..], dtype)];
    let launch = launch([total, MOST as i32 * rank], dtype, &outputs);
    kernel_or(&DIAGONAL, [one, two, three, sizes], &launch, || {
        Ok([joint::diagonal([one, two, three])?])
    })
}

fn diagonal_back(gradient: &Array, parts: &[Array; MOST], sizes: &Array) -> Result<[Array; MOST]> {
    let (rank, dtype) = (parts[0].dim(0), parts[0].dtype());
    let outputs = parts.each_ref().map(|part| (part.shape(), dtype));
    let launch = launch([gradient.dim(1), rank], dtype, &outputs);
    kernel_or(&DIAGONAL_BACK, [gradient, sizes], &launch, || {
        let (mut top, mut before) = (0, 0);
        let mut own = Vec::with_capacity(MOST);
        for part in parts {
            let end = [top + rank, before + part.dim(1)];
            own.push(planish_mlx::ops::slice(gradient, &[top, before], &end)?);
            [top, before] = end;
        }
        Ok(exactly(own)?)
    })
}

fn zeros(shape: &[i32], dtype: Dtype) -> Result<Array> {
    Ok(mlx_rs::ops::zeros_dtype(shape, dtype)?)
}

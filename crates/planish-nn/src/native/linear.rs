use std::sync::Arc;

use planish_kernels::{LowRank, PackedLinear, skinny_product, skinny_transposed_product, transpose};
use planish_mlx::Array;
use planish_mlx::host_kernel::Input;
use planish_mlx::transforms::custom_vjp_many;

use super::kernel_many;
use crate::Result;

/// One of several linear layers that read the same input.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    /// The frozen weight.
    pub(crate) weight: Arc<PackedLinear>,
    /// A low-rank update `(A [input_dims, rank], B [rank, output_dims], scale)`, f32.
    pub(crate) update: Option<(Array, Array, f32)>,
}

/// `y_i = x W_iᵀ + scale_i · (x A_i) B_i` for each part; `x` f32 `[..., input_dims]`.
///
/// Products with `W` are those of bf16 numbers summed in f32, the low-rank ones f32 throughout. One pass reads `x` for
/// all parts, and their gradients with respect to `x` are summed where they are made.
pub(crate) fn linears(x: &Array, parts: &[Part]) -> Result<Vec<Array>> {
    let mut inputs = vec![x.clone()];
    for (a, b, _) in parts.iter().filter_map(|part| part.update.as_ref()) {
        inputs.extend([a.clone(), b.clone()]);
    }
    let layout = Arc::new(Layout::of(x, parts));
    let other = layout.clone();
    let mut outputs = custom_vjp_many(
        move |inputs: &[Array]| forward(inputs, &layout),
        move |inputs: &[Array], cotangents: &[Array], outputs: &[Array]| backward(inputs, cotangents, outputs, &other),
        &inputs,
    )?;
    outputs.truncate(parts.len());
    Ok(outputs)
}

/// What forward and backward pass know beside arrays.
struct Layout {
    parts: Vec<Fixed>,
    /// Shape of `x`.
    shape: Vec<i32>,
    tokens: usize,
}

/// A part without its arrays.
struct Fixed {
    weight: Arc<PackedLinear>,
    rank: usize,
    scale: f32,
}

impl Layout {
    fn of(x: &Array, parts: &[Part]) -> Self {
        let fixed = |part: &Part| Fixed {
            weight: part.weight.clone(),
            rank: part.update.as_ref().map_or(0, |(a, _, _)| a.dim(1) as usize),
            scale: part.update.as_ref().map_or(1.0, |(_, _, scale)| *scale),
        };
        Self {
            parts: parts.iter().map(fixed).collect(),
            shape: x.shape().to_vec(),
            tokens: x.size() / x.dim(-1).max(1) as usize,
        }
    }

    fn adapted(&self) -> impl Iterator<Item = &Fixed> {
        self.parts.iter().filter(|part| part.rank > 0)
    }

    /// Shapes of `y` of each part, then of `scale · x A` of each adapted one.
    fn outputs(&self) -> Vec<Vec<i32>> {
        let y = self.parts.iter().map(|part| {
            let mut shape = self.shape.clone();
            shape.pop();
            shape.push(part.weight.output_dims() as i32);
            shape
        });
        let inner = self.adapted().map(|part| vec![self.tokens as i32, part.rank as i32]);
        y.chain(inner).collect()
    }

    /// Shapes of the gradients of `x` and of `A` and `B` of each adapted part.
    fn gradients(&self) -> Vec<Vec<i32>> {
        let of_part = |part: &Fixed| {
            let (weight, rank) = (&part.weight, part.rank as i32);
            [
                vec![weight.input_dims() as i32, rank],
                vec![rank, weight.output_dims() as i32],
            ]
        };
        std::iter::once(self.shape.clone())
            .chain(self.adapted().flat_map(of_part))
            .collect()
    }
}

/// Gives the products, and `scale · x A` for the backward pass.
fn forward(inputs: &[Array], layout: &Arc<Layout>) -> Result<Vec<Array>> {
    let run = layout.clone();
    kernel_many("linears", inputs, &layout.outputs(), move |inputs, mut outputs| {
        let x = inputs[0].f32();
        let (ys, inners) = outputs.split_at_mut(run.parts.len());
        let mut adapted = 0;
        for (part, y) in run.parts.iter().zip(ys) {
            if part.rank == 0 {
                part.weight.forward.multiply(x, None, y);
                continue;
            }
            let (a, b) = matrices(&inputs[1..], adapted);
            let inner = &mut *inners[adapted];
            adapted += 1;
            skinny_product(x, &transposed(a, part.rank), part.rank, part.scale, inner);
            let update = LowRank {
                left: inner,
                right: b,
                rank: part.rank,
            };
            part.weight.forward.multiply(x, Some(update), y);
        }
    })
}

/// With `e = scale · dy Bᵀ`: `dx = Σ dy W + e Aᵀ`, `dA = xᵀ e`, `dB = (scale · x A)ᵀ dy`.
fn backward(inputs: &[Array], cotangents: &[Array], outputs: &[Array], layout: &Arc<Layout>) -> Result<Vec<Array>> {
    let n_parts = layout.parts.len();
    let mut all = inputs.to_vec();
    all.extend_from_slice(&cotangents[..n_parts]);
    all.extend_from_slice(&outputs[n_parts..]);
    let run = layout.clone();
    let first_cotangent = inputs.len();
    kernel_many("linears_backward", &all, &layout.gradients(), move |inputs, outputs| {
        let x = inputs[0].f32();
        let mut gradients = outputs.into_iter();
        let Some(dx) = gradients.next() else { return };
        let mut adapted = 0;
        for (index, part) in run.parts.iter().enumerate() {
            let dy = inputs[first_cotangent + index].f32();
            let mut e = vec![0.0; run.tokens * part.rank];
            let mut a_transposed = Vec::new();
            if part.rank > 0 {
                let (a, b) = matrices(&inputs[1..], adapted);
                let inner = inputs[first_cotangent + n_parts + adapted].f32();
                adapted += 1;
                skinny_product(dy, b, part.rank, part.scale, &mut e);
                a_transposed = transposed(a, part.rank);
                if let (Some(da), Some(db)) = (gradients.next(), gradients.next()) {
                    let mut da_transposed = vec![0.0; da.len()];
                    skinny_transposed_product(&e, x, part.rank, &mut da_transposed);
                    transpose(&da_transposed, part.weight.input_dims(), da);
                    skinny_transposed_product(inner, dy, part.rank, db);
                }
            }
            let update = (part.rank > 0).then_some(LowRank {
                left: &e,
                right: &a_transposed,
                rank: part.rank,
            });
            match index {
                0 => part.weight.backward.multiply(dy, update, dx),
                _ => part.weight.backward.multiply_add(dy, update, dx),
            }
        }
    })
}

/// `A` and `B` of an adapted part.
fn matrices<'a>(inputs: &'a [Input<'_>], adapted: usize) -> (&'a [f32], &'a [f32]) {
    (inputs[2 * adapted].f32(), inputs[2 * adapted + 1].f32())
}

fn transposed(matrix: &[f32], columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; matrix.len()];
    transpose(matrix, columns, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use planish_mlx::transforms::value_and_grad;
    use planish_mlx::{Dtype, host};

    use super::*;
    use crate::Error;

    /// Numbers that bf16 holds exactly, so that both paths multiply the same ones.
    fn exact(shape: &[i32], seed: u64) -> Array {
        let key = mlx_rs::random::key(seed).unwrap();
        let numbers = mlx_rs::random::normal::<f32>(shape, None, 1.0, &key).unwrap();
        numbers
            .as_dtype(Dtype::Bfloat16)
            .unwrap()
            .as_dtype(Dtype::Float32)
            .unwrap()
    }

    fn composed(x: &Array, weight: &Array, update: Option<(&Array, &Array)>) -> Result<Array> {
        let y = x.matmul(weight.t())?;
        match update {
            Some((a, b)) => Ok(y.add(x.matmul(a)?.matmul(b)?.multiply(Array::from_f32(2.0))?)?),
            None => Ok(y),
        }
    }

    #[test]
    fn values_and_gradients_equal_the_composed_operations() {
        let weights = [exact(&[40, 24], 1), exact(&[16, 24], 2), exact(&[33, 24], 3)];
        let (x, a0, b0) = (exact(&[2, 7, 24], 4), exact(&[24, 3], 5), exact(&[3, 40], 6));
        let (a2, b2) = (exact(&[24, 8], 7), exact(&[8, 33], 8));
        // Gradients of `Σ c · y` with constants that bf16 holds.
        let constants = [exact(&[2, 7, 40], 9), exact(&[2, 7, 16], 10), exact(&[2, 7, 33], 11)];
        let packed: Vec<Arc<PackedLinear>> = weights
            .iter()
            .map(|w| Arc::new(PackedLinear::new(w.as_slice(), w.dim(0) as usize, 24)))
            .collect();
        let total = |ys: &[Array]| {
            let mut sum = Array::from_f32(0.0);
            for (y, c) in ys.iter().zip(&constants) {
                sum = sum.add(y.multiply(c)?.sum(None)?)?;
            }
            Ok::<_, Error>(vec![sum])
        };
        let arguments = [x, a0, b0, a2, b2];
        let by_mlx = |v: &[Array]| {
            total(&[
                composed(&v[0], &weights[0], Some((&v[1], &v[2])))?,
                composed(&v[0], &weights[1], None)?,
                composed(&v[0], &weights[2], Some((&v[3], &v[4])))?,
            ])
        };
        let by_kernel = |v: &[Array]| {
            let part = |index: usize, update| Part {
                weight: packed[index].clone(),
                update,
            };
            let parts = [
                part(0, Some((v[1].clone(), v[2].clone(), 2.0))),
                part(1, None),
                part(2, Some((v[3].clone(), v[4].clone(), 2.0))),
            ];
            total(&linears(&v[0], &parts)?)
        };
        let all = [0, 1, 2, 3, 4];
        let (expect, expect_gradients) = value_and_grad(by_mlx, &arguments, &all).unwrap();
        let (found, found_gradients) = value_and_grad(by_kernel, &arguments, &all).unwrap();
        let (expect, found) = (expect[0].item_exact::<f32>(), found[0].item_exact::<f32>());
        assert!(
            (expect - found).abs() < 1e-5 * expect.abs().max(100.0),
            "{expect} {found}"
        );
        for (one, other) in expect_gradients.iter().zip(&found_gradients) {
            let (one, other) = (host::to_f32_vec(one).unwrap(), host::to_f32_vec(other).unwrap());
            let scale = one.iter().fold(0_f32, |most, v| most.max(v.abs()));
            assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-5 * scale));
        }
    }
}

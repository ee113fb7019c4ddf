//! Layers that read the same input, with weights end to end in memory: one product instead of several.
//!
//! A GPU multiplies by a wide matrix at a higher rate than by narrow ones after another, the gradient of the input comes out
//! summed, and the low-rank updates become one product too. For training adapters in 16 bits, where that was measured to count.

use planish_mlx::{Array, Dtype, ops};

use crate::Result;
use crate::dropout::DropoutKeys;
use crate::linear::Linear;
use crate::lora::LoraAdapter;
use crate::weight::LinearBase;

/// The weights and biases of several layers, laid end to end.
#[derive(Debug, Clone)]
pub(crate) struct Joint {
    /// `[sum of output_dims, input_dims]`.
    weight: Array,
    /// `[sum of output_dims]`.
    bias: Option<Array>,
}

impl Joint {
    /// Lays weights end to end and makes the layers' own weights views of the result, so that nothing exists twice.
    /// `None` for layers that are not alike.
    pub(crate) fn of<const N: usize>(layers: [&mut Linear; N]) -> Result<Option<Self>> {
        let weights: Option<Vec<Array>> = layers.iter().map(|layer| dense(layer)).collect();
        let biases: Vec<Array> = layers.iter().filter_map(|layer| layer.bias.clone()).collect();
        let Some(weights) = weights.filter(|_| biases.is_empty() || biases.len() == N) else {
            return Ok(None);
        };
        let weight = mlx_rs::ops::concatenate(&weights, 0)?;
        let bias = match biases.as_slice() {
            [] => None,
            biases => Some(mlx_rs::ops::concatenate(biases, 0)?),
        };
        mlx_rs::transforms::eval(std::iter::once(&weight).chain(&bias))?;
        let mut start = 0;
        for (layer, own) in layers.into_iter().zip(&weights) {
            let end = start + own.dim(0);
            let view = ops::slice(&weight, &[start, 0], &[end, own.dim(1)])?;
            view.eval()?;
            layer.base = LinearBase::Dense { weight: view };
            start = end;
        }
        Ok(Some(Self { weight, bias }))
    }

    /// Applies the layers, whose adapters are `adapters`, to `x` `[..., input_dims]`.
    pub(crate) fn forward(&self, adapters: &[&LoraAdapter], x: &Array) -> Result<Vec<Array>> {
        let mut shape = x.shape().to_vec();
        shape.pop();
        shape.push(self.weight.dim(0));
        let y = self.base(&x.reshape(&[-1, x.dim(-1)])?)?;
        let inner = LoraAdapter::all_inner(adapters, x)?; // [rows, sum of ranks]
        let scales: Vec<f32> = adapters
            .iter()
            .flat_map(|adapter| std::iter::repeat_n(adapter.scale as f32, adapter.rank()))
            .collect();
        let scales = Array::from_slice(&scales, &[scales.len() as i32]);
        let inner = inner.as_dtype(Dtype::Float32)?.multiply(scales)?.as_dtype(x.dtype())?;
        let y = mlx_rs::ops::addmm(y, inner, blocks(adapters, x.dtype())?, None, None)?.reshape(&shape)?;
        let ends: Vec<i32> = adapters
            .iter()
            .scan(0, |end, adapter| {
                *end += adapter.b.dim(1);
                Some(*end)
            })
            .collect();
        // Copies: with views in their place, the losses of MLX's CUDA backend were NaN now and then (0.32.2, H100).
        let parts = y.split_at_indices(&ends[..ends.len() - 1], -1)?;
        Ok(parts.iter().map(Array::contiguous).collect::<Result<_, _>>()?)
    }

    /// The layers without adapters, beside each other: `[rows, input_dims]` → `[rows, sum of output_dims]`.
    pub(crate) fn base(&self, rows: &Array) -> Result<Array> {
        let y = rows.matmul(self.weight.t())?;
        match &self.bias {
            Some(bias) => Ok(y.add(bias)?),
            None => Ok(y),
        }
    }

    /// [`Linear::forward_together`], by one product where there is one and the adapters allow it.
    pub(crate) fn forward_layers<const N: usize>(
        joint: Option<&Self>,
        layers: [&Linear; N],
        x: &Array,
        keys: Option<&DropoutKeys>,
    ) -> Result<[Array; N]> {
        let Some((joint, adapters)) = joint.zip(Linear::adapters_to_share(&layers, x, keys)) else {
            return Linear::forward_together(layers, x, keys);
        };
        Ok(ops::exactly(joint.forward(&adapters, x)?)?)
    }
}

fn dense(layer: &Linear) -> Option<Array> {
    match &layer.base {
        LinearBase::Dense { weight } => Some(weight.clone()),
        _ => None,
    }
}

/// The `B` of all adapters on the diagonal of one matrix: `[sum of ranks, sum of output_dims]`.
fn blocks(adapters: &[&LoraAdapter], dtype: Dtype) -> Result<Array> {
    let parts: Vec<Array> = adapters
        .iter()
        .map(|adapter| adapter.b.as_dtype(dtype))
        .collect::<Result<_, _>>()?;
    diagonal(&parts)
}

/// Matrices on the diagonal of one.
pub(crate) fn diagonal<'a>(parts: impl IntoIterator<Item = &'a Array, IntoIter: Clone>) -> Result<Array> {
    let parts = parts.into_iter();
    let total: i32 = parts.clone().map(|part| part.dim(1)).sum();
    let mut before = 0;
    let mut bands = Vec::new();
    for part in parts {
        let after = total - before - part.dim(1);
        bands.push(mlx_rs::ops::pad(part, &[(0, 0), (before, after)][..], None, None)?);
        before += part.dim(1);
    }
    Ok(mlx_rs::ops::concatenate(&bands, 0)?)
}

#[cfg(test)]
mod tests {
    use planish_mlx::transforms::value_and_grad;

    use super::*;
    use crate::Error;

    fn random(seed: u64, shape: &[i32], size: f32) -> Array {
        let key = mlx_rs::random::key(seed).unwrap();
        mlx_rs::random::uniform::<_, f32>(-size, size, shape, &key).unwrap()
    }

    /// Three layers of different widths, ranks and scales.
    fn layers(arguments: &[Array], with_bias: bool, dtype: Dtype) -> [Linear; 3] {
        [(24, 2.0), (8, 1.7), (12, 0.3)].map(|(width, scale)| {
            let weight = random(width as u64, &[width, 32], 0.2).as_dtype(dtype).unwrap();
            let bias = random(width as u64 + 1, &[width], 1.0).as_dtype(dtype).unwrap();
            let mut layer = Linear::dense(weight, with_bias.then_some(bias));
            let of = match width {
                24 => 1,
                8 => 3,
                _ => 5,
            };
            layer.adapter = Some(LoraAdapter {
                a: arguments[of].clone(),
                b: arguments[of + 1].clone(),
                magnitude: None,
                scale,
                dropout: 0.0,
            });
            layer
        })
    }

    #[test]
    fn joint_layers_equal_single_ones_with_their_gradients() {
        let arguments = [
            random(1, &[2, 5, 32], 1.0),
            random(2, &[32, 3], 0.3),
            random(3, &[3, 24], 0.3),
            random(4, &[32, 4], 0.3),
            random(5, &[4, 8], 0.3),
            random(6, &[32, 1], 0.3),
            random(7, &[1, 12], 0.3),
        ];
        let run = |dtype: Dtype, joined: bool, with_bias: bool| {
            let objective = |arguments: &[Array]| {
                let [mut one, mut two, mut three] = layers(arguments, with_bias, dtype);
                let joint = match joined {
                    true => Joint::of([&mut one, &mut two, &mut three])?,
                    false => None,
                };
                assert_eq!(joint.is_some(), joined);
                let x = arguments[0].as_dtype(dtype)?;
                let outputs = Joint::forward_layers(joint.as_ref(), [&one, &two, &three], &x, None)?;
                let mut sum = Array::from_f32(0.0);
                for (i, y) in outputs.iter().enumerate() {
                    let weights = random(8 + i as u64, y.shape(), 1.0);
                    let y = y.as_dtype(Dtype::Float32)?;
                    sum = sum.add(y.square()?.multiply(weights)?.sum(false)?)?;
                }
                let mut all = vec![sum];
                all.extend(outputs);
                Ok::<_, Error>(all)
            };
            let all: Vec<usize> = (0..arguments.len()).collect();
            let (mut found, gradients) = value_and_grad(objective, &arguments, &all).unwrap();
            found.extend(gradients);
            found
                .iter()
                .map(|array| planish_mlx::host::to_f32_vec(array).unwrap())
                .collect::<Vec<_>>()
        };
        for with_bias in [false, true] {
            let exact = run(Dtype::Float32, false, with_bias);
            let joint = run(Dtype::Bfloat16, true, with_bias);
            for (i, (one, other)) in joint.iter().zip(&exact).enumerate().skip(1) {
                let square = |x: f32| f64::from(x) * f64::from(x);
                let off: f64 = one.iter().zip(other).map(|(a, b)| square(a - b)).sum();
                let size: f64 = other.iter().map(|&b| square(b)).sum();
                // bf16 keeps 8 bits.
                assert!((off / size).sqrt() < 1e-2, "{i}: {}", (off / size).sqrt());
            }
        }
    }

    #[test]
    fn unlike_layers_stay_apart() {
        let weight = || random(1, &[8, 4], 1.0);
        let mut plain = Linear::dense(weight(), None);
        let mut biased = Linear::dense(weight(), Some(random(2, &[8], 1.0)));
        assert!(Joint::of([&mut plain, &mut biased]).unwrap().is_none());
    }
}

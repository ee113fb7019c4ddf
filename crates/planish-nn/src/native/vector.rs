use planish_mlx::Array;
use planish_mlx::transforms::custom_vjp_many;

use super::kernel_many;
use crate::Result;

/// `x W_iᵀ` for each weight `[output_dims, input_dims]`, for a single token `x` `[..., input_dims]`, f32.
///
/// MLX hands such products to a routine that copies the whole weight first.
pub(crate) fn single_token(x: &Array, weights: &[&Array]) -> Result<Vec<Array>> {
    let mut inputs = vec![x.clone()];
    inputs.extend(weights.iter().map(|weight| (*weight).clone()));
    custom_vjp_many(forward, backward, &inputs)
}

fn forward(inputs: &[Array]) -> Result<Vec<Array>> {
    let shapes: Vec<Vec<i32>> = inputs[1..]
        .iter()
        .map(|weight| {
            let mut shape = inputs[0].shape().to_vec();
            shape.pop();
            shape.push(weight.dim(0));
            shape
        })
        .collect();
    kernel_many("single_token", inputs, &shapes, |inputs, outputs| {
        for (weight, out) in inputs[1..].iter().zip(outputs) {
            planish_kernels::matrix_vector(weight.f32(), inputs[0].f32(), out);
        }
    })
}

/// By MLX's operations: nobody trains on single tokens.
fn backward(inputs: &[Array], cotangents: &[Array], _: &[Array]) -> Result<Vec<Array>> {
    let x = inputs[0].reshape(&[1, -1])?;
    let mut d_x = Array::zeros::<f32>(inputs[0].shape())?;
    let mut gradients = Vec::with_capacity(inputs.len());
    for (weight, d_y) in inputs[1..].iter().zip(cotangents) {
        let d_y = d_y.reshape(&[1, -1])?;
        d_x = d_x.add(d_y.matmul(weight)?.reshape(inputs[0].shape())?)?;
        gradients.push(d_y.t().matmul(&x)?);
    }
    gradients.insert(0, d_x);
    Ok(gradients)
}

#[cfg(test)]
mod tests {
    use planish_mlx::host;
    use planish_mlx::transforms::value_and_grad;

    use super::*;
    use crate::Error;

    #[test]
    fn values_and_gradients_equal_those_of_mlx() {
        let random = |shape: &[i32], seed: u64| {
            mlx_rs::random::normal::<f32>(shape, None, 1.0, &mlx_rs::random::key(seed).unwrap()).unwrap()
        };
        let inputs = [random(&[1, 1, 24], 1), random(&[40, 24], 2), random(&[33, 24], 3)];
        let total = |ys: &[Array]| Ok::<_, Error>(vec![ys[0].square()?.sum(None)?.add(ys[1].square()?.sum(None)?)?]);
        let by_mlx = |v: &[Array]| total(&[v[0].matmul(v[1].t())?, v[0].matmul(v[2].t())?]);
        let by_kernel = |v: &[Array]| total(&single_token(&v[0], &[&v[1], &v[2]])?);
        let (expect, expect_gradients) = value_and_grad(by_mlx, &inputs, &[0, 1, 2]).unwrap();
        let (found, found_gradients) = value_and_grad(by_kernel, &inputs, &[0, 1, 2]).unwrap();
        let (expect, found) = (expect[0].item_exact::<f32>(), found[0].item_exact::<f32>());
        assert!((expect - found).abs() < 1e-5 * expect, "{expect} {found}");
        for (one, other) in expect_gradients.iter().zip(&found_gradients) {
            let (one, other) = (host::to_f32_vec(one).unwrap(), host::to_f32_vec(other).unwrap());
            let scale = one.iter().fold(0_f32, |most, v| most.max(v.abs()));
            assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-5 * scale));
        }
    }
}

use planish_mlx::ops::exactly;
use planish_mlx::{Array, Dtype};

use crate::Result;
use crate::dropout::DropoutKeys;
use crate::lora::LoraAdapter;
use crate::native::{self, Kernels, Part};
use crate::parameters::{Parameters, Role, Visitor, join};
use crate::plan::Path;
use crate::weight::LinearBase;

/// A linear layer, plain or quantised, with an optional trainable low-rank update beside its frozen base weight.
///
/// `y = x Wᵀ + bias + scale · (dropout(x) A) B`. See [`LoraAdapter`] for the update.
///
/// # Shapes
/// `W`: `[output_dims, input_dims]`; input `[..., input_dims]` → output `[..., output_dims]`, in the input's dtype.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The frozen weight.
    pub base: LinearBase,
    /// `[output_dims]`.
    pub bias: Option<Array>,
    /// The trainable update.
    pub adapter: Option<LoraAdapter>,
    /// What computes it.
    pub kernels: Kernels,
}

impl Linear {
    /// A plain layer without adapter.
    pub fn dense(weight: Array, bias: Option<Array>) -> Self {
        Linear {
            base: LinearBase::Dense { weight },
            bias,
            adapter: None,
            kernels: Kernels::Composed,
        }
    }

    /// Applies the layer without dropout.
    ///
    /// # Errors
    /// [`Error::Mlx`](crate::Error::Mlx) when the last axis of `x` is not `input_dims`.
    ///
    /// # Example
    /// ```
    /// use planish_mlx::{Array, Dtype};
    /// use planish_nn::Linear;
    /// let layer = Linear::dense(Array::from_slice(&[1_f32, 2.0, 3.0, 4.0], &[2, 2]), None);
    /// let y = layer.forward(&Array::from_slice(&[1_f32, 10.0], &[1, 2]))?;
    /// assert_eq!(y.as_slice::<f32>(), &[21.0, 43.0]);
    /// # Ok::<(), planish_nn::Error>(())
    /// ```
    pub fn forward(&self, x: &Array) -> Result<Array> {
        self.forward_with(x, None)
    }

    /// Applies several layers to one input, in one pass over it where their weights are packed.
    pub(crate) fn forward_together<const N: usize>(
        layers: [&Linear; N],
        x: &Array,
        keys: Option<&DropoutKeys>,
    ) -> Result<[Array; N]> {
        let parts: Option<Vec<Part>> = layers.iter().map(|layer| layer.as_part(keys)).collect();
        let outputs = match parts {
            Some(parts) => native::linears(x, &parts)?
                .into_iter()
                .zip(layers)
                .map(|(y, layer)| layer.add_bias(y))
                .collect::<Result<Vec<_>>>()?,
            None => Self::forward_apart(&layers, x, keys)?,
        };
        Ok(exactly(outputs)?)
    }

    fn forward_apart(layers: &[&Linear], x: &Array, keys: Option<&DropoutKeys>) -> Result<Vec<Array>> {
        if let Some(adapters) = Self::adapters_to_share(layers, x, keys) {
            let inner = LoraAdapter::inner_together(&adapters, x)?;
            let parts = layers.iter().zip(adapters).zip(inner);
            return parts
                .map(|((layer, adapter), inner)| adapter.add_product(&layer.base_with_bias(x)?, &inner))
                .collect();
        }
        let weights: Option<Vec<&Array>> = layers.iter().map(|layer| layer.weight_for_one(x)).collect();
        let Some(weights) = weights else {
            return layers.iter().map(|layer| layer.forward_alone(x, keys)).collect();
        };
        let products = native::single_token(x, &weights)?;
        let updated = |(y, layer): (Array, &&Linear)| match &layer.adapter {
            Some(adapter) => adapter.add_update(&layer.add_bias(y)?, x, keys),
            None => layer.add_bias(y),
        };
        products.into_iter().zip(layers).map(updated).collect()
    }

    /// The adapters, where all layers have a plain one that reads `x` as it is; in 16 bits, where traffic counts.
    pub(crate) fn adapters_to_share<'a>(
        layers: &[&'a Linear],
        x: &Array,
        keys: Option<&DropoutKeys>,
    ) -> Option<Vec<&'a LoraAdapter>> {
        if layers.len() < 2 || x.dtype() == Dtype::Float32 {
            return None;
        }
        let is_plain =
            |adapter: &&LoraAdapter| adapter.magnitude.is_none() && (keys.is_none() || adapter.dropout == 0.0);
        layers
            .iter()
            .map(|layer| layer.adapter.as_ref().filter(is_plain))
            .collect()
    }

    /// The weight, where our own kernel for single tokens applies.
    fn weight_for_one(&self, x: &Array) -> Option<&Array> {
        let is_single = x.size() == x.dim(-1) as usize && x.dtype() == Dtype::Float32;
        let is_dora = self.adapter.as_ref().is_some_and(|adapter| adapter.magnitude.is_some());
        match &self.base {
            LinearBase::Dense { weight } if self.kernels.is_native() && is_single && !is_dora => Some(weight),
            _ => None,
        }
    }

    /// Applies the layer; with keys, the adapter's dropout is active.
    pub(crate) fn forward_with(&self, x: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let [y] = Self::forward_together([self], x, keys)?;
        Ok(y)
    }

    /// The layer for the kernel that does base and update at once; `None` where it has more to do than that.
    fn as_part(&self, keys: Option<&DropoutKeys>) -> Option<Part> {
        let LinearBase::Packed(weight) = &self.base else {
            return None;
        };
        if self.obstacle(keys.is_some()).is_some() {
            return None;
        }
        let update = self.adapter.as_ref();
        Some(Part {
            weight: weight.clone(),
            update: update.map(|adapter| (adapter.a.clone(), adapter.b.clone(), adapter.scale as f32)),
        })
    }

    /// What keeps the adapter out of the kernel of the weight.
    fn obstacle(&self, drops: bool) -> Option<&'static str> {
        match &self.adapter {
            Some(adapter) if adapter.magnitude.is_some() => Some("DoRA"),
            Some(adapter) if drops && adapter.dropout > 0.0 => Some("dropout"),
            _ => None,
        }
    }

    /// What computes the layer in training.
    pub(crate) fn path(&self) -> Path {
        match (&self.base, self.obstacle(true)) {
            (LinearBase::Packed(_), None) => ("native kernel with its adapter, bf16", None),
            (LinearBase::Packed(_), obstacle) => ("native kernel, bf16; the adapter by MLX operations", obstacle),
            (LinearBase::Affine { .. }, _) => ("MLX, quantised weight", None),
            (LinearBase::Dense { .. }, _) => ("MLX", None),
        }
    }

    fn add_bias(&self, y: Array) -> Result<Array> {
        match &self.bias {
            Some(bias) => Ok(y.add(bias)?),
            None => Ok(y),
        }
    }

    fn forward_alone(&self, x: &Array, keys: Option<&DropoutKeys>) -> Result<Array> {
        let Some(adapter) = &self.adapter else {
            return self.base_with_bias(x);
        };
        if adapter.magnitude.is_none() {
            return adapter.add_update(&self.base_with_bias(x)?, x, keys);
        }
        let y = adapter.add_update(&self.base.forward(x)?, x, keys)?;
        let y = adapter.rescale(&y, &self.base)?;
        self.add_bias(y)
    }

    /// Width of the input.
    pub fn input_dims(&self) -> usize {
        self.base.dims().1
    }

    /// Width of the output.
    pub fn output_dims(&self) -> usize {
        self.base.dims().0
    }

    /// The layer without its adapter.
    pub(crate) fn base_with_bias(&self, x: &Array) -> Result<Array> {
        match (&self.base, &self.bias) {
            (LinearBase::Dense { weight }, Some(bias)) => Ok(mlx_rs::ops::addmm(bias, x, weight.t(), None, None)?),
            (base, None) => base.forward(x),
            (base, Some(bias)) => Ok(base.forward(x)?.add(bias)?),
        }
    }
}

impl Parameters for Linear {
    fn visit(&mut self, path: &str, visitor: &mut Visitor<'_>) {
        self.base.visit(path, visitor);
        if let Some(bias) = &mut self.bias {
            visitor(&join(path, "bias"), Role::Weight, bias);
        }
        if let Some(adapter) = &mut self.adapter {
            adapter.visit(path, visitor);
        }
    }
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

    /// Two adapted layers of different rank and scale on one input, in `dtype`.
    fn outputs(arguments: &[Array], dtype: Dtype, together: bool) -> Result<[Array; 2]> {
        let layer = |seed: u64, of: usize, scale: f64| {
            let weight = random(seed, &[24, 32], 0.2).as_dtype(dtype).unwrap();
            let mut layer = Linear::dense(weight, Some(random(seed + 1, &[24], 1.0).as_dtype(dtype).unwrap()));
            layer.adapter = Some(LoraAdapter {
                a: arguments[of].clone(),
                b: arguments[of + 1].clone(),
                magnitude: None,
                scale,
                dropout: 0.0,
            });
            layer
        };
        let (one, other) = (layer(10, 1, 2.0), layer(20, 3, 1.7));
        let x = arguments[0].as_dtype(dtype)?;
        match together {
            true => Linear::forward_together([&one, &other], &x, None),
            false => Ok([one.forward(&x)?, other.forward(&x)?]),
        }
    }

    #[test]
    fn layers_that_share_a_product_in_16_bits_equal_single_ones_in_f32() {
        let arguments = [
            random(1, &[2, 5, 32], 1.0),
            random(2, &[32, 3], 0.3),
            random(3, &[3, 24], 0.3),
            random(4, &[32, 4], 0.3),
            random(5, &[4, 24], 0.3),
        ];
        let weights = random(6, &[2, 5, 24], 1.0);
        let run = |dtype, together| {
            let objective = |arguments: &[Array]| {
                let [one, other] = outputs(arguments, dtype, together)?;
                let (one, other) = (one.as_dtype(Dtype::Float32)?, other.as_dtype(Dtype::Float32)?);
                let sum = one.multiply(&weights)?.add(other.square()?.multiply(&weights)?)?;
                Ok::<_, Error>(vec![sum.sum(false)?, one, other])
            };
            let (mut found, gradients) = value_and_grad(objective, &arguments, &[0, 1, 2, 3, 4]).unwrap();
            found.extend(gradients);
            found
                .iter()
                .map(|a| planish_mlx::host::to_f32_vec(a).unwrap())
                .collect::<Vec<_>>()
        };
        let exact = run(Dtype::Float32, false);
        for (name, rounded) in [
            ("together", run(Dtype::Bfloat16, true)),
            ("alone", run(Dtype::Bfloat16, false)),
        ] {
            for (i, (one, other)) in rounded.iter().zip(&exact).enumerate().skip(1) {
                let square = |x: f32| f64::from(x) * f64::from(x);
                let off: f64 = one.iter().zip(other).map(|(a, b)| square(a - b)).sum();
                let size: f64 = other.iter().map(|&b| square(b)).sum();
                // bf16 keeps 8 bits.
                assert!((off / size).sqrt() < 1e-2, "{name} {i}: {}", (off / size).sqrt());
            }
        }
    }
}

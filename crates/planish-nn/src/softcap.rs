use mlx_rs::ops::tanh;
use planish_mlx::{Array, Dtype};

use crate::Result;

/// `cap · tanh(x / cap)`, computed in f32: close to `x` while it is small, never beyond `±cap`.
pub(crate) fn softcapped(x: &Array, cap: f32) -> Result<Array> {
    let cap = Array::from_f32(cap);
    let bounded = tanh(x.as_dtype(Dtype::Float32)?.divide(&cap)?)?.multiply(&cap)?;
    Ok(bounded.as_dtype(x.dtype())?)
}

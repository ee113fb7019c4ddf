//! Dropout with explicit keys: the mask is a function of the key alone, so a run can be repeated and resumed.

use std::cell::Cell;

use mlx_rs::ops::indexing::TryIndexOp;
use planish_mlx::{Array, Dtype, ops};

use crate::Result;

/// Hands each linear layer of a block its own key, in the order of the computation.
#[derive(Debug)]
pub(crate) struct DropoutKeys {
    keys: Array,
    next: Cell<i32>,
}

impl DropoutKeys {
    /// `count` keys from one, u32 `[2]`.
    pub(crate) fn new(key: &Array, count: usize) -> Result<Self> {
        Ok(Self {
            keys: ops::split_key(key, count as i32)?,
            next: Cell::new(0),
        })
    }

    pub(crate) fn take(&self) -> Result<Array> {
        let index = self.next.replace(self.next.get() + 1);
        Ok(self.keys.try_index(index)?)
    }
}

/// Zeroes each element with `probability` and divides the rest by `1 − probability`.
pub(crate) fn dropout(x: &Array, probability: f32, key: &Array) -> Result<Array> {
    let keep = 1.0 - probability;
    let kept = mlx_rs::random::bernoulli(&Array::from_f32(keep), x.shape(), key)?;
    let factor = mlx_rs::ops::select(&kept, Array::from_f32(1.0 / keep), Array::from_f32(0.0))?;
    Ok(x.multiply(factor.as_dtype(float(x.dtype()))?)?)
}

fn float(dtype: Dtype) -> Dtype {
    if dtype.is_float() { dtype } else { Dtype::Float32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_has_its_own_key() {
        let keys = DropoutKeys::new(&mlx_rs::random::key(3).unwrap(), 7).unwrap();
        let mut taken: Vec<Vec<u32>> = (0..7).map(|_| keys.take().unwrap().to_vec_exact().unwrap()).collect();
        taken.sort();
        taken.dedup();
        assert_eq!(taken.len(), 7);
    }

    #[test]
    fn mean_is_kept_and_the_key_decides() {
        let x = Array::ones::<f32>(&[100, 100]).unwrap();
        let key = mlx_rs::random::key(3).unwrap();
        let once = dropout(&x, 0.25, &key).unwrap();
        assert!((once.mean(None).unwrap().item_exact::<f32>() - 1.0).abs() < 0.02);
        let zeros = once.as_slice::<f32>().iter().filter(|&&value| value == 0.0).count();
        assert!((2300..2700).contains(&zeros), "{zeros}");
        assert!(once.eq_exact(dropout(&x, 0.25, &key).unwrap()).unwrap());
        assert!(
            !once
                .eq_exact(dropout(&x, 0.25, &mlx_rs::random::key(4).unwrap()).unwrap())
                .unwrap()
        );
    }
}

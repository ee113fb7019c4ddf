//! A trained adapter as the exporter folds it in: in f32, row by row, before anything is rounded.

use std::{collections::BTreeMap, ops::Range};

use ndarray::{Array2, ArrayViewMut2, s};
use planish_checkpoint::adapter::{Adapter, Method};

use crate::{Error, Result};

/// One adapted linear layer.
///
/// `W' = W + scale · (A B)ᵀ`, then with a magnitude `m` (DoRA) each row `o` becomes `m[o] · W'[o] / ‖W'[o]‖`.
#[derive(Clone, Debug)]
pub struct LoraDelta {
    /// `scale · Bᵀ`, `[output_dims, rank]`.
    scaled_b: Array2<f32>,
    /// `Aᵀ`, `[rank, input_dims]`.
    a: Array2<f32>,
    /// DoRA's magnitudes, `[output_dims]`.
    magnitude: Option<Vec<f32>>,
}

impl LoraDelta {
    /// From `lora_a [input_dims, rank]` and `lora_b [rank, output_dims]`, as mlx-lm stores them.
    pub fn new(lora_a: &Array2<f32>, lora_b: &Array2<f32>, scale: f32, magnitude: Option<Vec<f32>>) -> Self {
        let scaled_b = lora_b.t().mapv(|v| v * scale);
        let a = lora_a.t().as_standard_layout().into_owned();
        Self { scaled_b, a, magnitude }
    }

    /// Rank of the update.
    pub fn rank(&self) -> usize {
        self.a.nrows()
    }

    /// `[output_dims, input_dims]` of the layer it fits.
    pub fn shape(&self) -> [usize; 2] {
        [self.scaled_b.nrows(), self.a.ncols()]
    }

    /// `Aᵀ`, `[rank, input_dims]`.
    pub fn a(&self) -> &Array2<f32> {
        &self.a
    }

    /// `scale · Bᵀ`, `[output_dims, rank]`.
    pub fn scaled_b(&self) -> &Array2<f32> {
        &self.scaled_b
    }

    /// Whether it rescales rows (DoRA); such an update cannot be kept beside the base weight.
    pub fn is_dora(&self) -> bool {
        self.magnitude.is_some()
    }

    /// Folds the update into rows `rows` of the weight.
    pub(crate) fn merge(&self, rows: Range<usize>, mut weight: ArrayViewMut2<f32>) {
        let b = self.scaled_b.slice(s![rows.clone(), ..]);
        ndarray::linalg::general_mat_mul(1.0, &b, &self.a, 1.0, &mut weight);
        if let Some(magnitude) = &self.magnitude {
            for (row_idx, mut row) in rows.zip(weight.rows_mut()) {
                let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt() as f32;
                row *= magnitude[row_idx] / norm;
            }
        }
    }
}

/// Everything an adapter changes.
#[derive(Clone, Debug, Default)]
pub struct AdapterDelta {
    /// Low-rank updates by module path, such as `model.layers.0.self_attn.q_proj`.
    pub lora: BTreeMap<String, LoraDelta>,
    /// Tensors that were trained as a whole, by tensor name.
    pub full: BTreeMap<String, Vec<f32>>,
}

impl AdapterDelta {
    /// From an adapter that has been read, in either layout.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a module without both matrices or with a shape that is none; [`Error::Tensors`].
    pub fn from_adapter(adapter: &Adapter) -> Result<Self> {
        if adapter.method == Method::Full {
            let full = adapter
                .tensors
                .iter()
                .map(|(name, tensor)| Ok((name.clone(), tensor.to_f32()?)));
            return Ok(Self {
                full: full.collect::<Result<_>>()?,
                ..Self::default()
            });
        }
        let lora = adapter
            .modules()
            .into_iter()
            .map(|module| Ok((module.to_owned(), lora_delta(adapter, module)?)));
        Ok(Self {
            lora: lora.collect::<Result<_>>()?,
            ..Self::default()
        })
    }
}

fn lora_delta(adapter: &Adapter, module: &str) -> Result<LoraDelta> {
    let matrix = |leaf: &str| -> Result<Array2<f32>> {
        let name = format!("{module}.{leaf}");
        let unfit = |found: String| Error::Tensor {
            file: "adapter".into(),
            tensor: name.clone(),
            found,
            expected: "a matrix".into(),
        };
        let tensor = adapter.tensors.get(&name).ok_or_else(|| unfit("nothing".into()))?;
        let [rows, columns] = tensor.shape[..] else {
            return Err(unfit(format!("shape {:?}", tensor.shape)));
        };
        Array2::from_shape_vec((rows, columns), tensor.to_f32()?).map_err(|e| unfit(e.to_string()))
    };
    let magnitude = match (adapter.method, adapter.tensors.get(&format!("{module}.m"))) {
        (Method::Dora, Some(m)) => Some(m.to_f32()?),
        _ => None,
    };
    Ok(LoraDelta::new(
        &matrix("lora_a")?,
        &matrix("lora_b")?,
        adapter.scale as f32,
        magnitude,
    ))
}

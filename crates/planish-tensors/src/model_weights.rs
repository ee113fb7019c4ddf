//! The weights of a model folder as numbers: found whatever they are called, dequantised, with an adapter merged in.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use planish_core::model_config::{LayerQuantization, ModelConfig, QuantizationMode};
use planish_core::suggest::nearest;

use crate::merge::Update;
use crate::{Affine, Dtype, Error, LoadReport, LoadRules, Result, TensorStore, dequantize};

/// The tensors of a model, from which every consumer takes its weights: MLX arrays as they are stored
/// ([`store`](Self::store)), files of other formats as f32 rows with the update of an adapter in them.
///
/// Rows are read from the files when asked for, so that memory is bounded by what is asked for.
#[derive(Debug)]
pub struct ModelWeights {
    store: TensorStore,
    /// Of the modules whose weights are packed, by the name of the weight.
    packed: BTreeMap<String, LayerQuantization>,
    /// Shapes as if nothing were packed.
    shapes: BTreeMap<String, Vec<usize>>,
    update: Update,
}

impl ModelWeights {
    /// Opens the tensors of a folder, which must be exactly those of such a model, and says what was found.
    ///
    /// Names lose the [wrappers](without_wrappers) of frameworks; those that lack `model.` get it; a tied model may hold its one matrix under the name of the head. Two kinds of tensors
    /// may be there without need, and are reported as ignored: the angles of the rotation, which follow from the configuration,
    /// and the head of a tied model where it repeats the embedding. So may the other parts of a model that has more than text.
    ///
    /// # Errors
    /// Those of [`TensorStore::open`]; [`Error::HeadDiffers`]; [`Error::Refused`] with every disagreement.
    pub fn open(folder: &Path, config: &ModelConfig, rules: &LoadRules) -> Result<(Self, LoadReport)> {
        let mut store = TensorStore::open(folder)?;
        name_as_configured(&mut store, config);
        let mut rules = rules.clone();
        rules.allow_unexpected.push("*.rotary_emb.inv_freq".to_owned());
        let other_parts = config.family.other_parts.iter();
        rules.allow_unexpected.extend(other_parts.map(|&name| name.to_owned()));
        if config.arch.head.is_tied {
            refuse_another_head(&store, config, folder)?;
            rules.allow_unexpected.push(format!("{}.*", config.arch.head_path()));
        }
        let report = store.check(&config.expected_tensors(), &rules).into_result(folder)?;
        store.release_pages();
        let weights = Self {
            packed: packed_modules(&store, config),
            shapes: float_shapes(config),
            store,
            update: Update::default(),
        };
        Ok((weights, report))
    }

    /// Tensors that need not be a model, none of them packed.
    pub fn from_store(store: TensorStore) -> Self {
        let shapes = store.iter().map(|view| (view.name.to_owned(), view.shape.to_vec()));
        Self {
            shapes: shapes.collect(),
            packed: BTreeMap::new(),
            store,
            update: Update::default(),
        }
    }

    /// The same with an update in it.
    ///
    /// # Errors
    /// [`Error::NoTensor`] for a tensor that the model does not have; [`Error::UpdateShape`].
    pub fn with_update(mut self, update: Update) -> Result<Self> {
        for name in update.names() {
            let expected = self.shape(name)?;
            let found = match (update.low_rank.get(name), update.replacement(name)) {
                (Some(low_rank), _) => low_rank.shape().to_vec(),
                (None, Some(store)) => store.require(name)?.shape.to_vec(),
                (None, None) => continue,
            };
            if found != expected {
                let reason = format!("the update of {name} is {found:?}, the tensor {expected:?}");
                return Err(Error::UpdateShape { reason });
            }
        }
        self.update = update;
        Ok(self)
    }

    /// The tensors as they are stored.
    pub fn store(&self) -> &TensorStore {
        &self.store
    }

    /// The same, to give their memory back.
    pub fn store_mut(&mut self) -> &mut TensorStore {
        &mut self.store
    }

    /// Leaves the base alone, and returns what was merged in.
    pub fn take_update(&mut self) -> Update {
        std::mem::take(&mut self.update)
    }

    /// What is merged in.
    pub fn update(&self) -> &Update {
        &self.update
    }

    /// Names of the tensors that the model needs, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// How a weight is packed; `None` where it is plain.
    pub fn packing(&self, name: &str) -> Option<LayerQuantization> {
        self.packed.get(name).copied()
    }

    /// Shape of a tensor, as if nothing were packed.
    ///
    /// # Errors
    /// [`Error::NoTensor`] with the nearest name there is.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        let shape = self.shapes.get(name).ok_or_else(|| Error::NoTensor {
            path: self.store.path().to_path_buf(),
            name: name.to_owned(),
            nearest: nearest(name, self.names()).map(str::to_owned),
        })?;
        Ok(shape)
    }

    /// Element type of a tensor's numbers: that of the scales where it is packed.
    ///
    /// # Errors
    /// [`Error::NoTensor`].
    pub fn dtype(&self, name: &str) -> Result<Dtype> {
        Ok(self.store.require(&self.floats_of(name))?.dtype)
    }

    /// A whole tensor as f32, the update merged in.
    ///
    /// # Errors
    /// As [`rows_into`](Self::rows_into).
    pub fn all(&self, name: &str) -> Result<Vec<f32>> {
        self.rows(name, 0..self.shape(name)?[0])
    }

    /// Rows `rows` of a tensor as f32, the update merged in; an element of a vector is a row.
    ///
    /// # Errors
    /// As [`rows_into`](Self::rows_into).
    pub fn rows(&self, name: &str, rows: Range<usize>) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        self.rows_into(name, rows, &mut values)?;
        Ok(values)
    }

    /// [`rows`](Self::rows) into a buffer that is used again: fresh memory costs as much as reading.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::NonFinite`] for a NaN or an infinity; [`Error::NotFloat`]; [`Error::Quantization`];
    /// [`Error::Read`].
    pub fn rows_into(&self, name: &str, rows: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        match self.update.replacement(name) {
            Some(store) => store.rows_into(name, rows.clone(), values)?,
            None => self.base_into(name, rows.clone(), values)?,
        }
        if let Some(low_rank) = self.update.low_rank.get(name) {
            low_rank.merge(rows.clone(), values);
        }
        refuse_non_finite(self.store.path(), name, rows.start, values, self.shape(name)?)
    }

    /// A whole tensor of the base as f32, without the update.
    ///
    /// # Errors
    /// As [`rows_into`](Self::rows_into).
    pub fn base(&self, name: &str) -> Result<Vec<f32>> {
        let mut values = Vec::new();
        self.base_into(name, 0..self.shape(name)?[0], &mut values)?;
        refuse_non_finite(self.store.path(), name, 0, &values, self.shape(name)?)?;
        Ok(values)
    }

    fn base_into(&self, name: &str, rows: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        let Some(layer) = self.packing(name) else {
            return self.store.rows_into(name, rows, values);
        };
        if layer.mode != QuantizationMode::Affine {
            let (path, mode) = (self.store.path().display(), layer.mode.name());
            return Err(Error::Quantization {
                reason: format!("{path}: {name} has the mode {mode}, only affine is read as numbers"),
            });
        }
        let module = name.strip_suffix(".weight").unwrap_or(name);
        let part = |leaf: &str| self.store.read_rows(&format!("{module}.{leaf}"), rows.clone());
        let packed = Affine {
            weight: part("weight")?,
            scales: part("scales")?,
            biases: part("biases")?,
        };
        *values = dequantize(&packed, layer.bits)?;
        Ok(())
    }

    /// The tensor that has the floats of a weight.
    fn floats_of(&self, name: &str) -> String {
        match name.strip_suffix(".weight").filter(|_| self.packed.contains_key(name)) {
            Some(module) => format!("{module}.scales"),
            None => name.to_owned(),
        }
    }
}

/// What frameworks put around a module and leave in the names of its tensors.
const WRAPPERS: [&str; 4] = [
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "module",
];

/// A tensor's name without the wrappers that compiling, sharding, checkpointing and data parallelism leave in it.
///
/// ```
/// let name = "module._orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight";
/// assert_eq!(planish_tensors::without_wrappers(name), "model.layers.0.mlp.up_proj.weight");
/// ```
pub fn without_wrappers(name: &str) -> String {
    let words: Vec<&str> = name.split('.').filter(|word| !WRAPPERS.contains(word)).collect();
    words.join(".")
}

/// Names as the configuration has them, where others mean the same.
fn name_as_configured(store: &mut TensorStore, config: &ModelConfig) {
    store.rename(without_wrappers);
    let (embedding, head) = (config.arch.embedding_path(), config.arch.head_path());
    // What saving a model without its head leaves.
    if store.contains("norm.weight") && store.names().all(|name| !name.starts_with("model.")) {
        store.rename(|name| match name.starts_with(&head) {
            true => name.to_owned(),
            false => format!("model.{name}"),
        });
    }
    // Of two names for one matrix some writers keep that of the head.
    if config.arch.head.is_tied && !store.contains(&format!("{embedding}.weight")) {
        store.rename(|name| match name.strip_prefix(&head) {
            Some(leaf) => format!("{embedding}{leaf}"),
            None => name.to_owned(),
        });
    }
}

/// A tied model may hold its head once more, but not another one.
fn refuse_another_head(store: &TensorStore, config: &ModelConfig, folder: &Path) -> Result<()> {
    let (embedding, head) = (config.arch.embedding_path(), config.arch.head_path());
    let content = |name: &str| store.get(name).map(|view| (view.dtype, view.shape, view.bytes));
    for leaf in store.names().filter_map(|name| name.strip_prefix(&head)) {
        if content(&format!("{head}{leaf}")) != content(&format!("{embedding}{leaf}")) {
            return Err(Error::HeadDiffers {
                path: folder.to_path_buf(),
            });
        }
    }
    Ok(())
}

fn packed_modules(store: &TensorStore, config: &ModelConfig) -> BTreeMap<String, LayerQuantization> {
    let Some(quantization) = &config.quantization else {
        return BTreeMap::new();
    };
    let modules = store.names().filter_map(|name| name.strip_suffix(".scales"));
    modules
        .filter_map(|module| Some((format!("{module}.weight"), quantization.for_module(module)?)))
        .collect()
}

fn float_shapes(config: &ModelConfig) -> BTreeMap<String, Vec<usize>> {
    let plain = ModelConfig {
        quantization: None,
        ..config.clone()
    };
    let specs = plain.expected_tensors().into_iter();
    specs.map(|spec| (spec.name, spec.shape)).collect()
}

fn refuse_non_finite(path: &Path, name: &str, first_row: usize, values: &[f32], shape: &[usize]) -> Result<()> {
    let columns: usize = shape[1..].iter().product();
    match first_outside(values, f32::MAX) {
        None => Ok(()),
        Some(at) => Err(Error::NonFinite {
            path: path.to_path_buf(),
            name: name.to_owned(),
            index: first_row * columns + at,
            value: f64::from(values[at]),
        }),
    }
}

/// Index of the first value that is NaN or beyond ±limit. Whole chunks are judged at once, which vectorises.
///
/// ```
/// use planish_tensors::first_outside;
/// assert_eq!(first_outside(&[1.0, f32::NAN, -9.0], 8.0), Some(1));
/// assert_eq!(first_outside(&[1.0, -8.0], 8.0), None);
/// ```
pub fn first_outside(values: &[f32], limit: f32) -> Option<usize> {
    const CHUNK: usize = 4096;
    let outside = |v: &f32| v.is_nan() || v.abs() > limit;
    let chunk = values
        .chunks(CHUNK)
        .position(|chunk| chunk.iter().fold(false, |bad, v| bad | outside(v)))?;
    values[chunk * CHUNK..]
        .iter()
        .position(outside)
        .map(|at| chunk * CHUNK + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_bad_value_is_found_in_any_chunk() {
        let mut values = vec![1.0f32; 10_000];
        assert_eq!(first_outside(&values, 65504.0), None);
        values[9_000] = f32::NAN;
        values[9_500] = 65505.0;
        assert_eq!(first_outside(&values, 65504.0), Some(9_000));
        values[9_000] = -65504.0;
        assert_eq!(first_outside(&values, 65504.0), Some(9_500));
    }
}

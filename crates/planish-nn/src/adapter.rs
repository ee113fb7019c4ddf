//! Adapters from files and to files.

use std::collections::{BTreeMap, BTreeSet};

use planish_checkpoint::adapter::{Adapter, Trained};
use planish_core::suggest;
use planish_mlx::{Array, Dtype, host};
use planish_tensors::{Dtype as FileDtype, HostTensor, TensorStore, TensorView};

use crate::lora::LoraAdapter;
use crate::parameters::{Parameters, Trainable};
use crate::weights::from_view;
use crate::{Error, Linear, Model, Result};

impl Model {
    /// Lays what was trained over the model, and returns what changed: low-rank tensors are attached (module paths), whole
    /// weights take the place of the model's own (tensor names).
    ///
    /// # Errors
    /// As [`attach_tensors`](Self::attach_tensors).
    pub fn attach(&mut self, trained: &Trained) -> Result<Vec<String>> {
        match trained {
            Trained::Whole(store) => self.replace_weights(store),
            Trained::LowRank(adapter) => self.attach_adapter(adapter),
        }
    }

    /// Attaches the low-rank tensors of an adapter.
    ///
    /// # Errors
    /// As [`attach_tensors`](Self::attach_tensors). The model is unchanged then.
    pub fn attach_adapter(&mut self, adapter: &Adapter) -> Result<Vec<String>> {
        self.attach_tensors(&adapter.tensors, adapter.scale, adapter.dropout as f32)
    }

    /// Attaches stored adapter tensors in mlx-lm's layout (`<path>.lora_a`, `.lora_b`, and `.m` for DoRA) with one final
    /// multiplier, and returns the adapted paths. Every tensor must be used.
    ///
    /// # Errors
    /// [`Error::UnknownAdapterModule`]; [`Error::IncompleteAdapter`]; [`Error::ShapeMismatch`]; [`Error::AdaptersAttached`];
    /// [`Error::Tensors`] for NaN or infinite values. The model is unchanged then.
    pub fn attach_tensors(
        &mut self,
        tensors: &BTreeMap<String, HostTensor>,
        scale: f64,
        dropout: f32,
    ) -> Result<Vec<String>> {
        if !(0.0..1.0).contains(&dropout) {
            return Err(Error::DropoutRange { dropout });
        }
        self.require_no_adapters()?;
        let modules = self.adapted_modules(tensors)?;
        let mut attached = Vec::with_capacity(modules.len());
        for (path, linear) in self.decoder.linears_mut() {
            if modules.contains(path.as_str()) {
                attached.push((adapter_from(tensors, &path, linear, scale, dropout)?, path, linear));
            }
        }
        let mut paths = Vec::with_capacity(attached.len());
        for (adapter, path, linear) in attached {
            linear.adapter = Some(adapter);
            paths.push(path);
        }
        self.train(Trainable::Adapters)?;
        Ok(paths)
    }

    /// The adapter tensors for a file, f32, by name.
    ///
    /// # Errors
    /// [`Error::Mlx`] when an array cannot be evaluated.
    pub fn adapter_tensors(&self) -> Result<BTreeMap<String, HostTensor>> {
        self.decoder
            .collect(Trainable::Adapters)
            .into_iter()
            .map(|(name, array)| Ok((name, to_host(&array)?)))
            .collect()
    }

    /// Puts stored weights in the place of the model's own, in the model's dtype, one tensor at a time.
    fn replace_weights(&mut self, store: &TensorStore) -> Result<Vec<String>> {
        let own: BTreeMap<String, Array> = self.decoder.collect(Trainable::Weights).into_iter().collect();
        if let Some(name) = store.names().find(|name| !own.contains_key(*name)) {
            let nearest = suggest::nearest(name, own.keys().map(String::as_str)).map(str::to_owned);
            let tensor = name.to_owned();
            return Err(Error::UnknownAdapterModule { tensor, nearest });
        }
        let dtype = self.dtype();
        let mut failure = None;
        self.decoder.visit("", &mut |name, role, array| {
            let stored = store.get(name).filter(|_| Trainable::Weights.includes(role));
            let Some(view) = stored.filter(|_| failure.is_none()) else {
                return;
            };
            match from_tensor(&view, &dims(array)).and_then(|weight| Ok(weight.as_dtype(dtype)?)) {
                Ok(weight) => *array = weight,
                Err(error) => failure = Some(error),
            }
        });
        failure.map_or_else(|| Ok(store.names().map(str::to_owned).collect()), Err)
    }

    /// The paths that the tensors speak of; each must be a linear layer of this model.
    fn adapted_modules<'a>(&self, tensors: &'a BTreeMap<String, HostTensor>) -> Result<BTreeSet<&'a str>> {
        let known = self.linear_paths();
        let mut modules = BTreeSet::new();
        for name in tensors.keys() {
            let module = [".lora_a", ".lora_b", ".m"]
                .iter()
                .find_map(|suffix| name.strip_suffix(suffix));
            match module {
                Some(module) if known.iter().any(|path| path == module) => modules.insert(module),
                _ => {
                    let nearest = suggest::nearest(module.unwrap_or(name), known.iter().map(String::as_str));
                    let nearest = nearest.map(str::to_owned);
                    return Err(Error::UnknownAdapterModule {
                        tensor: name.clone(),
                        nearest,
                    });
                }
            };
        }
        Ok(modules)
    }
}

fn adapter_from(
    tensors: &BTreeMap<String, HostTensor>,
    path: &str,
    linear: &Linear,
    scale: f64,
    dropout: f32,
) -> Result<LoraAdapter> {
    let (output_dims, input_dims) = linear.base.dims();
    let required = |part: &'static str| {
        let name = format!("{path}.{part}");
        match tensors.get(&name) {
            Some(tensor) => Ok((name, tensor)),
            None => Err(Error::IncompleteAdapter {
                module: path.to_owned(),
                part,
            }),
        }
    };
    let (a_name, a) = required("lora_a")?;
    let (b_name, b) = required("lora_b")?;
    let rank = a.shape.last().copied().unwrap_or(0);
    if rank == 0 {
        return Err(Error::ZeroRank { path: path.to_owned() });
    }
    let magnitude_name = format!("{path}.m");
    let magnitude = tensors.get(&magnitude_name);
    Ok(LoraAdapter {
        a: from_host(&a_name, a, &[input_dims, rank])?,
        b: from_host(&b_name, b, &[rank, output_dims])?,
        magnitude: magnitude
            .map(|m| from_host(&magnitude_name, m, &[output_dims]))
            .transpose()?,
        scale,
        dropout,
    })
}

fn from_host(name: &str, tensor: &HostTensor, shape: &[usize]) -> Result<Array> {
    Ok(from_tensor(&tensor.view(name), shape)?.as_dtype(Dtype::Float32)?)
}

fn from_tensor(view: &TensorView<'_>, shape: &[usize]) -> Result<Array> {
    if view.shape != shape {
        return Err(Error::ShapeMismatch {
            path: view.name.to_owned(),
            expected: shape.to_vec(),
            found: view.shape.to_vec(),
        });
    }
    from_view(view)
}

fn to_host(array: &Array) -> Result<HostTensor> {
    let bytes = host::bytes_of(&array.as_dtype(Dtype::Float32)?)?;
    Ok(HostTensor::new(FileDtype::F32, &dims(array), bytes)?)
}

fn dims(array: &Array) -> Vec<usize> {
    array.shape().iter().map(|&dim| dim as usize).collect()
}

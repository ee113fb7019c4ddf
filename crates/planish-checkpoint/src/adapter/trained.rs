use std::path::Path;

use planish_tensors::{LowRank, TensorStore, Update};

use super::names::Leaf;
use super::{Adapter, AdapterReport, BaseModel, Method, ReadOptions, Sidecar, full, validate};
use crate::error::Result;

/// What a training run made of its base: low-rank updates beside it, or weights that take the place of its own.
#[derive(Debug)]
pub enum Trained {
    /// An adapter of [`Method::Lora`] or [`Method::Dora`].
    LowRank(Box<Adapter>),
    /// Whole weights under the base's names: a full fine-tune. They are read from the files when used.
    Whole(TensorStore),
}

impl Trained {
    /// Opens the folder of an adapter in either layout, or of a full fine-tune.
    ///
    /// # Errors
    /// As [`Adapter::read`].
    pub fn read(path: &Path, options: &ReadOptions<'_>) -> Result<(Self, AdapterReport)> {
        match full::weights_of(path)? {
            Some(file) => {
                let dir = if path.is_dir() {
                    path
                } else {
                    path.parent().unwrap_or(Path::new(""))
                };
                let mut report = AdapterReport::default();
                let sidecar = Sidecar::read(dir)?.unwrap_or_default();
                validate::check_base_identity(&sidecar, options, path, &mut report)?;
                Ok((Self::Whole(TensorStore::open(&file)?), report))
            }
            None => {
                let (adapter, report) = Adapter::read(path, options)?;
                Ok((Self::LowRank(Box::new(adapter)), report))
            }
        }
    }

    /// What it does to the tensors of `base`.
    ///
    /// # Errors
    /// [`planish_tensors::Error::UpdateShape`] for updates that are no matrices, such as those of experts.
    pub fn into_update(self, base: &BaseModel) -> Result<Update> {
        match self {
            Self::Whole(store) => Ok(Update {
                whole: Some(store),
                ..Update::default()
            }),
            Self::LowRank(adapter) => adapter.update(base),
        }
    }
}

impl Adapter {
    fn update(&self, base: &BaseModel) -> Result<Update> {
        let mut update = Update::default();
        for module in self.modules() {
            let (Some(a), Some(b)) = (self.tensor(module, Leaf::A), self.tensor(module, Leaf::B)) else {
                continue; // refused when it was read
            };
            let m = self
                .tensor(module, Leaf::Magnitude)
                .filter(|_| self.method == Method::Dora);
            let is_embedding = base.modules.get(module).is_some_and(|module| module.is_embedding);
            let low_rank = match is_embedding {
                true => LowRank::embedding(a, b, self.scale, m)?,
                false => LowRank::linear(a, b, self.scale, m)?,
            };
            update.low_rank.insert(format!("{module}.weight"), low_rank);
        }
        Ok(update)
    }
}

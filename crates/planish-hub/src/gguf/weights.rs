//! The safetensors of a Hugging Face folder, one file or shards, as f32.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value as Json;

use crate::error::io_at;
use crate::{Error, Result};

/// Where the numbers of an exported model come from: a folder, or weights that somebody merges on the way.
///
/// The safetensors of a folder are one; [`export_gguf`](super::export_gguf) opens them itself.
pub trait WeightSource {
    /// Names and shapes of all tensors.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>>;

    /// Reads the numbers of one tensor, by parts.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Weights`] with whatever the source has to say.
    fn reader(&self, name: &str) -> Result<WeightReader<'_>>;
}

/// Copies numbers of a tensor, from the given one on, until the slice is full.
pub type WeightReader<'a> = Box<dyn Fn(usize, &mut [f32]) + 'a>;

/// All tensors of a folder, memory-mapped.
pub(super) struct WeightFiles {
    folder: PathBuf,
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Place>,
}

struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    len: usize,
}

impl WeightFiles {
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let mut weights = Self {
            folder: folder.to_path_buf(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
        };
        for name in file_names(folder)? {
            weights.add(folder.join(name))?;
        }
        Ok(weights)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let wrong = |message: String| Error::Safetensors {
            path: path.clone(),
            message,
        };
        let file = File::open(&path).map_err(io_at(&path))?;
        // SAFETY: the map is read-only; see `Gguf::open`.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(io_at(&path))?;
        let parsed = SafeTensors::deserialize(&map).map_err(|error| wrong(error.to_string()))?;
        for (name, view) in parsed.iter() {
            if !matches!(view.dtype(), Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                return Err(wrong(format!(
                    "tensor {name:?} is {:?}, expected F32, F16 or BF16",
                    view.dtype()
                )));
            }
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            let place = Place {
                file: self.files.len(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                start,
                len: view.data().len(),
            };
            if self.tensors.insert(name.to_owned(), place).is_some() {
                return Err(wrong(format!("tensor {name:?} is in another shard too")));
            }
        }
        self.files.push((path, map));
        Ok(())
    }
}

impl WeightSource for WeightFiles {
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = |(name, place): (&String, &Place)| (name.clone(), place.shape.clone());
        self.tensors.iter().map(shape).collect()
    }

    fn reader(&self, name: &str) -> Result<WeightReader<'_>> {
        let missing = || Error::MissingTensor {
            path: self.folder.clone(),
            tensor: name.to_owned(),
        };
        let place = self.tensors.get(name).ok_or_else(missing)?;
        let bytes = &self.files[place.file].1[place.start..place.start + place.len];
        Ok(Box::new(|first, out| read_f32(place.dtype, bytes, first, out)))
    }
}

fn read_f32(dtype: Dtype, bytes: &[u8], first: usize, out: &mut [f32]) {
    let item = if dtype == Dtype::F32 { 4 } else { 2 };
    for (value, b) in out.iter_mut().zip(bytes[first * item..].chunks_exact(item)) {
        *value = match dtype {
            Dtype::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Dtype::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
            _ => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        };
    }
}

/// `model.safetensors`, or the shards that its index names.
fn file_names(folder: &Path) -> Result<BTreeSet<String>> {
    if folder.join("model.safetensors").exists() {
        return Ok(BTreeSet::from(["model.safetensors".to_owned()]));
    }
    let path = folder.join("model.safetensors.index.json");
    let text = std::fs::read_to_string(&path).map_err(io_at(&path))?;
    let wrong = |problem: String| Error::Json {
        path: path.clone(),
        problem,
    };
    let index: Json = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let map = index["weight_map"]
        .as_object()
        .ok_or_else(|| wrong("there is no object `weight_map`".into()))?;
    let plain = |file: &Json| {
        file.as_str()
            .filter(|name| !name.contains(['/', '\\']))
            .map(str::to_owned)
    };
    map.values()
        .map(|file| plain(file).ok_or_else(|| wrong(format!("{file} is no file name"))))
        .collect()
}

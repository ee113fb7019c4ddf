//! Where a model's arrays come from: a checked checkpoint, or random numbers for benchmarks.

use std::collections::HashMap;
use std::sync::Arc;

use planish_core::model_config::{LayerQuantization, ModelConfig, QuantizationMode};
use planish_kernels::PackedLinear;
use planish_mlx::{Array, Dtype, host};
use planish_tensors::{Dtype as FileDtype, TensorStore, TensorView};

use crate::embedding::Embedding;
use crate::native::Kernels;
use crate::weight::LinearBase;
use crate::{Error, Linear, Result, RmsNorm};

/// Builds layers from named tensors, floating-point ones in `dtype`.
pub(crate) struct Weights<'a> {
    config: &'a ModelConfig,
    source: Source<'a>,
    dtype: Dtype,
    kernels: Kernels,
}

enum Source<'a> {
    Store(&'a mut TensorStore),
    Random {
        shapes: HashMap<String, Vec<i32>>,
        seed: u64,
    },
}

impl<'a> Weights<'a> {
    /// From files whose names and shapes were checked.
    pub(crate) fn from_store(
        config: &'a ModelConfig,
        store: &'a mut TensorStore,
        dtype: Dtype,
        kernels: Kernels,
    ) -> Self {
        Weights {
            config,
            source: Source::Store(store),
            dtype,
            kernels,
        }
    }

    /// Normal numbers of deviation 0.02, norms of 1, biases of 0.
    pub(crate) fn random(config: &'a ModelConfig, dtype: Dtype, kernels: Kernels, seed: u64) -> Self {
        let dims = |shape: Vec<usize>| shape.into_iter().map(|dim| dim as i32).collect();
        let shapes = config
            .expected_tensors()
            .into_iter()
            .map(|spec| (spec.name, dims(spec.shape)))
            .collect();
        Weights {
            config,
            source: Source::Random { shapes, seed },
            dtype,
            kernels,
        }
    }

    pub(crate) fn kernels(&self) -> Kernels {
        self.kernels
    }

    pub(crate) fn linear(&mut self, path: &str, has_bias: bool) -> Result<Linear> {
        let base = match self.matrix(path)? {
            LinearBase::Dense { weight } if self.kernels == Kernels::NativeBf16 => LinearBase::Packed(packed(&weight)?),
            base => base,
        };
        let bias = has_bias.then(|| self.float(&format!("{path}.bias"))).transpose()?;
        Ok(Linear {
            base,
            bias,
            adapter: None,
            kernels: self.kernels,
        })
    }

    pub(crate) fn embedding(&mut self, path: &str, factor: f32, is_head: bool) -> Result<Embedding> {
        let mut table = self.matrix(path)?;
        let mut packed_head = None;
        if self.kernels == Kernels::NativeBf16
            && let LinearBase::Dense { weight } = &mut table
        {
            if is_head {
                packed_head = Some(packed(weight)?);
            }
            *weight = weight.as_dtype(Dtype::Bfloat16)?;
            weight.eval()?;
        }
        Ok(Embedding {
            table,
            packed_head,
            widens: self.kernels == Kernels::NativeBf16,
            factor,
            kernels: self.kernels,
        })
    }

    pub(crate) fn rms_norm(&mut self, path: &str, eps: f32, offset: f32) -> Result<RmsNorm> {
        Ok(RmsNorm {
            weight: self.float(&format!("{path}.weight"))?,
            offset,
            eps,
            kernels: self.kernels,
        })
    }

    fn matrix(&mut self, path: &str) -> Result<LinearBase> {
        match self
            .config
            .quantization
            .as_ref()
            .and_then(|quantization| quantization.for_module(path))
        {
            Some(layer) => self.quantized(path, layer),
            None => Ok(LinearBase::Dense {
                weight: self.float(&format!("{path}.weight"))?,
            }),
        }
    }

    fn quantized(&mut self, path: &str, layer: LayerQuantization) -> Result<LinearBase> {
        if layer.mode != QuantizationMode::Affine {
            return Err(Error::QuantizationMode {
                path: path.to_owned(),
                mode: layer.mode.name(),
            });
        }
        Ok(LinearBase::Affine {
            packed: self.tensor(&format!("{path}.weight"))?,
            scales: self.float(&format!("{path}.scales"))?,
            biases: self.float(&format!("{path}.biases"))?,
            group_size: layer.group_size as i32,
            bits: layer.bits as i32,
        })
    }

    fn float(&mut self, name: &str) -> Result<Array> {
        let array = self.tensor(name)?.as_dtype(self.dtype)?;
        array.eval()?; // one tensor at a time: the unconverted copy is freed before the next is read
        Ok(array)
    }

    fn tensor(&mut self, name: &str) -> Result<Array> {
        match &mut self.source {
            Source::Store(store) => {
                let array = from_view(&store.require(name)?)?;
                store.release_pages(); // the array has its own copy
                Ok(array)
            }
            Source::Random { shapes, seed } => {
                let shape = shapes.get(name).map(Vec::as_slice).unwrap_or_default();
                random(name, shape, *seed)
            }
        }
    }
}

/// A dense weight `[output_dims, input_dims]` packed for both directions.
fn packed(weight: &Array) -> Result<Arc<PackedLinear>> {
    let (output_dims, input_dims) = (weight.dim(0) as usize, weight.dim(1) as usize);
    let weight = host::to_f32_vec(weight)?;
    Ok(Arc::new(PackedLinear::new(&weight, output_dims, input_dims)))
}

/// An array from a tensor of a file, refusing NaN and infinity.
pub(crate) fn from_view(view: &TensorView<'_>) -> Result<Array> {
    if let Some(bad) = view.find_non_finite() {
        return Err(planish_tensors::Error::NonFinite {
            path: view.file.to_path_buf(),
            name: bad.name,
            index: bad.index,
            value: bad.value,
        }
        .into());
    }
    Ok(host::array_from_bytes(
        view.bytes,
        view.shape,
        mlx_dtype(view.name, view.dtype)?,
    )?)
}

/// MLX's name for a file's element type.
pub(crate) fn mlx_dtype(path: &str, dtype: FileDtype) -> Result<Dtype> {
    match dtype {
        FileDtype::Bool => Ok(Dtype::Bool),
        FileDtype::U8 => Ok(Dtype::Uint8),
        FileDtype::I8 => Ok(Dtype::Int8),
        FileDtype::U16 => Ok(Dtype::Uint16),
        FileDtype::I16 => Ok(Dtype::Int16),
        FileDtype::F16 => Ok(Dtype::Float16),
        FileDtype::BF16 => Ok(Dtype::Bfloat16),
        FileDtype::U32 => Ok(Dtype::Uint32),
        FileDtype::I32 => Ok(Dtype::Int32),
        FileDtype::F32 => Ok(Dtype::Float32),
        FileDtype::U64 => Ok(Dtype::Uint64),
        FileDtype::I64 => Ok(Dtype::Int64),
        FileDtype::F64 => Ok(Dtype::Float64),
        FileDtype::C64 => Ok(Dtype::Complex64),
        FileDtype::F8E5M2 | FileDtype::F8E4M3 | FileDtype::F8E8M0 => Err(Error::ForeignDtype {
            path: path.to_owned(),
            dtype,
        }),
    }
}

fn random(name: &str, shape: &[i32], seed: u64) -> Result<Array> {
    if name.ends_with(".bias") {
        return Ok(Array::zeros::<f32>(shape)?);
    }
    if shape.len() == 1 {
        return Ok(Array::ones::<f32>(shape)?);
    }
    let key = mlx_rs::random::key(crate::lora::module_seed(seed, name))?;
    Ok(mlx_rs::random::normal::<f32>(shape, None, 0.02, &key)?)
}

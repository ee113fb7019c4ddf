//! A base model with an adapter over it: what each tensor becomes, one module in memory at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_core::model_config::{LayerQuantization, ModelConfig};
use planish_tensors::{
    Dtype, Error as TensorError, HostTensor, LoadRules, ModelWeights, ShardWriter, TensorInfo, Update, dequantize,
    quantize,
};
use serde_json::{Map, Value, json};

use super::report::{FuseReport, ModuleRetention, Verdict};
use super::retention::Retention;
use super::stream::{FuseOptions, FuseTarget};
use crate::error::{Error, Result};
use crate::model_files;

pub(super) struct Source {
    model_dir: PathBuf,
    config: ModelConfig,
    weights: ModelWeights,
    options: FuseOptions,
    /// The type of the base, where another was chosen to keep the update.
    widened_from: Option<String>,
}

/// A weight as it will be stored, and what that keeps.
struct FusedWeight {
    /// By tensor name.
    tensors: BTreeMap<String, HostTensor>,
    retention: Option<ModuleRetention>,
}

impl Source {
    pub(super) fn open(model_dir: &Path, update: Update, options: &FuseOptions) -> Result<Self> {
        let config = read_config(model_dir)?;
        let (weights, _) = ModelWeights::open(model_dir, &config, &LoadRules::default())?;
        if config.quantization.is_none() && options.target != FuseTarget::Float {
            let reason = format!(
                "{} is not quantised, so it cannot be quantised again",
                model_dir.display()
            );
            return Err(TensorError::Quantization { reason }.into());
        }
        Ok(Self {
            model_dir: model_dir.to_path_buf(),
            config,
            weights: weights.with_update(update)?,
            options: *options,
            widened_from: None,
        })
    }

    pub(super) fn measure(&self) -> Result<FuseReport> {
        let names = self.weights.update().names().into_iter();
        let measured = names
            .map(|name| Ok(self.fused(name)?.retention))
            .collect::<Result<Vec<_>>>()?;
        Ok(self.report(measured.into_iter().flatten().collect()))
    }

    pub(super) fn write(&mut self, dir: &Path, max_shard_bytes: u64) -> Result<FuseReport> {
        let mut writer = ShardWriter::create(dir, self.plan()?, max_shard_bytes)?;
        // Scales and biases wait here until the writer asks for them: it sorts by element type.
        let (mut waiting, mut modules) = (BTreeMap::<String, HostTensor>::new(), BTreeMap::new());
        while let Some(name) = writer.next_tensor().map(|next| next.name.clone()) {
            if let Some(tensor) = waiting.remove(&name) {
                writer.write_next(&tensor.bytes)?;
                continue;
            }
            let weight = self.weight_of(&name);
            if !self.is_made(&weight) {
                self.copy_tensor(&name, &mut writer)?;
                continue;
            }
            let mut fused = self.fused(&weight)?;
            if let Some(tensor) = fused.tensors.remove(&name) {
                writer.write_next(&tensor.bytes)?;
            }
            waiting.extend(fused.tensors);
            modules.extend(fused.retention.map(|retention| (weight, retention)));
        }
        let summary = writer.finish()?;
        Ok(FuseReport {
            files: summary.files,
            ..self.report(modules.into_values().collect())
        })
    }

    fn report(&self, modules: Vec<ModuleRetention>) -> FuseReport {
        FuseReport {
            widened_from: self.widened_from.clone(),
            ..FuseReport::new(modules)
        }
    }

    /// A tensor that stays: the base's bytes, or its numbers in the type that was asked for.
    fn copy_tensor(&self, name: &str, writer: &mut ShardWriter) -> Result<()> {
        let rows = self.weights.store().require(name)?.shape.first().copied().unwrap_or(1);
        let tensor = self.weights.store().read_rows(name, 0..rows)?;
        let dtype = self.stored_dtype(tensor.dtype);
        if dtype == tensor.dtype {
            return Ok(writer.write_next(&tensor.bytes)?);
        }
        Ok(writer.write_next(&rounded(dtype, &tensor.shape, &tensor.to_f32()?, name)?.bytes)?)
    }

    /// The element type of floats in the result.
    fn stored_dtype(&self, found: Dtype) -> Dtype {
        match self.options.dtype {
            Some(wanted) if found.is_float() && self.options.target == FuseTarget::Float => wanted,
            _ => found,
        }
    }

    /// The tensors of the result, by name.
    fn plan(&self) -> Result<Vec<TensorInfo>> {
        let needed = self.config.expected_tensors();
        let mut names: Vec<&str> = needed.iter().map(|spec| spec.name.as_str()).collect();
        names.sort_unstable();
        let mut infos = Vec::new();
        for name in names {
            let weight = self.weight_of(name);
            if !self.is_made(&weight) {
                let view = self.weights.store().require(name)?;
                infos.push(TensorInfo {
                    dtype: self.stored_dtype(view.dtype),
                    ..TensorInfo::from(&view)
                });
            } else if weight == name {
                // The parts of a module are listed where its weight is.
                infos.extend(self.stored_form(&weight)?);
            }
        }
        Ok(infos)
    }

    /// The weight that a tensor is part of: itself, or the packed weight of scales and biases.
    fn weight_of(&self, name: &str) -> String {
        let packed = [".scales", ".biases"].iter().find_map(|leaf| {
            let weight = format!("{}.weight", name.strip_suffix(leaf)?);
            self.weights.packing(&weight).map(|_| weight)
        });
        packed.unwrap_or_else(|| name.to_string())
    }

    /// Whether a weight is not copied: it is changed, or no longer packed.
    fn is_made(&self, weight: &str) -> bool {
        let is_unpacked = self.options.target == FuseTarget::Float && self.weights.packing(weight).is_some();
        is_unpacked || self.weights.update().changes(weight)
    }

    /// Bits and group size that a weight is packed with in the result.
    fn stored_packing(&self, weight: &str) -> Option<(usize, usize)> {
        let LayerQuantization { bits, group_size, .. } = self.weights.packing(weight)?;
        match self.options.target {
            FuseTarget::Quantized { bits: wanted } => Some((wanted.unwrap_or(bits), group_size)),
            FuseTarget::Float => None,
        }
    }

    /// The tensors that a weight becomes.
    fn stored_form(&self, weight: &str) -> Result<Vec<TensorInfo>> {
        let (dtype, shape) = (self.weights.dtype(weight)?, self.weights.shape(weight)?);
        let info = |name: String, dtype, shape| TensorInfo { name, dtype, shape };
        let Some((bits, group_size)) = self.stored_packing(weight) else {
            return Ok(vec![info(weight.to_string(), self.stored_dtype(dtype), shape.to_vec())]);
        };
        let module = module_of(weight);
        let groups = vec![shape[0], shape[1] / group_size];
        Ok(vec![
            info(weight.to_string(), Dtype::U32, vec![shape[0], shape[1] * bits / 32]),
            info(format!("{module}.scales"), dtype, groups.clone()),
            info(format!("{module}.biases"), dtype, groups),
        ])
    }

    /// One weight fused, stored, and read back for comparison.
    fn fused(&self, weight: &str) -> Result<FusedWeight> {
        let (fused, dtype) = (self.weights.all(weight)?, self.weights.dtype(weight)?);
        let shape = self.weights.shape(weight)?;
        let module = module_of(weight);
        let (tensors, kept, stored_as) = match self.stored_packing(weight) {
            Some((bits, group_size)) => {
                let packed = quantize(&fused, shape[0], bits, group_size, dtype)?;
                let kept = dequantize(&packed, bits)?;
                let tensors = BTreeMap::from([
                    (weight.to_string(), packed.weight),
                    (format!("{module}.scales"), packed.scales),
                    (format!("{module}.biases"), packed.biases),
                ]);
                (tensors, kept, format!("{bits} bits, groups of {group_size}"))
            }
            None => {
                let dtype = self.stored_dtype(dtype);
                let stored = rounded(dtype, shape, &fused, weight)?;
                let kept = stored.to_f32()?;
                (BTreeMap::from([(weight.to_string(), stored)]), kept, dtype.to_string())
            }
        };
        if !self.weights.update().changes(weight) {
            let retention = None;
            return Ok(FusedWeight { tensors, retention });
        }
        let retention = Retention::measure(&self.weights.base(weight)?, &fused, &kept);
        let retention = Some(ModuleRetention {
            module: module.to_string(),
            stored_as,
            verdict: Verdict::of(retention.as_ref()),
            retention,
        });
        Ok(FusedWeight { tensors, retention })
    }

    pub(super) fn refuse_loss(&self, report: &FuseReport) -> Result<()> {
        let failed = report
            .modules
            .iter()
            .filter(|module| module.verdict == Verdict::Fail)
            .count();
        if self.options.accept_loss || failed == 0 {
            return Ok(());
        }
        let worst = report.worst().map(|m| {
            (
                m.module.clone(),
                m.stored_as.clone(),
                m.retention.map_or(0.0, |r| r.cosine),
            )
        });
        let (worst, stored_as, cosine) = worst.unwrap_or_default();
        let (how, way_out) = match self.options.target {
            FuseTarget::Float => (format!("rounding to {stored_as}"), "store as --dtype f32"),
            FuseTarget::Quantized { .. } => ("quantising".to_string(), "fuse with --dequantize or --bits 8"),
        };
        Err(Error::FuseLoss {
            how,
            way_out,
            failed,
            of: report.modules.len(),
            worst,
            cosine,
            report: Box::new(report.clone()),
        })
    }

    /// Stores floats in f32 where nobody chose a type and rounding to that of the base would lose the update of a module.
    pub(super) fn keep_the_update(&mut self) -> Result<()> {
        if self.options.dtype.is_some() || self.options.target != FuseTarget::Float || self.options.accept_loss {
            return Ok(());
        }
        let mut lossy = None;
        for name in self.weights.update().names() {
            let module = self.fused(name)?.retention;
            lossy = module.filter(|module| module.verdict == Verdict::Fail);
            if lossy.is_some() {
                break;
            }
        }
        if let Some(module) = lossy {
            self.options.dtype = Some(Dtype::F32);
            self.widened_from = Some(module.stored_as);
        }
        Ok(())
    }

    /// Tokenizer, templates, licences and the adjusted configuration.
    pub(super) fn copy_other_files(&self, dir: &Path) -> Result<()> {
        model_files::copy_adjusted(&self.model_dir, dir, |config| self.adjust_config(config))
    }

    /// The element type; no quantisation after dequantising; an entry for each module that now has other bits than the rest.
    fn adjust_config(&self, config: &mut Map<String, Value>) {
        model_files::set_dtype(config, self.options.dtype);
        let keys = ["quantization", "quantization_config"];
        match self.options.target {
            FuseTarget::Float if self.config.quantization.is_some() => {
                keys.iter().for_each(|key| drop(config.shift_remove(*key)));
            }
            FuseTarget::Quantized { bits: Some(bits) } => {
                for (key, weight) in keys
                    .iter()
                    .flat_map(|key| self.weights.update().names().into_iter().map(move |name| (key, name)))
                {
                    if let (Some(entries), Some(layer)) = (
                        config.get_mut(*key).and_then(Value::as_object_mut),
                        self.weights.packing(weight),
                    ) && layer.bits != bits
                    {
                        entries.insert(
                            module_of(weight).to_string(),
                            json!({"group_size": layer.group_size, "bits": bits}),
                        );
                    }
                }
            }
            _ => {}
        }
    }
}

/// The configuration of a model folder.
pub(super) fn read_config(model_dir: &Path) -> Result<ModelConfig> {
    ModelConfig::from_file(&model_dir.join("config.json")).map_err(|source| Error::Config {
        source: Box::new(source),
    })
}

fn module_of(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// Numbers as they are stored; one that has no finite image is an error.
fn rounded(dtype: Dtype, shape: &[usize], values: &[f32], name: &str) -> Result<HostTensor> {
    let stored = HostTensor::from_f32_as(dtype, shape, values)?;
    match stored.view(name).find_non_finite() {
        Some(found) => Err(TensorError::TooLarge {
            name: name.to_string(),
            index: found.index,
            value: values[found.index],
            dtype,
        }
        .into()),
        None => Ok(stored),
    }
}

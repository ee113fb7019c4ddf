//! A base model with an adapter over it: what each tensor becomes, one module in memory at a time.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_core::model_config::ModelConfig;
use planish_tensors::{
    Affine, Dtype, HostTensor, INDEX_FILE, LoadRules, ShardWriter, TensorInfo, TensorStore, affine_layer, dequantize,
    quantize,
};
use serde_json::{Value, json};

use super::delta::fuse_module;
use super::report::{FuseReport, ModuleRetention, Verdict};
use super::retention::Retention;
use super::stream::{FuseOptions, FuseTarget, REPORT_FILE};
use crate::adapter::{Adapter, BaseModel};
use crate::error::{Error, Result};

pub(super) struct Source {
    model_dir: PathBuf,
    config: ModelConfig,
    store: TensorStore,
    base: BaseModel,
    adapter: Adapter,
    options: FuseOptions,
}

/// A module's weight in f32, with what it was.
struct Merged {
    base: Vec<f32>,
    fused: Vec<f32>,
    /// Of the base's floats: the weight, or the scales of a quantised one.
    dtype: Dtype,
    shape: Vec<usize>,
    /// Bits and group size of a quantised base.
    layer: Option<(usize, usize)>,
}

/// A module's weight as it will be stored, and what that keeps.
struct FusedModule {
    /// By tensor name.
    tensors: BTreeMap<String, HostTensor>,
    retention: Option<ModuleRetention>,
}

impl Source {
    pub(super) fn open(model_dir: &Path, adapter: Adapter, base: BaseModel, options: &FuseOptions) -> Result<Self> {
        let config_path = model_dir.join("config.json");
        let config = ModelConfig::from_file(&config_path).map_err(|source| Error::Config {
            source: Box::new(source),
        })?;
        let store = TensorStore::open(model_dir)?;
        let tied_head = config
            .arch
            .head
            .is_tied
            .then(|| format!("{}.weight", config.arch.head_path()));
        let rules = LoadRules {
            allow_unexpected: tied_head
                .into_iter()
                .chain(["*.rotary_emb.inv_freq".to_string()])
                .collect(),
            ..LoadRules::default()
        };
        store.check(&config.expected_tensors(), &rules).into_result(model_dir)?;
        if config.quantization.is_none() && options.target != FuseTarget::Float {
            let reason = format!(
                "{} is not quantised, so it cannot be quantised again",
                model_dir.display()
            );
            return Err(planish_tensors::Error::Quantization { reason }.into());
        }
        Ok(Self {
            model_dir: model_dir.to_path_buf(),
            config,
            store,
            base,
            adapter,
            options: *options,
        })
    }

    pub(super) fn measure(&self) -> Result<FuseReport> {
        let modules = self.adapter.modules().into_iter();
        let measured = modules
            .map(|module| Ok(self.fused(module)?.retention))
            .collect::<Result<Vec<_>>>()?;
        Ok(FuseReport::new(measured.into_iter().flatten().collect()))
    }

    pub(super) fn write(&mut self, dir: &Path, max_shard_bytes: u64) -> Result<FuseReport> {
        let (infos, owners) = self.plan()?;
        let mut writer = ShardWriter::create(dir, infos, max_shard_bytes)?;
        // Scales and biases wait here until the writer asks for them: it sorts by element type.
        let (mut waiting, mut modules) = (BTreeMap::<String, HostTensor>::new(), BTreeMap::new());
        while let Some(name) = writer.next_tensor().map(|next| next.name.clone()) {
            self.store.release_pages(); // what was written is in another file now
            if let Some(tensor) = waiting.remove(&name) {
                writer.write_next(&tensor.bytes)?;
                continue;
            }
            let Some(module) = owners.get(&name) else {
                self.copy_tensor(&name, &mut writer)?;
                continue;
            };
            let mut fused = self.fused(module)?;
            if let Some(tensor) = fused.tensors.remove(&name) {
                writer.write_next(&tensor.bytes)?;
            }
            waiting.extend(fused.tensors);
            modules.extend(fused.retention.map(|retention| (module.clone(), retention)));
        }
        let summary = writer.finish()?;
        let mut report = FuseReport::new(modules.into_values().collect());
        report.files = summary.files;
        Ok(report)
    }

    /// A tensor that no module owns: the base's bytes, or its numbers in the type that was asked for.
    fn copy_tensor(&self, name: &str, writer: &mut ShardWriter) -> Result<()> {
        let view = self.store.require(name)?;
        let dtype = self.stored_dtype(view.dtype);
        if dtype == view.dtype {
            return Ok(writer.write_next(view.bytes)?);
        }
        Ok(writer.write_next(&self.rounded(dtype, view.shape, &view.to_f32()?, name)?.bytes)?)
    }

    /// The element type of floats in the result.
    fn stored_dtype(&self, found: Dtype) -> Dtype {
        match self.options.dtype {
            Some(wanted) if found.is_float() && self.options.target == FuseTarget::Float => wanted,
            _ => found,
        }
    }

    /// Numbers as they are stored; one that has no finite image is an error.
    fn rounded(&self, dtype: Dtype, shape: &[usize], values: &[f32], name: &str) -> Result<HostTensor> {
        let stored = HostTensor::from_f32_as(dtype, shape, values)?;
        match stored.view(name).find_non_finite() {
            Some(found) => Err(planish_tensors::Error::TooLarge {
                name: name.to_string(),
                index: found.index,
                value: values[found.index],
                dtype,
            }
            .into()),
            None => Ok(stored),
        }
    }

    /// The tensors of the result, and which module makes those that are not copied.
    fn plan(&self) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>)> {
        let (mut infos, mut owners) = (Vec::new(), BTreeMap::new());
        // A tied head that is stored all the same would stay behind when the embedding changes.
        let head = format!("{}.weight", self.config.arch.head_path());
        let is_stray_head = |name: &str| self.config.arch.head.is_tied && name == head;
        for view in self.store.iter().filter(|view| !is_stray_head(view.name)) {
            let (module, leaf) = view.name.rsplit_once('.').unwrap_or((view.name, ""));
            match self.stored_form(module, leaf)? {
                None => infos.push(TensorInfo {
                    dtype: self.stored_dtype(view.dtype),
                    ..TensorInfo::from(&view)
                }),
                Some(parts) => {
                    for info in parts {
                        owners.insert(info.name.clone(), module.to_string());
                        infos.push(info);
                    }
                }
            }
        }
        Ok((infos, owners))
    }

    /// What a tensor of the base becomes: `None` is itself; the parts of a module stand at its `weight`.
    fn stored_form(&self, module: &str, leaf: &str) -> Result<Option<Vec<TensorInfo>>> {
        let layer = affine_layer(&self.config, module, &self.model_dir)?.filter(|_| self.is_packed(module));
        let is_adapted = self.is_adapted(module);
        let is_part = matches!(leaf, "weight" | "scales" | "biases");
        let changes = is_part && (is_adapted || layer.is_some() && self.options.target == FuseTarget::Float);
        if !changes {
            return Ok(None);
        }
        if leaf != "weight" {
            return Ok(Some(Vec::new()));
        }
        let Some((bits, group_size)) = layer else {
            let view = self.store.require(&format!("{module}.weight"))?;
            return Ok(Some(vec![TensorInfo {
                dtype: self.stored_dtype(view.dtype),
                ..TensorInfo::from(&view)
            }]));
        };
        let scales = self.store.require(&format!("{module}.scales"))?;
        let (rows, columns) = (scales.shape[0], scales.shape[1] * group_size);
        let info = |leaf: &str, dtype, columns| TensorInfo {
            name: format!("{module}.{leaf}"),
            dtype,
            shape: vec![rows, columns],
        };
        Ok(Some(match self.options.target {
            FuseTarget::Float => vec![info("weight", self.stored_dtype(scales.dtype), columns)],
            FuseTarget::Quantized { bits: wanted } => vec![
                info("weight", Dtype::U32, columns * wanted.unwrap_or(bits) / 32),
                info("scales", scales.dtype, columns / group_size),
                info("biases", scales.dtype, columns / group_size),
            ],
        }))
    }

    /// The names and shapes of the model, as if nothing were quantised.
    pub(super) fn float_shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let config = self.float_config();
        let specs = config.expected_tensors().into_iter();
        specs.map(|spec| (spec.name, spec.shape)).collect()
    }

    /// The configuration without quantisation.
    pub(super) fn float_config(&self) -> ModelConfig {
        ModelConfig {
            quantization: None,
            ..self.config.clone()
        }
    }

    /// A tensor of the fused model in f32, not rounded.
    pub(super) fn merged_f32(&self, name: &str) -> Result<Vec<f32>> {
        match name.strip_suffix(".weight") {
            Some(module) if self.is_adapted(module) || self.is_packed(module) => Ok(self.merge(module)?.fused),
            _ => Ok(self.store.require(name)?.to_f32()?),
        }
    }

    /// A module's weight before and after, in f32.
    fn merge(&self, module: &str) -> Result<Merged> {
        let layer = affine_layer(&self.config, module, &self.model_dir)?.filter(|_| self.is_packed(module));
        let view = self.store.require(&format!("{module}.weight"))?;
        let (base, dtype, shape) = match layer {
            None => (view.to_f32()?, view.dtype, view.shape.to_vec()),
            Some((bits, group_size)) => {
                let packed = Affine::of_module(&self.store, module)?;
                let shape = vec![packed.scales.shape[0], packed.scales.shape[1] * group_size];
                (dequantize(&packed, bits)?, packed.scales.dtype, shape)
            }
        };
        let is_embedding = self.base.modules.get(module).is_some_and(|module| module.is_embedding);
        let fused = if self.is_adapted(module) {
            fuse_module(&self.adapter, module, &base, is_embedding)?
        } else {
            base.clone()
        };
        Ok(Merged {
            base,
            fused,
            dtype,
            shape,
            layer,
        })
    }

    /// One module fused, stored, and read back for comparison.
    fn fused(&self, module: &str) -> Result<FusedModule> {
        let weight_name = format!("{module}.weight");
        let Merged {
            base,
            fused,
            dtype,
            shape,
            layer,
        } = self.merge(module)?;
        let is_adapted = self.is_adapted(module);
        let (tensors, kept, stored_as) = match (self.options.target, layer) {
            (FuseTarget::Quantized { bits: wanted }, Some((bits, group_size))) => {
                let bits = wanted.unwrap_or(bits);
                let packed = quantize(&fused, shape[0], bits, group_size, dtype)?;
                let kept = dequantize(&packed, bits)?;
                let named = |leaf: &str| format!("{module}.{leaf}");
                let tensors = BTreeMap::from([
                    (named("weight"), packed.weight),
                    (named("scales"), packed.scales),
                    (named("biases"), packed.biases),
                ]);
                (tensors, kept, format!("{bits} bits, groups of {group_size}"))
            }
            _ => {
                let dtype = self.stored_dtype(dtype);
                let stored = self.rounded(dtype, &shape, &fused, &weight_name)?;
                let kept = stored.to_f32()?;
                (BTreeMap::from([(weight_name, stored)]), kept, dtype.to_string())
            }
        };
        let retention = is_adapted.then(|| {
            let retention = Retention::measure(&base, &fused, &kept);
            let verdict = Verdict::of(retention.as_ref());
            ModuleRetention {
                module: module.to_string(),
                stored_as,
                verdict,
                retention,
            }
        });
        Ok(FusedModule { tensors, retention })
    }

    fn is_adapted(&self, module: &str) -> bool {
        self.adapter.tensors.contains_key(&format!("{module}.lora_b"))
    }

    fn is_packed(&self, module: &str) -> bool {
        self.store.contains(&format!("{module}.scales"))
    }

    pub(super) fn refuse_loss(&self, report: &FuseReport) -> Result<()> {
        let failed = report
            .modules
            .iter()
            .filter(|module| module.verdict == Verdict::Fail)
            .count();
        if self.options.target == FuseTarget::Float || self.options.accept_loss || failed == 0 {
            return Ok(());
        }
        let worst = report
            .worst()
            .map(|m| (m.module.clone(), m.retention.map_or(0.0, |r| r.cosine)));
        let (worst, cosine) = worst.unwrap_or_default();
        Err(Error::FuseLoss {
            failed,
            of: report.modules.len(),
            worst,
            cosine,
            report: Box::new(report.clone()),
        })
    }

    /// Tokenizer, templates, licences and the adjusted configuration.
    pub(super) fn copy_other_files(&self, dir: &Path) -> Result<()> {
        let read_error = |e| Error::read(&self.model_dir, e);
        for entry in std::fs::read_dir(&self.model_dir).map_err(read_error)? {
            let entry = entry.map_err(read_error)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_weight =
                name.ends_with(".safetensors") || name == INDEX_FILE || name.ends_with(".bin") || name == REPORT_FILE;
            if is_weight || name == "config.json" || name.starts_with('.') || !entry.path().is_file() {
                continue;
            }
            let to = dir.join(&name);
            std::fs::copy(entry.path(), &to).map_err(|e| Error::write(&to, e))?;
        }
        let path = self.model_dir.join("config.json");
        let mut config = Value::Object(crate::adapter::read_json_object(&path)?);
        self.adjust_config(&mut config);
        crate::adapter::write_json(&dir.join("config.json"), &config)
    }

    /// The element type; no quantisation after dequantising; an entry for each module that now has other bits than the rest.
    fn adjust_config(&self, config: &mut Value) {
        let Some(object) = config.as_object_mut() else { return };
        if let Some(name) = self.options.dtype.and_then(torch_name) {
            // Newer configurations say `dtype`; either is read by all.
            let key = if object.contains_key("dtype") {
                "dtype"
            } else {
                "torch_dtype"
            };
            object.insert(key.to_string(), name.into());
        }
        let keys = ["quantization", "quantization_config"];
        match self.options.target {
            FuseTarget::Float if self.config.quantization.is_some() => {
                keys.iter().for_each(|key| drop(object.shift_remove(*key)));
            }
            FuseTarget::Quantized { bits: Some(bits) } => {
                for (key, module) in keys
                    .iter()
                    .flat_map(|key| self.adapter.modules().into_iter().map(move |m| (key, m)))
                {
                    let layer = self.config.quantization.as_ref().and_then(|q| q.for_module(module));
                    if let (Some(entries), Some(layer)) = (object.get_mut(*key).and_then(Value::as_object_mut), layer)
                        && layer.bits != bits
                    {
                        entries.insert(
                            module.to_string(),
                            json!({"group_size": layer.group_size, "bits": bits}),
                        );
                    }
                }
            }
            _ => {}
        }
    }
}

/// What transformers calls an element type.
fn torch_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F32 => Some("float32"),
        Dtype::F16 => Some("float16"),
        Dtype::BF16 => Some("bfloat16"),
        _ => None,
    }
}

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use planish_core::fs::AtomicDir;
use planish_core::model_config::ModelConfig;
use serde_json::{Value, json};

use super::affine::{Affine, affine_layer, dequantize, quantize};
use super::delta::fuse_module;
use super::report::{FuseReport, ModuleRetention, Verdict};
use super::retention::Retention;
use crate::adapter::{Adapter, BaseModel, Method, ReadOptions, Refusal};
use crate::error::{Error, Result};
use crate::tensors::{
    DEFAULT_SHARD_BYTES, Dtype, HostTensor, INDEX_FILE, LoadRules, ShardWriter, TensorInfo, TensorStore,
};

/// How the fused weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FuseTarget {
    /// As floats: those of the base, or of the scales where the base is quantised, which then is no longer.
    #[default]
    Float,
    /// Quantised again, the adapted modules to this many bits; the others stay as they are.
    Quantized {
        /// Bits of the adapted modules; those of the base when absent.
        bits: Option<usize>,
    },
}

/// How a fuse is done.
#[derive(Clone, Copy, Debug, Default)]
pub struct FuseOptions {
    /// How weights are stored.
    pub target: FuseTarget,
    /// Report without writing.
    pub dry_run: bool,
    /// Write a quantised model although it lost much of the update.
    pub accept_loss: bool,
    /// Go on although the adapter is all zeros, or of another base.
    pub force: bool,
    /// Largest shard in bytes; 5 GB when absent.
    pub max_shard_bytes: Option<u64>,
}

/// Folds an adapter into its base model: a new model folder, with shards, index, the base's other files and
/// `fuse_report.json`. The folder appears whole or not at all.
///
/// # Errors
/// Those of [`Adapter::read`] and [`TensorStore::open`]; [`Error::AdapterRefused`] with [`Refusal::EmptyAdapter`] for an
/// update of zeros; [`Error::FuseLoss`] when quantising would lose a module's update; [`Error::Quantization`];
/// [`Error::Write`] also when `out` exists and is not empty.
pub fn fuse(model_dir: &Path, adapter_dir: &Path, out: &Path, options: &FuseOptions) -> Result<FuseReport> {
    let base = BaseModel::open(model_dir)?;
    let read = ReadOptions {
        base: Some(&base),
        trust_shapes: false,
        force: options.force,
    };
    let (adapter, _) = Adapter::read(adapter_dir, &read)?;
    refuse_nothing(&adapter, options).map_err(|refusal| Error::refused(adapter_dir, refusal))?;
    let source = Source::open(model_dir, &adapter, base, options)?;
    if options.dry_run {
        return source.measure();
    }
    let building = AtomicDir::create(out).map_err(|e| Error::write(out, e))?;
    let mut report = source.write(building.path(), options.max_shard_bytes.unwrap_or(DEFAULT_SHARD_BYTES))?;
    source.refuse_loss(&report)?;
    source.copy_other_files(building.path())?;
    report.written = true;
    crate::adapter::write_json(&building.path().join("fuse_report.json"), &report)?;
    building.commit().map_err(|e| Error::write(out, e))?;
    Ok(report)
}

fn refuse_nothing(adapter: &Adapter, options: &FuseOptions) -> Result<(), Refusal> {
    if adapter.method == Method::Full {
        return Err(Refusal::FullAsAdapter);
    }
    let is_zero = |tensor: &HostTensor| tensor.to_f32().is_ok_and(|values| values.iter().all(|v| *v == 0.0));
    let mut updates = adapter.tensors.iter().filter(|(name, _)| name.ends_with(".lora_b"));
    if adapter.method == Method::Lora && !options.force && updates.all(|(_, tensor)| is_zero(tensor)) {
        return Err(Refusal::EmptyAdapter {
            reason: "every lora_b is zero: there is nothing to fuse".to_string(),
        });
    }
    Ok(())
}

struct Source<'a> {
    model_dir: PathBuf,
    config: ModelConfig,
    store: TensorStore,
    base: BaseModel,
    adapter: &'a Adapter,
    options: &'a FuseOptions,
}

/// A module's weight as it will be stored, and what that keeps.
struct FusedModule {
    /// By tensor name.
    tensors: BTreeMap<String, HostTensor>,
    retention: Option<ModuleRetention>,
}

impl<'a> Source<'a> {
    fn open(model_dir: &Path, adapter: &'a Adapter, base: BaseModel, options: &'a FuseOptions) -> Result<Self> {
        let config_path = model_dir.join("config.json");
        let config = ModelConfig::from_file(&config_path).map_err(|source| Error::Config {
            source: Box::new(source),
        })?;
        let store = TensorStore::open(model_dir)?;
        let tied_head = config.tie_word_embeddings.then(|| "lm_head.weight".to_string());
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
            return Err(Error::Quantization { reason });
        }
        Ok(Self {
            model_dir: model_dir.to_path_buf(),
            config,
            store,
            base,
            adapter,
            options,
        })
    }

    fn measure(&self) -> Result<FuseReport> {
        let modules = self.adapter.modules().into_iter();
        let measured = modules
            .map(|module| Ok(self.fused(module)?.retention))
            .collect::<Result<Vec<_>>>()?;
        Ok(FuseReport::new(measured.into_iter().flatten().collect()))
    }

    fn write(&self, dir: &Path, max_shard_bytes: u64) -> Result<FuseReport> {
        let (infos, owners) = self.plan()?;
        let mut writer = ShardWriter::create(dir, infos, max_shard_bytes)?;
        // Scales and biases wait here until the writer asks for them: it sorts by element type.
        let (mut waiting, mut modules) = (BTreeMap::<String, HostTensor>::new(), BTreeMap::new());
        while let Some(name) = writer.next_tensor().map(|next| next.name.clone()) {
            if let Some(tensor) = waiting.remove(&name) {
                writer.write_next(&tensor.bytes)?;
                continue;
            }
            let Some(module) = owners.get(&name) else {
                writer.write_next(self.store.require(&name)?.bytes)?;
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

    /// The tensors of the result, and which module makes those that are not copied.
    fn plan(&self) -> Result<(Vec<TensorInfo>, BTreeMap<String, String>)> {
        let (mut infos, mut owners) = (Vec::new(), BTreeMap::new());
        // A tied head that is stored all the same would stay behind when the embedding changes.
        let is_stray_head = |name: &str| self.config.tie_word_embeddings && name == "lm_head.weight";
        for view in self.store.iter().filter(|view| !is_stray_head(view.name)) {
            let (module, leaf) = view.name.rsplit_once('.').unwrap_or((view.name, ""));
            match self.stored_form(module, leaf)? {
                None => infos.push(TensorInfo::from(&view)),
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
            return Ok(Some(vec![TensorInfo::from(
                &self.store.require(&format!("{module}.weight"))?,
            )]));
        };
        let scales = self.store.require(&format!("{module}.scales"))?;
        let (rows, columns) = (scales.shape[0], scales.shape[1] * group_size);
        let info = |leaf: &str, dtype, columns| TensorInfo {
            name: format!("{module}.{leaf}"),
            dtype,
            shape: vec![rows, columns],
        };
        Ok(Some(match self.options.target {
            FuseTarget::Float => vec![info("weight", scales.dtype, columns)],
            FuseTarget::Quantized { bits: wanted } => vec![
                info("weight", Dtype::U32, columns * wanted.unwrap_or(bits) / 32),
                info("scales", scales.dtype, columns / group_size),
                info("biases", scales.dtype, columns / group_size),
            ],
        }))
    }

    /// One module fused, stored, and read back for comparison.
    fn fused(&self, module: &str) -> Result<FusedModule> {
        let layer = affine_layer(&self.config, module, &self.model_dir)?.filter(|_| self.is_packed(module));
        let weight_name = format!("{module}.weight");
        let view = self.store.require(&weight_name)?;
        let (base, dtype, shape) = match layer {
            None => (view.to_f32()?, view.dtype, view.shape.to_vec()),
            Some((bits, group_size)) => {
                let packed = Affine::of_module(&self.store, module)?;
                let shape = vec![packed.scales.shape[0], packed.scales.shape[1] * group_size];
                (dequantize(&packed, bits)?, packed.scales.dtype, shape)
            }
        };
        let is_embedding = self.base.modules.get(module).is_some_and(|module| module.is_embedding);
        let is_adapted = self.is_adapted(module);
        let fused = if is_adapted {
            fuse_module(self.adapter, module, &base, is_embedding)?
        } else {
            base.clone()
        };
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
                let stored = HostTensor::from_f32_as(dtype, &shape, &fused)?;
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

    fn refuse_loss(&self, report: &FuseReport) -> Result<()> {
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
    fn copy_other_files(&self, dir: &Path) -> Result<()> {
        let read_error = |e| Error::read(&self.model_dir, e);
        for entry in std::fs::read_dir(&self.model_dir).map_err(read_error)? {
            let entry = entry.map_err(read_error)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_weight = name.ends_with(".safetensors") || name == INDEX_FILE || name.ends_with(".bin");
            if is_weight || name == "config.json" || name.starts_with('.') || !entry.path().is_file() {
                continue;
            }
            let to = dir.join(&name);
            std::fs::copy(entry.path(), &to).map_err(|e| Error::write(&to, e))?;
        }
        let path = self.model_dir.join("config.json");
        let mut config = Value::Object(crate::adapter::read_json_object(&path)?);
        self.adjust_quantization(&mut config);
        crate::adapter::write_json(&dir.join("config.json"), &config)
    }

    /// No quantisation after dequantising; an entry for each module that now has other bits than the rest.
    fn adjust_quantization(&self, config: &mut Value) {
        let Some(object) = config.as_object_mut() else { return };
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

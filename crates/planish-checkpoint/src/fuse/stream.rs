use std::path::Path;

use planish_core::fs::AtomicDir;
use planish_core::model_config::ModelConfig;
use planish_tensors::{DEFAULT_SHARD_BYTES, Dtype, HostTensor, LoadRules, ModelWeights, Update};

use super::report::{FuseReport, LogitsCheck};
use super::source::{Source, read_config};
use crate::adapter::{BaseModel, Method, ReadOptions, Refusal, Trained};
use crate::error::{Error, Result};
use crate::model_files::REPORT_FILE;

/// How the fused weights are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FuseTarget {
    /// As floats: of the type of the base, or of the scales where the base is quantised, which then is no longer; f32 where
    /// that would lose an update and no type was chosen.
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
    /// Write a quantised or rounded model although it lost much of the update.
    pub accept_loss: bool,
    /// Go on although the adapter is all zeros, or of another base.
    pub force: bool,
    /// Element type of the floats: `F32`, `F16` or `BF16`; when absent that of the base, or f32 where it would lose an update.
    pub dtype: Option<Dtype>,
    /// Largest shard in bytes; 5 GB when absent.
    pub max_shard_bytes: Option<u64>,
}

/// Folds an adapter into its base model: a new model folder, with shards, index, the base's other files and
/// `fuse_report.json`. The folder appears whole or not at all.
///
/// # Errors
/// Those of [`Trained::read`] and [`TensorStore::open`](planish_tensors::TensorStore::open); [`Error::AdapterRefused`] with
/// [`Refusal::EmptyAdapter`] for an update of zeros; [`Error::FuseLoss`] when quantising, or rounding to a chosen type, would lose a module's update;
/// [`TooLarge`](planish_tensors::Error::TooLarge) for a number too large for the type; [`Quantization`](planish_tensors::Error::Quantization); [`Error::Write`] also when `out`
/// exists and is not empty.
pub fn fuse(model_dir: &Path, adapter_dir: &Path, out: &Path, options: &FuseOptions) -> Result<FuseReport> {
    fuse_checked(model_dir, adapter_dir, out, options, |_| Ok(None))
}

/// [`fuse`], with a look at the finished folder before it gets its name: `check` runs the model in it and says how its
/// logits differ from those of base and adapter. Nothing is left when the check fails.
///
/// # Errors
/// As [`fuse`]; [`Error::FusedLogits`] when they differ by more than [`LogitsCheck::is_close`] allows, unless
/// [`FuseOptions::accept_loss`]; errors of `check` itself.
pub fn fuse_checked<E: From<Error>>(
    model_dir: &Path,
    adapter_dir: &Path,
    out: &Path,
    options: &FuseOptions,
    check: impl FnOnce(&Path) -> Result<Option<LogitsCheck>, E>,
) -> Result<FuseReport, E> {
    let source = open(model_dir, Some(adapter_dir), options)?;
    if options.dry_run {
        return Ok(source.measure()?);
    }
    write(source, out, options, check)
}

/// Copies a model, with an adapter folded in if one is given, to another element type: shards, index, and the base's
/// other files. A quantised base is dequantised. The folder appears whole or not at all.
///
/// # Errors
/// As [`fuse`].
pub fn export_safetensors(
    model_dir: &Path,
    adapter_dir: Option<&Path>,
    out: &Path,
    options: &FuseOptions,
) -> Result<FuseReport> {
    write(open(model_dir, adapter_dir, options)?, out, options, |_| Ok(None))
}

/// The weights of a model with an adapter merged in, for writers of other formats, and its configuration without the
/// quantisation of the base.
///
/// # Errors
/// Those of [`read_update`] and [`ModelWeights::open`].
pub fn open_merged(model_dir: &Path, adapter_dir: Option<&Path>, force: bool) -> Result<(ModelConfig, ModelWeights)> {
    let config = read_config(model_dir)?;
    let (weights, _) = ModelWeights::open(model_dir, &config, &LoadRules::default())?;
    let weights = weights.with_update(read_update(model_dir, adapter_dir, force)?)?;
    let quantization = None;
    Ok((ModelConfig { quantization, ..config }, weights))
}

fn open(model_dir: &Path, adapter_dir: Option<&Path>, options: &FuseOptions) -> Result<Source> {
    let mut source = Source::open(model_dir, read_update(model_dir, adapter_dir, options.force)?, options)?;
    source.keep_the_update()?;
    Ok(source)
}

/// What an adapter changes in its base; nothing without one.
///
/// # Errors
/// Those of [`Trained::read`]; [`Error::AdapterRefused`] with [`Refusal::EmptyAdapter`] for an update of zeros, unless `force`;
/// [`planish_tensors::Error::UpdateShape`].
pub fn read_update(model_dir: &Path, adapter_dir: Option<&Path>, force: bool) -> Result<Update> {
    let Some(dir) = adapter_dir else {
        return Ok(Update::default());
    };
    let base = BaseModel::open(model_dir)?;
    let read = ReadOptions {
        base: Some(&base),
        force,
        ..ReadOptions::default()
    };
    let (trained, _) = Trained::read(dir, &read)?;
    if !force {
        refuse_nothing(&trained).map_err(|refusal| Error::refused(dir, refusal))?;
    }
    trained.into_update(&base)
}

fn write<E: From<Error>>(
    mut source: Source,
    out: &Path,
    options: &FuseOptions,
    check: impl FnOnce(&Path) -> Result<Option<LogitsCheck>, E>,
) -> Result<FuseReport, E> {
    refuse_occupied(out)?;
    let building = AtomicDir::create(out).map_err(|e| Error::write(out, e))?;
    let mut report = source.write(building.path(), options.max_shard_bytes.unwrap_or(DEFAULT_SHARD_BYTES))?;
    source.refuse_loss(&report)?;
    source.copy_other_files(building.path())?;
    report.logits = check(building.path())?;
    refuse_other_logits(&report, options)?;
    report.written = true;
    crate::adapter::write_json(&building.path().join(REPORT_FILE), &report)?;
    building.commit().map_err(|e| Error::write(out, e))?;
    Ok(report)
}

/// Said before the work, not after it.
fn refuse_occupied(out: &Path) -> Result<()> {
    let is_occupied = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    };
    if is_occupied {
        let source = std::io::Error::new(std::io::ErrorKind::AlreadyExists, "exists already and is not empty");
        return Err(Error::write(out, source));
    }
    Ok(())
}

fn refuse_other_logits(report: &FuseReport, options: &FuseOptions) -> Result<()> {
    match &report.logits {
        Some(check) if !check.is_close() && !options.accept_loss => Err(Error::FusedLogits {
            check: *check,
            report: Box::new(report.clone()),
        }),
        _ => Ok(()),
    }
}

fn refuse_nothing(trained: &Trained) -> Result<(), Refusal> {
    let Trained::LowRank(adapter) = trained else {
        return Ok(());
    };
    let is_zero = |tensor: &HostTensor| tensor.to_f32().is_ok_and(|values| values.iter().all(|v| *v == 0.0));
    let mut updates = adapter.tensors.iter().filter(|(name, _)| name.ends_with(".lora_b"));
    if adapter.method == Method::Lora && updates.all(|(_, tensor)| is_zero(tensor)) {
        return Err(Refusal::EmptyAdapter {
            reason: "every lora_b is zero: there is nothing to fuse".to_string(),
        });
    }
    Ok(())
}

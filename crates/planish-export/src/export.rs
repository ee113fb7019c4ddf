//! The export from a model folder to packages on disk, top to bottom.

use std::{
    fs,
    path::{Path, PathBuf},
};

use planish_core::{fs::AtomicDir, model_config::ModelConfig};
use planish_tensors::{LoadRules, ModelWeights, Update};
use serde::Serialize;

use crate::{
    Error, Result,
    check::{CheckReport, Judge},
    graph::Decoder,
    layout::{companion_files, plan_anemll, plan_monolith},
    package::{PackageReport, PlannedPackage},
    plain::Plain,
    reference::{Activations, forward},
    settings::{ExportOptions, Layout, MAX_PACKAGE_BYTES, Settings},
    verify,
    weights::{Importance, LayerError, StoredRows, WeightFormat},
};

/// Tokenizer files that a host wants beside the packages.
const TOKENIZER_FILES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"];

/// Name of the bundle for a Mac.
const VERIFY: &str = "verify";
/// Tokens of the calibration text that the pass before the export reads.
const CALIBRATION_TOKENS: usize = 512;
/// Fewer are too few to tell which inputs of a layer matter.
const ENOUGH_TOKENS: usize = 256;
/// Largest fp16 number.
const FP16_MAX: f32 = 65_504.0;
/// Half of the fp16 range: another text may reach twice as far.
const FP16_NEAR: f32 = FP16_MAX / 2.0;

/// What an export did.
#[derive(Clone, Debug, Serialize)]
pub struct ExportReport {
    /// The package, or the folder of packages.
    pub path: PathBuf,
    /// The numbers it settled on.
    pub settings: Settings,
    /// Each package.
    pub packages: Vec<PackageReport>,
    /// Bytes written, all files.
    pub bytes: u64,
    /// Error of each compressed weight; empty for fp16.
    pub layer_errors: Vec<LayerError>,
    /// The comparison with the f32 pass, where one was asked for.
    pub check: Option<CheckReport>,
    /// What may go wrong on a device, or was missing from the model folder; each says what to change.
    pub warnings: Vec<String>,
}

/// Writes a model folder as Core ML packages.
///
/// `out` is the `.mlpackage` itself for a monolith and the folder of packages for the ANEMLL layout; it must not exist. The
/// adapter is merged in f32 before anything is rounded, unless [`ExportOptions::keep_adapter`] asks for functions of its
/// own. Memory is bounded by a few pieces of one tensor; equal input gives equal bytes; on an error nothing is left.
///
/// # Errors
/// [`Error::Config`] for a model that planish does not read; [`Error::Unsupported`] for one with parts that a package cannot
/// have; [`Error::Tensors`] for missing, unexpected or misshapen tensors, weights that are no numbers, and an adapter that does
/// not fit; [`Error::Option`] for settings that do not fit; [`Error::Fp16Range`] for
/// weights that fp16 cannot hold; [`Error::ActivationRange`] where the calibration text leaves fp16; [`Error::OutputExists`]; [`Error::NoSpace`]; [`Error::Io`].
pub fn export(model: &Path, adapter: Update, out: &Path, options: &ExportOptions) -> Result<ExportReport> {
    let (stored, config) = read_config(model)?;
    check_destination(out, options)?;
    let plain = Plain::of(&config)?;
    let (settings, mut warnings) = Settings::new(&plain, options)?;
    check_kept(&adapter, options)?;
    let mut source = open(model, &stored, adapter)?;
    // An adapter that is kept beside the weights is not merged into them.
    let kept = match options.keep_adapter {
        Some(_) => source.take_update(),
        None => Update::default(),
    };
    let compressed = options.weights != WeightFormat::Fp16;
    // Any text weighs errors better than none; only the user's own says how large activations become.
    let text = match options.calibration.is_empty() && compressed {
        true => &options.prompt,
        false => &options.calibration,
    };
    let (importance, activation_advice) = calibrate(&config, &source, text, settings.context)?;
    warnings.extend(activation_advice);
    warnings.extend(few_tokens(text).filter(|_| compressed));
    let decoder = Decoder {
        model: &plain,
        context: settings.context,
        head_parts: settings.head_parts,
        format: options.weights,
        min_epsilon: options.min_epsilon,
        kept: options.keep_adapter.as_deref().map(|name| (name, &kept.low_rank)),
    };
    let planned = match settings.layout {
        Layout::Monolith => vec![plan_monolith(&decoder, &settings, &file_name(out))?],
        Layout::Anemll => plan_anemll(&decoder, &settings)?,
    };
    warnings.extend(planned.iter().filter_map(size_warning));
    let packages_len: u64 = planned.iter().map(PlannedPackage::byte_len).sum();
    check_space(out, packages_len + companions_len(model, &settings))?;

    let folder = AtomicDir::create(out).map_err(Error::io(out))?;
    let (mut packages, mut layer_errors) = (Vec::new(), Vec::new());
    for package in &planned {
        let target = match settings.layout {
            Layout::Monolith => folder.path().to_owned(),
            Layout::Anemll => folder.path().join(&package.file_name),
        };
        let (report, errors) = package.write(&target, &source, &importance)?;
        packages.push(report);
        layer_errors.extend(errors);
    }
    if settings.layout == Layout::Anemll {
        warnings.extend(write_companions(folder.path(), model, out, &decoder, &settings)?);
    }
    let check = match options.check {
        true => Some(judge(&config, &source, &importance, &settings, options, folder.path())?),
        false => None,
    };
    let verify = options.verify_bundle.then(|| verify_folder(out, &settings));
    let tokens = if options.calibration.is_empty() {
        &options.prompt
    } else {
        &options.calibration
    };
    let beside = match &verify {
        Some(target) if settings.layout == Layout::Monolith => {
            let bundle = AtomicDir::create(target).map_err(Error::io(target))?;
            verify::write(bundle.path(), &config, &source, &settings, &packages, tokens)?;
            Some(bundle)
        }
        Some(_) => {
            verify::write(
                &folder.path().join(VERIFY),
                &config,
                &source,
                &settings,
                &packages,
                tokens,
            )?;
            None
        }
        None => None,
    };
    let bytes = size_of(folder.path())?;
    folder.commit().map_err(Error::io(out))?;
    if let (Some(bundle), Some(target)) = (beside, &verify) {
        bundle.commit().map_err(Error::io(target))?;
    }
    Ok(ExportReport {
        path: out.to_owned(),
        settings,
        packages,
        bytes,
        layer_errors,
        check,
        warnings,
    })
}

/// Advice where a text is too short to weigh errors by.
pub(crate) fn few_tokens(text: &[u32]) -> Option<String> {
    (text.len() < ENOUGH_TOKENS).then(|| {
        format!(
            "compressed weights were weighed by {} tokens of text, which costs quality: use --text with {ENOUGH_TOKENS} tokens or more of text like yours",
            text.len()
        )
    })
}

/// Importance of inputs and warnings about activations, from one f32 pass over the start of the text.
pub(crate) fn calibrate(
    config: &ModelConfig,
    source: &ModelWeights,
    text: &[u32],
    context: usize,
) -> Result<(Importance, Vec<String>)> {
    if text.is_empty() {
        return Ok(Default::default());
    }
    let mut seen = Activations::default();
    forward(
        config,
        source,
        &[&text[..text.len().min(CALIBRATION_TOKENS).min(context)]],
        Some(&mut seen),
    )?;
    let mut advice = Vec::new();
    for (place, &peak) in &seen.peaks {
        if peak.is_nan() || peak > FP16_MAX {
            return Err(Error::ActivationRange {
                place: place.clone(),
                peak,
            });
        }
        if peak > FP16_NEAR {
            advice.push(format!(
                "{place} reaches {peak:.0} on the text; fp16 ends at 65504 and another text may go beyond it, where the package gives NaN: use --text and --check with more text like yours"
            ));
        }
    }
    Ok((seen.importance, advice))
}

/// The configuration of a model folder as it is, and as if no weight were packed: an export reads numbers.
pub(crate) fn read_config(model: &Path) -> Result<(ModelConfig, ModelConfig)> {
    let stored = ModelConfig::from_file(&model.join("config.json"))?;
    let numbers = ModelConfig {
        quantization: None,
        ..stored.clone()
    };
    Ok((stored, numbers))
}

/// The weights of such a folder with an update in them.
pub(crate) fn open(model: &Path, stored: &ModelConfig, update: Update) -> Result<ModelWeights> {
    let (weights, _) = ModelWeights::open(model, stored, &LoadRules::default())?;
    Ok(weights.with_update(update)?)
}

/// Beside a monolith, whose folder is the package; inside the folder of the ANEMLL layout.
fn verify_folder(out: &Path, settings: &Settings) -> PathBuf {
    match settings.layout {
        Layout::Monolith => out.with_extension(VERIFY),
        Layout::Anemll => out.join(VERIFY),
    }
}

/// Runs the package in its temporary place; an error removes it.
fn judge(
    config: &ModelConfig,
    source: &ModelWeights,
    importance: &Importance,
    settings: &Settings,
    options: &ExportOptions,
    path: &Path,
) -> Result<CheckReport> {
    let head_rows = config.arch.vocab_size / settings.head_parts;
    let stored = StoredRows {
        source,
        format: options.weights,
        head_rows,
        importance,
    };
    Judge {
        config,
        original: source,
        stored: &stored,
    }
    .check(path, &options.calibration, &options.prompt)
}

fn check_destination(out: &Path, options: &ExportOptions) -> Result<()> {
    if out.exists() {
        return Err(Error::OutputExists { path: out.to_owned() });
    }
    let bundle = out.with_extension(VERIFY);
    if options.verify_bundle && options.layout == Layout::Monolith && bundle.exists() {
        return Err(Error::OutputExists { path: bundle });
    }
    let is_package = out.extension().is_some_and(|e| e == "mlpackage");
    match options.layout {
        Layout::Monolith if !is_package => Err(Error::option(
            "--out",
            out.display(),
            "a monolith is one package: end the name with .mlpackage",
        )),
        Layout::Anemll if is_package => Err(Error::option(
            "--out",
            out.display(),
            "the anemll layout is a folder of packages: leave .mlpackage away",
        )),
        _ => Ok(()),
    }
}

/// An adapter that stays beside the base weights must be of a kind that can.
fn check_kept(adapter: &Update, options: &ExportOptions) -> Result<()> {
    let Some(name) = &options.keep_adapter else {
        return Ok(());
    };
    let rule = if options.layout != Layout::Monolith {
        "adapters are kept as functions in the monolith layout only"
    } else if !can_be_kept(adapter) {
        "only a plain LoRA adapter can be kept beside the base weights; leave the flag away to merge it"
    } else if !coreml_mil::is_identifier(&format!("infer_{name}")) {
        "use letters, digits and underscores"
    } else {
        return Ok(());
    };
    Err(Error::option("--keep-adapter", name, rule))
}

/// A plain low-rank update of the linear layers of blocks.
fn can_be_kept(adapter: &Update) -> bool {
    let mut layers = adapter.low_rank.iter();
    let is_plain = layers.all(|(name, layer)| name.starts_with("model.layers.") && !layer.is_dora());
    is_plain && adapter.whole.is_none() && !adapter.low_rank.is_empty()
}

fn size_warning(package: &PlannedPackage) -> Option<String> {
    let bytes = package.plan.file_len();
    (bytes > MAX_PACKAGE_BYTES).then(|| {
        format!(
            "{} has {} of weights; above about {} the Neural Engine is reported to be left silently: use --layout anemll with more --chunks, or compressed --weights",
            package.file_name,
            planish_core::units::format_bytes(bytes),
            planish_core::units::format_bytes(MAX_PACKAGE_BYTES)
        )
    })
}

/// Refuses before the first byte when the disk cannot hold the result.
pub(crate) fn check_space(out: &Path, needed: u64) -> Result<()> {
    let existing = out.ancestors().skip(1).find(|p| p.is_dir()).unwrap_or(Path::new("."));
    let existing = if existing.as_os_str().is_empty() {
        Path::new(".")
    } else {
        existing
    };
    let disk = rustix::fs::statvfs(existing).map_err(|e| Error::io(existing)(e.into()))?;
    let available = disk.f_bavail.saturating_mul(disk.f_frsize);
    if available < needed {
        return Err(Error::NoSpace {
            path: existing.to_owned(),
            needed,
            available,
        });
    }
    Ok(())
}

/// Bytes of the files that [`write_companions`] copies.
fn companions_len(model: &Path, settings: &Settings) -> u64 {
    let files: &[&str] = match settings.layout {
        Layout::Monolith => &[],
        Layout::Anemll => &TOKENIZER_FILES,
    };
    let lengths = files.iter().filter_map(|name| fs::metadata(model.join(name)).ok());
    lengths.map(|metadata| metadata.len()).sum()
}

fn write_companions(
    folder: &Path,
    model: &Path,
    out: &Path,
    decoder: &Decoder,
    settings: &Settings,
) -> Result<Vec<String>> {
    let mut warnings = Vec::new();
    for name in TOKENIZER_FILES {
        let from = model.join(name);
        if from.is_file() {
            let to = folder.join(name);
            fs::copy(&from, &to).map_err(Error::io(&to))?;
        } else if name.starts_with("tokenizer") {
            warnings.push(format!(
                "the model folder has no {name}: a host cannot turn text into tokens"
            ));
        }
    }
    for (name, text) in companion_files(decoder, settings, &file_name(out), &tokenizer_class(model)) {
        let path = folder.join(name);
        fs::write(&path, text).map_err(Error::io(&path))?;
    }
    Ok(warnings)
}

fn tokenizer_class(model: &Path) -> String {
    let read = || -> Option<String> {
        let text = fs::read_to_string(model.join("tokenizer_config.json")).ok()?;
        let json: serde_json::Value = serde_json::from_str(&text).ok()?;
        Some(json.get("tokenizer_class")?.as_str()?.to_owned())
    };
    read().unwrap_or_else(|| "PreTrainedTokenizerFast".into())
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

pub(crate) fn size_of(folder: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let metadata = entry.metadata().map_err(Error::io(folder))?;
        total += if metadata.is_dir() {
            size_of(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(total)
}

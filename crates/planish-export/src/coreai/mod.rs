//! Core AI: a model folder as an `.aimodel`, alone or in the bundle that Apple's engines load, top to bottom.

mod bundle;
mod check;
mod formats;
mod graph;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use coreai_asset::AssetWriter;
use planish_core::{
    arch::{Mixer, Norm, NormKind},
    fs::{AtomicDir, write_atomic},
    model_config::{ModelConfig, TensorSpec},
};
use planish_tensors::{self as tensors, HostTensor, ModelWeights, Update};
use serde::Serialize;

use crate::{
    Error, Result,
    export::{calibrate, check_space, few_tokens, file_name, open, read_config, size_of},
    weights::{Importance, LayerError, Rows, Sink, WeightFormat, fill},
};
use bundle::Facts;
pub use check::CoreAiCheck;
use check::Judge;
use formats::{Formats, Stored};

/// Everything a user can choose. `Default` is what the command line does without flags.
#[derive(Clone, Debug, PartialEq)]
pub struct CoreAiOptions {
    /// Form of the linear layers' weights; there are no tables of 64 entries.
    pub weights: WeightFormat,
    /// Longest text; the model's own when `None`.
    pub context: Option<usize>,
    /// Token ids of a text like the user's: activation ranges, importance of inputs; may be empty.
    pub calibration: Vec<u32>,
    /// Token ids to start the check from where there is no calibration text; may be empty.
    pub prompt: Vec<u32>,
    /// Tokens that end a text or a turn, the usual one first, for the bundle.
    pub end_tokens: Vec<String>,
    /// Run the asset on the CPU and compare it with the f32 forward pass before it gets its name.
    pub check: bool,
}

impl Default for CoreAiOptions {
    fn default() -> Self {
        Self {
            weights: WeightFormat::Fp16,
            context: None,
            calibration: Vec::new(),
            prompt: Vec::new(),
            end_tokens: Vec::new(),
            check: false,
        }
    }
}

/// What an export did.
#[derive(Clone, Debug, Serialize)]
pub struct CoreAiReport {
    /// The asset, or the bundle.
    pub path: PathBuf,
    /// Whether `path` is a bundle.
    pub is_bundle: bool,
    /// Longest text.
    pub context: usize,
    /// Bytes written, all files.
    pub bytes: u64,
    /// Operations of the program, bodies of composites included, decompositions not.
    pub operations: usize,
    /// Error of each compressed weight; empty for fp16.
    pub layer_errors: Vec<LayerError>,
    /// The comparison with the f32 pass, where one was asked for.
    pub check: Option<CoreAiCheck>,
    /// What may go wrong on a device, or was missing from the model folder.
    pub warnings: Vec<String>,
}

impl Sink for AssetWriter {
    fn next_weight(&mut self) -> Result<()> {
        Ok(Self::next_weight(self)?)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        Ok(Self::write(self, data)?)
    }
}

/// Writes a model folder as a Core AI asset.
///
/// `out` that ends with `.aimodel` is the asset alone; any other name is the bundle with tokenizer and end tokens. It must not
/// exist. The adapter is merged in f32 before anything is rounded. Memory is bounded by a few pieces of one tensor; equal
/// input gives equal bytes; on an error nothing is left.
///
/// # Errors
/// [`Error::Config`] for a model that planish does not read; [`Error::Unsupported`] for one with parts that the graph does
/// not have; [`Error::Tensors`] for missing, unexpected or misshapen tensors; [`Error::Option`]; [`Error::Fp16Range`] for weights that fp16 cannot hold; [`Error::ActivationRange`] where the calibration text leaves
/// fp16; [`Error::CheckFailed`]; [`Error::OutputExists`]; [`Error::NoSpace`]; [`Error::Io`].
pub fn export_coreai(model: &Path, adapter: Update, out: &Path, options: &CoreAiOptions) -> Result<CoreAiReport> {
    if out.exists() {
        return Err(Error::OutputExists { path: out.to_owned() });
    }
    let (stored, config) = read_config(model)?;
    let job = Export::new(&config, open(model, &stored, adapter)?, options)?;
    let planned = graph::plan(&config.arch, job.context, &job.formats)?;
    let mut warnings: Vec<String> = job.warnings().collect();
    check_space(out, planned.program.weights.iter().map(|weight| weight.bytes).sum())?;

    let folder = AtomicDir::create(out).map_err(Error::io(out))?;
    let facts = job.facts(file_name(out), out);
    let asset = facts.asset(folder.path());
    std::fs::create_dir_all(&asset).map_err(Error::io(&asset))?;
    let writer = AssetWriter::create(&asset, &planned.program)?;
    let (layer_errors, writer) = fill(&planned.jobs, &job.source, &job.importance, writer)?;
    writer.finish()?;
    if facts.is_bundle {
        warnings.extend(bundle::write(folder.path(), model, &facts)?);
    }
    let check = options.check.then(|| job.check(folder.path(), &facts)).transpose()?;
    let bytes = size_of(folder.path())?;
    folder.commit().map_err(Error::io(out))?;
    let graphs = planned.program.graphs.iter();
    Ok(CoreAiReport {
        path: out.to_owned(),
        is_bundle: facts.is_bundle,
        context: job.context,
        bytes,
        operations: graphs.map(|graph| graph.block.operations.len()).sum(),
        layer_errors,
        check,
        warnings,
    })
}

/// Compares an asset or bundle with the model that it was written from, under the same options.
///
/// # Errors
/// As [`export_coreai`]; above all [`Error::CheckFailed`] and [`Error::Asset`].
pub fn check_coreai(model: &Path, adapter: Update, path: &Path, options: &CoreAiOptions) -> Result<CoreAiCheck> {
    let (stored, config) = read_config(model)?;
    let job = Export::new(&config, open(model, &stored, adapter)?, options)?;
    job.check(path, &job.facts(file_name(path), path))
}

/// Writes a model folder whose weights are those that an asset of the same options holds, in f32: what remains between the
/// two is the graph. For checks; the weights are in memory at once.
///
/// # Errors
/// As [`export_coreai`].
pub fn write_stored(model: &Path, adapter: Update, target: &Path, options: &CoreAiOptions) -> Result<()> {
    let (stored, config) = read_config(model)?;
    let job = Export::new(&config, open(model, &stored, adapter)?, options)?;
    let whole = whole_vectors(&config);
    let stored = job.stored(&whole);
    let tensor = |spec: TensorSpec| {
        Ok((
            spec.name.clone(),
            HostTensor::from_f32(&spec.shape, &stored.all(&spec.name)?),
        ))
    };
    let all = config
        .expected_tensors()
        .into_iter()
        .map(tensor)
        .collect::<Result<_>>()?;
    let folder = AtomicDir::create(target).map_err(Error::io(target))?;
    let config_path = folder.path().join("config.json");
    write_atomic(&config_path, config_of_numbers(model)?.as_bytes()).map_err(Error::io(target))?;
    tensors::write(&folder.path().join("model.safetensors"), &all, &BTreeMap::new())?;
    folder.commit().map_err(Error::io(target))
}

/// The text of `config.json` without a quantisation.
fn config_of_numbers(model: &Path) -> Result<String> {
    let path = model.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default(); // read before, so it is JSON
    if let Some(object) = json.as_object_mut() {
        for key in ["quantization", "quantization_config"] {
            object.remove(key);
        }
    }
    Ok(json.to_string())
}

/// What an export has settled on before anything is written.
struct Export<'a> {
    config: &'a ModelConfig,
    options: &'a CoreAiOptions,
    source: ModelWeights,
    formats: Formats,
    importance: Importance,
    context: usize,
    /// About activations on the text.
    advice: Vec<String>,
}

impl<'a> Export<'a> {
    fn new(config: &'a ModelConfig, source: ModelWeights, options: &'a CoreAiOptions) -> Result<Self> {
        let context = context(config, options.context)?;
        let (importance, advice) = calibrate(config, &source, weighing(options), context)?;
        Ok(Self {
            config,
            options,
            source,
            formats: Formats::new(config, options.weights),
            importance,
            context,
            advice,
        })
    }

    fn warnings(&self) -> impl Iterator<Item = String> {
        let short = few_tokens(weighing(self.options)).filter(|_| is_compressed(self.options));
        self.advice.iter().cloned().chain(short)
    }

    fn facts(&self, name: String, out: &Path) -> Facts<'_> {
        Facts {
            name,
            is_bundle: out.extension().is_none_or(|e| e != bundle::ASSET),
            config: self.config,
            context: self.context,
            compression: is_compressed(self.options).then(|| self.options.weights.name()),
            end_tokens: &self.options.end_tokens,
        }
    }

    fn stored<'s>(&'s self, whole: &'s [String]) -> Stored<'s> {
        Stored {
            source: &self.source,
            formats: &self.formats,
            importance: &self.importance,
            whole,
        }
    }

    fn check(&self, folder: &Path, facts: &Facts) -> Result<CoreAiCheck> {
        if facts.is_bundle {
            bundle::check(folder, facts)?;
        }
        let whole = whole_vectors(self.config);
        let stored = self.stored(&whole);
        let judge = Judge {
            config: self.config,
            original: &self.source,
            stored: &stored,
            context: self.context,
        };
        judge.check(&facts.asset(folder), any_text(self.options))
    }
}

fn is_compressed(options: &CoreAiOptions) -> bool {
    options.weights != WeightFormat::Fp16
}

/// The user's text, or an ordinary one.
fn any_text(options: &CoreAiOptions) -> &[u32] {
    match options.calibration.is_empty() {
        true => &options.prompt,
        false => &options.calibration,
    }
}

/// What errors are weighed by: any text is better than none; only the user's own says how large activations become.
fn weighing(options: &CoreAiOptions) -> &[u32] {
    if is_compressed(options) {
        any_text(options)
    } else {
        &options.calibration
    }
}

fn context(config: &ModelConfig, wanted: Option<usize>) -> Result<usize> {
    let longest = config.max_position_embeddings;
    match wanted {
        Some(context) if context == 0 || context > longest => {
            let rule = format!("use 1 to {longest}, the model's longest context");
            Err(Error::option("--context", context, rule))
        }
        wanted => Ok(wanted.unwrap_or(longest)),
    }
}

/// Vectors that the asset keeps in f32: gains of norms with an offset.
fn whole_vectors(config: &ModelConfig) -> Vec<String> {
    let arch = &config.arch;
    let is_shifted = |norm: &&Norm| norm.kind != NormKind::Rms { offset: 0.0 };
    let of_layers = arch.layers.iter().enumerate().flat_map(|(layer_idx, layer)| {
        let Mixer::Attention(attention) = &layer.mixer;
        let heads = attention.qk_norm.iter().flat_map(|norms| [&norms.query, &norms.key]);
        let around = [
            &layer.pre_mixer_norm,
            &layer.post_mixer_norm,
            &layer.pre_feed_forward_norm,
            &layer.post_feed_forward_norm,
        ];
        let path = arch.layer_path(layer_idx);
        let norms = around.into_iter().flatten().chain(heads).filter(is_shifted);
        norms
            .map(|norm| format!("{}.weight", norm.at(&path)))
            .collect::<Vec<_>>()
    });
    let last = Some(&arch.norm)
        .filter(is_shifted)
        .map(|_| format!("{}.weight", arch.norm_path()));
    of_layers.chain(last).collect()
}

//! A GGUF file → a Hugging Face folder.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use planish_core::arch::ArchTensor;
use planish_core::families;
use planish_core::fs::AtomicDir;
use planish_core::model_config::ModelConfig;
use planish_tensors::{Dtype, TensorFileWriter, TensorInfo as FileTensor};
use serde_json::{Map, Value as Json};

use super::names::permuted_heads;
use super::rows::RowOrder;
use super::{Gguf, TensorInfo, TensorType, config, dequantize, gguf_name, tokenizer};
use crate::error::io_at;
use crate::manifest::is_free;
use crate::{Error, Event, Progress, Result, Stage};

/// What an import did.
#[derive(Clone, Debug)]
pub struct ImportReport {
    /// The folder that was written.
    pub folder: PathBuf,
    /// Tensors in it.
    pub n_tensors: usize,
    /// Numbers in all of them together.
    pub n_parameters: u64,
    /// How they are stored.
    pub dtype: Dtype,
    /// How many tensors of the file had each type, most frequent first.
    pub source_types: Vec<(TensorType, usize)>,
}

/// Converts a GGUF file into a new Hugging Face folder, which appears whole or not at all.
///
/// Weights are dequantised to f32 and rounded once to `dtype`. One tensor is in memory at a time.
///
/// # Errors
/// [`Error::OutputExists`]; those of [`Gguf::open`], [`config::model_config`] and [`tokenizer::from_gguf`];
/// [`Error::MissingTensor`], [`Error::UnexpectedTensor`], [`Error::TensorShape`]; [`Error::WeightOutOfRange`];
/// [`Error::Io`].
pub fn import(file: &Path, folder: &Path, dtype: Dtype, progress: &mut dyn Progress) -> Result<ImportReport> {
    if !is_free(folder)? {
        return Err(Error::OutputExists {
            path: folder.to_path_buf(),
        });
    }
    let gguf = Gguf::open(file)?;
    let building = AtomicDir::create(folder).map_err(io_at(folder))?;
    let report = import_into(&gguf, building.path(), dtype, progress)?;
    building.commit().map_err(io_at(folder))?;
    Ok(ImportReport {
        folder: folder.to_path_buf(),
        ..report
    })
}

/// Whether a file can be imported, found out without reading a weight; the configuration of its model.
///
/// # Errors
/// As [`import`], but for [`Error::WeightOutOfRange`] and the output.
pub fn check(gguf: &Gguf) -> Result<ModelConfig> {
    Model::plan(gguf, Dtype::F32).map(|model| model.parsed)
}

/// Writes the folder's files into an existing empty directory, without the final rename.
pub(crate) fn import_into(
    gguf: &Gguf,
    directory: &Path,
    dtype: Dtype,
    progress: &mut dyn Progress,
) -> Result<ImportReport> {
    let model = Model::plan(gguf, dtype)?;
    write_json(directory, "config.json", &model.config)?;
    write_json(directory, "generation_config.json", &model.tokenizer.ids)?;
    write_text(directory, "tokenizer.json", model.tokenizer.tokenizer.to_string())?;
    write_json(directory, "tokenizer_config.json", &model.tokenizer.config)?;
    write_json(directory, "special_tokens_map.json", &model.tokenizer.special_tokens)?;
    write_weights(
        gguf,
        &model.tensors,
        dtype,
        &directory.join("model.safetensors"),
        progress,
    )?;
    Ok(ImportReport {
        folder: directory.to_path_buf(),
        n_tensors: model.tensors.len(),
        n_parameters: model.tensors.iter().map(|t| t.info.n_elements() as u64).sum(),
        dtype,
        source_types: source_types(&model.tensors),
    })
}

/// Everything that is decided before a single weight is read.
struct Model<'a> {
    config: Map<String, Json>,
    parsed: ModelConfig,
    tokenizer: tokenizer::HuggingFaceTokenizer,
    tensors: Vec<PlannedTensor<'a>>,
}

/// One tensor of the folder and where it comes from.
struct PlannedTensor<'a> {
    /// Its name in the folder.
    name: String,
    info: &'a TensorInfo,
    order: RowOrder,
}

impl<'a> Model<'a> {
    fn plan(gguf: &'a Gguf, dtype: Dtype) -> Result<Self> {
        let (family, form) = config::family(gguf.metadata())?;
        let mut config = config::model_config(gguf, family, form, dtype)?;
        let context_length = config["max_position_embeddings"].as_u64().unwrap_or_default();
        let tokenizer = tokenizer::from_gguf(gguf.metadata(), context_length)?;
        config.extend(tokenizer.ids.clone());
        // Parsed again by the one reader of config.json: what it accepts is what training will load.
        let parsed = ModelConfig::from_json_str(&Json::Object(config.clone()).to_string(), gguf.path())?;
        let tensors = plan_tensors(gguf, form, &parsed)?;
        Ok(Self {
            config,
            parsed,
            tokenizer,
            tensors,
        })
    }
}

fn plan_tensors<'a>(gguf: &'a Gguf, form: families::Gguf, config: &ModelConfig) -> Result<Vec<PlannedTensor<'a>>> {
    let path = || gguf.path().to_path_buf();
    let by_name: HashMap<&str, &TensorInfo> = gguf.tensors().iter().map(|t| (t.name.as_str(), t)).collect();
    let mut used = HashSet::from([config::ROPE_FACTORS]);
    let mut planned = Vec::new();
    for tensor in config.arch.tensors() {
        let name = gguf_name(tensor.role, tensor.kind);
        let Some(info) = by_name.get(name.as_str()).copied() else {
            return Err(Error::MissingTensor {
                path: path(),
                tensor: name,
            });
        };
        if info.shape != tensor.shape {
            let (found, expected) = (info.shape.clone(), tensor.shape);
            return Err(Error::TensorShape {
                path: path(),
                tensor: name,
                found,
                expected,
            });
        }
        let order = row_order(form, config, &tensor);
        if order != RowOrder::Same && info.shape.len() == 1 && info.kind.block_len() > 1 {
            let found = format!("type {} in a bias whose elements must be reordered", info.kind.name());
            return Err(Error::UnsupportedTensorType {
                path: path(),
                tensor: name,
                found,
            });
        }
        used.insert(&info.name);
        planned.push(PlannedTensor {
            name: tensor.name(),
            info,
            order,
        });
    }
    match gguf
        .tensors()
        .iter()
        .find(|tensor| !used.contains(tensor.name.as_str()))
    {
        Some(extra) => Err(Error::UnexpectedTensor {
            path: path(),
            tensor: extra.name.clone(),
            architecture: form.architecture,
        }),
        None => Ok(planned),
    }
}

fn row_order(form: families::Gguf, config: &ModelConfig, tensor: &ArchTensor) -> RowOrder {
    permuted_heads(form, &config.arch, tensor.role).map_or(RowOrder::Same, |n_heads| RowOrder::SplitPairs { n_heads })
}

fn write_weights(
    gguf: &Gguf,
    tensors: &[PlannedTensor<'_>],
    dtype: Dtype,
    path: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    let total = tensors
        .iter()
        .map(|t| (t.info.n_elements() * dtype.size()) as u64)
        .sum();
    progress.report(Event::Began {
        stage: Stage::Convert,
        item: "model.safetensors",
        total_bytes: Some(total),
    });
    let infos = tensors.iter().map(|tensor| FileTensor {
        name: tensor.name.clone(),
        dtype,
        shape: tensor.info.shape.clone(),
    });
    let by_name: HashMap<&str, &PlannedTensor<'_>> = tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let format = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = TensorFileWriter::create(path, infos.collect(), &format)?;
    let mut done_bytes = 0;
    while let Some(next) = writer.next_tensor() {
        let bytes = convert(gguf, by_name[next.name.as_str()], dtype)?;
        writer.write_next(&bytes)?;
        done_bytes += bytes.len() as u64;
        progress.report(Event::Advanced { done_bytes });
    }
    writer.finish()?;
    progress.report(Event::Ended);
    Ok(())
}

/// All bytes of one tensor, row by row, in the order of the folder.
fn convert(gguf: &Gguf, tensor: &PlannedTensor<'_>, dtype: Dtype) -> Result<Vec<u8>> {
    let info = tensor.info;
    let (n_rows, row_len) = rows(info, tensor.order);
    let stored = gguf.bytes(info);
    let row_bytes = stored.len() / n_rows;
    let mut values = vec![0.0; row_len];
    let mut out = Vec::with_capacity(info.n_elements() * dtype.size());
    for row in 0..n_rows {
        let source = tensor.order.source(row, n_rows);
        dequantize(info.kind, &stored[source * row_bytes..][..row_bytes], &mut values);
        dtype.append(&values, &mut out).map_err(|i| Error::WeightOutOfRange {
            path: gguf.path().to_path_buf(),
            tensor: info.name.clone(),
            index: source * row_len + i,
            value: values[i],
            dtype,
        })?;
    }
    Ok(out)
}

/// Number and length of the rows: of a vector that is reordered each element is a row.
fn rows(info: &TensorInfo, order: RowOrder) -> (usize, usize) {
    let n_elements = info.n_elements();
    let row_len = match info.shape.as_slice() {
        [_] if order != RowOrder::Same => 1,
        [.., row_len] => *row_len,
        [] => n_elements,
    };
    (n_elements / row_len, row_len)
}

fn source_types(tensors: &[PlannedTensor<'_>]) -> Vec<(TensorType, usize)> {
    let count = |kind| tensors.iter().filter(|tensor| tensor.info.kind == kind).count();
    let mut counts: Vec<_> = TensorType::ALL
        .into_iter()
        .map(|kind| (kind, count(kind)))
        .filter(|(_, n)| *n > 0)
        .collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    counts
}

fn write_json(directory: &Path, name: &str, value: &Map<String, Json>) -> Result<()> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| io_at(directory.join(name))(std::io::Error::other(error)))?;
    write_text(directory, name, text)
}

fn write_text(directory: &Path, name: &str, mut text: String) -> Result<()> {
    text.push('\n');
    let path = directory.join(name);
    fs::write(&path, text).map_err(io_at(path))
}

//! A Hugging Face folder → a GGUF file that llama.cpp loads.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use planish_core::arch::{ArchTensor, Role, Rope, RopeScaling};
use planish_core::model_config::ModelConfig;
use planish_tensors::{Dtype, ModelWeights};

use super::config::ROPE_FACTORS;
use super::names::permuted_heads;
use super::quantize::quantize;
use super::rows::RowOrder;
use super::sayable::Sayable;
use super::{TensorPlan, TensorType, Value, gguf_name, tokenizer, write};
use crate::{Error, Event, Progress, Result, Stage};

/// How the matrices of an exported file are stored; vectors (norms, biases) are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExportFormat {
    /// Exact for f32 weights.
    F32,
    /// Exact for f16 weights.
    F16,
    /// Exact for bf16 weights.
    Bf16,
    /// 8.5 bits a weight.
    Q8_0,
    /// 4.5 bits a weight; embedding and head, which suffer most, as `Q8_0`.
    Q4_0,
}

impl ExportFormat {
    /// Every format.
    pub const ALL: [Self; 5] = [Self::F32, Self::F16, Self::Bf16, Self::Q8_0, Self::Q4_0];

    /// The short name, as on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        }
    }

    /// `general.file_type`, llama.cpp's number for the mixture.
    fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
            Self::Bf16 => 32,
        }
    }

    /// How one tensor is stored.
    fn kind(self, tensor: &ArchTensor) -> TensorType {
        let is_vocabulary = matches!(tensor.role, Role::Embedding | Role::Head);
        match (self, tensor.shape.as_slice()) {
            (_, [_]) | (Self::F32, _) => TensorType::F32,
            (Self::Bf16, _) => TensorType::BF16,
            // A row that is no whole number of blocks cannot be quantised.
            (Self::Q8_0 | Self::Q4_0, [.., row]) if !row.is_multiple_of(32) => TensorType::F16,
            (Self::F16, _) => TensorType::F16,
            (Self::Q4_0, _) if !is_vocabulary => TensorType::Q4_0,
            (Self::Q8_0 | Self::Q4_0, _) => TensorType::Q8_0,
        }
    }
}

impl fmt::Display for ExportFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for ExportFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL
            .into_iter()
            .find(|format| format.name().eq_ignore_ascii_case(name));
        known.ok_or_else(|| Error::UnknownExportFormat { found: name.to_owned() })
    }
}

/// What an export did.
#[derive(Clone, Debug)]
pub struct ExportReport {
    /// The file that was written.
    pub file: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Tensors in it.
    pub n_tensors: usize,
    /// What GGUF could not hold but changes no number.
    pub notes: Vec<String>,
}

/// Writes a model as a GGUF file, with the tokenizer and the chat template of its folder, whose name is the model's. The file
/// appears whole or not at all; one tensor is in memory at a time. An existing file is replaced.
///
/// `weights` are those of the folder, with the update of an adapter if there is one; `config` is that of the folder without
/// a quantisation.
///
/// # Errors
/// [`Error::CannotExport`] for what the format has no word for: a sliding window, biases that llama.cpp does not read;
/// [`Error::UnsupportedTokenizer`]; [`Error::WeightOutOfRange`]; [`Error::Tensors`]; [`Error::Io`].
pub fn export_gguf(
    folder: &Path,
    config: &ModelConfig,
    weights: &ModelWeights,
    file: &Path,
    format: ExportFormat,
    progress: &mut dyn Progress,
) -> Result<ExportReport> {
    let sayable = Sayable::of(config).map_err(|problem| Error::CannotExport {
        path: folder.join("config.json"),
        problem,
    })?;
    let tokenizer = tokenizer::to_gguf(folder, config)?;
    let mut notes = tokenizer.notes;
    let sources = plan(config, &sayable, format, &mut notes)?;

    let mut metadata = general_metadata(&sayable, folder, format);
    metadata.extend(model_metadata(config, &sayable));
    metadata.extend(tokenizer.metadata);

    let plans: Vec<TensorPlan> = sources.iter().map(|source| source.plan.clone()).collect();
    let item = file.file_name().unwrap_or_default().to_string_lossy();
    let total = sources.iter().map(|source| source.n_elements() as u64).sum::<u64>() * 4;
    progress.report(Event::Began {
        stage: Stage::Convert,
        item: &item,
        total_bytes: Some(total),
    });
    let mut done_bytes = 0;
    write(file, &metadata, &plans, |i| {
        let bytes = sources[i].bytes(weights, folder)?;
        done_bytes += sources[i].n_elements() as u64 * 4;
        progress.report(Event::Advanced { done_bytes });
        Ok(bytes)
    })?;
    progress.report(Event::Ended);
    let bytes = std::fs::metadata(file).map_err(crate::error::io_at(file))?.len();
    Ok(ExportReport {
        file: file.to_path_buf(),
        bytes,
        n_tensors: plans.len(),
        notes,
    })
}

/// One tensor of the file and what it is made from.
struct Source {
    plan: TensorPlan,
    content: Content,
}

enum Content {
    /// A tensor of the folder.
    Weight { name: String, order: RowOrder },
    /// Numbers that follow from the configuration.
    Computed(Vec<f32>),
}

impl Source {
    fn n_elements(&self) -> usize {
        self.plan.shape.iter().product()
    }

    fn bytes(&self, weights: &ModelWeights, folder: &Path) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        let (name, order) = match &self.content {
            Content::Computed(values) => {
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
                return Ok(out);
            }
            Content::Weight { name, order } => (name, *order),
        };
        let values = weights.all(name)?;
        let row_len = match self.plan.shape.as_slice() {
            [_] if order != RowOrder::Same => 1,
            [.., row_len] => *row_len,
            [] => 1,
        };
        let n_rows = self.n_elements() / row_len;
        for row in 0..n_rows {
            let first = order.source(row, n_rows) * row_len;
            quantize(self.plan.kind, &values[first..first + row_len], &mut out).map_err(|i| {
                Error::WeightOutOfRange {
                    path: folder.to_path_buf(),
                    tensor: name.clone(),
                    index: first + i,
                    value: values[first + i],
                    dtype: if self.plan.kind == TensorType::F32 {
                        Dtype::F32
                    } else {
                        Dtype::F16
                    },
                }
            })?;
        }
        Ok(out)
    }
}

fn plan(
    config: &ModelConfig,
    sayable: &Sayable<'_>,
    format: ExportFormat,
    notes: &mut Vec<String>,
) -> Result<Vec<Source>> {
    let tensors = config.arch.tensors();
    let mut sources = Vec::with_capacity(tensors.len() + 1);
    for tensor in tensors {
        let own_name = tensor.name();
        let name = gguf_name(tensor.role, tensor.kind);
        let kind = format.kind(&tensor);
        if kind == TensorType::F16 && format != ExportFormat::F16 {
            notes.push(format!(
                "{name} is stored as F16: its rows are no whole number of blocks of 32"
            ));
        }
        let heads = permuted_heads(sayable.form, &config.arch, tensor.role);
        let order = heads.map_or(RowOrder::Same, |n_heads| RowOrder::JoinPairs { n_heads });
        let plan = TensorPlan {
            name,
            shape: tensor.shape,
            kind,
        };
        sources.push(Source {
            plan,
            content: Content::Weight { name: own_name, order },
        });
    }
    if let Some(factors) = rope_factors(sayable.rope) {
        let plan = TensorPlan {
            name: ROPE_FACTORS.to_owned(),
            shape: vec![factors.len()],
            kind: TensorType::F32,
        };
        sources.push(Source {
            plan,
            content: Content::Computed(factors),
        });
    }
    Ok(sources)
}

fn general_metadata(sayable: &Sayable<'_>, folder: &Path, format: ExportFormat) -> Vec<(String, Value)> {
    let architecture = sayable.form.architecture;
    let absolute = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    let name = absolute
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let mut metadata = vec![
        ("general.architecture".to_owned(), Value::from(architecture)),
        ("general.type".to_owned(), Value::from("model")),
        ("general.name".to_owned(), Value::String(name)),
        ("general.file_type".to_owned(), Value::U32(format.file_type())),
    ];
    if matches!(format, ExportFormat::Q8_0 | ExportFormat::Q4_0) {
        metadata.push(("general.quantization_version".to_owned(), Value::U32(2)));
    }
    metadata
}

fn model_metadata(config: &ModelConfig, sayable: &Sayable<'_>) -> Vec<(String, Value)> {
    let (arch, attention, rope) = (&config.arch, sayable.attention, sayable.rope);
    let whole = |n: usize| Value::U32(n as u32);
    let mut pairs = vec![
        ("block_count", whole(arch.layers.len())),
        ("context_length", whole(config.max_position_embeddings)),
        ("embedding_length", whole(arch.hidden_size)),
        ("feed_forward_length", whole(sayable.feed_forward_dims)),
        ("attention.head_count", whole(attention.n_heads)),
        ("attention.head_count_kv", whole(attention.n_kv_heads)),
        ("attention.key_length", whole(attention.head_dim)),
        ("attention.value_length", whole(attention.head_dim)),
        ("attention.layer_norm_rms_epsilon", Value::F32(sayable.eps)),
        ("rope.dimension_count", whole(rope.dims)),
        ("rope.freq_base", Value::F32(rope.theta)),
        ("vocab_size", whole(arch.vocab_size)),
    ];
    if let RopeScaling::Linear { factor } = rope.scaling {
        pairs.push(("rope.scaling.type", Value::from("linear")));
        pairs.push(("rope.scaling.factor", Value::F32(factor)));
    }
    let architecture = sayable.form.architecture;
    pairs
        .into_iter()
        .map(|(key, value)| (format!("{architecture}.{key}"), value))
        .collect()
}

/// Llama 3's scaling as llama.cpp wants it: what the frequency of each pair is divided by.
fn rope_factors(rope: &Rope) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = rope.scaling else {
        return None;
    };
    let plain = Rope {
        scaling: RopeScaling::None,
        ..rope.clone()
    };
    let pairs = plain.frequencies(1).into_iter().zip(rope.frequencies(1));
    Some(pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

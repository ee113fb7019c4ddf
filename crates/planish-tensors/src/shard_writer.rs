use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::INDEX_FILE;
use super::writer::{TensorFileWriter, TensorInfo};
use crate::error::{Error, Result};

/// Largest shard written by default: 5 GB, as other tools do.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Writes a model as safetensors shards with an index, one tensor in memory at a time.
///
/// The tensors are dealt out to the shards in the order given; inside a shard they follow the order of the file
/// format, which [`next_tensor`](Self::next_tensor) tells. One shard is called `model.safetensors`, several
/// `model-00001-of-0000N.safetensors`. Each file appears whole; the index comes last. To make the folder appear whole
/// as well, write into [`planish_core::fs::AtomicDir`].
///
/// ```
/// use planish_tensors::{Dtype, ShardWriter, TensorInfo, TensorStore};
///
/// let dir = tempfile::tempdir()?;
/// let info = |name: &str| TensorInfo { name: name.to_string(), dtype: Dtype::U8, shape: vec![3] };
/// let mut writer = ShardWriter::create(dir.path(), vec![info("a"), info("b"), info("c")], 6)?;
/// while let Some(next) = writer.next_tensor() {
///     let fill = next.name.as_bytes()[0];
///     writer.write_next(&[fill; 3])?;
/// }
/// let summary = writer.finish()?;
/// assert_eq!(summary.files, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
/// assert_eq!(TensorStore::open(dir.path())?.require("c")?.bytes, b"ccc");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ShardWriter {
    folder: PathBuf,
    files: Vec<String>,
    /// Shards not begun, last first.
    waiting: Vec<Vec<TensorInfo>>,
    current: Option<TensorFileWriter>,
    weight_map: BTreeMap<String, String>,
    total_bytes: u64,
}

/// What [`ShardWriter::finish`] wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardSummary {
    /// Shards, in order.
    pub files: Vec<String>,
    /// Bytes of all values.
    pub total_bytes: u64,
}

impl ShardWriter {
    /// Plans the shards and begins the first. A tensor larger than `max_shard_bytes` gets a shard of its own.
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::WriterMisuse`] for a name given twice, a size that does not fit, or no tensor at all.
    pub fn create(folder: &Path, infos: Vec<TensorInfo>, max_shard_bytes: u64) -> Result<Self> {
        let total_bytes = infos.iter().map(|info| info.byte_len().unwrap_or(0) as u64).sum();
        let mut waiting = plan(infos, max_shard_bytes);
        let files: Vec<String> = (1..=waiting.len()).map(|i| shard_name(i, waiting.len())).collect();
        let mut weight_map = BTreeMap::new();
        for (shard, file) in waiting.iter().zip(&files) {
            for info in shard {
                if weight_map.insert(info.name.clone(), file.clone()).is_some() {
                    let reason = format!("tensor {:?} was given twice", info.name);
                    return Err(Error::WriterMisuse {
                        path: folder.join(file),
                        reason,
                    });
                }
            }
        }
        if files.is_empty() {
            let reason = "there is no tensor to write".to_string();
            return Err(Error::WriterMisuse {
                path: folder.to_path_buf(),
                reason,
            });
        }
        waiting.reverse();
        let mut writer = Self {
            folder: folder.to_path_buf(),
            files,
            waiting,
            current: None,
            weight_map,
            total_bytes,
        };
        writer.begin_next_shard()?;
        Ok(writer)
    }

    /// The tensor whose values come next; `None` after the last.
    pub fn next_tensor(&self) -> Option<&TensorInfo> {
        self.current.as_ref().and_then(TensorFileWriter::next_tensor)
    }

    /// Writes the values of [`next_tensor`](Self::next_tensor).
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::WriterMisuse`] for a wrong number of bytes, or when there is no next tensor.
    pub fn write_next(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(current) = &mut self.current else {
            let reason = "more tensors were written than announced".to_string();
            return Err(Error::WriterMisuse {
                path: self.folder.clone(),
                reason,
            });
        };
        current.write_next(bytes)?;
        if current.next_tensor().is_none() {
            self.begin_next_shard()?;
        }
        Ok(())
    }

    /// Writes the index.
    ///
    /// # Errors
    /// [`Error::Write`]; [`Error::WriterMisuse`] when tensors are still missing.
    pub fn finish(mut self) -> Result<ShardSummary> {
        if let Some(current) = self.current.take() {
            current.finish()?;
        }
        let index = Index {
            metadata: IndexMetadata {
                total_size: self.total_bytes,
            },
            weight_map: &self.weight_map,
        };
        let path = self.folder.join(INDEX_FILE);
        let mut json = serde_json::to_vec_pretty(&index).map_err(|e| Error::json(&path, &e))?;
        json.push(b'\n');
        planish_core::fs::write_atomic(&path, &json).map_err(|e| Error::write(&path, e))?;
        Ok(ShardSummary {
            files: self.files,
            total_bytes: self.total_bytes,
        })
    }

    /// Ends the shard in hand, and begins the next if there is one.
    fn begin_next_shard(&mut self) -> Result<()> {
        if let Some(done) = self.current.take() {
            done.finish()?;
        }
        let shard_idx = self.files.len() - self.waiting.len();
        if let Some(infos) = self.waiting.pop() {
            let path = self.folder.join(&self.files[shard_idx]);
            let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
            self.current = Some(TensorFileWriter::create(&path, infos, &metadata)?);
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct Index<'a> {
    metadata: IndexMetadata,
    weight_map: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct IndexMetadata {
    total_size: u64,
}

/// Fills shard after shard, never above the limit unless a single tensor is.
fn plan(infos: Vec<TensorInfo>, max_shard_bytes: u64) -> Vec<Vec<TensorInfo>> {
    let mut shards: Vec<Vec<TensorInfo>> = Vec::new();
    let mut used = 0;
    for info in infos {
        let bytes = info.byte_len().unwrap_or(0) as u64;
        match shards.last_mut() {
            Some(shard) if used + bytes <= max_shard_bytes => {
                shard.push(info);
                used += bytes;
            }
            _ => {
                shards.push(vec![info]);
                used = bytes;
            }
        }
    }
    shards
}

fn shard_name(number: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".to_string()
    } else {
        format!("model-{number:05}-of-{count:05}.safetensors")
    }
}

//! Feeds packages as their hosts do: masks, positions, padding, cache.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use coreml_mil::interpreter::{Package, Precision, StateMap, Value};
use ndarray::{Array1, Array2, ArrayD, Axis, IxDyn, s};

use crate::{Error, Result};

/// What hosts put where a token must not look.
const MASKED: f32 = -1e4;

/// Runs an export of any layout token by token. All its numbers are read from the packages.
pub struct Driver {
    parts: Parts,
    context: usize,
    prefill: usize,
    precision: Precision,
    state: StateMap,
    /// The cache of packages that leave it to the caller.
    host_cache: Option<Arc<ArrayD<f32>>>,
}

enum Parts {
    Monolith(Box<Package>),
    Anemll {
        embeddings: Box<Package>,
        chunks: Vec<Package>,
        head: Box<Package>,
    },
}

impl Driver {
    /// Opens a `.mlpackage`, or a folder in the ANEMLL layout.
    ///
    /// # Errors
    /// [`Error::Package`]; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let parts = if path.join("Manifest.json").is_file() {
            Parts::Monolith(Box::new(Package::open(path)?))
        } else {
            let open_one = |part: &str| -> Result<Package> {
                let found = packages_with(path, part)?;
                match found.as_slice() {
                    [only] => Ok(Package::open(only)?),
                    _ => Err(Error::bad_package(
                        path,
                        format!("expected one *{part}*.mlpackage, found {}", found.len()),
                    )),
                }
            };
            let chunks = packages_with(path, "_FFN_PF")?;
            Parts::Anemll {
                embeddings: Box::new(open_one("_embeddings")?),
                chunks: chunks
                    .iter()
                    .map(|p| Package::open(p))
                    .collect::<coreml_mil::Result<_>>()?,
                head: Box::new(open_one("_lm_head")?),
            }
        };
        let decoder = match &parts {
            Parts::Monolith(package) => package.as_ref(),
            Parts::Anemll { chunks, .. } => chunks
                .first()
                .ok_or_else(|| Error::bad_package(path, "no *_FFN_PF*.mlpackage"))?,
        };
        let size = |function: &str, input: &str, axis: usize| -> Result<usize> {
            let shape = decoder.input_type(function, input).and_then(|ty| ty.shape());
            let missing = || Error::bad_package(path, format!("function {function} has no input {input}"));
            shape.and_then(|s| s.get(axis).copied()).ok_or_else(missing)
        };
        let prefill = size("prefill", "position_ids", 0)?;
        let cache = decoder.input_type("infer", "kv_cache").and_then(|ty| ty.shape());
        let context = match &cache {
            Some(shape) => shape[2],
            None => size("infer", "causal_mask", 3)?,
        };
        let host_cache = cache.map(|shape| Arc::new(ArrayD::zeros(IxDyn(&shape))));
        let state = decoder.new_state("infer")?;
        Ok(Self {
            parts,
            context,
            prefill,
            precision: Precision::F16,
            state,
            host_cache,
        })
    }

    /// Positions of the cache.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Tokens of a prefill call.
    pub fn prefill(&self) -> usize {
        self.prefill
    }

    /// Empties the cache and sets the arithmetic.
    ///
    /// # Errors
    /// None in practice.
    pub fn reset(&mut self, precision: Precision) -> Result<()> {
        self.precision = precision;
        for held in self.state.values_mut() {
            *held = Arc::new(ArrayD::zeros(held.raw_dim()));
        }
        if let Some(cache) = &mut self.host_cache {
            *cache = Arc::new(ArrayD::zeros(cache.raw_dim()));
        }
        Ok(())
    }

    /// Puts a prompt into the cache in batches, the last one padded with token 0 as hosts do. Logits `[prompt, v]` where the
    /// layout gives them.
    ///
    /// # Errors
    /// [`Error::Package`].
    pub fn prefill_prompt(&mut self, prompt: &[u32]) -> Result<Option<Array2<f32>>> {
        let mut rows: Vec<Array2<f32>> = Vec::new();
        for (i, batch) in prompt.chunks(self.prefill).enumerate() {
            let start = i * self.prefill;
            if start + self.prefill > self.context {
                // A batch that would be padded past the end goes in token by token.
                for (j, token) in batch.iter().enumerate() {
                    let row = self.decode(*token, start + j)?;
                    rows.push(row.insert_axis(Axis(0)));
                }
                continue;
            }
            let mut tokens = batch.to_vec();
            tokens.resize(self.prefill, 0);
            let logits = self.call("prefill", &tokens, start, batch.len())?;
            rows.extend(logits.map(|l| l.slice(s![..batch.len(), ..]).to_owned()));
        }
        if matches!(self.parts, Parts::Anemll { .. }) {
            return Ok(None);
        }
        let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
        ndarray::concatenate(Axis(0), &views)
            .map(Some)
            .map_err(|e| Error::internal(e.to_string()))
    }

    /// Logits after the last token of a prompt that is in the cache; that token is decoded again, as hosts do.
    ///
    /// # Errors
    /// [`Error::Package`].
    pub fn last_logits(&mut self, prompt: &[u32]) -> Result<Array1<f32>> {
        match prompt.last() {
            Some(token) => self.decode(*token, prompt.len() - 1),
            None => Err(Error::internal("an empty prompt")),
        }
    }

    /// Logits `[v]` after one token at a position.
    ///
    /// # Errors
    /// [`Error::Package`].
    pub fn decode(&mut self, token: u32, position: usize) -> Result<Array1<f32>> {
        let logits = self.call("infer", &[token], position, 1)?;
        let row = logits.and_then(|l| l.rows().into_iter().next().map(|r| r.to_owned()));
        row.ok_or_else(|| Error::internal("infer gave no logits"))
    }

    /// Logits `[tokens, v]` of a whole text from an empty cache.
    ///
    /// # Errors
    /// [`Error::Package`].
    pub fn all_logits(&mut self, tokens: &[u32]) -> Result<Array2<f32>> {
        if let Parts::Monolith(_) = self.parts {
            return self
                .prefill_prompt(tokens)?
                .ok_or_else(|| Error::internal("prefill gave no logits"));
        }
        let rows = tokens
            .iter()
            .enumerate()
            .map(|(position, token)| self.decode(*token, position));
        let rows: Vec<Array1<f32>> = rows.collect::<Result<_>>()?;
        let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
        ndarray::stack(Axis(0), &views).map_err(|e| Error::internal(e.to_string()))
    }

    /// One call; `valid` of the tokens are no padding.
    fn call(&mut self, function: &str, tokens: &[u32], start: usize, valid: usize) -> Result<Option<Array2<f32>>> {
        let inputs = self.inputs(tokens, start)?;
        match &self.parts {
            Parts::Monolith(package) => {
                let outputs = package.run(function, &inputs, &mut self.state, self.precision)?;
                if let Some(cache) = &mut self.host_cache {
                    append(cache, outputs.get("new_kv"), start, valid)?;
                }
                join_logits(&outputs).map(Some)
            }
            Parts::Anemll {
                embeddings,
                chunks,
                head,
            } => {
                let mut none = StateMap::new();
                let mut hidden = embeddings
                    .run("main", &inputs, &mut none, self.precision)?
                    .remove("hidden_states");
                for chunk in chunks {
                    let mut inputs = inputs.clone();
                    inputs.extend(hidden.take().map(|x| ("hidden_states".to_owned(), x)));
                    let mut outputs = chunk.run(function, &inputs, &mut self.state, self.precision)?;
                    hidden = outputs.remove("output_hidden_states");
                }
                if tokens.len() != 1 || function != "infer" {
                    return Ok(None); // the last chunk's prefill gives no usable row
                }
                let inputs: BTreeMap<String, Value> =
                    hidden.into_iter().map(|x| ("hidden_states".to_owned(), x)).collect();
                join_logits(&head.run("main", &inputs, &mut none, self.precision)?).map(Some)
            }
        }
    }

    fn inputs(&self, tokens: &[u32], start: usize) -> Result<BTreeMap<String, Value>> {
        let (n, context) = (tokens.len(), self.context);
        let ids = tokens.iter().map(|t| *t as i32).collect();
        let positions = (start..start + n).map(|p| p as i32).collect();
        let host = self.host_cache.is_some();
        let columns = context + if host { n } else { 0 };
        let visible = |row: usize, column: usize| {
            if host && column < context {
                column < start
            } else if host {
                column - context <= row
            } else {
                column <= start + row
            }
        };
        let mask = (0..n).flat_map(|r| (0..columns).map(move |c| (r, c)));
        let mask = mask.map(|(r, c)| if visible(r, c) { 0.0 } else { MASKED }).collect();
        let values = [
            ("input_ids", Value::ints(&[1, n], ids)),
            ("position_ids", Value::ints(&[n], positions)),
            ("current_pos", Value::ints(&[1], vec![start as i32])),
            ("causal_mask", Value::floats(&[1, 1, n, columns], mask)),
            ("kv_cache", self.host_cache.clone().map(Value::Float)),
        ];
        Ok(values
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value?)))
            .collect())
    }
}

/// Copies the new rows of a call, padding excepted, to their place in the host's cache.
fn append(cache: &mut Arc<ArrayD<f32>>, new: Option<&Value>, start: usize, valid: usize) -> Result<()> {
    let new = new
        .and_then(Value::to_floats)
        .ok_or_else(|| Error::internal("no new_kv"))?;
    let cache = Arc::make_mut(cache);
    let part = new.slice_axis(Axis(2), ndarray::Slice::from(0..valid));
    cache
        .slice_axis_mut(Axis(2), ndarray::Slice::from(start..start + valid))
        .assign(&part);
    Ok(())
}

/// `logits1 ..` side by side, `[tokens, v]`.
fn join_logits(outputs: &BTreeMap<String, Value>) -> Result<Array2<f32>> {
    let parts = (1..).map_while(|i| outputs.get(&format!("logits{i}")).and_then(Value::to_floats));
    let parts: Vec<Arc<ArrayD<f32>>> = parts.collect();
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
    let joined = ndarray::concatenate(Axis(2), &views).map_err(|e| Error::internal(format!("logits: {e}")))?;
    let joined = joined.as_standard_layout().into_owned();
    let (tokens, v) = (joined.shape()[1], joined.shape()[2]);
    joined
        .into_shape_with_order((tokens, v))
        .map_err(|e| Error::internal(e.to_string()))
}

fn packages_with(folder: &Path, part: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if name.contains(part) && name.ends_with(".mlpackage") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

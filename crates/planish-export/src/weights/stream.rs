//! Fills a weight file from its plan: reads, converts and writes a few megabytes at a time.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ops::Range,
    path::Path,
    sync::{
        Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use coreml_mil::BlobWriter;
use half::{f16, slice::HalfFloatSliceExt};
use planish_tensors::{ModelWeights, first_outside};
use rayon::prelude::*;
use serde::Serialize;
use xxhash_rust::xxh3::Xxh3;

use super::{
    WeightFormat, WeightPlan, compress,
    compress::row_quantum,
    plan::{Job, JobSource},
};
use crate::{Error, Result};

/// Weights handled by one task at a time; with both precisions about 3 MB.
const BLOCK_ELEMENTS: usize = 1 << 19;
/// Pieces that may wait for the writing thread.
const QUEUE: usize = 8;
const FP16_MAX: f32 = 65504.0;

thread_local! {
    /// Weights of the block that a thread works on.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// How far the stored form of one weight is from the original.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerError {
    /// Tensor, with the rows where only some are stored together.
    pub tensor: String,
    /// Format.
    pub format: &'static str,
    /// `‖W − W'‖ / ‖W‖`, Frobenius.
    pub relative_error: f64,
    /// Largest single difference.
    pub max_error: f32,
}

/// Importance of each input of a linear layer, by module path: its mean share in the squares of a token.
///
/// A share, so that a token with large activations counts no more than another; docs/coreml.md has the measurement.
pub type Importance = BTreeMap<String, Vec<f32>>;

/// Where the data of weights go, one after the other.
pub trait Sink: Send {
    /// Ends the current weight and begins the next one.
    ///
    /// # Errors
    /// When the current one lacks data, or there is no next.
    fn next_weight(&mut self) -> Result<()>;

    /// Appends data to the current weight.
    ///
    /// # Errors
    /// When it would become too long, or cannot be written.
    fn write(&mut self, data: &[u8]) -> Result<()>;
}

/// The weight file of a Core ML package, with a hash of all data.
struct BlobSink {
    writer: BlobWriter,
    hash: Xxh3,
}

impl Sink for BlobSink {
    fn next_weight(&mut self) -> Result<()> {
        self.writer.next_blob()?;
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        self.hash.update(data);
        Ok(self.writer.write(data)?)
    }
}

/// Writes the weight file. Returns the error of each compressed weight and a hash of all data.
///
/// # Errors
/// As `fill`, and [`Error::Io`].
pub fn stream(
    plan: &WeightPlan,
    source: &ModelWeights,
    importance: &Importance,
    path: &Path,
) -> Result<(Vec<LayerError>, u64)> {
    let sink = BlobSink {
        writer: BlobWriter::create(path, &plan.blobs)?,
        hash: Xxh3::new(),
    };
    let (errors, sink) = fill(&plan.jobs, source, importance, sink)?;
    sink.writer.finish()?;
    Ok((errors, sink.hash.digest()))
}

/// Fills a sink with what the jobs ask for. Returns the error of each compressed weight.
///
/// Reading and converting run beside hashing and writing, which have a thread of their own.
///
/// # Errors
/// [`Error::Tensors`] and [`Error::Fp16Range`] for weights that fp16 cannot hold; errors of the sink.
pub(crate) fn fill<S: Sink>(
    jobs: &[Job],
    source: &ModelWeights,
    importance: &Importance,
    sink: S,
) -> Result<(Vec<LayerError>, S)> {
    let (sender, receiver) = sync_channel(QUEUE);
    let used = Mutex::new(Vec::new());
    let (made, written) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| write_all(sink, receiver, &used));
        let out = Outlet {
            pieces: sender,
            used: &used,
        };
        let made: Result<Vec<_>> = jobs.iter().map(|job| run(job, source, importance, &out)).collect();
        drop(out); // ends the writing
        (made, writing.join())
    });
    // Where writing failed, making failed after it for want of a taker.
    let sink = written.map_err(|_| Error::internal("the writing thread panicked"))??;
    let errors = made?.into_iter().flatten().collect();
    Ok((errors, sink))
}

/// What the writing thread is told.
enum Piece {
    NextBlob,
    Bytes(Vec<u8>),
    Halves(Vec<f16>),
}

/// Buffers that have been written and may be filled again: fresh memory costs as much as converting.
type Used = Mutex<Vec<Vec<f16>>>;

/// Hands pieces to the writing thread, in order.
struct Outlet<'a> {
    pieces: SyncSender<Piece>,
    used: &'a Used,
}

impl Outlet<'_> {
    fn put(&self, piece: Piece) -> Result<()> {
        let stopped = |_| Error::internal("the writing thread stopped");
        self.pieces.send(piece).map_err(stopped)
    }
}

/// Takes the receiver: when writing fails, makers must find nobody there.
#[allow(clippy::needless_pass_by_value)]
fn write_all<S: Sink>(mut sink: S, pieces: Receiver<Piece>, used: &Used) -> Result<S> {
    for piece in &pieces {
        let data = match &piece {
            Piece::NextBlob => {
                sink.next_weight()?;
                continue;
            }
            Piece::Bytes(bytes) => bytes.as_slice(),
            Piece::Halves(halves) => bytemuck::cast_slice(halves),
        };
        sink.write(data)?;
        if let (Piece::Halves(halves), Ok(mut used)) = (piece, used.lock()) {
            used.push(halves);
        }
    }
    Ok(sink)
}

fn run(job: &Job, source: &ModelWeights, importance: &Importance, out: &Outlet) -> Result<Option<LayerError>> {
    out.put(Piece::NextBlob)?;
    match &job.source {
        JobSource::PlusOne { tensor } => {
            let values: Vec<f32> = source.all(tensor)?.into_iter().map(|value| value + 1.0).collect();
            out.put(Piece::Bytes(bytemuck::cast_slice(&values).to_vec()))
                .map(|()| None)
        }
        JobSource::Table { .. } => out.put(Piece::Halves(job.table.clone())).map(|()| None),
        JobSource::Rows {
            tensor,
            rows,
            format: WeightFormat::Fp16,
        } => dense_rows(tensor, rows.clone(), source, out).map(|()| None),
        JobSource::Rows { tensor, rows, format } => {
            let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
            let task = Task {
                tensor,
                rows,
                format: *format,
                importance: importance.get(module),
            };
            compressed_rows(&task, source, out).map(Some)
        }
    }
}

fn dense_rows(tensor: &str, rows: Range<usize>, source: &ModelWeights, out: &Outlet) -> Result<()> {
    let columns: usize = source.shape(tensor)?[1..].iter().product();
    let used = out.used;
    in_blocks(
        rows,
        columns,
        1,
        |block| {
            SCRATCH.with_borrow_mut(|values| {
                source.rows_into(tensor, block.clone(), values)?;
                check_range(tensor, block.start * columns, values)?;
                let mut halves = used.lock().ok().and_then(|mut used| used.pop()).unwrap_or_default();
                halves.resize(values.len(), f16::ZERO);
                halves.convert_from_f32_slice(values);
                Ok(halves)
            })
        },
        |halves| out.put(Piece::Halves(halves)),
    )
}

struct Task<'a> {
    tensor: &'a str,
    rows: &'a Range<usize>,
    format: WeightFormat,
    importance: Option<&'a Vec<f32>>,
}

fn compressed_rows(task: &Task, source: &ModelWeights, out: &Outlet) -> Result<LayerError> {
    let Task {
        tensor,
        rows,
        format,
        importance,
    } = *task;
    let columns: usize = source.shape(tensor)?[1..].iter().product();
    let mut side = Vec::new();
    let (mut miss, mut size, mut max_error) = (0f64, 0f64, 0f32);
    in_blocks(
        rows.clone(),
        columns,
        row_quantum(rows.len(), format),
        |block| {
            let values = source.rows(tensor, block.clone())?;
            check_range(tensor, block.start * columns, &values)?;
            let packed = compress(&values, columns, rows.len(), format, importance.map(Vec::as_slice));
            let errors = differences(&values, &packed.restored);
            Ok((packed.data, packed.side, errors))
        },
        |(data, block_side, errors)| {
            side.extend(block_side);
            miss += errors.0;
            size += errors.1;
            max_error = max_error.max(errors.2);
            out.put(Piece::Bytes(data))
        },
    )?;
    out.put(Piece::NextBlob)?;
    out.put(Piece::Halves(side))?;
    let whole = *rows == (0..source.shape(tensor)?[0]);
    let tensor = if whole {
        tensor.into()
    } else {
        format!("{tensor}[{}..{}]", rows.start, rows.end)
    };
    let relative_error = if size > 0.0 { (miss / size).sqrt() } else { 0.0 };
    Ok(LayerError {
        tensor,
        format: format.name(),
        relative_error,
        max_error,
    })
}

/// Runs `make` over blocks of rows in parallel and `take` over the results in order; two rounds of blocks are in memory.
fn in_blocks<T: Send>(
    rows: Range<usize>,
    columns: usize,
    quantum: usize,
    make: impl Fn(Range<usize>) -> Result<T> + Sync,
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let step = (BLOCK_ELEMENTS / columns.max(1)).max(1).next_multiple_of(quantum);
    let blocks: Vec<Range<usize>> = rows
        .clone()
        .step_by(step)
        .map(|start| start..(start + step).min(rows.end))
        .collect();
    let at_once = 2 * rayon::current_num_threads();
    for round in blocks.chunks(at_once) {
        let made: Vec<Result<T>> = round.par_iter().map(|block| make(block.clone())).collect();
        for result in made {
            take(result?)?;
        }
    }
    Ok(())
}

fn check_range(tensor: &str, first: usize, values: &[f32]) -> Result<()> {
    match first_outside(values, FP16_MAX) {
        Some(at) => Err(Error::Fp16Range {
            tensor: tensor.into(),
            index: first + at,
            value: values[at],
        }),
        None => Ok(()),
    }
}

/// Σ (a − b)², Σ a², max |a − b|.
fn differences(a: &[f32], b: &[f32]) -> (f64, f64, f32) {
    a.iter().zip(b).fold((0.0, 0.0, 0.0), |(miss, size, max), (a, b)| {
        let d = a - b;
        (
            miss + f64::from(d) * f64::from(d),
            size + f64::from(*a) * f64::from(*a),
            max.max(d.abs()),
        )
    })
}

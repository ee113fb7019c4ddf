//! Which rows make an update, and in which batches: a pure function of the data, the settings, the seed and the epoch.

use std::ops::Range;
use std::sync::Mutex;

use sha2::{Digest, Sha256};

use crate::batch::Batch;
use crate::dataset::{Dataset, Example};
use crate::error::{Error, Result};
use crate::ladder::{Ladder, Rungs};
use crate::order::{Purpose, Random, systematic_copies};
use crate::packing::best_fit_decreasing;

/// How a data set is cut into batches.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanOptions {
    /// Rows of a micro-batch: examples, pairs of a preference set (two rows each), or packed rows.
    pub batch_size: usize,
    /// Micro-batches of one optimizer update.
    pub accumulation: usize,
    /// The longest example in tokens, as the data was read.
    pub max_seq_length: usize,
    /// The seed of the order.
    pub seed: u64,
    /// Change the order from epoch to epoch. Without it every epoch has the order of the first, so that evaluations see
    /// the same rows; the first windows are a fair sample of all.
    pub shuffle: bool,
    /// Pack many examples into one row.
    pub packing: bool,
    /// The lengths that the backend allows.
    pub rungs: Rungs,
    /// Distinct shapes at most.
    pub max_shapes: usize,
    /// One weight an example: draw examples in proportion, instead of each once an epoch.
    pub sampler_weights: Option<Vec<f64>>,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            batch_size: 4,
            accumulation: 1,
            max_seq_length: 2048,
            seed: 0,
            shuffle: true,
            packing: false,
            rungs: Rungs::Fine,
            max_shapes: 12,
            sampler_weights: None,
        }
    }
}

/// The windows of every epoch.
///
/// A window is the set of rows of one optimizer update, `batch_size · accumulation` of them; micro-batches are cut from
/// it. Windows are chosen first, so the seed and the rows an update decide which rows meet, however the window is cut.
/// The last window of an epoch may be smaller; its micro-batches are filled up with rows of padding, so every batch has
/// the same number of rows.
///
/// # Errors
/// [`Error::Plan`] when settings contradict one another or the data.
///
/// # Example
/// ```
/// use planish_data::{BatchPlan, DataOptions, Dataset, PlanOptions, Tokenizer};
/// # let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/fixtures/tiny").as_ref();
/// # let dir = tempfile::tempdir()?;
/// # let file = dir.path().join("train.jsonl");
/// std::fs::write(&file, "{\"text\": \"one\"}\n{\"text\": \"one two three\"}\n{\"text\": \"four\"}")?;
/// let (data, _) = Dataset::load(&file, &Tokenizer::from_dir(model)?, None, &DataOptions::default())?;
/// let plan = BatchPlan::new(&data, &PlanOptions { batch_size: 2, ..PlanOptions::default() })?;
/// assert_eq!(plan.windows_in_epoch(0)?, 2);
/// let window = plan.window(&data, 0, 0)?;
/// let batch = &window.micro_batches[0];
/// assert_eq!((batch.rows, batch.length), (2, 32));
/// assert_eq!(window.target_tokens, batch.target_weights.iter().sum::<f32>() as usize);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct BatchPlan {
    options: PlanOptions,
    /// What is placed as a whole: one example, or the two of a pair.
    units: Vec<Unit>,
    fingerprint: String,
    ladder: Ladder,
    /// Rows of every micro-batch.
    rows: usize,
    plan_hash: String,
    summary: PlanSummary,
    cache: Mutex<Option<(u64, std::sync::Arc<Epoch>)>>,
}

/// The rows of one optimizer update.
#[derive(Debug, Clone, PartialEq)]
pub struct Window {
    /// What is run forward and backward, one after another.
    pub micro_batches: Vec<Batch>,
    /// Trained targets of all of them: the `N` that their summed losses are divided by.
    pub target_tokens: usize,
    /// Examples in the window.
    pub examples: usize,
}

/// A place in the order of a run: the next window to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursor {
    /// The epoch, from 0.
    pub epoch: u64,
    /// The window of that epoch, from 0.
    pub window_index: usize,
}

/// What the first epoch of a plan looks like; later ones differ in which rows meet, never in the shapes allowed.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanSummary {
    /// Each shape with its micro-batches in the first epoch, by length.
    pub shapes: Vec<ShapeCount>,
    /// Windows of the first epoch.
    pub windows: usize,
    /// Micro-batches of the first epoch.
    pub micro_batches: usize,
    /// Examples of the first epoch.
    pub examples: usize,
    /// Trained targets of the first epoch.
    pub target_tokens: usize,
    /// Positions without a token, as a share of all, in the first epoch.
    pub padding_fraction: f64,
}

/// A shape and how often it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShapeCount {
    /// Rows.
    pub rows: usize,
    /// Input tokens a row.
    pub length: usize,
    /// Micro-batches of this shape.
    pub batches: usize,
}

/// What is placed as a whole. Kept small: there is one for every example of a data set that may be larger than memory.
#[derive(Debug, Clone, Copy)]
struct Unit {
    /// Its first example.
    first: u32,
    /// One example, or the two of a pair.
    n_examples: u32,
    /// Input tokens of the longest.
    cost: u32,
    /// Input tokens of all.
    used: u32,
    target_tokens: u32,
}

/// The order of one epoch: units in rows, rows in windows.
#[derive(Debug)]
struct Epoch {
    units: Vec<u32>,
    /// Where each packed row ends among the units; without packing every unit is a row.
    row_ends: Option<Vec<u32>>,
    /// The windows, in the order in which they are trained; window `w` holds the rows from `w · rows_per_window` on.
    windows: Vec<u32>,
    rows_per_window: usize,
}

impl Epoch {
    fn n_rows(&self) -> usize {
        self.row_ends.as_ref().map_or(self.units.len(), Vec::len)
    }

    /// The units of a row.
    fn row(&self, row: usize) -> &[u32] {
        match &self.row_ends {
            None => &self.units[row..=row],
            Some(ends) => &self.units[row.checked_sub(1).map_or(0, |before| ends[before] as usize)..ends[row] as usize],
        }
    }

    /// The rows of the window that comes at a place of the order.
    fn window(&self, index: usize) -> Option<Range<usize>> {
        let start = *self.windows.get(index)? as usize * self.rows_per_window;
        Some(start..(start + self.rows_per_window).min(self.n_rows()))
    }

    fn windows(&self) -> impl Iterator<Item = Range<usize>> {
        (0..self.windows.len()).filter_map(|index| self.window(index))
    }
}

/// Windows that are sorted by length together.
const SORTED_WINDOWS: usize = 64;

impl BatchPlan {
    /// Plans a data set.
    pub fn new(data: &Dataset, options: &PlanOptions) -> Result<Self> {
        check(data, options)?;
        let units = units(data.examples());
        let mut plan = Self {
            ladder: Ladder::new(options.max_seq_length, options.rungs),
            rows: 0,
            plan_hash: plan_hash(data, options),
            summary: PlanSummary::empty(),
            cache: Mutex::new(None),
            fingerprint: data.fingerprint().to_string(),
            options: options.clone(),
            units,
        };
        let first = plan.lay_out(0);
        plan.rows = options.batch_size.min(first.n_rows());
        plan.choose_rungs(&first)?;
        plan.summary = plan.summarise(&first)?;
        Ok(plan)
    }

    /// Windows of an epoch; the same for every epoch except where a sampler draws and packs.
    pub fn windows_in_epoch(&self, epoch: u64) -> Result<usize> {
        Ok(self.epoch(epoch)?.windows.len())
    }

    /// The batches of one window. `data` is the set that was planned.
    pub fn window(&self, data: &Dataset, epoch: u64, index: usize) -> Result<Window> {
        if data.fingerprint() != self.fingerprint {
            return Err(Error::plan(
                "the plan was made for another data set",
                "plan the data set that is trained",
            ));
        }
        let layout = self.epoch(epoch)?;
        let rows = window_rows(&layout, epoch, index)?;
        let micro_batches = self
            .micro_batches(rows)
            .map(|rows| self.batch(data, &layout, rows))
            .collect::<Result<Vec<_>>>()?;
        Ok(Window {
            target_tokens: micro_batches.iter().map(|batch| batch.target_tokens).sum(),
            examples: micro_batches.iter().map(|batch| batch.row_ids.len()).sum(),
            micro_batches,
        })
    }

    /// Trained targets of a window, without building its batches.
    pub fn target_tokens(&self, epoch: u64, index: usize) -> Result<usize> {
        let layout = self.epoch(epoch)?;
        let rows = window_rows(&layout, epoch, index)?;
        Ok(rows
            .flat_map(|row| self.units_of(&layout, row))
            .map(|unit| unit.target_tokens as usize)
            .sum())
    }

    /// The window after this one, in the next epoch after the last.
    pub fn advance(&self, cursor: Cursor) -> Result<Cursor> {
        let next = cursor.window_index + 1;
        Ok(if next < self.windows_in_epoch(cursor.epoch)? {
            Cursor {
                window_index: next,
                ..cursor
            }
        } else {
            Cursor {
                epoch: cursor.epoch + 1,
                window_index: 0,
            }
        })
    }

    /// SHA-256 over the data set's fingerprint and every setting that decides the plan; equal hashes give equal batches.
    pub fn plan_hash(&self) -> &str {
        &self.plan_hash
    }

    /// Shapes, counts and padding, for printing before the first step.
    pub fn summary(&self) -> &PlanSummary {
        &self.summary
    }

    /// The lengths that batches of this plan may have.
    pub fn ladder(&self) -> &Ladder {
        &self.ladder
    }

    /// The largest shape, `(rows, length)`: the one that needs the most memory.
    pub fn largest_shape(&self) -> (usize, usize) {
        (self.batch_rows(), self.ladder.rungs().last().copied().unwrap_or(0))
    }

    fn epoch(&self, epoch: u64) -> Result<std::sync::Arc<Epoch>> {
        let mut cache = self
            .cache
            .lock()
            .map_err(|_| Error::plan("a thread that read the plan died", "start again"))?;
        match &*cache {
            Some((cached, layout)) if *cached == epoch => Ok(layout.clone()),
            _ => {
                let layout = std::sync::Arc::new(self.lay_out(epoch));
                *cache = Some((epoch, layout.clone()));
                Ok(layout)
            }
        }
    }

    fn lay_out(&self, epoch: u64) -> Epoch {
        let epoch = if self.options.shuffle { epoch } else { 0 };
        let drawn = self.drawn(epoch);
        let (units, row_ends) = if self.options.packing {
            let (units, ends) = self.packed_rows(&drawn, epoch);
            (units, Some(ends))
        } else {
            (self.single_rows(drawn, epoch), None)
        };
        let rows_per_window = self.options.batch_size * self.options.accumulation;
        let n_rows = row_ends.as_ref().map_or(units.len(), Vec::len);
        let mut windows: Vec<u32> = (0..n_rows.div_ceil(rows_per_window) as u32).collect();
        Random::new(self.options.seed, epoch, Purpose::Windows).shuffle(&mut windows);
        Epoch {
            units,
            row_ends,
            windows,
            rows_per_window,
        }
    }

    /// The units of an epoch: each once, or drawn by weight.
    fn drawn(&self, epoch: u64) -> Vec<u32> {
        let Some(weights) = &self.options.sampler_weights else {
            return (0..self.units.len() as u32).collect();
        };
        let of_unit: Vec<f64> = self.units.iter().map(|unit| weights[unit.first as usize]).collect();
        let offset = Random::new(self.options.seed, epoch, Purpose::Sampler).unit();
        let copies = systematic_copies(&of_unit, offset);
        (0..)
            .zip(copies)
            .flat_map(|(unit, count)| std::iter::repeat_n(unit, count))
            .collect()
    }

    /// Shuffled, then sorted by length within stretches of 64 windows, so that rows of like length meet and yet the
    /// company of a row changes from epoch to epoch.
    fn single_rows(&self, mut drawn: Vec<u32>, epoch: u64) -> Vec<u32> {
        Random::new(self.options.seed, epoch, Purpose::Rows).shuffle(&mut drawn);
        let stretch = SORTED_WINDOWS * self.options.batch_size * self.options.accumulation;
        for part in drawn.chunks_mut(stretch) {
            part.sort_by_key(|unit| self.units[*unit as usize].cost);
        }
        drawn
    }

    /// The units in their rows, and where each row ends.
    fn packed_rows(&self, drawn: &[u32], epoch: u64) -> (Vec<u32>, Vec<u32>) {
        let costs: Vec<usize> = drawn
            .iter()
            .map(|unit| self.units[*unit as usize].cost as usize)
            .collect();
        let mut bins = best_fit_decreasing(&costs, self.pack_capacity());
        Random::new(self.options.seed, epoch, Purpose::Rows).shuffle(&mut bins);
        let (mut units, mut ends) = (Vec::with_capacity(drawn.len()), Vec::with_capacity(bins.len()));
        for bin in bins {
            units.extend(bin.into_iter().map(|item| drawn[item]));
            ends.push(units.len() as u32);
        }
        (units, ends)
    }

    /// The top rung, before unused ones are taken out.
    fn pack_capacity(&self) -> usize {
        Ladder::new(self.options.max_seq_length, self.options.rungs)
            .rungs()
            .last()
            .copied()
            .unwrap_or(0)
    }

    /// Keeps the rungs that any epoch can need, at most `max_shapes`.
    fn choose_rungs(&mut self, first: &Epoch) -> Result<()> {
        let lengths: Vec<usize> = if self.options.packing {
            // Every bin is as long as the fullest one: one shape.
            let fullest = (0..first.n_rows())
                .map(|row| self.row_cost(first, row))
                .max()
                .unwrap_or(1);
            let resampled = self.options.sampler_weights.is_some();
            vec![if resampled { self.pack_capacity() } else { fullest }]
        } else {
            // A batch is as long as its longest unit, so any unit's rung can come in some epoch.
            self.units.iter().map(|unit| unit.cost as usize).collect()
        };
        self.ladder = self.ladder.thin(&lengths, self.options.max_shapes)?;
        Ok(())
    }

    fn units_of<'a>(&'a self, layout: &'a Epoch, row: usize) -> impl Iterator<Item = &'a Unit> {
        layout.row(row).iter().map(|unit| &self.units[*unit as usize])
    }

    fn row_cost(&self, layout: &Epoch, row: usize) -> usize {
        self.units_of(layout, row).map(|unit| unit.cost as usize).sum()
    }

    /// Cuts the rows of a window.
    fn micro_batches(&self, rows: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let size = self.options.batch_size;
        rows.clone()
            .step_by(size)
            .map(move |start| start..(start + size).min(rows.end))
    }

    fn batch_length(&self, layout: &Epoch, rows: Range<usize>) -> Result<usize> {
        self.ladder
            .fit(rows.map(|row| self.row_cost(layout, row)).max().unwrap_or(1))
    }

    /// Rows of every batch: two a pair.
    fn batch_rows(&self) -> usize {
        self.rows * self.units.first().map_or(1, |unit| unit.n_examples as usize)
    }

    fn batch(&self, data: &Dataset, layout: &Epoch, rows: Range<usize>) -> Result<Batch> {
        let length = self.batch_length(layout, rows.clone())?;
        let mut batch = Batch::new(self.batch_rows(), length, self.options.packing);
        let mut row_index = 0;
        for row in rows {
            let (mut start, mut rows_here) = (0, 1);
            for unit in self.units_of(layout, row) {
                for offset in 0..unit.n_examples as usize {
                    let example = unit.first as usize + offset;
                    let side = data.examples()[example].side;
                    batch.place(example, &data.tokens(example)?, row_index + offset, start, side);
                }
                start += unit.cost as usize;
                rows_here = unit.n_examples as usize;
            }
            row_index += rows_here;
        }
        Ok(batch)
    }

    fn summarise(&self, first: &Epoch) -> Result<PlanSummary> {
        let mut summary = PlanSummary::empty();
        summary.windows = first.windows.len();
        let (mut used, mut positions) = (0, 0);
        for rows in first.windows().flat_map(|rows| self.micro_batches(rows)) {
            let length = self.batch_length(first, rows.clone())?;
            summary.micro_batches += 1;
            positions += self.batch_rows() * length;
            for unit in rows.flat_map(|row| self.units_of(first, row)) {
                summary.examples += unit.n_examples as usize;
                summary.target_tokens += unit.target_tokens as usize;
                used += unit.used as usize;
            }
            match summary.shapes.iter_mut().find(|shape| shape.length == length) {
                Some(shape) => shape.batches += 1,
                None => summary.shapes.push(ShapeCount {
                    rows: self.batch_rows(),
                    length,
                    batches: 1,
                }),
            }
        }
        summary.shapes.sort_by_key(|shape| shape.length);
        summary.padding_fraction = 1.0 - used as f64 / positions.max(1) as f64;
        Ok(summary)
    }
}

fn window_rows(layout: &Epoch, epoch: u64, index: usize) -> Result<Range<usize>> {
    layout.window(index).ok_or(Error::NoSuchWindow {
        epoch,
        index,
        windows: layout.windows.len(),
    })
}

impl PlanSummary {
    fn empty() -> Self {
        Self {
            shapes: Vec::new(),
            windows: 0,
            micro_batches: 0,
            examples: 0,
            target_tokens: 0,
            padding_fraction: 0.0,
        }
    }
}

fn check(data: &Dataset, options: &PlanOptions) -> Result<()> {
    if options.batch_size == 0 || options.accumulation == 0 || options.max_shapes == 0 {
        return Err(Error::plan(
            "train.batch_size, train.accumulation and max_shapes must be at least 1",
            "raise the one that is 0",
        ));
    }
    if let Some(longest) = data
        .examples()
        .iter()
        .map(|example| example.n_tokens)
        .max()
        .filter(|n| *n > options.max_seq_length)
    {
        return Err(Error::plan(
            format!(
                "an example has {longest} tokens, and the plan's limit is {}",
                options.max_seq_length
            ),
            "plan with the max_seq_length that the data was read with",
        ));
    }
    if options.packing && data.examples().iter().any(|example| example.side.is_some()) {
        return Err(Error::plan(
            "preference pairs cannot be packed",
            "leave out data.packing",
        ));
    }
    if let Some(weights) = &options.sampler_weights {
        if weights.len() != data.len() {
            return Err(Error::plan(
                format!("{} sampler weights for {} examples", weights.len(), data.len()),
                "give one weight an example",
            ));
        }
        let sum: f64 = weights.iter().sum();
        if !weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0) || sum <= 0.0 {
            return Err(Error::plan(
                "sampler weights must be finite, not negative, and not all 0",
                "check the distrust fields",
            ));
        }
    }
    Ok(())
}

fn units(examples: &[Example]) -> Vec<Unit> {
    let mut units = Vec::with_capacity(examples.len());
    let mut first = 0;
    while first < examples.len() {
        let n_examples = if examples[first].side.is_some() { 2 } else { 1 };
        let members = &examples[first..(first + n_examples).min(examples.len())];
        let costs = || members.iter().map(|example| example.n_tokens as u32 - 1);
        units.push(Unit {
            first: first as u32,
            n_examples: members.len() as u32,
            cost: costs().max().unwrap_or(0),
            used: costs().sum(),
            target_tokens: members.iter().map(|example| example.n_targets as u32).sum(),
        });
        first += n_examples;
    }
    units
}

/// The version in front changes whenever the same settings would give other batches.
fn plan_hash(data: &Dataset, options: &PlanOptions) -> String {
    let mut digest = Sha256::new();
    digest.update(b"planish batch plan 1\0");
    digest.update(data.fingerprint());
    for number in [
        options.batch_size as u64,
        options.accumulation as u64,
        options.max_seq_length as u64,
        options.seed,
        u64::from(options.shuffle),
        u64::from(options.packing),
        options.rungs as u64,
        options.max_shapes as u64,
    ] {
        digest.update(number.to_le_bytes());
    }
    for weight in options.sampler_weights.iter().flatten() {
        digest.update(weight.to_bits().to_le_bytes());
    }
    crate::hex(&digest.finalize())
}

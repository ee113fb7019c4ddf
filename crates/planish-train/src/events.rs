//! What a run tells while it goes on. The library hands these values out; whoever runs it decides what to print.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use planish_data::PlanSummary;

pub use crate::figures::Figures;

/// Receives the events of a run, in order, on the training thread.
pub trait Observer {
    /// Called once an event.
    fn on_event(&mut self, event: &Event);
}

impl<F: FnMut(&Event)> Observer for F {
    fn on_event(&mut self, event: &Event) {
        self(event);
    }
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {
    fn on_event(&mut self, _: &Event) {}
}

/// Something that happened in a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// Everything is ready; the first update comes next.
    Started(Box<RunPlan>),
    /// One update is done.
    Step(StepReport),
    /// Figures of the updates since the last report, as written to `metrics.jsonl`.
    Report(Box<TrainReport>),
    /// The validation set was evaluated.
    Evaluated(EvalReport),
    /// A file or folder is safely on disk.
    Saved(SaveReport),
    /// An update was refused, or its gradient was unusually large.
    Guard(GuardReport),
    /// The model answered a prompt of the data.
    Sampled(SampleReport),
    /// Something the user should know, in one sentence.
    Note(String),
    /// The run is over.
    Finished(Box<Summary>),
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Position {
    /// Updates done, refused ones included.
    pub step: usize,
    /// Passes over the data, with the fraction of the current one.
    pub epoch: f64,
    /// Forward and backward passes done.
    pub micro_step: usize,
}

/// What a run is going to do.
#[derive(Debug, Clone, PartialEq)]
pub struct RunPlan {
    /// Updates of the whole run.
    pub total_steps: usize,
    /// Updates already done, when resumed.
    pub first_step: usize,
    /// Updates of one epoch.
    pub steps_per_epoch: usize,
    /// Paths of the adapted modules; empty for full fine-tuning.
    pub modules: Vec<String>,
    /// Rank and multiplier that each of them trains with.
    pub own_rank_and_scale: Vec<(usize, f64)>,
    /// Trainable numbers.
    pub trainable: usize,
    /// All numbers of the model, adapters included.
    pub total: usize,
    /// The final multiplier of the adapters, as the files hold it.
    pub scale: f64,
    /// Rank of the adapters, as the files hold it: the largest of any module, twice that for PiSSA.
    pub rank: usize,
    /// Shapes, padding and counts of the first epoch.
    pub data: PlanSummary,
    /// Digest of the data and every setting that decides the order.
    pub plan_hash: String,
    /// Updates of warm-up.
    pub warmup_steps: usize,
    /// Effective sample size as a share of the examples, with distrust weights.
    pub effective_share: Option<f64>,
    /// Peak of one update at the largest shape, where it was measured.
    pub step_memory_bytes: Option<u64>,
}

/// One update.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepReport {
    /// After the update.
    pub position: Position,
    /// Updates of the whole run.
    pub total_steps: usize,
    /// Cross-entropy a trained token, unweighted, or the loss a preference pair, in nats.
    pub loss: f64,
    /// Learning rate of the update.
    pub learning_rate: f64,
    /// Global norm of the gradient before clipping.
    pub grad_norm: f64,
    /// What the loss is a mean over: trained tokens, or preference pairs.
    pub items: usize,
    /// Trained tokens of the update.
    pub tokens: usize,
    /// Seconds it took.
    pub seconds: f64,
    /// False when the guard refused it.
    pub accepted: bool,
}

/// Figures of the updates since the last report.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct TrainReport {
    /// After the last of them.
    pub position: Position,
    /// Cross-entropy a trained token over the interval, unweighted, in nats.
    pub loss: f64,
    /// What was minimised, a token, where it differs from `loss`.
    pub loss_weighted: Option<f64>,
    /// Figures of the distrust weights.
    pub distrust: Option<DistrustReport>,
    /// Means of what the objective reports besides.
    pub figures: Figures,
    /// Learning rate of the last update.
    pub lr: f64,
    /// Learning rate of `lora_b`, where LoRA+ sets it apart.
    pub lr_b: Option<f64>,
    /// Norm of the last gradient, before clipping.
    pub grad_norm: f64,
    /// Share of the updates that were clipped.
    pub clipped: f64,
    /// Trained tokens since the start of the run.
    pub tokens: u64,
    /// Tokens with context since the start of the run.
    pub tokens_total: u64,
    /// Examples since the start of the run.
    pub examples: u64,
    /// Trained tokens a second of training.
    pub tokens_per_second: f64,
    /// Updates a second of training.
    pub steps_per_second: f64,
    /// Seconds since the start of this process's part of the run.
    pub elapsed_seconds: f64,
    /// Seconds that the rest will take at this pace.
    pub eta_seconds: f64,
    /// Memory counters.
    pub memory: Memory,
    /// Positions without a token, as a share, over the interval.
    pub padding_fraction: f64,
    /// Distinct shapes so far.
    pub shapes_seen: usize,
    /// Updates refused so far.
    pub skipped_steps: u64,
}

/// Figures of distrust weighting over an interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DistrustReport {
    /// Mean effective sample size of the windows.
    pub ess: f64,
    /// The same as a share of their examples.
    pub ess_fraction: f64,
    /// Largest weight that was used.
    pub weight_max: f64,
    /// Mean of the published value `α·c²`; never part of `loss`.
    pub value: f64,
}

/// Bytes in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Most that MLX's live arrays took since the last report.
    pub peak_bytes: u64,
    /// MLX's live arrays.
    pub active_bytes: u64,
    /// Buffers that MLX keeps for reuse.
    pub cache_bytes: u64,
    /// Resident memory of the process; `None` where the system does not say.
    pub rss_bytes: Option<u64>,
}

/// Loss on the validation set.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalReport {
    /// When.
    pub position: Position,
    /// Cross-entropy a token, or the loss a preference pair, in nats.
    pub loss: f64,
    /// `exp(loss)`, where the loss is that of tokens.
    pub perplexity: Option<f64>,
    /// Standard error of the perplexity.
    pub perplexity_se: Option<f64>,
    /// Trained tokens that were counted.
    pub tokens: usize,
    /// Means of what the objective reports besides.
    pub figures: Figures,
    /// Whether it is the best so far.
    pub best: bool,
    /// The step of the best so far.
    pub best_step: usize,
    /// Evaluations without a new best that are still allowed; `None` when the run does not stop early.
    pub patience_left: Option<usize>,
    /// Loss under the training split's distrust weights.
    pub loss_weighted: Option<f64>,
    /// Seconds it took.
    pub seconds: f64,
}

/// Something was written.
#[derive(Debug, Clone, PartialEq)]
pub struct SaveReport {
    /// When.
    pub position: Position,
    /// Where.
    pub path: PathBuf,
    /// SHA-256 of the adapter tensors.
    pub sha256: String,
    /// Seconds it took.
    pub seconds: f64,
}

/// An answer of the model to a prompt of the data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SampleReport {
    /// `before` or `after` training.
    pub when: &'static str,
    /// The prompt as the model reads it.
    pub prompt: String,
    /// The likeliest answer, token by token.
    pub text: String,
    /// What the data says.
    pub expected: String,
}

/// What the guard saw.
#[derive(Debug, Clone, PartialEq)]
pub struct GuardReport {
    /// When.
    pub position: Position,
    /// Why.
    pub reason: GuardReason,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// The rows of the update, or those whose own loss was not finite, as `file:line`.
    pub rows: Vec<String>,
    /// Updates refused so far.
    pub skipped_steps: u64,
}

/// Why the guard spoke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardReason {
    /// The loss or the gradient was not finite; the update was refused.
    NotFinite,
    /// The gradient was far above its running median; the update was applied.
    Spike,
}

impl GuardReason {
    /// As written to `metrics.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotFinite => "not_finite",
            Self::Spike => "spike",
        }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub end: End,
    /// Where it stood.
    pub position: Position,
    /// Loss of the last report.
    pub last_loss: Option<f64>,
    /// The best evaluation: step and loss.
    pub best: Option<(usize, f64)>,
    /// Which step's adapter is in the output folder; `None` where none is.
    pub adapter_step: Option<usize>,
    /// Trained tokens of the whole run.
    pub tokens: u64,
    /// Updates refused.
    pub skipped_steps: u64,
    /// Seconds of this process's part.
    pub elapsed_seconds: f64,
    /// The output folder.
    pub out: PathBuf,
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All updates are done.
    Completed,
    /// The validation loss did not improve any more.
    StoppedEarly,
    /// Somebody asked it to stop; the state is saved, or nothing is left where no update was done.
    Interrupted,
    /// Losses are not finite any more; what was saved before is kept.
    Diverged,
    /// An error ended it; what was saved before is kept.
    Failed,
    /// It had been finished before; nothing was changed.
    AlreadyFinished,
}

impl End {
    /// As written to `metrics.jsonl`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::StoppedEarly => "stopped_early",
            Self::Interrupted => "interrupted",
            Self::Diverged => "diverged",
            Self::Failed => "failed",
            Self::AlreadyFinished => "already_finished",
        }
    }
}

/// Asks a run to stop after the update it is in; clones share the request.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Asks.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether somebody asked.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

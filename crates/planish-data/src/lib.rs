//! From JSONL rows to padded or packed batches with a loss mask. No MLX, nothing printed.
//!
//! [`Splits`] or [`Dataset`] read rows, [`ChatTemplate`] renders them, [`Tokenizer`] encodes them, [`BatchPlan`] cuts
//! them into the micro-batches of optimizer windows. Lengths are in tokens, shapes are `[rows, length]`.

mod batch;
mod control;
mod csv;
mod dataset;
mod encode;
mod ends;
mod error;
mod format;
#[doc(hidden)]
pub mod fuzzing;
mod guard;
mod jinja;
mod json;
mod ladder;
mod layout;
mod limit;
mod lines;
mod loader;
mod mask;
mod mlx_lm;
mod notes;
mod options;
mod order;
mod packing;
mod plan;
mod prepare;
mod provenance;
mod record;
mod rendering;
mod report;
mod score;
mod show;
mod splits;
mod store;
mod template;
mod tokenizer;

pub use batch::{Batch, Segment};
pub use control::ControlTokens;
pub use dataset::{Dataset, Example, ExampleTokens, Side};
pub use ends::with_end_tokens;
pub use error::{Error, Result, RowError, RowErrorKind};
pub use format::{FieldNames, Format};
pub use ladder::{Ladder, Rungs};
pub use layout::Layout;
pub use mask::Straddling;
pub use mlx_lm::MlxLmPlan;
pub use options::{DataOptions, MissingProvenance, OnPrefixViolation, OnRowError, Overlong, Train};
pub use plan::{BatchPlan, Cursor, PlanOptions, PlanSummary, ShapeCount, Window};
pub use provenance::{Provenance, Scoring, shannon_bits};
pub use record::Role;
pub use report::{DataReport, LengthStats, Remark};
pub use score::{Score, ScoreInput, ScoreReport, score, score_file};
pub use show::{Shown, ShownKind, ShownSpan, SourceMix, show, survey};
pub use splits::{Leak, Split, SplitFiles, Splits};
pub use template::{ChatTemplate, TemplateOptions};
pub use tokenizer::{DecodeStream, Encoded, Tokenizer};

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

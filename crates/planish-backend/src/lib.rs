//! Which device can train here: probed in a child process, chosen with a reason, held to memory limits.
//!
//! A device is used only after its numbers agreed with the CPU's. Everything that touches a GPU for the first time runs in
//! a child ([`probe()`] starts it, [`child_main`] is what it runs), because a bad driver ends the process it lives in.
//! [`select`] does all of it, with remembered verdicts. A program that uses this crate must hand the hidden subcommand [`PROBE_COMMAND`] to [`child_main`].

mod cache;
mod child;
mod choose;
mod error;
mod files;
mod limits;
mod machine;
mod probe;
mod report;
mod select;
mod stages;
mod tail;

pub use cache::{CacheKey, VerdictCache};
pub use child::{PROBE_COMMAND, child_main, die_with_parent};
pub use choose::{Choice, Rejected, Requested, choose};
pub use error::{Error, Result};
pub use files::{FileFacts, MetallibFacts, MlxFiles};
pub use limits::{MemoryBudget, budget, set_limits};
pub use machine::Machine;
pub use probe::{Limits, conclude, probe, run_guarded};
pub use report::{Backend, Check, CheckStatus, ChildEnd, DeviceReport, ProbeReport, Verdict};
pub use select::{Prober, select};

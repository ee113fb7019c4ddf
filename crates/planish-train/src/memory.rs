//! Memory of this process and of MLX, read for reports.

use planish_core::memory::{available_bytes, resident_bytes};
use planish_mlx::device::{self, DeviceFact};

use crate::Result;
use crate::events::Memory;

/// Reads all counters and starts a new peak.
pub(crate) fn read_and_reset_peak() -> Result<Memory> {
    let usage = planish_mlx::memory::usage()?;
    planish_mlx::memory::reset_peak()?;
    Ok(Memory {
        peak_bytes: usage.peak_bytes as u64,
        active_bytes: usage.active_bytes as u64,
        cache_bytes: usage.cache_bytes as u64,
        rss_bytes: resident_bytes(),
    })
}

/// What a run may use: what the device recommends, and at most four fifths of the memory that this process may use.
/// `None` where the system tells neither.
pub(crate) fn budget() -> Result<Option<u64>> {
    let facts = device::facts(device::default_kind()?)?;
    let number = |name: &str| match facts.get(name) {
        Some(DeviceFact::Number(number)) => Some(*number as u64),
        _ => None,
    };
    let of_machine = available_bytes()
        .or_else(|| number("memory_size"))
        .map(|bytes| bytes / 5 * 4);
    let recommended = number("max_recommended_working_set_size").filter(|bytes| *bytes > 0);
    Ok([of_machine, recommended].into_iter().flatten().min())
}

//! Memory of this process and of MLX, read for reports.

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

/// Resident memory of the process in bytes, where `/proc` tells it.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

//! How much memory a run may use.

use planish_core::memory::available_bytes;

use crate::{DeviceReport, Result};

/// Share of the memory that this process may use, that a run may take.
const SHARE_OF_RAM: f64 = 0.8;
/// Share of the limit above which MLX returns cached buffers to the system. A step frees and takes again what its activations
/// need: with a small cache each step would ask the driver for them.
const SHARE_OF_CACHE: f64 = 0.5;

/// Bytes that a run may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBudget {
    /// In all.
    pub total_bytes: u64,
    /// Kept by the allocator for reuse.
    pub cache_bytes: u64,
}

/// The smaller of what the device recommends and 80 % of the memory that this process may use, or what the user set.
///
/// `None` where neither is known.
pub fn budget(device: &DeviceReport, asked: Option<u64>) -> Option<MemoryBudget> {
    let ram = available_bytes().map(|bytes| (bytes as f64 * SHARE_OF_RAM) as u64);
    let known = [device.recommended_bytes, ram].into_iter().flatten().min();
    let total_bytes = asked.or(known)?;
    Some(MemoryBudget {
        total_bytes,
        cache_bytes: (total_bytes as f64 * SHARE_OF_CACHE) as u64,
    })
}

/// Makes MLX keep to a budget.
///
/// # Errors
/// [`Error::Mlx`](crate::Error::Mlx) when MLX refuses.
pub fn set_limits(budget: &MemoryBudget) -> Result<()> {
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    planish_mlx::memory::set_memory_limit(size(budget.total_bytes))?;
    planish_mlx::memory::set_cache_limit(size(budget.cache_bytes))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_known_bound_counts_and_the_user_wins() {
        let device = DeviceReport {
            recommended_bytes: Some(1000),
            ..DeviceReport::default()
        };
        assert_eq!(
            budget(&device, None),
            Some(MemoryBudget {
                total_bytes: 1000,
                cache_bytes: 500
            })
        );
        assert_eq!(budget(&device, Some(500)).map(|b| b.total_bytes), Some(500));
        let unknown = budget(&DeviceReport::default(), None).map(|b| b.total_bytes);
        assert_eq!(
            unknown,
            available_bytes().map(|bytes| (bytes as f64 * SHARE_OF_RAM) as u64)
        );
    }
}

//! What MLX's allocator holds, and its limits. All counters are global to the process and in bytes.

use crate::{Result, install_error_handler};

/// A reading of MLX's memory counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Bytes in arrays that are alive.
    pub active_bytes: usize,
    /// Bytes kept for reuse by the allocator.
    pub cache_bytes: usize,
    /// Largest value of `active_bytes` since the start or the last [`reset_peak`].
    pub peak_bytes: usize,
}

/// Reads the counters.
///
/// # Errors
/// [`crate::Error::Operation`] when MLX does not answer.
///
/// # Example
/// ```
/// use planish_mlx::{Array, memory};
/// let array = Array::zeros::<f32>(&[1024])?;
/// array.eval()?;
/// assert!(memory::usage()?.active_bytes >= 4096);
/// # Ok::<(), planish_mlx::Error>(())
/// ```
pub fn usage() -> Result<MemoryUsage> {
    install_error_handler();
    Ok(MemoryUsage {
        active_bytes: mlx_rs::memory::active_memory()?,
        cache_bytes: mlx_rs::memory::cache_memory()?,
        peak_bytes: mlx_rs::memory::peak_memory()?,
    })
}

/// Sets the peak counter back to zero.
///
/// # Errors
/// [`crate::Error::Operation`] when MLX refuses.
pub fn reset_peak() -> Result<()> {
    install_error_handler();
    Ok(mlx_rs::memory::reset_peak_memory()?)
}

/// Returns the allocator's cached buffers to the system.
///
/// # Errors
/// [`crate::Error::Operation`] when MLX refuses.
pub fn clear_cache() -> Result<()> {
    install_error_handler();
    Ok(mlx_rs::memory::clear_cache()?)
}

/// The bytes above which MLX waits for memory to be freed.
///
/// # Errors
/// [`crate::Error::Operation`] when MLX does not answer.
pub fn memory_limit() -> Result<usize> {
    install_error_handler();
    Ok(mlx_rs::memory::memory_limit()?)
}

/// Sets the memory limit and returns the previous one.
///
/// # Errors
/// [`crate::Error::Operation`] when MLX refuses.
pub fn set_memory_limit(bytes: usize) -> Result<usize> {
    install_error_handler();
    Ok(mlx_rs::memory::set_memory_limit(bytes)?)
}

/// Sets the largest size of the allocator's cache and returns the previous one.
///
/// # Errors
/// [`crate::Error::Operation`] when MLX refuses.
pub fn set_cache_limit(bytes: usize) -> Result<usize> {
    install_error_handler();
    Ok(mlx_rs::memory::set_cache_limit(bytes)?)
}

/// Sets how many bytes may stay resident for the GPU (Metal on macOS 15 and later) and returns the previous limit.
///
/// # Errors
/// [`crate::Error::Operation`] where the machine has no such limit.
pub fn set_wired_limit(bytes: usize) -> Result<usize> {
    install_error_handler();
    Ok(mlx_rs::memory::set_wired_limit(bytes)?)
}

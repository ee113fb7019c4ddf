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

/// Tells the system's allocator to keep what is freed, and returns whether it did.
///
/// MLX takes the memory of CPU arrays from `malloc`, which gives large blocks back to the system at once; the next
/// operation gets them again page by page, cleared. Training frees and takes the same sizes all the time. To be called once,
/// before the first array. Only glibc can be told; elsewhere nothing happens.
pub fn keep_freed_memory() -> bool {
    keep_freed()
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
fn keep_freed() -> bool {
    /// Blocks below this size come from the heap, which is kept.
    const LARGEST_HEAP_BLOCK: libc::c_int = 1 << 30;
    // SAFETY: mallopt changes settings of the allocator under its own lock.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK) == 1
            && libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX) == 1
            // MLX allocates on one thread and works on another; arenas of other threads cannot hold large blocks.
            && libc::mallopt(libc::M_ARENA_MAX, 1) == 1
            // Grow in steps, not block by block.
            && libc::mallopt(libc::M_TOP_PAD, 64 << 20) == 1
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed() -> bool {
    false
}

/// Makes MLX hand its work to an NVIDIA GPU in pieces that touch at most 300 MB, unless `MLX_MAX_MB_PER_BUFFER` says otherwise.
///
/// MLX frees what a piece has used when the piece is done, and has ten of them under way. Of the size that it takes by itself,
/// 1 GB on an H100, they hold as much memory as all activations of a model of 1B parameters. To be called before anything is
/// computed. Nothing happens on macOS.
///
/// # Safety
/// Sets an environment variable: no other thread may read or write the environment meanwhile. At the beginning of a program's
/// `main` nothing does: threads that libraries have started while they were loaded wait for work.
#[allow(unsafe_code)]
pub unsafe fn bound_command_buffers() {
    const NAME: &str = "MLX_MAX_MB_PER_BUFFER";
    if cfg!(target_os = "linux") && std::env::var_os(NAME).is_none() {
        // SAFETY: the caller promises it.
        unsafe { std::env::set_var(NAME, "300") };
    }
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

//! Where kernels run.

/// Runs `work` on a thread of the pool, where the loops inside start without waking another thread first.
pub fn on_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| work())
}

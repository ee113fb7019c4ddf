//! Where kernels run.

use std::cell::OnceCell;

use rayon::{ThreadPool, ThreadPoolBuilder};

thread_local! {
    static POOL: OnceCell<Option<ThreadPool>> = const { OnceCell::new() };
}

/// Runs `work` with the calling thread as one of as many threads as the processor has, so that the loops inside start at
/// once: to hand work to a sleeping pool costs more than a small kernel does.
///
/// Meant for the thread that evaluates MLX's CPU stream; each calling thread gets a pool of its own, which stays with it.
pub fn on_pool<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    if rayon::current_thread_index().is_some() {
        return work(); // a worker, perhaps since an earlier call
    }
    POOL.with(|pool| {
        let pool = pool.get_or_init(|| {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            ThreadPoolBuilder::new()
                .num_threads(threads)
                .use_current_thread()
                .build()
                .ok()
        });
        match pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    })
}

#[cfg(test)]
mod tests {
    use rayon::prelude::*;

    use super::*;

    #[test]
    fn work_starts_on_the_calling_thread_and_loops_share_it() {
        let caller = std::thread::current().id();
        for _ in 0..2 {
            let (first, sum) = on_pool(|| {
                let sum: u64 = (0..10_000_u64).into_par_iter().sum();
                (std::thread::current().id(), sum)
            });
            assert_eq!(first, caller);
            assert_eq!(sum, 49_995_000);
        }
    }
}

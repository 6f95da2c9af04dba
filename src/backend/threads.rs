//! The threads that share the work of one call. The calling thread always works too, so a pool of n threads has n − 1 helpers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::error::{Error, Result};

fn build(threads: usize) -> Result<Arc<ThreadPool>> {
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("skvq-{i}")).build();
    pool.map(Arc::new).map_err(|error| Error::value("threads", "a number of threads that can be started", error))
}

fn current() -> &'static RwLock<Arc<ThreadPool>> {
    static POOL: OnceLock<RwLock<Arc<ThreadPool>>> = OnceLock::new();
    POOL.get_or_init(|| {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        RwLock::new(build(threads).expect("the default threads can be started"))
    })
}

fn pool() -> Arc<ThreadPool> {
    Arc::clone(&current().read().unwrap_or_else(std::sync::PoisonError::into_inner))
}

pub fn num_threads() -> usize {
    pool().current_num_threads()
}

/// Replaces the pool; calls under way keep theirs.
pub fn set_num_threads(threads: usize) -> Result<()> {
    if threads == 0 {
        return Err(Error::value("threads", "at least 1", 0));
    }
    let pool = build(threads)?;
    *current().write().unwrap_or_else(std::sync::PoisonError::into_inner) = pool;
    Ok(())
}

/// Runs `work` inside the pool, for rayon's parallel iterators.
pub fn install<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    pool().install(work)
}

/// Runs `work(i)` for every i below `items` on at most `threads` threads, this one among them; results in order.
pub fn share<R: Send>(items: usize, threads: usize, work: impl Fn(usize) -> R + Sync) -> Vec<R> {
    let threads = threads.min(items);
    if threads <= 1 {
        return (0..items).map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(items));
    let run = || {
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items {
                break;
            }
            let result = work(item);
            done.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((item, result));
        }
    };
    pool().in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| run());
        }
        run();
    });
    let mut done = done.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    done.sort_unstable_by_key(|(item, _)| *item);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_whatever_the_threads() {
        for threads in [1, 2, 7] {
            assert_eq!(share(100, threads, |i| i * i), (0..100).map(|i| i * i).collect::<Vec<_>>());
        }
        assert!(share(0, 4, |i| i).is_empty());
        assert!(set_num_threads(0).is_err());
    }
}

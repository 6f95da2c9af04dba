//! Device memory of a layer: blocks that torch's allocator has lent, and pages cut from them.
//!
//! What it is: owners of addresses. Blocks go back to torch when their last user is dropped, pages go back to their pool; whoever works with
//! them meanwhile works on the same stream, so that what the device still has to do comes before what the next owner does. What it is not:
//! an allocator, nor a reader of what is there.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};

/// Every block begins at a multiple of this, as torch's do.
pub const ALIGNMENT: usize = 256;

/// Memory of the device, alive as long as this.
pub struct Block {
    address: u64,
    bytes: usize,
    _owner: Box<dyn Any + Send + Sync>,
}

impl Block {
    /// `owner` keeps the memory alive. Refuses memory that is not aligned as kernels need it.
    pub fn new(address: u64, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Result<Self> {
        if address == 0 || !address.is_multiple_of(ALIGNMENT as u64) {
            return Err(Error::value("allocate", format!("an address at a multiple of {ALIGNMENT}"), address));
        }
        Ok(Self { address, bytes, _owner: owner })
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Where blocks come from.
pub trait Memory: Send + Sync {
    /// At least one byte, at a multiple of [`ALIGNMENT`], with anything in it.
    fn allocate(&self, bytes: usize) -> Result<Block>;
}

/// Pages of one size, cut from blocks. What is free is used again; blocks go back when the pool and all its pages are gone.
pub struct PagePool {
    page_bytes: usize,
    memory: Arc<dyn Memory>,
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    blocks: Vec<Block>,
    /// Addresses, the next one last.
    free: Vec<u64>,
    pages: usize,
}

impl PoolState {
    /// The next `count` free pages, the first one last; or how many more there must be, and how many there should.
    fn take(&mut self, count: usize) -> Result<Vec<u64>, [usize; 2]> {
        let Some(kept) = self.free.len().checked_sub(count) else {
            let missing = count - self.free.len();
            // An eighth more than there are: a growing cache asks seldom, and holds little that it does not use.
            return Err([missing, missing.max(self.pages / 8)]);
        };
        Ok(self.free.split_off(kept))
    }

    /// Free pages of a block are used after those that are free already.
    fn add(&mut self, block: Block, pages: usize, page_bytes: usize) {
        let fresh = (0..pages).rev().map(|page| block.address + (page * page_bytes) as u64);
        self.free.splice(..0, fresh);
        self.pages += pages;
        self.blocks.push(block);
    }
}

/// A page; cloning the `Arc` around it shares it.
pub struct Page {
    address: u64,
    pool: Arc<PagePool>,
}

impl PagePool {
    pub fn new(page_bytes: usize, memory: Arc<dyn Memory>) -> Arc<Self> {
        Arc::new(Self { page_bytes, memory, state: Mutex::default() })
    }

    pub fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    /// `count` pages that nobody else has, with anything in them; none on an error.
    pub fn take(self: &Arc<Self>, count: usize) -> Result<Vec<Arc<Page>>> {
        loop {
            let [missing, wanted] = match self.state().take(count) {
                Ok(addresses) => {
                    let own = |address| Arc::new(Page { address, pool: Arc::clone(self) });
                    return Ok(addresses.into_iter().rev().map(own).collect());
                }
                Err(sizes) => sizes,
            };
            // Without the lock: lending may wait for Python's interpreter, and who holds that may wait for the lock.
            let lend = |pages: usize| Ok((self.memory.allocate(pages * self.page_bytes)?, pages));
            let (block, pages) =
                lend(wanted).or_else(|error| if wanted > missing { lend(missing) } else { Err(error) })?;
            self.state().add(block, pages, self.page_bytes);
        }
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of all blocks.
    pub fn bytes(&self) -> usize {
        self.state().blocks.iter().map(Block::bytes).sum()
    }
}

impl Page {
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.pool.state().free.push(self.address);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{OnceLock, Weak};

    use super::*;

    struct Counting(Mutex<Vec<usize>>);

    impl Memory for Counting {
        fn allocate(&self, bytes: usize) -> Result<Block> {
            let mut asked = self.0.lock().unwrap();
            asked.push(bytes);
            Block::new((asked.len() << 20) as u64, bytes, Box::new(()))
        }
    }

    #[test]
    fn pages_are_used_again_and_blocks_are_few() {
        let memory = Arc::new(Counting(Mutex::default()));
        let pool = PagePool::new(64, Arc::clone(&memory) as Arc<dyn Memory>);
        let first = pool.take(16).unwrap();
        assert_eq!(first.iter().map(|page| page.address()).collect::<Vec<_>>()[..2], [1 << 20, (1 << 20) + 64]);
        let shared = Arc::clone(&first[3]);
        drop(first);
        assert_eq!(pool.take(15).unwrap().len(), 15);
        let again = pool.take(17).unwrap();
        assert!(again.iter().all(|page| page.address() != shared.address()));
        assert_eq!(*memory.0.lock().unwrap(), [16 * 64, 2 * 64]);
        assert_eq!(pool.bytes(), 18 * 64);
    }

    /// Lends no more than so many bytes at a time.
    struct Little(usize);

    impl Memory for Little {
        fn allocate(&self, bytes: usize) -> Result<Block> {
            if bytes > self.0 {
                return Err(Error::state("allocate", format!("{bytes} bytes"), "no memory left"));
            }
            Block::new(1 << 20, bytes, Box::new(()))
        }
    }

    #[test]
    fn where_memory_is_short_a_pool_takes_only_what_it_needs() {
        let pool = PagePool::new(64, Arc::new(Little(32 * 64)));
        // From 264 pages on an eighth is more than is lent.
        let pages: Vec<_> = (0..13).map(|_| pool.take(32).unwrap()).collect();
        assert_eq!(pool.bytes(), pages.len() * 32 * 64);
        assert!(pool.take(40).is_err());
        assert_eq!(pool.bytes(), pages.len() * 32 * 64);
    }

    /// Refuses to lend while the pool that asks is locked.
    struct Watching(OnceLock<Weak<PagePool>>);

    impl Memory for Watching {
        fn allocate(&self, bytes: usize) -> Result<Block> {
            let pool = self.0.get().and_then(Weak::upgrade).expect("the pool asks");
            assert!(pool.state.try_lock().is_ok());
            Block::new(1 << 20, bytes, Box::new(()))
        }
    }

    #[test]
    fn nothing_is_locked_while_memory_is_lent() {
        let memory = Arc::new(Watching(OnceLock::new()));
        let pool = PagePool::new(64, Arc::clone(&memory) as Arc<dyn Memory>);
        assert!(memory.0.set(Arc::downgrade(&pool)).is_ok());
        assert_eq!(pool.take(3).unwrap().len(), 3);
    }

    #[test]
    fn memory_that_is_not_aligned_is_refused() {
        assert!(Block::new(1 << 20 | 16, 64, Box::new(())).is_err());
        assert!(Block::new(0, 64, Box::new(())).is_err());
    }
}

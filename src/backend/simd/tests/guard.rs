//! Bytes that end where the process may not read: an access of one byte too many ends the test.

use std::slice;

#[cfg(target_os = "linux")]
mod pages {
    use std::{ffi::c_void, ptr};

    unsafe extern "C" {
        fn mmap(
            address: *mut c_void,
            length: usize,
            protection: i32,
            flags: i32,
            file: i32,
            offset: i64,
        ) -> *mut c_void;
        fn mprotect(address: *mut c_void, length: usize, protection: i32) -> i32;
        fn munmap(address: *mut c_void, length: usize) -> i32;
    }

    /// A multiple of every page size in use, so that half of it is whole pages.
    const HALF: usize = 1 << 16;
    const READ_WRITE: i32 = 3;
    const PRIVATE_ANONYMOUS: i32 = 0x22;

    pub(super) const CAPACITY: usize = HALF;

    pub(super) fn allocate() -> *mut u8 {
        // SAFETY: a fresh mapping; its second half becomes inaccessible.
        unsafe {
            let start = mmap(ptr::null_mut(), 2 * HALF, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0);
            assert_ne!(start as isize, -1, "mmap failed");
            assert_eq!(mprotect(start.add(HALF), HALF, 0), 0, "mprotect failed");
            start.cast()
        }
    }

    pub(super) fn free(start: *mut u8) {
        // SAFETY: `start` came from `allocate`.
        unsafe { munmap(start.cast(), 2 * HALF) };
    }
}

/// Elsewhere a plain allocation: overruns of the checked bytes only show in a sanitizer.
#[cfg(not(target_os = "linux"))]
mod pages {
    pub(super) const CAPACITY: usize = 1 << 16;

    pub(super) fn allocate() -> *mut u8 {
        Box::into_raw(Box::new([0_u8; CAPACITY])).cast()
    }

    pub(super) fn free(start: *mut u8) {
        // SAFETY: `start` came from `allocate`.
        drop(unsafe { Box::from_raw(start.cast::<[u8; CAPACITY]>()) });
    }
}

pub(super) struct Guarded {
    start: *mut u8,
    length: usize,
}

impl Guarded {
    pub(super) fn new(length: usize, fill: u8) -> Self {
        assert!(length <= pages::CAPACITY);
        let mut guarded = Self { start: pages::allocate(), length };
        guarded.bytes().fill(fill);
        guarded
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the last `length` accessible bytes of the allocation, which lives as long as `self`.
        unsafe { slice::from_raw_parts_mut(self.start.add(pages::CAPACITY - self.length), self.length) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        pages::free(self.start);
    }
}

//! One entry of the cache: a tag and a value that are always those of one store.
//!
//! A sequence lock whose readers never write: a reader that meets a store under way takes the
//! entry for empty. It is a cache: an answer may be missing, never wrong.
#![forbid(unsafe_code)]

#[cfg(all(test, loom))]
use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(all(test, loom)))]
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// An entry, in a cache line of its own or shared with one other.
#[derive(Debug)]
#[repr(align(32))]
pub(super) struct Cell {
    /// Odd while a store is under way.
    sequence: AtomicU64,
    /// 0 when the entry is empty: no tag is 0.
    tag: AtomicU64,
    value: AtomicU64,
}

// Not derived: loom's atomics have no default.
impl Default for Cell {
    fn default() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            tag: AtomicU64::new(0),
            value: AtomicU64::new(0),
        }
    }
}

impl Cell {
    /// The value stored with `tag`.
    #[inline]
    pub(super) fn load(&self, tag: u64) -> Option<u64> {
        let sequence = self.sequence.load(Ordering::Acquire);
        let found = self.tag.load(Ordering::Relaxed);
        let value = self.value.load(Ordering::Relaxed);
        // Pairs with the fence of `store`: if either load saw a later store, so does the next one.
        fence(Ordering::Acquire);
        let same = self.sequence.load(Ordering::Relaxed) == sequence;
        (found == tag && sequence & 1 == 0 && same).then_some(value)
    }

    /// Stores an entry, unless another store is under way. Returns the former tag.
    pub(super) fn store(&self, tag: u64, value: u64) -> u64 {
        let sequence = self.sequence.load(Ordering::Relaxed);
        let former = self.tag.load(Ordering::Relaxed);
        if sequence & 1 != 0
            || self
                .sequence
                .compare_exchange(sequence, sequence + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_err()
        {
            return tag;
        }
        // The odd sequence is visible before either word.
        fence(Ordering::Release);
        self.tag.store(tag, Ordering::Relaxed);
        self.value.store(value, Ordering::Relaxed);
        self.sequence.store(sequence + 2, Ordering::Release);
        former
    }

    /// Empties the entry if it is that of `tag`. No load or store may be under way.
    pub(super) fn remove(&self, tag: u64) {
        if self.tag.load(Ordering::Relaxed) == tag {
            self.clear();
        }
    }

    /// Empties the entry. No load or store may be under way.
    pub(super) fn clear(&self) {
        self.tag.store(0, Ordering::Relaxed);
    }
}

//! A device's cache of translations: bounded, filled and read without a lock.
//!
//! The cache lies inside the device's DMA guard. Accesses hold the guard shared: they look up and
//! fill. Whoever changes what the cache must hold has the guard exclusively, hence `&mut` here, so
//! an invalidation meets neither a lookup nor a fill under way, and whatever is filled later comes
//! from tables as they are later.
//!
//! Only leaves are cached. A miss walks from the root, so there is no non-leaf entry that a flush
//! could miss.
#![forbid(unsafe_code)]

mod cell;

use std::sync::atomic::{AtomicU64, Ordering};

use cell::Cell;

use super::translation::{FlushRange, leaf_size};
use super::walk::Leaf;
use crate::hv::pviommu::entry;
use crate::mem::PAGE_SIZE;

/// Fewest entries of a cache.
pub(super) const MIN_ENTRIES: u32 = 16;
/// Most entries of a cache: 32 MiB of memory for each function.
pub(super) const MAX_ENTRIES: u32 = 1 << 20;

/// Pages of one size that a flush looks up one by one. A longer flush empties the cache, which
/// costs the same whatever it holds.
const MAX_LOOKUPS: u64 = 32;

/// Bits 44:0 of a tag: page number. An address has at most 57 bits.
const LEVEL_SHIFT: u32 = 45;
/// Bits 46:45: level of the leaf. Bits 63:47: generation.
const GENERATION_SHIFT: u32 = 47;
const GENERATIONS: u64 = 1 << (64 - GENERATION_SHIFT);
/// In a value, whose bits 51:12 are the page's address: writes may pass.
const WRITABLE: u64 = 1;

const LEVELS: [u8; 3] = [1, 2, 3];

/// Counts of a cache since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IotlbCounters {
    /// Lookups that found nothing, and walked.
    pub misses: u64,
    /// Entries that were replaced by that of another page.
    pub evictions: u64,
    /// Ranges that were flushed page by page.
    pub range_flushes: u64,
    /// Times that the whole cache was emptied.
    pub full_flushes: u64,
}

/// The cache.
#[derive(Debug)]
pub(crate) struct Iotlb {
    /// A power of two of them. The place of a page is its number, folded.
    cells: Box<[Cell]>,
    generation: u64,
    /// Bit n: leaves of level n may be here. Lookups of sizes that are not in use cost nothing.
    sizes: AtomicU64,
    misses: AtomicU64,
    evictions: AtomicU64,
    range_flushes: u64,
    full_flushes: u64,
}

impl Iotlb {
    /// An empty cache of `entries` (a power of two) entries.
    pub(crate) fn new(entries: u32) -> Self {
        Self {
            cells: (0..entries.next_power_of_two())
                .map(|_| Cell::default())
                .collect(),
            generation: 0,
            sizes: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            evictions: AtomicU64::new(0),
            range_flushes: 0,
            full_flushes: 0,
        }
    }

    /// What `iova` translates to, and how many bytes from there on follow in the same page.
    // Inlined, and what is not a small page is elsewhere: the usual answer is in registers.
    #[inline(always)]
    pub(crate) fn lookup(&self, iova: u64, write: bool) -> Option<(u64, u64)> {
        let [small, ..] = LEVELS;
        let sizes = self.sizes.load(Ordering::Relaxed);
        if sizes & 1 << small != 0
            && let Some(found) = self.probe(iova, small, write)
        {
            return Some(found);
        }
        self.lookup_larger(sizes, iova, write)
    }

    /// Looks for a page of a larger size that is in use.
    #[inline(never)]
    fn lookup_larger(&self, sizes: u64, iova: u64, write: bool) -> Option<(u64, u64)> {
        let found = LEVELS[1..]
            .iter()
            .filter(|level| sizes & 1 << **level != 0)
            .find_map(|level| self.probe(iova, *level, write));
        if found.is_none() {
            self.misses.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    /// Looks for the page of one level. A write finds only what lets writes pass: otherwise a walk
    /// decides whether the page is read-only or merely clean.
    #[inline(always)]
    fn probe(&self, iova: u64, level: u8, write: bool) -> Option<(u64, u64)> {
        let tag = self.tag(page(iova, level), level);
        let value = self.cell(tag).load(tag)?;
        if write && value & WRITABLE == 0 && !mutant!("iotlb-hit-ignores-writes") {
            return None;
        }
        let offset = iova & (leaf_size(level) - 1);
        Some(((value & entry::ADDRESS) + offset, leaf_size(level) - offset))
    }

    /// Keeps what a walk for `iova` found.
    pub(crate) fn fill(&self, iova: u64, leaf: &Leaf) {
        let tag = self.tag(page(iova, leaf.level), leaf.level);
        let value = leaf.gpa & entry::ADDRESS | if leaf.writable { WRITABLE } else { 0 };
        let bit = 1 << leaf.level;
        if self.sizes.load(Ordering::Relaxed) & bit == 0 {
            self.sizes.fetch_or(bit, Ordering::Relaxed);
        }
        let former = self.cell(tag).store(tag, value);
        if former != 0 && former != tag && former >> GENERATION_SHIFT == self.generation {
            self.evictions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Forgets every translation of a page that overlaps `range`.
    pub(crate) fn flush(&mut self, range: FlushRange) {
        // A range that is too long for the smallest page in use.
        let sizes = self.sizes.load(Ordering::Relaxed);
        let count = |level: u8| -> u64 {
            let shift = u32::from(range.shift).saturating_sub(fold(level));
            1_u64.checked_shl(shift).unwrap_or(u64::MAX)
        };
        let smallest = LEVELS.into_iter().find(|level| sizes & 1 << level != 0);
        if smallest.is_some_and(|level| count(level) > MAX_LOOKUPS) {
            if mutant!("iotlb-long-flush-lost") {
                return;
            }
            self.flush_all();
            return;
        }
        self.range_flushes += 1;
        let here = |level: &u8| {
            sizes & 1 << level != 0 && (*level == 1 || !mutant!("iotlb-flush-keeps-large"))
        };
        for level in LEVELS.into_iter().filter(here) {
            let first = range.first >> fold(level);
            for page in first..first.saturating_add(count(level)) {
                let tag = self.tag(page, level);
                self.cell(tag).remove(tag);
            }
        }
    }

    /// Forgets everything, at the same cost however much that is.
    pub(crate) fn flush_all(&mut self) {
        self.full_flushes += 1;
        self.sizes.store(0, Ordering::Relaxed);
        self.generation += 1;
        if self.generation == GENERATIONS {
            // Tags of the first generations would be taken for new ones.
            self.generation = 0;
            for cell in &self.cells {
                cell.clear();
            }
        }
    }

    /// Counts since the cache was made.
    pub(crate) fn counters(&self) -> IotlbCounters {
        IotlbCounters {
            misses: self.misses.load(Ordering::Relaxed),
            evictions: self.evictions.load(Ordering::Relaxed),
            range_flushes: self.range_flushes,
            full_flushes: self.full_flushes,
        }
    }

    fn tag(&self, page: u64, level: u8) -> u64 {
        self.generation << GENERATION_SHIFT | u64::from(level) << LEVEL_SHIFT | page
    }

    /// Where the page of `tag` is, if anywhere. Pages next to each other never meet, and those of
    /// different sizes start at different places.
    fn cell(&self, tag: u64) -> &Cell {
        let page = tag & ((1 << LEVEL_SHIFT) - 1);
        let level = tag >> LEVEL_SHIFT & 3;
        let folded = page ^ page >> 11 ^ page >> 22 ^ (level - 1) << 5;
        &self.cells[folded as usize & (self.cells.len() - 1)]
    }
}

/// Number of the page of `iova` among pages of `level`.
fn page(iova: u64, level: u8) -> u64 {
    iova >> (PAGE_SIZE.trailing_zeros() + fold(level))
}

/// Bits of a 4 KiB page's number that do not count at `level`.
fn fold(level: u8) -> u32 {
    entry::INDEX_BITS * u32::from(level - 1)
}

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod tests;

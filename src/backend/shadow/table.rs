//! The guest's tables as they are in RAM, or will be when a store that waits is done.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::Ordering;

use crate::hv::pviommu::{INTERRUPT_RANGE, entry};
use crate::mem::{PAGE_SIZE, Snapshot};
use crate::pviommu::{Access, PageTable, judge, leaf_size};

/// Bytes of I/O virtual addresses that one entry of a table of `level` translates.
pub(super) const fn entry_span(level: u8) -> u64 {
    leaf_size(level)
}

/// Bytes that the whole table translates.
pub(super) const fn table_span(level: u8) -> u64 {
    leaf_size(level) * entry::COUNT
}

/// A table at its place in a domain. The same page may have several places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    /// Address of the page.
    pub(super) gpa: u64,
    /// 1 for the one that maps 4 KiB pages.
    pub(super) level: u8,
    /// First I/O virtual address that it translates.
    pub(super) base: u64,
    /// No entry above forbids writes.
    pub(super) writable: bool,
}

/// A page of the guest at its I/O virtual address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leaf {
    /// First I/O virtual address.
    pub(super) iova: u64,
    /// Where it leads to.
    pub(super) gpa: u64,
    /// Bytes: 4 KiB, 2 MiB or 1 GiB.
    pub(super) size: u64,
    /// Writes pass at every level.
    pub(super) writable: bool,
}

/// A part of a leaf that can be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) iova: u64,
    pub(super) gpa: u64,
    pub(super) len: u64,
    pub(super) writable: bool,
}

impl Leaf {
    /// What of the leaf is guest RAM and not the interrupt range, by address.
    pub(super) fn pieces(&self, ram: &Snapshot) -> impl Iterator<Item = Piece> {
        let leaf = *self;
        let end = leaf.iova + leaf.size;
        let Range { start, end: behind } = INTERRUPT_RANGE;
        let sides = [
            leaf.iova..end.min(start.max(leaf.iova)),
            behind.clamp(leaf.iova, end)..end,
        ];
        let ranges = sides.into_iter().filter(|side| side.start < side.end);
        ranges.flat_map(move |range| {
            let gpa = |iova| leaf.gpa + (iova - leaf.iova);
            let parts = ram.parts(gpa(range.start), gpa(range.end));
            parts.map(move |(part, is_writable)| Piece {
                iova: leaf.iova + (part.start - leaf.gpa),
                gpa: part.start,
                len: part.end - part.start,
                writable: leaf.writable && is_writable,
            })
        })
    }
}

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nothing, or nonsense.
    Empty,
    /// A page.
    Leaf(Leaf),
    /// A table of the next lower level.
    Link(Table),
}

/// RAM and a store that is not in it yet.
#[derive(Debug)]
pub(super) struct View<'a> {
    ram: &'a Snapshot,
    /// Address bits that no entry may have.
    unusable: u64,
    /// Address of a word, and its value to come.
    pub(super) pending: Option<(u64, u64)>,
}

impl<'a> View<'a> {
    pub(super) fn new(ram: &'a Snapshot, physical_bits: u8) -> Self {
        Self {
            ram,
            unusable: entry::ADDRESS & !((1 << physical_bits) - 1),
            pending: None,
        }
    }

    pub(super) fn ram(&self) -> &'a Snapshot {
        self.ram
    }

    /// The entry at `gpa`; a word that is not RAM is an empty entry.
    fn load(&self, gpa: u64) -> u64 {
        match self.pending {
            Some((word, value)) if word == gpa => value,
            _ => self
                .ram
                .u64(gpa)
                .map_or(0, |word| word.load(Ordering::Acquire)),
        }
    }

    /// What `value` says as the entry `index` of a table.
    pub(super) fn decode(&self, value: u64, table: &Table, index: u64) -> Entry {
        let (level, gpa) = (table.level, value & entry::ADDRESS);
        let iova = table.base + index * entry_span(level);
        let writable = table.writable && value & entry::WRITABLE != 0;
        match judge(value, level, self.unusable, Access::Read) {
            Err(_) => Entry::Empty,
            Ok(true) => Entry::Leaf(Leaf {
                iova,
                gpa,
                size: leaf_size(level),
                writable,
            }),
            Ok(false) if self.ram.check(gpa, PAGE_SIZE, false).is_ok() => Entry::Link(Table {
                gpa,
                level: level - 1,
                base: iova,
                writable,
            }),
            Ok(false) => Entry::Empty,
        }
    }

    /// What the entry `index` of a table says.
    pub(super) fn entry(&self, table: &Table, index: u64) -> Entry {
        self.decode(self.load(table.gpa + index * 8), table, index)
    }

    /// Marks an entry that says something as used: what is mapped counts as accessed, and, where the
    /// device may write, as dirty, because the host does not tell when it is
    /// (docs/decisions.md, D-152).
    pub(super) fn mark_used(&mut self, table: &Table, index: u64, found: &Entry) {
        let bits = match found {
            Entry::Empty => return,
            Entry::Leaf(leaf) if leaf.writable => entry::ACCESSED | entry::DIRTY,
            Entry::Leaf(_) | Entry::Link(_) => entry::ACCESSED,
        };
        let gpa = table.gpa + index * 8;
        if let Some((word, value)) = &mut self.pending
            && *word == gpa
        {
            *value |= bits;
            return;
        }
        let Ok(word) = self.ram.u64(gpa) else {
            return;
        };
        let value = word.load(Ordering::Acquire);
        if value & bits != bits && self.decode(value, table, index) == *found {
            let (order, failed) = (Ordering::AcqRel, Ordering::Relaxed);
            // A table that nobody can write stays unmarked. Else this fails only if somebody stores past
            // the tracker, which a flush makes good.
            if let Ok(word) = word.writable() {
                let _ = word.compare_exchange(value, value | bits, order, failed);
            }
        }
    }

    /// The table at a place, if there is one: found by a walk from the root.
    pub(super) fn table_at(&self, root: &PageTable, level: u8, base: u64) -> Option<Table> {
        let mut table = root_of(root);
        while table.level > level {
            let index = (base - table.base) / entry_span(table.level);
            match self.entry(&table, index) {
                Entry::Link(next) => table = next,
                Entry::Empty | Entry::Leaf(_) => return None,
            }
        }
        Some(table)
    }
}

/// The root as a table.
pub(super) fn root_of(table: &PageTable) -> Table {
    Table {
        gpa: table.root,
        level: table.levels.count(),
        base: 0,
        writable: true,
    }
}

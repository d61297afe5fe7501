//! One address space and the tables that it follows.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::pages::{Pages, Place};
use super::table::{Entry, Leaf, Piece, Table, View, entry_span, root_of, table_span};
use super::{Stats, Trouble, count};
use crate::backend::{AddressSpace, Intervals, Permissions};
use crate::pviommu::PageTable;

/// Most levels of a table.
const MAX_LEVELS: usize = 5;

/// Where mapped addresses lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Target {
    gpa: u64,
    writable: bool,
}

/// An address space, what is mapped in it, and the tables that say so.
#[derive(Debug)]
pub(super) struct Domain {
    pub(super) table: PageTable,
    space: Arc<dyn AddressSpace>,
    max_mappings: usize,
    /// Exactly the mappings of `space`.
    mapped: Intervals<Target>,
    /// Bytes of `mapped`.
    bytes: u64,
    /// By level, from 1 on: pages of the tables by the first address that they translate.
    tables: [BTreeMap<u64, u64>; MAX_LEVELS],
    /// The domain is blocked: nothing is mapped, and no table has a place.
    pub(super) blocked: bool,
    /// It is to be blocked, and the host failed to.
    leaking: bool,
}

impl Domain {
    pub(super) fn new(table: PageTable, space: Arc<dyn AddressSpace>, max_mappings: usize) -> Self {
        let host = space.limits().max_mappings.unwrap_or(usize::MAX);
        Self {
            table,
            space,
            max_mappings: max_mappings.min(host),
            mapped: Intervals::default(),
            bytes: 0,
            tables: Default::default(),
            blocked: false,
            leaking: false,
        }
    }

    /// The page of the table at a place.
    pub(super) fn table_at(&self, level: u8, base: u64) -> Option<u64> {
        self.tables[usize::from(level) - 1].get(&base).copied()
    }

    /// Number of mappings.
    pub(super) fn mappings(&self) -> usize {
        self.mapped.len()
    }

    /// Empties the address space for good.
    fn block(&mut self) {
        self.blocked = true;
        self.mapped.clear();
        self.bytes = 0;
        self.leaking = false;
        if let Err(error) = self.space.clear() {
            // Tried again at each flush.
            log::error!("a domain that has to be blocked is not: {error}");
            self.leaking = true;
        }
    }

    /// Tries again what the host failed to do.
    pub(super) fn block_again(&mut self) {
        if self.leaking {
            self.block();
        }
    }
}

/// A domain being worked on.
#[derive(Debug)]
pub(super) struct Follower<'a, 'r> {
    pub(super) id: u64,
    pub(super) domain: &'a mut Domain,
    pub(super) pages: &'a mut Pages,
    pub(super) view: &'a mut View<'r>,
    pub(super) stats: &'a Stats,
    pub(super) max_tables: usize,
    pub(super) max_bytes: u64,
}

impl Follower<'_, '_> {
    fn place(&self, level: u8, base: u64) -> Place {
        Place {
            domain: self.id,
            level,
            base,
        }
    }

    /// Forgets the table at a place, and all below it.
    pub(super) fn forget(&mut self, level: u8, base: u64) {
        for lower in (1..=level).rev() {
            let tables = &mut self.domain.tables[usize::from(lower) - 1];
            let below: Vec<(u64, u64)> = tables
                .range(base..base + table_span(level))
                .map(|(base, gpa)| (*base, *gpa))
                .collect();
            for (base, gpa) in below {
                self.domain.tables[usize::from(lower) - 1].remove(&base);
                self.pages.remove(gpa, self.place(lower, base));
            }
        }
    }

    /// Gives up: the device is blocked, and the tables are forgotten.
    pub(super) fn block(&mut self, trouble: &Trouble) {
        let root = root_of(&self.domain.table);
        self.forget(root.level, root.base);
        self.domain.block();
        let blocked = count(&self.stats.blocked);
        // A guest can do this as often as it likes: log at powers of two.
        if blocked.is_power_of_two() {
            let root = root.gpa;
            log::error!(
                "the domain with the root {root:#x} is blocked, {blocked} so far: {trouble}"
            );
        }
    }

    /// Notes a table at its place.
    fn note(&mut self, table: &Table) -> Result<(), Trouble> {
        let Table {
            gpa, level, base, ..
        } = *table;
        match self.domain.table_at(level, base) {
            Some(noted) if noted == gpa => return Ok(()),
            Some(_) => self.forget(level, base),
            None => {}
        }
        self.pages.add(gpa, self.place(level, base))?;
        self.domain.tables[usize::from(level) - 1].insert(base, gpa);
        Ok(())
    }

    /// Finds the leaves of `top` and all below it that touch `range`. All tables on the way are
    /// tracked before they are read, those of a level in one go; tables that are linked no more are
    /// forgotten.
    fn scan(&mut self, top: Table, range: &Range<u64>) -> Result<Vec<Leaf>, Trouble> {
        let mut leaves = Vec::new();
        let mut level = vec![top];
        while !level.is_empty() {
            for table in &level {
                self.note(table)?;
            }
            self.pages.commit()?;
            let mut next = Vec::new();
            for table in &level {
                self.read(table, range, &mut next, &mut leaves)?;
            }
            level = next;
        }
        Ok(leaves)
    }

    fn read(
        &mut self,
        table: &Table,
        range: &Range<u64>,
        links: &mut Vec<Table>,
        leaves: &mut Vec<Leaf>,
    ) -> Result<(), Trouble> {
        let (span, base) = (entry_span(table.level), table.base);
        let start = range.start.clamp(base, base + table_span(table.level));
        let end = range.end.clamp(start, base + table_span(table.level));
        let (first, last) = ((start - base) / span, (end - base).div_ceil(span));
        let former = links.len();
        for index in first..last {
            let entry = self.view.entry(table, index);
            match entry {
                Entry::Empty => continue,
                Entry::Leaf(_) if leaves.len() >= self.domain.max_mappings => {
                    let max = self.domain.max_mappings;
                    return Err(Trouble::Mappings { max });
                }
                Entry::Link(_) if links.len() >= self.max_tables => {
                    let max = self.max_tables;
                    return Err(Trouble::Tables { max });
                }
                Entry::Leaf(leaf) => leaves.push(leaf),
                Entry::Link(next) => links.push(next),
            }
            self.view.mark_used(table, index, &entry);
        }
        if table.level > 1 {
            let lower = &self.domain.tables[usize::from(table.level) - 2];
            let linked = &links[former..];
            let is_stale = |base: &u64| linked.binary_search_by_key(base, |t| t.base).is_err();
            let covered = base + first * span..base + last * span;
            let stale: Vec<u64> = lower
                .range(covered)
                .map(|(base, _)| *base)
                .filter(is_stale)
                .collect();
            for base in stale {
                self.forget(table.level - 1, base);
            }
        }
        Ok(())
    }

    /// Makes the space say in `range` what the tables say, and nothing else.
    pub(super) fn reconcile(&mut self, mut range: Range<u64>) -> Result<(), Trouble> {
        let root = root_of(&self.domain.table);
        // Leaves and mappings that reach out of the range are dealt with as a whole. They lie in
        // aligned blocks of at most 1 GiB, so the range grows a few times at most.
        let leaves = loop {
            let leaves = self.scan(root, &range)?;
            let leaf_ranges = leaves.iter().map(|leaf| leaf.iova..leaf.iova + leaf.size);
            let mapped = self.domain.mapped.overlapping(range.clone());
            let all = leaf_ranges.chain(mapped.map(|(mapped, _)| mapped));
            let wide = all.fold(range.clone(), |wide, one| {
                wide.start.min(one.start)..wide.end.max(one.end)
            });
            if wide == range {
                break leaves;
            }
            range = wide;
        };
        let ram = self.view.ram();
        let mut pieces: Vec<Piece> = leaves.iter().flat_map(|leaf| leaf.pieces(ram)).collect();
        pieces.sort_unstable_by_key(|piece| piece.iova);
        self.prune(range, &pieces)?;
        for piece in &pieces {
            if self.domain.mapped.find(piece.iova).is_none() {
                self.map(piece)?;
            }
        }
        Ok(())
    }

    /// Unmaps what is mapped in `range`, which holds whole mappings, and is not one of `pieces`;
    /// neighbours in one go.
    fn prune(&mut self, range: Range<u64>, pieces: &[Piece]) -> Result<(), Trouble> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut kept = true;
        for (mapped, target) in self.domain.mapped.overlapping(range) {
            let found = pieces.binary_search_by_key(&mapped.start, |piece| piece.iova);
            let keep = found.is_ok_and(|index| is_piece(&mapped, target, &pieces[index]));
            match runs.last_mut() {
                _ if keep => {}
                Some(run) if !kept => run.end = mapped.end,
                _ => runs.push(mapped),
            }
            kept = keep;
        }
        for run in runs {
            self.unmap(run)?;
        }
        Ok(())
    }

    /// Maps a leaf, in place of whatever is mapped there.
    pub(super) fn install(&mut self, leaf: &Leaf) -> Result<(), Trouble> {
        for piece in leaf.pieces(self.view.ram()) {
            let range = piece.iova..piece.iova + piece.len;
            let mapped = self.domain.mapped.overlapping(range);
            let ends = mapped.fold(None, |ends: Option<Range<u64>>, (range, _)| {
                Some(ends.map_or(range.start, |ends| ends.start)..range.end)
            });
            if let Some(former) = ends {
                let same = self.domain.mapped.find(piece.iova);
                if same.is_some_and(|(range, target)| is_piece(&range, target, &piece)) {
                    continue;
                }
                self.unmap(former)?;
            }
            self.map(&piece)?;
        }
        Ok(())
    }

    /// A table is about to be linked at the place `table`: maps what it and those below it say.
    pub(super) fn install_table(&mut self, table: Table) -> Result<(), Trouble> {
        let span = table.base..table.base + table_span(table.level);
        for leaf in self.scan(table, &span)? {
            self.install(&leaf)?;
        }
        Ok(())
    }

    fn map(&mut self, piece: &Piece) -> Result<(), Trouble> {
        let Piece {
            iova,
            gpa,
            len,
            writable,
        } = *piece;
        let max = self.domain.max_mappings;
        if self.domain.mapped.len() >= max {
            return Err(Trouble::Mappings { max });
        }
        // Before the host is asked, which pins what it maps.
        let max = self.max_bytes;
        let bytes = self.domain.bytes.saturating_add(len);
        if bytes > max {
            return Err(Trouble::Bytes { max });
        }
        let access = match writable {
            true => Permissions::READ | Permissions::WRITE,
            false => Permissions::READ,
        };
        self.domain
            .space
            .map(iova, gpa, len, access)
            .map_err(Trouble::Space)?;
        count(&self.stats.maps);
        let noted = self
            .domain
            .mapped
            .insert(iova, len, Target { gpa, writable });
        debug_assert!(noted.is_ok(), "{piece:?}: {noted:?}");
        self.domain.bytes = bytes;
        Ok(())
    }

    /// Unmaps all mappings in `range`, which begins and ends with one.
    fn unmap(&mut self, range: Range<u64>) -> Result<(), Trouble> {
        let len = range.end - range.start;
        self.domain
            .space
            .unmap(range.start, len)
            .map_err(Trouble::Space)?;
        count(&self.stats.unmaps);
        let inside = self.domain.mapped.overlapping(range);
        let starts: Vec<u64> = inside.map(|(mapped, _)| mapped.start).collect();
        for start in starts {
            if let Some((gone, _)) = self.domain.mapped.remove(start) {
                self.domain.bytes -= gone.end - gone.start;
            }
        }
        Ok(())
    }
}

fn is_piece(mapped: &Range<u64>, target: &Target, piece: &Piece) -> bool {
    let Target { gpa, writable } = *target;
    let end = piece.iova + piece.len;
    *mapped == (piece.iova..end) && gpa == piece.gpa && writable == piece.writable
}

//! Which memory slots RAM with read-only pages takes.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::mem::PAGE_SIZE;

/// A memory slot of KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// Its number.
    pub(super) id: u32,
    /// First guest physical address.
    pub(super) gpa: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Stores trap.
    pub(super) readonly: bool,
}

impl Slot {
    /// True if it is of exactly this piece.
    fn is(&self, (range, readonly): &Piece) -> bool {
        (self.gpa, self.gpa + self.len, self.readonly) == (range.start, range.end, *readonly)
    }
}

/// What is to be done, in this order.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Slots to take away.
    pub(super) delete: Vec<Slot>,
    /// Slots to put in place.
    pub(super) add: Vec<Slot>,
    /// Blocks by their first addresses, as they are then.
    blocks: Vec<(u64, Block)>,
}

impl Plan {
    /// True if there is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.delete.is_empty() && self.add.is_empty()
    }
}

/// No slot ids are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the VM has its {max} memory slots for RAM already")]
pub(super) struct OutOfSlots {
    pub(super) max: usize,
}

/// A piece of RAM that is split on its own.
#[derive(Debug, Clone)]
struct Block {
    end: u64,
    /// This process cannot write it either: all of it is read-only at all times.
    rom: bool,
    readonly: BTreeSet<u64>,
    /// By address. A hostile guest makes them as many as half the pages, so they are searched.
    slots: Vec<Slot>,
}

/// The slots of all RAM.
#[derive(Debug)]
pub(super) struct SlotMap {
    /// By first address.
    blocks: BTreeMap<u64, Block>,
    /// Ids that are free, the next one last.
    free: Vec<u32>,
    ids: usize,
}

impl SlotMap {
    /// Cuts RAM into blocks of `block` bytes at most, at multiples of it, and numbers their slots from
    /// `ids`. `ram`: regions, and whether each is read-only for good.
    ///
    /// # Errors
    ///
    /// [`OutOfSlots`].
    pub(super) fn new(
        ram: impl Iterator<Item = (Range<u64>, bool)>,
        block: u64,
        ids: Range<u32>,
    ) -> Result<Self, OutOfSlots> {
        let max = ids.len();
        let mut free: Vec<u32> = ids.rev().collect();
        let mut blocks = BTreeMap::new();
        for (region, rom) in ram {
            let mut gpa = region.start;
            while gpa < region.end {
                let end = (gpa / block + 1).saturating_mul(block).min(region.end);
                let id = free.pop().ok_or(OutOfSlots { max })?;
                let slot = Slot {
                    id,
                    gpa,
                    len: end - gpa,
                    readonly: rom,
                };
                let block = Block {
                    end,
                    rom,
                    readonly: BTreeSet::new(),
                    slots: vec![slot],
                };
                blocks.insert(gpa, block);
                gpa = end;
            }
        }
        Ok(Self {
            blocks,
            free,
            ids: max,
        })
    }

    /// All slots.
    pub(super) fn slots(&self) -> impl Iterator<Item = Slot> {
        self.blocks
            .values()
            .flat_map(|block| block.slots.iter().copied())
    }

    /// Pages that are read-only.
    pub(super) fn readonly(&self) -> Vec<u64> {
        let blocks = self.blocks.values();
        blocks
            .flat_map(|block| block.readonly.iter().copied())
            .collect()
    }

    /// What it takes to make pages read-only, and others writable. Pages outside RAM, those that are so
    /// already, and those of regions that are read-only for good change nothing.
    ///
    /// # Errors
    ///
    /// [`OutOfSlots`].
    pub(super) fn plan(&self, readonly: &[u64], writable: &[u64]) -> Result<Plan, OutOfSlots> {
        let mut changed: BTreeMap<u64, Block> = BTreeMap::new();
        let both = [(readonly, true), (writable, false)];
        for (pages, is_readonly) in both {
            for page in pages {
                let Some((start, block)) = self.blocks.range(..=*page).next_back() else {
                    continue;
                };
                if *page >= block.end || block.rom {
                    continue;
                }
                let block = changed.entry(*start).or_insert_with(|| block.clone());
                match is_readonly {
                    true => block.readonly.insert(*page),
                    false => block.readonly.remove(page),
                };
            }
        }
        let mut plan = Plan::default();
        // All that goes is known first: its ids are free by the time that slots are added.
        let changed: Vec<_> = changed
            .into_iter()
            .map(|(start, block)| {
                let pieces = pieces(start..block.end, &block.readonly);
                let is_gone = |slot: &&Slot| {
                    let piece = pieces.binary_search_by_key(&slot.gpa, |(range, _)| range.start);
                    piece.is_err() || piece.is_ok_and(|at| !slot.is(&pieces[at]))
                };
                plan.delete.extend(block.slots.iter().filter(is_gone));
                (start, block, pieces)
            })
            .collect();
        let gone = plan.delete.iter().map(|slot| slot.id);
        let mut ids = self.free.iter().rev().copied().chain(gone);
        for (start, mut block, pieces) in changed {
            let former = std::mem::take(&mut block.slots);
            for piece in pieces {
                let at = former.binary_search_by_key(&piece.0.start, |slot| slot.gpa);
                if let Ok(at) = at
                    && former[at].is(&piece)
                {
                    block.slots.push(former[at]);
                    continue;
                }
                let (range, readonly) = piece;
                let slot = Slot {
                    id: ids.next().ok_or(OutOfSlots { max: self.ids })?,
                    gpa: range.start,
                    len: range.end - range.start,
                    readonly,
                };
                block.slots.push(slot);
                plan.add.push(slot);
            }
            plan.blocks.push((start, block));
        }
        Ok(plan)
    }

    /// A plan of this moment has been carried out.
    pub(super) fn done(&mut self, plan: Plan) {
        let taken = plan.add.len().min(self.free.len());
        self.free.truncate(self.free.len() - taken);
        let reused = plan.add.len() - taken;
        let gone = plan.delete.iter().skip(reused);
        self.free.extend(gone.map(|slot| slot.id));
        self.blocks.extend(plan.blocks);
    }
}

/// A range of pages, and whether they are read-only.
type Piece = (Range<u64>, bool);

/// Cuts a block so that each piece is read-only or is not; neighbours of a kind are one.
fn pieces(block: Range<u64>, readonly: &BTreeSet<u64>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut next = block.start;
    for page in readonly {
        let end = page + PAGE_SIZE;
        if next < *page {
            pieces.push((next..*page, false));
        }
        match pieces.last_mut() {
            Some((last, true)) if last.end == *page => last.end = end,
            _ => pieces.push((*page..end, true)),
        }
        next = end;
    }
    if next < block.end {
        pieces.push((next..block.end, false));
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    const RAM: [Range<u64>; 2] = [0..0xa000, 0x1_0000..0x2_4000];
    const BLOCK: u64 = 0x8000;

    fn ram() -> impl Iterator<Item = (Range<u64>, bool)> {
        RAM.into_iter().map(|region| (region, false))
    }

    fn map(ids: u32) -> SlotMap {
        SlotMap::new(ram(), BLOCK, 7..7 + ids).unwrap()
    }

    #[test]
    fn ram_is_cut_at_multiples_of_the_block() {
        let map = map(5);
        let slots: Vec<_> = map.slots().map(|s| (s.id, s.gpa, s.len)).collect();
        let expected = [
            (7, 0, 0x8000),
            (8, 0x8000, 0x2000),
            (9, 0x1_0000, 0x8000),
            (10, 0x1_8000, 0x8000),
            (11, 0x2_0000, 0x4000),
        ];
        assert_eq!(slots, expected);
        let max = SlotMap::new(ram(), BLOCK, 0..4).unwrap_err().max;
        assert_eq!(max, 4);
        assert_eq!(map.plan(&[0x1000], &[]).unwrap_err().max, 5);
    }

    #[test]
    fn a_region_that_is_read_only_for_good_stays_so() {
        let regions = [(0..0xa000, true), (0xa000..0xc000, false)];
        let mut map = SlotMap::new(regions.into_iter(), BLOCK, 0..9).unwrap();
        let slots =
            |map: &SlotMap| -> Vec<_> { map.slots().map(|s| (s.gpa, s.len, s.readonly)).collect() };
        let expected = [
            (0, 0x8000, true),
            (0x8000, 0x2000, true),
            (0xa000, 0x2000, false),
        ];
        assert_eq!(slots(&map), expected);
        assert!(map.plan(&[0x1000], &[0x9000]).unwrap().is_empty());
        // One in which pages are tracked is not mixed up with it.
        let plan = map.plan(&[0x9000, 0xa000], &[]).unwrap();
        assert_eq!((plan.delete.len(), plan.add.len()), (1, 2));
        map.done(plan);
        assert_eq!(map.readonly(), [0xa000]);
    }

    #[test]
    fn only_the_block_concerned_is_split_and_neighbours_share_a_slot() {
        let mut map = map(20);
        let plan = map.plan(&[0x1000, 0x2000, 0xa000], &[]).unwrap();
        assert_eq!(plan.delete.len(), 1);
        let added: Vec<_> = plan
            .add
            .iter()
            .map(|s| (s.gpa, s.len, s.readonly))
            .collect();
        let expected = [
            (0, 0x1000, false),
            (0x1000, 0x2000, true),
            (0x3000, 0x5000, false),
        ];
        assert_eq!(added, expected);
        map.done(plan);
        assert!(map.plan(&[0x1000], &[0x5000]).unwrap().is_empty());
        let plan = map.plan(&[], &[0x1000, 0x2000]).unwrap();
        assert_eq!((plan.delete.len(), plan.add.len()), (3, 1));
        map.done(plan);
        assert_eq!(map.slots().count(), 5);
        assert!(map.readonly().is_empty());
    }

    #[test]
    fn ids_that_are_used_up_come_back() {
        let mut map = map(10);
        // Two more slots for each, in a block of its own.
        for page in [0x1000, 0x1_1000] {
            let plan = map.plan(&[page], &[]).unwrap();
            map.done(plan);
        }
        assert_eq!(map.free.len(), 1);
        assert!(map.plan(&[0x1_9000], &[]).is_err());
        let all = map.readonly();
        let plan = map.plan(&[], &all).unwrap();
        map.done(plan);
        assert_eq!((map.slots().count(), map.free.len()), (5, 5));
        // The last ids can be used as well.
        for page in [0x1000, 0x1_1000, 0x1_9000] {
            let result = map.plan(&[page], &[]).map(|plan| map.done(plan));
            assert_eq!(result.is_ok(), page != 0x1_9000);
        }
        let plan = map.plan(&[0x2000], &[0x1000]).unwrap();
        map.done(plan);
        assert_eq!(map.free.len(), 1);
    }

    /// What the most scattered pages of a block cost.
    #[test]
    fn a_change_in_a_block_of_many_pieces_looks_at_each_a_few_times() {
        let block = 16 << 20;
        let mut map = SlotMap::new(std::iter::once((0..block, false)), block, 0..5000).unwrap();
        let pages: Vec<u64> = (0..2048).map(|page| page << 13).collect();
        let plan = map.plan(&pages, &[]).unwrap();
        map.done(plan);
        assert_eq!(map.slots().count(), 4096);
        let start = Instant::now();
        for page in &pages[..100] {
            let plan = map.plan(&[], &[*page]).unwrap();
            assert!(plan.delete.len() <= 3 && plan.add.len() == 1);
            map.done(plan);
        }
        // A hundred times less than if each piece were compared with each.
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    proptest! {
        #[test]
        fn every_page_is_in_one_slot_of_its_kind(
            steps in prop::collection::vec(
                (prop::collection::vec(0u64..0x30, 0..5), prop::collection::vec(0u64..0x30, 0..5)),
                0..20,
            ),
        ) {
            let mut map = map(40);
            let mut live: BTreeMap<u32, Slot> = map.slots().map(|slot| (slot.id, slot)).collect();
            let mut readonly = BTreeSet::new();
            let in_ram = |page: &u64| RAM.iter().any(|range| range.contains(page));
            for (track, untrack) in steps {
                let pages = |pages: Vec<u64>| -> Vec<u64> { pages.iter().map(|p| p << 12).collect() };
                let (track, untrack) = (pages(track), pages(untrack));
                readonly.extend(track.iter().copied().filter(in_ram));
                readonly.retain(|page| !untrack.contains(page));
                let plan = map.plan(&track, &untrack).unwrap();
                for slot in &plan.delete {
                    prop_assert_eq!(live.remove(&slot.id), Some(*slot));
                }
                for slot in &plan.add {
                    let overlaps = |other: &Slot| {
                        other.gpa < slot.gpa + slot.len && slot.gpa < other.gpa + other.len
                    };
                    prop_assert!(!live.values().any(overlaps));
                    prop_assert!(live.insert(slot.id, *slot).is_none());
                }
                map.done(plan);
                for page in (0..0x30).map(|page| page << 12).filter(in_ram) {
                    let is_in = |slot: &&Slot| (slot.gpa..slot.gpa + slot.len).contains(&page);
                    let slot = live.values().find(is_in).unwrap();
                    prop_assert_eq!(slot.readonly, readonly.contains(&page));
                }
                prop_assert_eq!(map.free.len() + live.len(), 40);
                prop_assert_eq!(map.readonly(), readonly.iter().copied().collect::<Vec<_>>());
            }
        }
    }
}

//! The engine against a reference that looks every address up anew.
#![forbid(unsafe_code)]

mod limits;
mod model;

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use super::*;
use crate::backend::{IntervalError, Intervals, Permissions, SpaceLimits};
use crate::hv::pviommu::{INTERRUPT_RANGE, entry};
use crate::mem::RamMap;
use crate::pviommu::Levels;

const LINK: u64 = entry::PRESENT | entry::WRITABLE | entry::USER | entry::ACCESSED;
const PAGE: u64 = LINK | entry::DIRTY;
const LARGE: u64 = PAGE | entry::PAGE_SIZE;

/// RAM with a hole from 1 MiB to 2 MiB.
const RAM: [Range<u64>; 2] = [0..0x10_0000, 0x20_0000..0x60_0000];

/// An address space in memory.
#[derive(Debug)]
pub(crate) struct FakeSpace {
    ram: Vec<Range<u64>>,
    /// What of it cannot be written.
    rom: Mutex<Range<u64>>,
    limits: SpaceLimits,
    mapped: Mutex<Intervals<(u64, Permissions)>>,
    /// Bytes mapped now, and at most so far.
    bytes: Mutex<(u64, u64)>,
    /// Calls until the host fails.
    fails_in: Mutex<Option<u32>>,
}

impl FakeSpace {
    fn new(max_mappings: Option<usize>) -> Arc<Self> {
        Self::with_ram(&RAM, max_mappings)
    }

    pub(crate) fn with_ram(ram: &[Range<u64>], max_mappings: Option<usize>) -> Arc<Self> {
        let ranges = vec![
            0..=INTERRUPT_RANGE.start - 1,
            INTERRUPT_RANGE.end..=(1 << 57) - 1,
        ];
        Arc::new(Self {
            ram: ram.to_vec(),
            rom: Mutex::default(),
            limits: SpaceLimits {
                ranges,
                granule: 4096,
                max_mappings,
            },
            mapped: Mutex::default(),
            bytes: Mutex::default(),
            fails_in: Mutex::default(),
        })
    }

    /// Where the page of `iova` leads to, and whether writes pass.
    pub(crate) fn find(&self, iova: u64) -> Option<(u64, bool)> {
        let mapped = self.mapped.lock().unwrap();
        let (range, (gpa, access)) = mapped.find(iova)?;
        let writable = access.contains(Permissions::WRITE);
        Some((gpa + (iova - range.start), writable))
    }

    pub(crate) fn ranges(&self) -> Vec<Range<u64>> {
        let mapped = self.mapped.lock().unwrap();
        mapped.iter().map(|(range, _)| range).collect()
    }

    /// Bytes that were mapped at a time, at most.
    fn most_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().1
    }

    fn may_fail(&self) -> Result<(), SpaceError> {
        let mut left = self.fails_in.lock().unwrap();
        match &mut *left {
            None => Ok(()),
            Some(0) => Err(SpaceError::Host(io::ErrorKind::OutOfMemory.into())),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

impl AddressSpace for FakeSpace {
    fn map(&self, iova: u64, gpa: u64, len: u64, access: Permissions) -> Result<(), SpaceError> {
        self.may_fail()?;
        assert!(self.limits.allow(iova, len), "{iova:#x}+{len:#x}");
        let is_ram = |range: &Range<u64>| range.start <= gpa && gpa + len <= range.end;
        assert!(self.ram.iter().any(is_ram), "{gpa:#x}+{len:#x}");
        let rom = self.rom.lock().unwrap();
        if access.contains(Permissions::WRITE) && gpa < rom.end && rom.start < gpa + len {
            return Err(SpaceError::NotRam { gpa, len });
        }
        let mut mapped = self.mapped.lock().unwrap();
        let inserted = mapped.insert(iova, len, (gpa, access));
        inserted.map_err(|_| SpaceError::Exists { iova, len })?;
        let (now, most) = &mut *self.bytes.lock().unwrap();
        *now += len;
        *most = (*most).max(*now);
        Ok(())
    }

    fn unmap(&self, iova: u64, len: u64) -> Result<(), SpaceError> {
        self.may_fail()?;
        let mut mapped = self.mapped.lock().unwrap();
        let inside: Vec<u64> = match mapped.inside(iova, len) {
            Ok(inside) => inside.map(|(range, _)| range.start).collect(),
            Err(IntervalError::PartlyInside) => {
                return Err(SpaceError::PartlyInside { iova, len });
            }
            Err(_) => return Err(SpaceError::OutOfRange { iova, len }),
        };
        assert!(!inside.is_empty(), "a call for nothing");
        for start in inside {
            let (gone, _) = mapped.remove(start).unwrap();
            self.bytes.lock().unwrap().0 -= gone.end - gone.start;
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), SpaceError> {
        self.mapped.lock().unwrap().clear();
        self.bytes.lock().unwrap().0 = 0;
        Ok(())
    }

    fn limits(&self) -> &SpaceLimits {
        &self.limits
    }
}

/// A tracker that stores like a vCPU in the last moment before a page is tracked.
#[derive(Debug)]
struct FakeTracker {
    ram: GuestRam,
    tracked: Mutex<BTreeSet<u64>>,
    /// Words and values.
    last_stores: Mutex<Vec<(u64, u64)>>,
    changes: AtomicU64,
    broken: Mutex<bool>,
}

impl TrackedPages for FakeTracker {
    fn change(&self, track: &[u64], untrack: &[u64]) -> io::Result<()> {
        assert!(track.is_sorted_by(|a, b| a < b) && untrack.is_sorted_by(|a, b| a < b));
        self.changes.fetch_add(1, Ordering::Relaxed);
        if *self.broken.lock().unwrap() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut last_stores = self.last_stores.lock().unwrap();
        last_stores.retain(|(word, value)| {
            let page = word & !0xfff;
            let is_last = track.contains(&page);
            if is_last {
                self.ram.write(*word, &value.to_le_bytes()).unwrap();
            }
            !is_last
        });
        let mut tracked = self.tracked.lock().unwrap();
        for page in track {
            assert!(tracked.insert(*page), "{page:#x} is tracked already");
        }
        for page in untrack {
            tracked.remove(page);
        }
        Ok(())
    }
}

/// A VM without vCPUs.
struct Bed {
    ram: GuestRam,
    tracker: Arc<FakeTracker>,
    shadow: Arc<Shadow>,
}

impl Bed {
    fn new(config: ShadowConfig) -> Self {
        Self::with_ram(&RAM, config)
    }

    fn with_ram(ram: &[Range<u64>], config: ShadowConfig) -> Self {
        let ranges: Vec<_> = ram
            .iter()
            .map(|range| {
                let len = (range.end - range.start) as usize;
                (GuestAddress(range.start), len)
            })
            .collect();
        let map = RamMap::from_ranges(&ranges).expect("test RAM");
        Self::over(GuestRam::new(&map), config)
    }

    fn over(ram: GuestRam, config: ShadowConfig) -> Self {
        let tracker = Arc::new(FakeTracker {
            ram: ram.clone(),
            tracked: Mutex::default(),
            last_stores: Mutex::default(),
            changes: AtomicU64::new(0),
            broken: Mutex::new(false),
        });
        let shadow = Arc::new(Shadow::new(config, ram.clone(), tracker.clone()));
        Self {
            ram,
            tracker,
            shadow,
        }
    }

    fn is_tracked(&self, page: u64) -> bool {
        self.tracker.tracked.lock().unwrap().contains(&page)
    }

    /// A store of a vCPU, inside one page.
    fn store(&self, gpa: u64, data: &[u8]) {
        match self.is_tracked(gpa & !0xfff) {
            true => self.shadow.store(gpa, data).unwrap(),
            false => self.ram.write(gpa, data).unwrap(),
        }
    }

    fn set(&self, table: u64, index: u64, value: u64) {
        self.store(table + index * 8, &value.to_le_bytes());
    }

    fn get(&self, table: u64, index: u64) -> u64 {
        self.ram.read_obj(table + index * 8).unwrap()
    }

    fn follow(
        &self,
        root: u64,
        space: &Arc<FakeSpace>,
    ) -> Result<Arc<dyn PagedDomain>, BackendError> {
        let table = PageTable {
            root,
            levels: Levels::Four,
        };
        ShadowBackend(self.shadow.clone()).follow(table, space.clone())
    }

    /// The reference: looks the page of `iova` up in a table of four levels.
    fn look_up(&self, root: u64, iova: u64) -> Option<(u64, bool)> {
        let is_ram = |gpa| RAM.iter().any(|range| range.contains(&gpa));
        let mut table = root;
        let mut writable = true;
        for shift in [39, 30, 21, 12] {
            let value = self.get(table, iova >> shift & 0x1ff);
            if value & 0b101 != 0b101 || value & 0x000f_0000_0000_0000 & !((1 << 50) - 1) != 0 {
                return None;
            }
            writable &= value & 0b10 != 0;
            let gpa = value & 0x000f_ffff_ffff_f000;
            let large = value & 0x80 != 0;
            if shift == 12 || large {
                let offset = iova & ((1 << shift) - 1);
                let valid = shift != 39 && gpa & ((1 << shift) - 1) == 0;
                let passes = valid && is_ram(gpa + offset) && !INTERRUPT_RANGE.contains(&iova);
                return passes.then_some((gpa + offset, writable));
            }
            if !is_ram(gpa) {
                return None;
            }
            table = gpa;
        }
        None
    }
}

fn config() -> ShadowConfig {
    ShadowConfig {
        physical_bits: 50,
        // RAM is small, and large leaves map all of it.
        max_bytes: Some(u64::MAX),
        ..ShadowConfig::default()
    }
}

/// Tables at 0x1000 (level 4) to 0x4000 (level 1), and a leaf at this address.
const IOVA: u64 = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12;

fn mapped(bed: &Bed) {
    bed.set(0x1000, 1, 0x2000 | LINK);
    bed.set(0x2000, 2, 0x3000 | LINK);
    bed.set(0x3000, 3, 0x4000 | LINK);
    bed.set(0x4000, 4, 0x8000 | PAGE);
}

fn range(iova: u64, shift: u8) -> [FlushRange; 1] {
    let first = iova >> 12 >> shift << shift;
    [FlushRange { first, shift }]
}

#[test]
fn a_leaf_is_mapped_by_its_store_and_stays_until_the_flush() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    assert_eq!(space.find(IOVA), Some((0x8000, true)));
    assert_eq!(space.ranges().len(), 1);
    for page in [0x1000, 0x2000, 0x3000, 0x4000] {
        assert!(
            bed.is_tracked(page) && bed.shadow.is_tracked(page + 8),
            "{page:#x}"
        );
    }
    assert!(!bed.is_tracked(0x8000));
    bed.set(0x4000, 5, 0x9000 | PAGE & !entry::WRITABLE);
    assert_eq!(space.find(IOVA + 0x1000), Some((0x9000, false)));
    bed.set(0x4000, 4, 0);
    assert_eq!(space.find(IOVA), Some((0x8000, true)));
    domain.flush(&range(IOVA + 0x1000, 0));
    assert_eq!(space.find(IOVA), Some((0x8000, true)), "not in the range");
    domain.flush(&range(IOVA, 0));
    assert_eq!(space.find(IOVA), None);
    assert_eq!(space.find(IOVA + 0x1000), Some((0x9000, false)));
    drop(domain);
    assert!(bed.tracker.tracked.lock().unwrap().is_empty());
    let counters = bed.shadow.counters();
    assert_eq!((counters.stores, counters.maps, counters.unmaps), (2, 2, 1));
    assert_eq!(
        (counters.tracked_pages, counters.tables, counters.mappings),
        (0, 0, 0)
    );
}

#[test]
fn a_leaf_that_changes_without_a_flush_is_replaced() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let _domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x4000, 4, 0x9000 | PAGE);
    assert_eq!(space.find(IOVA), Some((0x9000, true)));
    // Half of an entry is an entry too.
    bed.store(0x4000 + 4 * 8, &(0xa000 | PAGE as u32).to_le_bytes());
    assert_eq!(space.find(IOVA), Some((0xa000, true)));
    // A large leaf in place of a table, whose other leaves are gone.
    bed.set(0x4000, 6, 0xb000 | PAGE);
    bed.set(0x3000, 3, 0x20_0000 | LARGE);
    assert_eq!(space.find(IOVA), Some((0x20_4000, true)));
    assert_eq!(space.ranges().len(), 1);
    // The table that is linked no more is written like any page, from the second store on at least.
    bed.set(0x4000, 7, 0xc000 | PAGE);
    assert!(!bed.is_tracked(0x4000));
    assert_eq!(space.find(IOVA + 0x3000), Some((0x20_7000, true)));
}

#[test]
fn a_table_is_tracked_before_it_is_read_and_mapped_before_it_is_linked() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    let domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x3000, 3, 0x4000 | LINK);
    bed.set(0x4000, 4, 0x8000 | PAGE);
    bed.set(0x1000, 1, 0x2000 | LINK);
    assert!(bed.is_tracked(0x2000) && !bed.is_tracked(0x3000));
    // Another vCPU stores while the pages are being taken from it.
    bed.tracker.last_stores.lock().unwrap().extend([
        (0x3000 + 9 * 8, 0x5000 | LINK),
        (0x4000 + 5 * 8, 0x9000 | PAGE),
        (0x5000, 0xa000 | PAGE),
    ]);
    let changes = bed.tracker.changes.load(Ordering::Relaxed);
    bed.set(0x2000, 2, 0x3000 | LINK);
    assert!(bed.tracker.last_stores.lock().unwrap().is_empty());
    // The two tables of the lowest level are tracked in one go.
    assert_eq!(bed.tracker.changes.load(Ordering::Relaxed), changes + 2);
    assert_eq!(space.find(IOVA), Some((0x8000, true)));
    assert_eq!(space.find(IOVA + 0x1000), Some((0x9000, true)));
    assert_eq!(
        space.find(IOVA - (3 << 21 | 4 << 12) + (9 << 21)),
        Some((0xa000, true))
    );
    // Cut off: what is stored below the cut counts no more, also not for the flush.
    bed.set(0x2000, 2, 0);
    bed.set(0x4000, 6, 0xb000 | PAGE);
    assert_eq!(space.find(IOVA + 0x2000), None);
    domain.flush_all();
    assert!(space.ranges().is_empty());
}

#[test]
fn stores_past_the_tracker_count_from_the_flush_on() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    let past = |table: u64, index: u64, value: u64| {
        let bytes = value.to_le_bytes();
        bed.ram.write(table + index * 8, &bytes).unwrap();
    };
    past(0x4000, 4, 0x9000 | PAGE);
    past(0x5000, 0, 0xa000 | PAGE);
    past(0x3000, 4, 0x5000 | LINK);
    domain.flush(&range(IOVA, 0));
    assert_eq!(space.find(IOVA), Some((0x9000, true)));
    assert_eq!(space.find(IOVA & !0x1f_ffff | 4 << 21), None);
    domain.flush(&range(4 << 21 | 2 << 30 | 1 << 39, 9));
    assert_eq!(
        space.find(4 << 21 | 2 << 30 | 1 << 39),
        Some((0xa000, true))
    );
    // The table is tracked now.
    bed.set(0x5000, 1, 0xb000 | PAGE);
    assert_eq!(
        space.find(4 << 21 | 2 << 30 | 1 << 39 | 1 << 12),
        Some((0xb000, true))
    );
}

#[test]
fn a_flush_of_a_part_deals_with_all_of_what_is_large() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    let past = |table: u64, index: u64, value: u64| {
        let bytes = value.to_le_bytes();
        bed.ram.write(table + index * 8, &bytes).unwrap();
    };
    // A large page takes the place of a table whose leaf is mapped.
    past(0x3000, 3, 0x20_0000 | LARGE);
    domain.flush(&range(IOVA + 0x1000, 0));
    assert_eq!(space.find(IOVA), Some((0x20_4000, true)));
    assert_eq!(space.ranges().len(), 1);
    assert_eq!(bed.shadow.counters().tables, 3);
    // And the other way round.
    past(0x4000, 5, 0x9000 | PAGE);
    past(0x3000, 3, 0x4000 | LINK);
    domain.flush(&range(IOVA + 0x1000, 0));
    assert_eq!(space.find(IOVA), Some((0x8000, true)));
    assert_eq!(space.find(IOVA + 0x1000), Some((0x9000, true)));
    assert_eq!(space.ranges().len(), 2);
    let counters = bed.shadow.counters();
    assert_eq!((counters.tables, counters.blocked), (4, 0));
}

#[test]
fn a_store_to_a_table_that_was_replaced_past_the_tracker_maps_nothing() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x5000, 4, 0xa000 | PAGE);
    let link = (0x5000 | LINK).to_le_bytes();
    bed.ram.write(0x3000 + 3 * 8, &link).unwrap();
    bed.set(0x4000, 4, 0x9000 | PAGE);
    assert_eq!(space.find(IOVA), Some((0x8000, true)));
    assert!(!bed.is_tracked(0x4000));
    domain.flush(&range(IOVA, 0));
    assert_eq!(space.find(IOVA), Some((0xa000, true)));
}

#[test]
fn flush_ranges_become_disjoint_addresses() {
    let page = |first, shift| FlushRange { first, shift };
    let end = 1 << 48;
    let ranges = [page(8, 2), page(0, 0), page(12, 1), page(1, 0), page(9, 0)];
    assert_eq!(address_ranges(&ranges, end), [0..0x2000, 0x8000..0xe000]);
    assert_eq!(
        address_ranges(&[page(0, 52)], end),
        vec![Range { start: 0, end }]
    );
    assert_eq!(address_ranges(&[page(1 << 36, 0)], end), []);
    let top = (end - 0x1000) >> 12;
    assert_eq!(
        address_ranges(&[page(top, 40)], end),
        vec![Range {
            start: end - 0x1000,
            end
        }]
    );
}

#[test]
fn a_compare_exchange_that_comes_too_late_stores_nothing() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    mapped(&bed);
    let _domain = bed.follow(0x1000, &space).unwrap();
    let exchange = |old: u64, new: u64| {
        let (old, new) = (old.to_le_bytes(), new.to_le_bytes());
        bed.shadow.compare_exchange(0x3000 + 8, &old, &new).unwrap()
    };
    bed.set(0x5000, 0, 0x9000 | PAGE);
    bed.set(0x6000, 0, 0xa000 | PAGE);
    assert_eq!(exchange(0, 0x5000 | LINK), Ok(()));
    let linked = (0x5000 | LINK).to_le_bytes();
    assert_eq!(exchange(0, 0x6000 | LINK), Err(linked));
    let iova = 1 << 39 | 2 << 30 | 1 << 21;
    assert_eq!(space.find(iova), Some((0x9000, true)));
    assert!(!bed.is_tracked(0x6000));
    assert_eq!(bed.shadow.counters().lost_exchanges, 1);
    assert!(
        bed.shadow
            .compare_exchange(0x10_0000, &[0; 8], &[0; 8])
            .is_err()
    );
}

#[test]
fn what_is_mapped_counts_as_used() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    let unused = !(entry::ACCESSED | entry::DIRTY);
    bed.set(0x1000, 1, 0x2000 | LINK & unused);
    bed.set(0x2000, 2, 0x3000 | LINK & unused);
    let _domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x4000, 4, 0x8000 | PAGE & unused);
    bed.set(0x4000, 5, 0x9000 | PAGE & unused & !entry::WRITABLE);
    bed.set(0x3000, 3, 0x4000 | LINK & unused);
    bed.set(0x4000, 6, 0xa000 | PAGE & unused);
    let got = [(0x1000, 1), (0x2000, 2), (0x3000, 3)].map(|(t, i)| bed.get(t, i));
    assert_eq!(got, [0x2000 | LINK, 0x3000 | LINK, 0x4000 | LINK]);
    let got = [4, 5, 6].map(|index| bed.get(0x4000, index));
    let read_only = PAGE & !entry::DIRTY & !entry::WRITABLE;
    assert_eq!(got, [0x8000 | PAGE, 0x9000 | read_only, 0xa000 | PAGE]);
}

#[test]
fn what_a_part_of_an_entry_maps_counts_as_used() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    let unused = !(entry::ACCESSED | entry::DIRTY);
    mapped(&bed);
    let _domain = bed.follow(0x1000, &space).unwrap();
    let low = |value: u64| (value as u32).to_le_bytes();
    bed.store(0x4000 + 5 * 8, &low(0x9000 | PAGE & unused));
    bed.store(
        0x4000 + 6 * 8,
        &low(0xa000 | PAGE & unused & !entry::WRITABLE),
    );
    bed.set(0x5000, 0, 0xb000 | PAGE & unused);
    bed.store(0x3000 + 4 * 8, &low(0x5000 | LINK & unused));
    // A reserved bit goes; those that are set are in another byte.
    bed.set(0x4000, 7, 1 << 50 | 0xc000 | PAGE & unused);
    bed.store(0x4000 + 7 * 8 + 6, &[0]);
    assert_eq!(space.find(IOVA + 0x3000), Some((0xc000, true)));
    let read_only = PAGE & !entry::DIRTY & !entry::WRITABLE;
    let got = [5, 6, 7].map(|index| bed.get(0x4000, index));
    assert_eq!(got, [0x9000 | PAGE, 0xa000 | read_only, 0xc000 | PAGE]);
    assert_eq!(bed.get(0x3000, 4), 0x5000 | LINK);
    assert_eq!(bed.get(0x5000, 0), 0xb000 | PAGE);
}

#[test]
fn holes_of_ram_and_the_interrupt_range_stay_unmapped() {
    let bed = Bed::new(config());
    let space = FakeSpace::new(None);
    bed.set(0x1000, 0, 0x2000 | LINK);
    let domain = bed.follow(0x1000, &space).unwrap();
    // 1 GiB on all of RAM: one mapping for each region.
    bed.set(0x2000, 0, LARGE);
    assert_eq!(space.ranges(), RAM);
    domain.flush(&range(0x1000, 0));
    assert_eq!(space.ranges(), RAM, "flushed, and present as before");
    bed.set(0x2000, 0, 0);
    domain.flush(&range(0x20_1000, 0));
    assert_eq!(
        space.ranges(),
        RAM[..1],
        "only a flush of its own range is a must"
    );
    domain.flush_all();
    assert!(space.ranges().is_empty());
    // Around the interrupt range, which begins where a block of 2 MiB does.
    let start = INTERRUPT_RANGE.start;
    bed.set(0x2000, 3, 0x3000 | LINK);
    bed.set(0x3000, 0x1f7, 0x20_0000 | LARGE);
    let (start, end) = (INTERRUPT_RANGE.end, start + 0x20_0000);
    assert_eq!(space.ranges(), [Range { start, end }]);
    let start = INTERRUPT_RANGE.start;
    assert_eq!(space.find(start + 0x10_0000), Some((0x30_0000, true)));
    bed.set(0x3000, 0x1f7, 0x4000 | LINK);
    bed.set(0x4000, 0, 0x8000 | PAGE);
    assert_eq!(space.find(start), None);
}

#[test]
fn a_store_that_kvm_cannot_report_is_followed_afterwards() {
    let bed = Bed::new(config());
    let spaces = [(); 2].map(|()| FakeSpace::new(None));
    mapped(&bed);
    let _domains = spaces
        .each_ref()
        .map(|space| bed.follow(0x1000, space).unwrap());
    let done = bed.shadow.with_pages_writable(false, || {
        let entries = [0x9000 | PAGE, 0xa000 | PAGE].map(u64::to_le_bytes);
        bed.ram
            .write(0x4000 + 4 * 8, entries.as_flattened())
            .unwrap();
    });
    assert_eq!(done, Ok(()));
    for space in &spaces {
        assert_eq!(space.find(IOVA), Some((0x9000, true)));
        assert_eq!(space.find(IOVA + 0x1000), Some((0xa000, true)));
    }
}

#[test]
fn a_page_that_is_given_up_is_writable_and_blocks_the_domains_that_have_it() {
    let bed = Bed::new(config());
    mapped(&bed);
    let (space, other) = (FakeSpace::new(None), FakeSpace::new(None));
    let domain = bed.follow(0x1000, &space).unwrap();
    bed.set(0x9000, 0, 0xa000 | LINK);
    let _other = bed.follow(0x9000, &other).unwrap();
    assert!(!space.ranges().is_empty());
    assert!(bed.is_tracked(0x4000) && bed.is_tracked(0x9000));
    assert!(bed.shadow.give_up(0x4123));
    assert!(space.ranges().is_empty());
    assert!(!bed.is_tracked(0x4000) && !bed.is_tracked(0x1000));
    assert!(bed.is_tracked(0x9000), "another domain does not notice");
    assert_eq!(bed.shadow.counters().blocked, 1);
    domain.flush_all();
    assert!(space.ranges().is_empty());
    // There is nothing to give up any more, and nothing changes where it cannot be.
    assert!(!bed.shadow.give_up(0x4123));
    *bed.tracker.broken.lock().unwrap() = true;
    assert!(!bed.shadow.give_up(0x9000));
    *bed.tracker.broken.lock().unwrap() = false;
    assert!(bed.shadow.give_up(0x9000));
    assert!(!bed.is_tracked(0x9000));
}

#[test]
fn tables_in_read_only_ram_are_followed_and_never_marked() {
    let rom = 0x1_0000;
    let unmarked = |entry: u64| entry & !(entry::ACCESSED | entry::DIRTY);
    let leaf = unmarked(0x5000 | PAGE);
    // The second one is to that RAM itself, for writing.
    let leaves = [leaf, unmarked(rom | PAGE)].map(u64::to_le_bytes);
    let table = [leaves.as_flattened(), &[0; 0xff0]].concat();
    let map = crate::mem::testing::with_rom(rom, &table);
    let bed = Bed::over(GuestRam::new(&map), config());
    bed.set(0x1000, 0, 0x2000 | LINK);
    bed.set(0x2000, 0, 0x3000 | LINK);
    bed.set(0x3000, 0, rom | LINK);
    let space = FakeSpace::with_ram(std::slice::from_ref(&(0..rom + 0x1000)), None);
    *space.rom.lock().unwrap() = rom..rom + 0x1000;
    let domain = bed.follow(0x1000, &space).unwrap();
    assert_eq!(space.find(0), Some((0x5000, true)));
    assert_eq!(space.find(0x1000), Some((rom, false)));
    assert_eq!(bed.get(rom, 0), leaf);
    // Stores of a vCPU that leave the guest change nothing.
    assert!(bed.shadow.store(rom, &[0; 8]).is_err());
    assert!(bed.shadow.store(rom - 4, &[0; 8]).is_err());
    let old = leaf.to_le_bytes();
    assert!(bed.shadow.compare_exchange(rom, &old, &[0; 8]).is_err());
    domain.flush_all();
    assert_eq!(space.find(0), Some((0x5000, true)));
}

//! The guest physical ranges in which vPCI devices live, shared by all buses of a VM.
//!
//! An access looks its region up without a lock; placing and removing regions is serialised. A
//! region is registered for as long as its [`MmioRegion`] lives. An access that found its region
//! just before the region went away may still run a moment longer, as a posted write would:
//! handlers are safe at any time.
#![forbid(unsafe_code)]

use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

use crate::mem::{GuestRam, PAGE_SIZE};

/// Why a region cannot be where it was asked for. Nothing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MmioError {
    /// The range is empty, wraps around, or is not aligned to pages.
    #[error("MMIO range {base:#x}+{len:#x} is not a range of pages")]
    Malformed {
        /// First guest physical address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range is not inside one of the apertures.
    #[error("MMIO range {base:#x}+{len:#x} is outside the apertures of the vPCI buses")]
    OutsideApertures {
        /// First guest physical address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range overlaps guest RAM.
    #[error("MMIO range {base:#x}+{len:#x} overlaps guest RAM")]
    Ram {
        /// First guest physical address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range overlaps another region, or another aperture.
    #[error("MMIO range {base:#x}+{len:#x} overlaps another one")]
    Overlap {
        /// First guest physical address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// What answers the accesses to a region.
pub trait MmioHandler: Send + Sync + Debug {
    /// A load of 1, 2, 4 or 8 bytes, wholly inside the region, of any alignment. `data` arrives
    /// filled with ones.
    fn mmio_read(&self, offset: u64, data: &mut [u8]);

    /// A store of 1, 2, 4 or 8 bytes, wholly inside the region, of any alignment.
    fn mmio_write(&self, offset: u64, data: &[u8]);
}

#[derive(Clone)]
struct Region {
    base: u64,
    /// First address behind the region.
    end: u64,
    handler: Arc<dyn MmioHandler>,
}

/// Without the handler, which may lead back here.
impl Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.base, self.end)
    }
}

/// Counts of accesses since the space was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MmioCounters {
    /// Accesses inside an aperture that no region answered.
    pub unclaimed: u64,
    /// Regions that were refused.
    pub refused: u64,
}

/// All vPCI MMIO of a VM.
#[derive(Debug)]
pub struct MmioSpace {
    ram: GuestRam,
    /// Sorted, disjoint.
    apertures: Vec<Range<u64>>,
    /// Sorted by base, disjoint.
    regions: ArcSwap<Vec<Region>>,
    edit: Mutex<()>,
    unclaimed: AtomicU64,
    refused: AtomicU64,
}

impl MmioSpace {
    /// A space with nothing in it. `apertures` are the ranges that the VM's firmware tables give
    /// to the buses: whole pages, disjoint, and without RAM.
    ///
    /// # Errors
    ///
    /// [`MmioError`] for the first aperture that is malformed or overlaps RAM or another one.
    pub fn new(ram: GuestRam, mut apertures: Vec<Range<u64>>) -> Result<Arc<Self>, MmioError> {
        apertures.sort_by_key(|range| range.start);
        let mut free_from = 0;
        for range in &apertures {
            let (base, len) = (range.start, range.end.wrapping_sub(range.start));
            if range.start >= range.end
                || !range.start.is_multiple_of(PAGE_SIZE)
                || !range.end.is_multiple_of(PAGE_SIZE)
            {
                return Err(MmioError::Malformed { base, len });
            }
            if ram.overlaps_ram(base, len) {
                return Err(MmioError::Ram { base, len });
            }
            if base < free_from {
                return Err(MmioError::Overlap { base, len });
            }
            free_from = range.end;
        }
        Ok(Arc::new(Self {
            ram,
            apertures,
            regions: ArcSwap::from_pointee(Vec::new()),
            edit: Mutex::new(()),
            unclaimed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }))
    }

    /// The apertures, sorted.
    pub fn apertures(&self) -> &[Range<u64>] {
        &self.apertures
    }

    /// Places a region. It answers accesses from the return of this call until the returned value
    /// is dropped.
    ///
    /// # Errors
    ///
    /// [`MmioError`] if the range is not free MMIO inside one aperture.
    pub fn register(
        self: &Arc<Self>,
        base: u64,
        len: u64,
        handler: Arc<dyn MmioHandler>,
    ) -> Result<MmioRegion, MmioError> {
        let placed = self.insert(base, len, handler);
        if placed.is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        placed
    }

    fn insert(
        self: &Arc<Self>,
        base: u64,
        len: u64,
        handler: Arc<dyn MmioHandler>,
    ) -> Result<MmioRegion, MmioError> {
        let malformed = MmioError::Malformed { base, len };
        let end = base.checked_add(len).ok_or(malformed)?;
        if len == 0 || !base.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(malformed);
        }
        if !self
            .apertures
            .iter()
            .any(|aperture| aperture.start <= base && end <= aperture.end)
            && !mutant!("bar-outside-apertures")
        {
            return Err(MmioError::OutsideApertures { base, len });
        }
        // Checked at each placement: memory may have been plugged in since the VM was built.
        if self.ram.overlaps_ram(base, len) {
            return Err(MmioError::Ram { base, len });
        }
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let regions = self.regions.load();
        let index = regions.partition_point(|region| region.end <= base);
        if regions
            .get(index)
            .is_some_and(|region| region.base < end && !mutant!("bar-over-another"))
        {
            return Err(MmioError::Overlap { base, len });
        }
        let mut next = Vec::with_capacity(regions.len() + 1);
        next.extend_from_slice(&regions);
        next.insert(index, Region { base, end, handler });
        self.regions.store(Arc::new(next));
        Ok(MmioRegion {
            space: self.clone(),
            base,
            len,
        })
    }

    fn remove(&self, base: u64) {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let regions = self.regions.load();
        let next = regions
            .iter()
            .filter(|region| region.base != base)
            .cloned()
            .collect();
        self.regions.store(Arc::new(next));
    }

    /// A guest's load. Returns false if the address is in no aperture, so that the access is not
    /// ours; `data` is unchanged then. Where no region answers, or for lengths other than 1, 2, 4
    /// and 8, the load reads all ones.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        if !self.is_inside(gpa) {
            return false;
        }
        data.fill(0xff);
        let len = data.len();
        self.find(gpa, len, |handler, offset| handler.mmio_read(offset, data));
        true
    }

    /// A guest's store; as for [`MmioSpace::mmio_read`], but dropped where no region answers.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        if !self.is_inside(gpa) {
            return false;
        }
        self.find(gpa, data.len(), |handler, offset| {
            handler.mmio_write(offset, data);
        });
        true
    }

    /// Counts since the space was made.
    pub fn counters(&self) -> MmioCounters {
        MmioCounters {
            unclaimed: self.unclaimed.load(Ordering::Relaxed),
            refused: self.refused.load(Ordering::Relaxed),
        }
    }

    fn is_inside(&self, gpa: u64) -> bool {
        self.apertures.iter().any(|range| range.contains(&gpa))
    }

    fn find(&self, gpa: u64, len: usize, access: impl FnOnce(&dyn MmioHandler, u64)) {
        let regions = self.regions.load();
        let index = regions.partition_point(|region| region.end <= gpa);
        match regions.get(index) {
            Some(region)
                if matches!(len, 1 | 2 | 4 | 8)
                    && region.base <= gpa
                    && len as u64 <= region.end - gpa =>
            {
                access(&*region.handler, gpa - region.base);
            }
            _ => {
                self.unclaimed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// A registered region; dropping it removes the region.
pub struct MmioRegion {
    space: Arc<MmioSpace>,
    base: u64,
    len: u64,
}

impl MmioRegion {
    /// First guest physical address of the region.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Length of the region in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }
}

impl Debug for MmioRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.base, self.len)
    }
}

impl Drop for MmioRegion {
    fn drop(&mut self) {
        self.space.remove(self.base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use crate::mem::RamMap;

    #[derive(Debug)]
    struct Tag(u8);

    impl MmioHandler for Tag {
        fn mmio_read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 ^ offset as u8);
        }
        fn mmio_write(&self, _offset: u64, _data: &[u8]) {}
    }

    fn space() -> Arc<MmioSpace> {
        let map = RamMap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ram = GuestRam::new(&map);
        MmioSpace::new(ram, vec![0x10_0000..0x20_0000, 0x2_0000..0x4_0000]).unwrap()
    }

    #[test]
    fn a_region_answers_until_it_is_dropped() {
        let space = space();
        let region = space.register(0x2_1000, 0x1000, Arc::new(Tag(7))).unwrap();
        assert_eq!((region.base(), region.size()), (0x2_1000, 0x1000));
        let mut data = [0; 2];
        assert!(space.mmio_read(0x2_1002, &mut data));
        assert_eq!(data, [5, 5]);
        drop(region);
        assert!(space.mmio_read(0x2_1002, &mut data));
        assert_eq!(data, [0xff, 0xff]);
        assert_eq!(space.counters().unclaimed, 1);
    }

    #[test]
    fn accesses_outside_the_apertures_are_not_ours() {
        let space = space();
        let mut data = [3; 4];
        assert!(!space.mmio_read(0x1_fffc, &mut data));
        assert_eq!(data, [3; 4]);
        assert!(!space.mmio_write(0x4_0000, &data));
        assert!(space.mmio_write(0x3_fffc, &data));
    }

    #[test]
    fn an_access_that_leaves_its_region_reads_all_ones() {
        let space = space();
        let _a = space.register(0x2_0000, 0x1000, Arc::new(Tag(0))).unwrap();
        let _b = space.register(0x2_1000, 0x1000, Arc::new(Tag(0))).unwrap();
        let mut data = [0; 4];
        space.mmio_read(0x2_0ffe, &mut data);
        assert_eq!(data, [0xff; 4]);
        let mut odd = [0; 3];
        space.mmio_read(0x2_0000, &mut odd);
        assert_eq!(odd, [0xff; 3]);
    }

    #[test]
    fn regions_stay_clear_of_ram_of_each_other_and_of_the_outside() {
        let space = space();
        let _a = space.register(0x2_2000, 0x2000, Arc::new(Tag(0))).unwrap();
        for (base, len) in [(0x2_1000, 0x2000), (0x2_3000, 0x1000), (0x2_0000, 0x10000)] {
            assert_eq!(
                space.register(base, len, Arc::new(Tag(0))).unwrap_err(),
                MmioError::Overlap { base, len }
            );
        }
        for (base, len) in [(0x3_f000, 0x2000), (0, 0x1000), (0x5_0000, 0x1000)] {
            assert_eq!(
                space.register(base, len, Arc::new(Tag(0))).unwrap_err(),
                MmioError::OutsideApertures { base, len }
            );
        }
        for (base, len) in [
            (0x2_0800, 0x1000),
            (0x2_0000, 0x800),
            (0x2_0000, 0),
            (u64::MAX - 0xfff, 0x1000),
        ] {
            assert_eq!(
                space.register(base, len, Arc::new(Tag(0))).unwrap_err(),
                MmioError::Malformed { base, len }
            );
        }
        assert_eq!(space.counters().refused, 10);
    }

    #[test]
    fn apertures_must_be_disjoint_pages_without_ram() {
        let map = RamMap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let ram = GuestRam::new(&map);
        let make = |apertures| MmioSpace::new(ram.clone(), apertures).unwrap_err();
        assert!(matches!(
            make(vec![0xf000..0x1_1000, 0x2_0000..0x3_0000]),
            MmioError::Ram { .. }
        ));
        assert!(matches!(
            make(vec![0x2_0000..0x2_2000, 0x2_1000..0x2_3000]),
            MmioError::Overlap { .. }
        ));
        assert!(matches!(
            make(vec![0x2_0000..0x2_0800, 0x3_0000..0x4_0000]),
            MmioError::Malformed { .. }
        ));
    }

    proptest! {
        #[test]
        fn placed_regions_never_overlap_and_lookups_find_their_own(
            asks in proptest::collection::vec((0u64..0x22, 1u64..5), 1..40)
        ) {
            let space = space();
            let mut model: Vec<(u64, u64, u8, MmioRegion)> = Vec::new();
            for (index, (page, pages)) in asks.into_iter().enumerate() {
                let (base, len) = (0x2_0000 + page * 0x1000, pages * 0x1000);
                let free = base + len <= 0x4_0000
                    && model.iter().all(|(b, l, ..)| base + len <= *b || b + l <= base);
                match space.register(base, len, Arc::new(Tag(index as u8))) {
                    Ok(region) => {
                        prop_assert!(free);
                        model.push((base, len, index as u8, region));
                    }
                    Err(_) => prop_assert!(!free),
                }
                if index % 7 == 6 && !model.is_empty() {
                    model.remove(0);
                }
                for page in 0..0x20 {
                    let gpa = 0x2_0000 + page * 0x1000;
                    let want = model
                        .iter()
                        .find(|(b, l, ..)| *b <= gpa && gpa < b + l)
                        .map_or(0xff, |(b, _, tag, _)| tag ^ (gpa - b) as u8);
                    let mut data = [0];
                    prop_assert!(space.mmio_read(gpa, &mut data));
                    prop_assert_eq!(data[0], want);
                }
            }
        }
    }
}

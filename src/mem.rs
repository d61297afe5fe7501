//! The one way to guest RAM.
//!
//! Guest memory is shared with virtual CPUs that write it at any moment, so nothing here hands out
//! a reference into it: bytes are copied in and out, and words that synchronise with the guest are
//! loaded, stored or modified atomically. [`vm_memory`] appears only behind this type and in the
//! DMA handle ([`crate::dma`]).
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryLoadGuard, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory,
    VolatileSlice,
};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes in a guest page, the unit of every GPN and PFN of the Hyper-V interface (4 KiB on every
/// architecture).
pub const PAGE_SIZE: u64 = 4096;

/// The `vm-memory` type behind guest RAM.
pub type RamMap = GuestMemoryMmap<()>;

/// Why an access to guest RAM was refused. Nothing was read or written in these cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MemError {
    /// Part of the range is not guest RAM, or the range wraps around the address space.
    #[error("guest range {gpa:#x}+{len:#x} is not RAM")]
    NotRam {
        /// First guest physical address of the range.
        gpa: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// An atomic access is not aligned to its own size.
    #[error("atomic guest access at {gpa:#x} is not aligned to {align} bytes")]
    Misaligned {
        /// Guest physical address of the access.
        gpa: u64,
        /// Required alignment in bytes.
        align: u64,
    },
}

/// Guest RAM by guest physical address.
///
/// Cheap to clone; clones share the same memory map. The embedding VMM may replace the map
/// (memory hot-plug): every access resolves its address anew, so none uses a stale mapping.
#[derive(Debug, Clone)]
pub struct GuestRam {
    map: GuestMemoryAtomic<RamMap>,
}

impl GuestRam {
    /// Wraps the memory map of a VM.
    pub fn new(map: GuestMemoryAtomic<RamMap>) -> Self {
        Self { map }
    }

    /// The current map, for the DMA handle: its slices live as long as the guard.
    pub(crate) fn memory(&self) -> GuestMemoryLoadGuard<RamMap> {
        self.map.memory()
    }

    /// The map as it is now, for several accesses in a row: looking it up costs more than a short
    /// copy. Not to be kept: RAM that the VMM takes out meanwhile stays mapped for that long.
    pub(crate) fn view(&self) -> RamView {
        RamView {
            map: self.map.memory(),
        }
    }

    /// True if every byte of `gpa..gpa + len` is RAM. An empty range is RAM where its first byte
    /// would be.
    pub fn is_ram(&self, gpa: u64, len: u64) -> bool {
        check(&self.map.memory(), gpa, len).is_ok()
    }

    /// True if any byte of `gpa..gpa + len` is RAM. A range that wraps around counts as RAM, so
    /// that nothing is ever placed there.
    pub fn overlaps_ram(&self, gpa: u64, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else {
            return true;
        };
        self.map.memory().iter().any(|region| {
            let start = region.start_addr().0;
            start < end && gpa < start.saturating_add(region.len())
        })
    }

    /// Copies guest RAM at `gpa` to `buf`.
    ///
    /// # Errors
    ///
    /// [`MemError::NotRam`] if part of the range is not RAM; `buf` is unchanged then.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemError> {
        self.view().read(gpa, buf)
    }

    /// Copies `buf` to guest RAM at `gpa`.
    ///
    /// # Errors
    ///
    /// [`MemError::NotRam`] if part of the range is not RAM; guest memory is unchanged then.
    pub fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemError> {
        self.view().write(gpa, buf)
    }

    /// Copies a wire structure out of guest RAM.
    ///
    /// # Errors
    ///
    /// As for [`GuestRam::read`].
    pub fn read_obj<T: FromBytes + IntoBytes>(&self, gpa: u64) -> Result<T, MemError> {
        let mut value = T::new_zeroed();
        self.read(gpa, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Fills `gpa..gpa + len` with `byte`.
    ///
    /// # Errors
    ///
    /// As for [`GuestRam::write`].
    pub fn fill(&self, gpa: u64, len: u64, byte: u8) -> Result<(), MemError> {
        const CHUNK: u64 = 512;
        let map = self.map.memory();
        check(&map, gpa, len)?;
        let chunk = [byte; CHUNK as usize];
        let mut done = 0;
        while done < len {
            let count = CHUNK.min(len - done);
            map.write_slice(&chunk[..count as usize], GuestAddress(gpa + done))
                .map_err(|_| MemError::NotRam { gpa, len })?;
            done += count;
        }
        Ok(())
    }

    /// Loads a 32-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn load_u32(&self, gpa: u64, order: Ordering) -> Result<u32, MemError> {
        self.with_u32(gpa, |word| word.load(order))
    }

    /// Stores a 32-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn store_u32(&self, gpa: u64, value: u32, order: Ordering) -> Result<(), MemError> {
        self.with_u32(gpa, |word| word.store(value, order))
    }

    /// Sets the bits of `bits` in a 32-bit word and returns its former value.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn fetch_or_u32(&self, gpa: u64, bits: u32, order: Ordering) -> Result<u32, MemError> {
        self.with_u32(gpa, |word| word.fetch_or(bits, order))
    }

    /// Loads a 64-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn load_u64(&self, gpa: u64, order: Ordering) -> Result<u64, MemError> {
        self.with_u64(gpa, |word| word.load(order))
    }

    /// Stores a 64-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn store_u64(&self, gpa: u64, value: u64, order: Ordering) -> Result<(), MemError> {
        self.with_u64(gpa, |word| word.store(value, order))
    }

    /// Replaces `current` by `new` in a 64-bit word. The outer result is about the address; the
    /// inner one is that of [`AtomicU64::compare_exchange`].
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn compare_exchange_u64(
        &self,
        gpa: u64,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemError> {
        self.with_u64(gpa, |word| {
            word.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire)
        })
    }

    fn with_u32<R>(&self, gpa: u64, f: impl FnOnce(&AtomicU32) -> R) -> Result<R, MemError> {
        let view = self.view();
        let slice = word(&view.map, gpa, 4)?;
        let reference = slice
            .get_atomic_ref::<AtomicU32>(0)
            .map_err(|_| MemError::Misaligned { gpa, align: 4 })?;
        Ok(f(reference))
    }

    fn with_u64<R>(&self, gpa: u64, f: impl FnOnce(&AtomicU64) -> R) -> Result<R, MemError> {
        with_u64(&self.view().map, gpa, f)
    }
}

/// Accesses a 64-bit word of a map that the caller has loaded: the page walker reads several.
///
/// # Errors
///
/// [`MemError`] if the word is not aligned or not RAM.
#[inline]
pub(crate) fn with_u64<R>(
    map: &RamMap,
    gpa: u64,
    f: impl FnOnce(&AtomicU64) -> R,
) -> Result<R, MemError> {
    let slice = word(map, gpa, 8)?;
    let reference = slice
        .get_atomic_ref::<AtomicU64>(0)
        .map_err(|_| MemError::Misaligned { gpa, align: 8 })?;
    Ok(f(reference))
}

/// A range that lies in one region; `None` says nothing about other ranges.
#[inline]
fn slice(map: &RamMap, gpa: u64, len: usize) -> Option<VolatileSlice<'_>> {
    let region = map.find_region(GuestAddress(gpa))?;
    let offset = MemoryRegionAddress(gpa - region.start_addr().0);
    region.get_slice(offset, len).ok()
}

/// The slice of one naturally aligned word.
#[inline]
fn word(map: &RamMap, gpa: u64, size: u64) -> Result<VolatileSlice<'_>, MemError> {
    if !gpa.is_multiple_of(size) {
        return Err(MemError::Misaligned { gpa, align: size });
    }
    slice(map, gpa, size as usize).ok_or(MemError::NotRam { gpa, len: size })
}

/// Guest RAM as it is at one moment: see [`GuestRam::view`].
#[derive(Debug)]
pub(crate) struct RamView {
    map: GuestMemoryLoadGuard<RamMap>,
}

impl RamView {
    /// As [`GuestRam::read`].
    pub(crate) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemError> {
        if let Some(slice) = self.slice(gpa, buf.len()) {
            slice.copy_to(buf);
            return Ok(());
        }
        let len = buf.len() as u64;
        check(&self.map, gpa, len)?;
        self.map
            .read_slice(buf, GuestAddress(gpa))
            .map_err(|_| MemError::NotRam { gpa, len })
    }

    /// As [`GuestRam::write`].
    pub(crate) fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemError> {
        if let Some(slice) = self.slice(gpa, buf.len()) {
            slice.copy_from(buf);
            return Ok(());
        }
        let len = buf.len() as u64;
        check(&self.map, gpa, len)?;
        self.map
            .write_slice(buf, GuestAddress(gpa))
            .map_err(|_| MemError::NotRam { gpa, len })
    }

    /// The memory of one page, for words that synchronise with the guest.
    pub(crate) fn page(&self, gpa: u64) -> Result<RamPage<'_>, MemError> {
        let len = PAGE_SIZE;
        let slice = self.slice(gpa, len as usize);
        let slice = slice.ok_or(MemError::NotRam { gpa, len })?;
        Ok(RamPage { gpa, slice })
    }

    /// A range that lies in one region; `None` says nothing about other ranges.
    fn slice(&self, gpa: u64, len: usize) -> Option<VolatileSlice<'_>> {
        slice(&self.map, gpa, len)
    }
}

/// A page of RAM whose place is known: see [`RamView::page`].
#[derive(Debug)]
pub(crate) struct RamPage<'a> {
    gpa: u64,
    slice: VolatileSlice<'a>,
}

impl RamPage<'_> {
    /// Loads the 32-bit word at `offset`.
    pub(crate) fn load_u32(&self, offset: u64, order: Ordering) -> Result<u32, MemError> {
        Ok(self.u32(offset)?.load(order))
    }

    /// Stores the 32-bit word at `offset`.
    pub(crate) fn store_u32(
        &self,
        offset: u64,
        value: u32,
        order: Ordering,
    ) -> Result<(), MemError> {
        self.u32(offset)?.store(value, order);
        Ok(())
    }

    fn u32(&self, offset: u64) -> Result<&AtomicU32, MemError> {
        let error = MemError::Misaligned {
            gpa: self.gpa + offset,
            align: 4,
        };
        let word = self.slice.get_atomic_ref(offset as usize);
        word.map_err(|_| error)
    }
}

/// Checks that a whole range is RAM; regions may adjoin.
pub(crate) fn check(map: &RamMap, gpa: u64, len: u64) -> Result<(), MemError> {
    let error = MemError::NotRam { gpa, len };
    let end = gpa.checked_add(len).ok_or(error)?;
    let mut next = gpa;
    loop {
        let region = map.find_region(GuestAddress(next)).ok_or(error)?;
        next = region
            .start_addr()
            .0
            .checked_add(region.len())
            .ok_or(error)?;
        if next >= end {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        let ranges = [
            (GuestAddress(0), 0x2000),
            (GuestAddress(0x2000), 0x1000),
            (GuestAddress(0x10000), 0x1000),
        ];
        let map = RamMap::from_ranges(&ranges).expect("test RAM");
        GuestRam::new(GuestMemoryAtomic::new(map))
    }

    #[test]
    fn a_copy_crosses_adjoining_regions() {
        let ram = ram();
        ram.write(0x1ffe, &[1, 2, 3, 4]).unwrap();
        let mut back = [0; 4];
        ram.read(0x1ffe, &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
    }

    #[test]
    fn a_write_that_leaves_ram_changes_nothing() {
        let ram = ram();
        let error = ram.write(0x2ffe, &[0xff; 4]).unwrap_err();
        assert_eq!(
            error,
            MemError::NotRam {
                gpa: 0x2ffe,
                len: 4
            }
        );
        let mut back = [0xaa; 2];
        ram.read(0x2ffe, &mut back).unwrap();
        assert_eq!(back, [0, 0]);
        assert!(ram.fill(0x2ffe, 4, 0xff).is_err());
        ram.read(0x2ffe, &mut back).unwrap();
        assert_eq!(back, [0, 0]);
    }

    #[test]
    fn wrapping_ranges_are_refused_everywhere() {
        let ram = ram();
        let mut buf = [0; 16];
        assert!(ram.read(u64::MAX - 7, &mut buf).is_err());
        assert!(ram.write(u64::MAX - 7, &buf).is_err());
        assert!(!ram.is_ram(u64::MAX, 2));
        assert!(ram.overlaps_ram(u64::MAX, 2));
        assert!(ram.load_u64(u64::MAX - 7, Ordering::Relaxed).is_err());
    }

    #[test]
    fn overlap_and_containment_differ_at_region_ends() {
        let ram = ram();
        assert!(ram.is_ram(0, 0x3000));
        assert!(!ram.is_ram(0, 0x3001));
        assert!(ram.overlaps_ram(0x2fff, 0x1000));
        assert!(!ram.overlaps_ram(0x3000, 0xd000));
        assert!(ram.overlaps_ram(0x3000, 0xd001));
    }

    #[test]
    fn atomics_demand_natural_alignment() {
        let ram = ram();
        assert_eq!(
            ram.fetch_or_u32(0x102, 1, Ordering::SeqCst),
            Err(MemError::Misaligned {
                gpa: 0x102,
                align: 4
            })
        );
        assert_eq!(ram.fetch_or_u32(0x104, 6, Ordering::SeqCst), Ok(0));
        assert_eq!(ram.fetch_or_u32(0x104, 1, Ordering::SeqCst), Ok(6));
        assert_eq!(ram.load_u32(0x104, Ordering::Acquire), Ok(7));
        assert_eq!(ram.compare_exchange_u64(0x108, 0, 9), Ok(Ok(0)));
        assert_eq!(ram.compare_exchange_u64(0x108, 0, 5), Ok(Err(9)));
    }
}

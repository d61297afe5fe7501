//! The one way to guest RAM.
//!
//! Guest memory is shared with virtual CPUs that write it at any moment, so nothing here hands out
//! a reference into it: bytes are copied in and out, and words that synchronise with the guest are
//! loaded, stored or modified atomically. [`vm_memory`] appears only behind this type and in the
//! DMA handle ([`crate::dma`]).
//!
//! Unsafe code is in `device` only, which maps and unmaps.

mod device;
mod snapshot;

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use vm_memory::GuestMemoryMmap;
use zerocopy::{FromBytes, IntoBytes};

pub use device::DeviceMemory;
#[cfg(feature = "vfio")]
pub(crate) use snapshot::RamPiece;
pub(crate) use snapshot::{Snapshot, Span};

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
    /// Part of the range is RAM that the VMM has mapped for reading only, and it was to be written.
    #[error("guest range {gpa:#x}+{len:#x} is read-only")]
    ReadOnly {
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
/// A region that the VMM has mapped without `PROT_WRITE`, such as one of firmware, is read like any other
/// and never written: whatever would write there fails as if no RAM were there.
///
/// Cheap to clone; clones share the same memory map. The embedding VMM may replace the map
/// (memory hot-plug). Whoever works on RAM takes a snapshot of the map, for one hypercall, one ring
/// call or one DMA access; rings and DMA ports keep theirs and compare a generation before each use.
#[derive(Debug, Clone)]
pub struct GuestRam {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Changes after the snapshot does.
    generation: AtomicU64,
    snapshot: ArcSwap<Snapshot>,
}

impl GuestRam {
    /// The RAM of a VM, as mapped now.
    pub fn new(map: &RamMap) -> Self {
        Self {
            shared: Arc::new(Shared {
                generation: AtomicU64::new(0),
                snapshot: ArcSwap::from_pointee(Snapshot::new(map)),
            }),
        }
    }

    /// Replaces the memory map. What begins after this returns uses the new map. An access that is
    /// under way may end in the former one, and rings and DMA ports keep a region that was taken
    /// out mapped until their next access.
    ///
    /// Not in a VM with passed-through devices: what their DMA reaches is RAM as it was when they were
    /// opened (docs/passthrough.md).
    pub fn replace(&self, map: &RamMap) {
        self.shared.snapshot.store(Arc::new(Snapshot::new(map)));
        self.shared.generation.fetch_add(1, Ordering::Release);
    }

    /// Changes after each [`replace`](Self::replace): costs a plain load.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// RAM as it is now, for the accesses of one call: looking it up costs two locked
    /// instructions, more than a short copy.
    #[inline]
    pub(crate) fn view(&self) -> RamView {
        RamView(self.shared.snapshot.load())
    }

    /// RAM as it is now, to be kept.
    pub(crate) fn pin(&self) -> PinnedRam {
        // In this order: a pin is never newer than its generation says.
        let generation = self.generation();
        PinnedRam {
            generation,
            snapshot: self.shared.snapshot.load_full(),
        }
    }

    /// True if every byte of `gpa..gpa + len` is RAM. An empty range is RAM where its first byte
    /// would be.
    pub fn is_ram(&self, gpa: u64, len: u64) -> bool {
        self.view().check(gpa, len, false).is_ok()
    }

    /// True if every byte of `gpa..gpa + len` is RAM, and none of it is mapped for reading only.
    pub fn is_writable(&self, gpa: u64, len: u64) -> bool {
        self.view().check(gpa, len, true).is_ok()
    }

    /// True if any byte of `gpa..gpa + len` is RAM. A range that wraps around counts as RAM, so
    /// that nothing is ever placed there.
    pub fn overlaps_ram(&self, gpa: u64, len: u64) -> bool {
        let Some(end) = gpa.checked_add(len) else {
            return true;
        };
        self.view().overlaps(gpa, end)
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
    /// [`MemError::NotRam`] if part of the range is not RAM, [`MemError::ReadOnly`] if part of it may
    /// only be read; guest memory is unchanged then.
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
        let chunk = [byte; CHUNK as usize];
        let view = self.view();
        view.check(gpa, len, true)?;
        let mut done = 0;
        while done < len {
            let count = CHUNK.min(len - done);
            view.write(gpa + done, &chunk[..count as usize])?;
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
        Ok(self.view().u32(gpa)?.load(order))
    }

    /// Stores a 32-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned, not RAM, or read-only.
    pub fn store_u32(&self, gpa: u64, value: u32, order: Ordering) -> Result<(), MemError> {
        self.view().u32(gpa)?.writable()?.store(value, order);
        Ok(())
    }

    /// Sets the bits of `bits` in a 32-bit word and returns its former value.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned, not RAM, or read-only.
    pub fn fetch_or_u32(&self, gpa: u64, bits: u32, order: Ordering) -> Result<u32, MemError> {
        Ok(self.view().u32(gpa)?.writable()?.fetch_or(bits, order))
    }

    /// Loads a 64-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned or not RAM.
    pub fn load_u64(&self, gpa: u64, order: Ordering) -> Result<u64, MemError> {
        Ok(self.view().u64(gpa)?.load(order))
    }

    /// Stores a 64-bit word.
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned, not RAM, or read-only.
    pub fn store_u64(&self, gpa: u64, value: u64, order: Ordering) -> Result<(), MemError> {
        self.view().u64(gpa)?.writable()?.store(value, order);
        Ok(())
    }

    /// Replaces `current` by `new` in a 64-bit word. The outer result is about the address; the
    /// inner one is that of [`AtomicU64::compare_exchange`].
    ///
    /// # Errors
    ///
    /// [`MemError`] if the word is not aligned, not RAM, or read-only.
    pub fn compare_exchange_u64(
        &self,
        gpa: u64,
        current: u64,
        new: u64,
    ) -> Result<Result<u64, u64>, MemError> {
        let (order, failed) = (Ordering::AcqRel, Ordering::Acquire);
        let view = self.view();
        let word = view.u64(gpa)?.writable()?;
        Ok(word.compare_exchange(current, new, order, failed))
    }
}

/// Guest RAM for the time of one call: see [`GuestRam::view`].
#[derive(Debug)]
pub(crate) struct RamView(Guard<Arc<Snapshot>>);

impl Deref for RamView {
    type Target = Snapshot;

    #[inline]
    fn deref(&self) -> &Snapshot {
        &self.0
    }
}

/// Guest RAM for many calls: see [`GuestRam::pin`].
#[derive(Debug)]
pub(crate) struct PinnedRam {
    generation: u64,
    snapshot: Arc<Snapshot>,
}

impl PinnedRam {
    /// True if the map was not replaced since the pin was made.
    #[inline]
    pub(crate) fn is_current(&self, ram: &GuestRam) -> bool {
        self.generation == ram.generation()
    }
}

impl Deref for PinnedRam {
    type Target = Snapshot;

    #[inline]
    fn deref(&self) -> &Snapshot {
        &self.snapshot
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::fs::File;
    use std::io::Write;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    /// RAM of `len` bytes from 0 on, and behind it a region with `rom` in it that is mapped for reading
    /// only.
    pub(crate) fn with_rom(len: u64, rom: &[u8]) -> RamMap {
        let ram = MmapRegion::new(len as usize).expect("test RAM");
        let mut file: File = tempfile::tempfile().expect("a file for the ROM");
        file.write_all(rom).expect("a file for the ROM");
        let rom = MmapRegionBuilder::new(rom.len())
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_PRIVATE)
            .build()
            .expect("test ROM");
        let regions = [(ram, 0), (rom, len)]
            .map(|(mapping, at)| GuestRegionMmap::new(mapping, GuestAddress(at)).expect("no wrap"));
        RamMap::from_regions(regions.into()).expect("regions apart")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;

    fn ram() -> GuestRam {
        let ranges = [
            (GuestAddress(0), 0x2000),
            (GuestAddress(0x2000), 0x1000),
            (GuestAddress(0x10000), 0x1000),
        ];
        let map = RamMap::from_ranges(&ranges).expect("test RAM");
        GuestRam::new(&map)
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

    #[test]
    fn what_follows_a_replacement_uses_the_new_map() {
        let range = |start| (GuestAddress(start), 0x1000);
        let both = RamMap::from_ranges(&[range(0), range(0x1000)]).expect("test RAM");
        let ram = GuestRam::new(&both);
        let clone = ram.clone();
        let pin = clone.pin();
        assert!(pin.is_current(&ram));
        ram.write(0x1000, &[1]).unwrap();
        let (first, _) = both.remove_region(GuestAddress(0x1000), 0x1000).unwrap();
        drop(both);
        ram.replace(&first);
        assert!(!pin.is_current(&clone));
        assert!(clone.is_ram(0, 0x1000) && !clone.is_ram(0x1000, 1));
        assert!(!clone.overlaps_ram(0x1000, 0x1000));
        // Who keeps the former map keeps its memory.
        let mut byte = [0];
        pin.read(0x1000, &mut byte).unwrap();
        assert_eq!(byte, [1]);
        assert!(clone.pin().is_current(&ram));
    }

    #[test]
    fn a_span_ends_where_it_was_found_to_end() {
        let ram = ram();
        let view = ram.view();
        assert!(view.span(0x1000, 0x1001).is_err());
        assert!(view.span(0x3000, 1).is_err());
        let mut span = view.span(0x1000, 0x800).unwrap();
        assert!(span.slice(0x7fc, 4).is_some() && span.slice(0x7fc, 5).is_none());
        assert!(span.slice(usize::MAX, 2).is_none());
        assert!(span.u32(0x7fc).is_some() && span.u32(0x7fe).is_none());
        assert!(span.u32(0x800).is_none() && span.u32(0x7fd).is_none());
        assert!(!span.append(&view.span(0x1801, 1).unwrap()));
        assert!(span.append(&view.span(0x1800, 0x800).unwrap()));
        assert!(
            !span.append(&view.span(0x2000, 0x800).unwrap()),
            "another region"
        );
        assert!(span.slice(0, 0x1000).is_some() && span.slice(0, 0x1001).is_none());
    }

    #[test]
    fn a_read_only_region_is_read_and_never_written() {
        let ram = GuestRam::new(&testing::with_rom(0x1000, &[7; 0x1000]));
        let read_only = |gpa, len| Err(MemError::ReadOnly { gpa, len });
        assert!(ram.is_ram(0, 0x2000) && ram.is_writable(0, 0x1000));
        assert!(!ram.is_writable(0xfff, 2) && !ram.is_writable(0x1800, 1));
        assert_eq!(ram.write(0x1010, &[1; 4]), read_only(0x1010, 4));
        // Not even the part that may be.
        assert_eq!(ram.write(0xffe, &[1; 4]), read_only(0xffe, 4));
        assert_eq!(ram.fill(0xffe, 4, 1), read_only(0xffe, 4));
        let mut back = [0; 4];
        ram.read(0xffe, &mut back).unwrap();
        assert_eq!(back, [0, 0, 7, 7]);
        let order = Ordering::SeqCst;
        assert_eq!(ram.store_u32(0x1010, 1, order), read_only(0x1010, 4));
        assert_eq!(ram.store_u64(0x1010, 1, order), read_only(0x1010, 8));
        let former = ram.fetch_or_u32(0x1010, 1, order);
        assert_eq!(former.map(drop), read_only(0x1010, 4));
        let former = ram.compare_exchange_u64(0x1010, 0x0707_0707_0707_0707, 1);
        assert_eq!(former.map(drop), read_only(0x1010, 8));
        assert_eq!(ram.load_u32(0x1010, order), Ok(0x0707_0707));
        assert_eq!(ram.load_u64(0x1010, order), Ok(0x0707_0707_0707_0707));
        assert_eq!(ram.view().span(0x1000, 8).map(drop), read_only(0x1000, 8));
    }
}

//! The regions of guest RAM as they were at one moment.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{
    AtomicInteger, GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory,
    VolatileMemoryError, VolatileSlice,
};

use super::{MemError, RamMap};

/// One region of RAM.
#[derive(Debug)]
struct Region {
    start: u64,
    /// Bytes; the sum with `start` does not wrap.
    len: u64,
    /// This process may write it. Reading is all that may be done otherwise: a store would be a signal.
    writable: bool,
    mapping: Arc<MmapRegion>,
}

impl Region {
    /// Guest physical address behind the last byte.
    #[inline]
    fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Offset of `gpa`, which is in the region.
    #[inline]
    fn offset(&self, gpa: u64) -> usize {
        (gpa - self.start) as usize
    }

    /// True if it may be read, or, with `write`, written.
    #[inline]
    fn allows(&self, write: bool) -> bool {
        self.writable || !write
    }

    /// Why a part of it may not be written.
    #[cold]
    fn read_only(gpa: u64, len: u64) -> MemError {
        MemError::ReadOnly { gpa, len }
    }
}

/// Guest RAM at one moment: never changes, and keeps its regions mapped.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// By address. In one piece: a search touches one or two cache lines.
    regions: Box<[Region]>,
}

impl Snapshot {
    /// The regions of `map`.
    pub(crate) fn new(map: &RamMap) -> Self {
        let regions = map.iter().map(|region| Region {
            start: region.start_addr().0,
            len: region.len(),
            writable: region.prot() & libc::PROT_WRITE != 0,
            mapping: region.get_mmap(),
        });
        Self {
            regions: regions.collect(),
        }
    }

    #[inline]
    fn find(&self, gpa: u64) -> Option<&Region> {
        let is_in = |region: &&Region| gpa.wrapping_sub(region.start) < region.len;
        // As most VMs have them: below and above the hole for MMIO.
        match &*self.regions {
            few @ ([_] | [_, _] | [_, _, _]) => few.iter().find(is_in),
            many => Self::search(many, gpa).filter(is_in),
        }
    }

    #[inline(never)]
    fn search(regions: &[Region], gpa: u64) -> Option<&Region> {
        let next = regions.partition_point(|region| region.start <= gpa);
        regions.get(next.checked_sub(1)?)
    }

    /// The memory of a range that lies in one region, to be read or, with `write`, written; `None` says
    /// nothing about other ranges.
    #[inline]
    pub(crate) fn slice(&self, gpa: u64, len: usize, write: bool) -> Option<VolatileSlice<'_>> {
        let region = self.find(gpa).filter(|region| region.allows(write))?;
        region.mapping.get_slice(region.offset(gpa), len).ok()
    }

    /// The memory from `gpa` to the end of its region, at most `len` bytes, to be read or, with `write`,
    /// written.
    pub(crate) fn prefix(&self, gpa: u64, len: usize, write: bool) -> Option<VolatileSlice<'_>> {
        let region = self.find(gpa)?;
        let most = region.end() - gpa;
        self.slice(gpa, most.min(len as u64) as usize, write)
    }

    /// Checks that a whole range is RAM and, with `write`, that it may be written; regions may adjoin.
    /// An empty range is RAM where its first byte would be.
    #[inline]
    pub(crate) fn check(&self, gpa: u64, len: u64, write: bool) -> Result<(), MemError> {
        let error = MemError::NotRam { gpa, len };
        let end = gpa.checked_add(len).ok_or(error)?;
        let mut next = gpa;
        loop {
            let region = self.find(next).ok_or(error)?;
            if !region.allows(write) {
                return Err(Region::read_only(gpa, len));
            }
            next = region.end();
            if next >= end {
                return Ok(());
            }
        }
    }

    /// True if any byte of `gpa..end` is RAM.
    pub(super) fn overlaps(&self, gpa: u64, end: u64) -> bool {
        let mut regions = self.regions.iter();
        regions.any(|region| region.start < end && gpa < region.end())
    }

    /// The parts of `gpa..end` that are RAM, region by region, and whether each can be written.
    pub(crate) fn parts(&self, gpa: u64, end: u64) -> impl Iterator<Item = (Range<u64>, bool)> {
        let part = move |region: &Region| {
            let range = region.start.max(gpa)..region.end().min(end);
            (range, region.writable)
        };
        let parts = self.regions.iter().map(part);
        parts.filter(|(range, _)| range.start < range.end)
    }

    /// Bytes of all regions.
    pub(crate) fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    /// As [`GuestRam::read`](super::GuestRam::read).
    #[inline]
    pub(crate) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemError> {
        if let Some(slice) = self.slice(gpa, buf.len(), false) {
            slice.copy_to(buf);
            return Ok(());
        }
        self.each_piece(gpa, buf.len(), false, |slice, done| {
            slice.copy_to(&mut buf[done..]);
        })
    }

    /// As [`GuestRam::write`](super::GuestRam::write).
    #[inline]
    pub(crate) fn write(&self, gpa: u64, buf: &[u8]) -> Result<(), MemError> {
        if let Some(slice) = self.slice(gpa, buf.len(), true) {
            slice.copy_from(buf);
            return Ok(());
        }
        self.each_piece(gpa, buf.len(), true, |slice, done| {
            slice.copy_from(&buf[done..])
        })
    }

    /// Calls `f` with the memory of a range, region by region, and the bytes before each piece.
    #[cold]
    fn each_piece(
        &self,
        gpa: u64,
        len: usize,
        write: bool,
        mut f: impl FnMut(VolatileSlice<'_>, usize),
    ) -> Result<(), MemError> {
        self.check(gpa, len as u64, write)?;
        let mut done = 0;
        while done < len {
            let left = len - done;
            let piece = self.prefix(gpa + done as u64, left, write);
            let piece = piece.ok_or(MemError::NotRam {
                gpa,
                len: len as u64,
            })?;
            f(piece, done);
            done += piece.len();
        }
        Ok(())
    }

    /// The pieces of a range, region by region.
    #[cfg(feature = "vfio")]
    pub(crate) fn pieces(&self, gpa: u64, len: u64) -> Result<Vec<RamPiece>, MemError> {
        self.check(gpa, len, false)?;
        let end = gpa + len;
        let regions = self.regions.iter();
        let touched = regions.filter(|region| region.start < end && gpa < region.end());
        Ok(touched
            .map(|region| {
                let start = gpa.max(region.start);
                RamPiece {
                    mapping: region.mapping.clone(),
                    gpa: start,
                    offset: region.offset(start),
                    len: end.min(region.end()) - start,
                }
            })
            .collect())
    }

    /// All regions, in order.
    #[cfg(feature = "vfio")]
    pub(crate) fn all_pieces(&self) -> Vec<RamPiece> {
        let regions = self.regions.iter();
        regions
            .map(|region| RamPiece {
                mapping: region.mapping.clone(),
                gpa: region.start,
                offset: 0,
                len: region.len,
            })
            .collect()
    }

    /// A 32-bit word.
    #[inline]
    pub(crate) fn u32(&self, gpa: u64) -> Result<Word<'_, AtomicU32>, MemError> {
        self.word(gpa)
    }

    /// A 64-bit word.
    #[inline]
    pub(crate) fn u64(&self, gpa: u64) -> Result<Word<'_, AtomicU64>, MemError> {
        self.word(gpa)
    }

    #[inline]
    fn word<T: AtomicInteger>(&self, gpa: u64) -> Result<Word<'_, T>, MemError> {
        let len = size_of::<T>() as u64;
        let region = self.find(gpa).ok_or(MemError::NotRam { gpa, len })?;
        let atomic = region.mapping.get_atomic_ref(region.offset(gpa));
        Ok(Word {
            atomic: atomic.map_err(|error| word_error(&error, gpa, len))?,
            gpa,
            writable: region.writable,
        })
    }

    /// Finds a range that lies in one region and may be written, for many accesses.
    pub(crate) fn span(&self, gpa: u64, len: usize) -> Result<Span, MemError> {
        let not_ram = MemError::NotRam {
            gpa,
            len: len as u64,
        };
        let region = self.find(gpa).ok_or(not_ram)?;
        if !region.writable {
            return Err(Region::read_only(gpa, len as u64));
        }
        let offset = region.offset(gpa);
        region.mapping.get_slice(offset, len).map_err(|_| not_ram)?;
        Ok(Span {
            mapping: region.mapping.clone(),
            offset,
            len,
        })
    }
}

/// A word of RAM, which may be only to be read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Word<'a, T> {
    atomic: &'a T,
    gpa: u64,
    writable: bool,
}

impl<'a, T> Word<'a, T> {
    /// The word, to be written.
    ///
    /// # Errors
    ///
    /// [`MemError::ReadOnly`].
    #[inline]
    pub(crate) fn writable(&self) -> Result<&'a T, MemError> {
        match self.writable {
            true => Ok(self.atomic),
            false => Err(Region::read_only(self.gpa, size_of::<T>() as u64)),
        }
    }
}

impl Word<'_, AtomicU32> {
    /// Loads it.
    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> u32 {
        self.atomic.load(order)
    }
}

impl Word<'_, AtomicU64> {
    /// Loads it.
    #[inline]
    pub(crate) fn load(&self, order: Ordering) -> u64 {
        self.atomic.load(order)
    }
}

#[cold]
fn word_error(error: &VolatileMemoryError, gpa: u64, size: u64) -> MemError {
    match error {
        VolatileMemoryError::Misaligned { .. } => MemError::Misaligned { gpa, align: size },
        _ => MemError::NotRam { gpa, len: size },
    }
}

/// Guest RAM that the host's kernel can be told of: consecutive in guest physical addresses and in
/// this process. The memory stays mapped while this lives.
#[derive(Debug, Clone)]
#[cfg(feature = "vfio")]
pub(crate) struct RamPiece {
    mapping: Arc<MmapRegion>,
    gpa: u64,
    offset: usize,
    len: u64,
}

#[cfg(feature = "vfio")]
impl RamPiece {
    /// Guest physical address of its first byte.
    pub(crate) fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Where its first byte is in this process: a number for the kernel.
    pub(crate) fn host_address(&self) -> u64 {
        self.mapping.as_ptr() as u64 + self.offset as u64
    }

    /// True if this process may write it.
    pub(crate) fn is_writable(&self) -> bool {
        self.mapping.prot() & libc::PROT_WRITE != 0
    }
}

/// Consecutive bytes of RAM, which may be written, that were found once. Their region stays mapped as
/// long as this lives, also when the VMM takes it out of the map: whoever keeps a span compares
/// [`GuestRam::generation`](super::GuestRam::generation) before each use.
#[derive(Debug)]
pub(crate) struct Span {
    mapping: Arc<MmapRegion>,
    offset: usize,
    len: usize,
}

impl Span {
    /// Lengthens the span by `next`, if that follows in the same region.
    pub(crate) fn append(&mut self, next: &Self) -> bool {
        let follows =
            Arc::ptr_eq(&self.mapping, &next.mapping) && self.offset + self.len == next.offset;
        if follows {
            self.len += next.len;
        }
        follows
    }

    /// Memory of the span.
    #[inline]
    pub(crate) fn slice(&self, offset: usize, len: usize) -> Option<VolatileSlice<'_>> {
        let end = offset.checked_add(len)?;
        if end > self.len {
            return None;
        }
        self.mapping.get_slice(self.offset + offset, len).ok()
    }

    /// The 32-bit word at `offset`; `None` if it is not in the span or not aligned.
    #[inline]
    pub(crate) fn u32(&self, offset: usize) -> Option<&AtomicU32> {
        if offset.checked_add(size_of::<u32>())? > self.len {
            return None;
        }
        self.mapping.get_atomic_ref(self.offset + offset).ok()
    }
}

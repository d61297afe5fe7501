//! A function's I/O virtual address space under its guard.
#![forbid(unsafe_code)]

use std::iter::FusedIterator;
use std::sync::RwLockReadGuard;

use arrayvec::ArrayVec;
use vm_memory::guest_memory::{GuestMemoryBackendSliceIterator, GuestMemorySliceIterator};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryLoadGuard,
    Permissions, VolatileSlice,
};

use super::port::{DmaPort, Gate};
use super::{DmaError, MAX_DMA_LEN, MAX_SLICES};
use crate::mem::{self, RamMap};
use crate::pviommu::{Access, DmaFault, FaultCause, PageTable, Translation, touches_interrupts};

/// Guest physical bytes that follow each other.
#[derive(Debug, Clone, Copy)]
struct Run {
    gpa: u64,
    len: usize,
}

/// An access as guest physical bytes, in order.
type Runs = ArrayVec<Run, MAX_SLICES>;

/// A function's I/O virtual address space for the time of one [`Dma::session`].
///
/// `virtio-queue` and other users of [`GuestMemory`] work on it unchanged. Each access is
/// translated as a whole before a byte of it moves.
///
/// [`Dma::session`]: super::Dma::session
#[derive(Debug)]
pub struct DmaView<'a> {
    ram: GuestMemoryLoadGuard<RamMap>,
    port: &'a DmaPort,
    gate: RwLockReadGuard<'a, Gate>,
}

impl<'a> DmaView<'a> {
    pub(super) fn new(
        port: &'a DmaPort,
        gate: RwLockReadGuard<'a, Gate>,
        ram: GuestMemoryLoadGuard<RamMap>,
    ) -> Self {
        Self { ram, port, gate }
    }

    pub(super) fn collect<'s>(
        &'s self,
        iova: u64,
        len: usize,
        access: Access,
        slices: &mut ArrayVec<VolatileSlice<'s>, MAX_SLICES>,
    ) -> Result<(), DmaError> {
        let fault = DmaError::Fault {
            iova,
            len: len as u64,
        };
        let translated = self.translate(iova, len, access);
        for slice in translated.map_err(|()| fault)? {
            let slice = slice.map_err(|_| fault)?;
            slices.try_push(slice).map_err(|_| fault)?;
        }
        Ok(())
    }

    /// Translates a whole access, or records why it does not translate.
    #[inline]
    fn translate(&self, iova: u64, len: usize, access: Access) -> Result<Slices<'_>, ()> {
        match self.resolve(iova, len, access) {
            Ok(slices) => Ok(slices),
            Err((offset, cause)) => {
                let fault = DmaFault {
                    domain: self.gate.attachment.domain,
                    iova: iova.wrapping_add(offset),
                    len: len as u64 - offset,
                    access,
                    cause,
                };
                self.port.record(&self.gate, fault);
                Err(())
            }
        }
    }

    /// The same without a record. On failure, the offset of the first byte that does not translate.
    #[inline]
    fn resolve(
        &self,
        iova: u64,
        len: usize,
        access: Access,
    ) -> Result<Slices<'_>, (u64, FaultCause)> {
        let at_start = |cause| (0, cause);
        if iova.checked_add(len as u64).is_none() {
            return Err(at_start(FaultCause::NotRam));
        }
        if touches_interrupts(iova, len as u64) {
            return Err(at_start(FaultCause::InterruptRange));
        }
        match &self.gate.attachment.translation {
            Translation::Blocked => Err(at_start(FaultCause::Blocked)),
            Translation::Identity => {
                self.check_ram(iova, len).map_err(at_start)?;
                Ok(Slices::one(&self.ram, iova, len))
            }
            Translation::Paged(table) => self.paged(table, iova, len, access),
        }
    }

    #[inline]
    fn paged(
        &self,
        table: &PageTable,
        iova: u64,
        len: usize,
        access: Access,
    ) -> Result<Slices<'_>, (u64, FaultCause)> {
        let at_start = |cause| (0, cause);
        if len == 0 {
            return Ok(Slices::one(&self.ram, 0, 0));
        }
        let translated = self.gate.translate(table, &self.ram, iova, access);
        let (gpa, left) = translated.map_err(at_start)?;
        if left >= len as u64 {
            // The access does not leave its page: nearly all of them.
            self.check_ram(gpa, len).map_err(at_start)?;
            return Ok(Slices::one(&self.ram, gpa, len));
        }
        let mut runs = Runs::new();
        let mut done = 0;
        while done < len {
            let offset = done as u64;
            let fault = |cause| (offset, cause);
            let iova = iova + offset;
            let translated = self.gate.translate(table, &self.ram, iova, access);
            let (gpa, left) = translated.map_err(fault)?;
            let count = left.min((len - done) as u64) as usize;
            self.check_ram(gpa, count).map_err(fault)?;
            // More runs than an access of the greatest length can need: too long.
            let run = Run { gpa, len: count };
            runs.try_push(run).map_err(|_| fault(FaultCause::NotRam))?;
            done += count;
        }
        Ok(Slices::many(&self.ram, runs))
    }

    #[inline]
    fn check_ram(&self, gpa: u64, len: usize) -> Result<(), FaultCause> {
        match mem::check(&self.ram, gpa, len as u64) {
            Ok(()) => Ok(()),
            // An empty access is anywhere.
            Err(_) if len == 0 => Ok(()),
            Err(_) => Err(FaultCause::NotRam),
        }
    }
}

impl GuestMemory for DmaView<'_> {
    type PhysicalMemory = RamMap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let mut done = 0;
        // In pieces, because the answer, unlike an access, may be about any length.
        while done < count {
            let Some(iova) = addr.0.checked_add(done as u64) else {
                return false;
            };
            let len = (count - done).min(MAX_DMA_LEN);
            if self.resolve(iova, len, direction(access)).is_err() {
                return false;
            }
            done += len;
        }
        true
    }

    fn get_slices<'s>(
        &'s self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> vm_memory::guest_memory::Result<impl GuestMemorySliceIterator<'s, ()>> {
        // The whole range or nothing: a transfer that runs off its pages moves no byte.
        self.translate(addr.0, count, direction(access))
            .map_err(|()| GuestMemoryError::InvalidGuestAddress(addr))
    }
}

fn direction(access: Permissions) -> Access {
    if access.has_write() {
        Access::Write
    } else {
        Access::Read
    }
}

/// The host memory of an access that was found to be RAM.
struct Slices<'s> {
    ram: &'s RamMap,
    now: GuestMemoryBackendSliceIterator<'s, RamMap>,
    later: Option<arrayvec::IntoIter<Run, MAX_SLICES>>,
}

impl<'s> Slices<'s> {
    fn one(ram: &'s RamMap, gpa: u64, len: usize) -> Self {
        Self {
            ram,
            now: GuestMemoryBackend::get_slices(ram, GuestAddress(gpa), len),
            later: None,
        }
    }

    fn many(ram: &'s RamMap, runs: Runs) -> Self {
        Self {
            later: Some(runs.into_iter()),
            ..Self::one(ram, 0, 0)
        }
    }
}

impl<'s> Iterator for Slices<'s> {
    type Item = vm_memory::guest_memory::Result<VolatileSlice<'s>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(slice) = self.now.next() {
                return Some(slice);
            }
            let run = self.later.as_mut()?.next()?;
            self.now = GuestMemoryBackend::get_slices(self.ram, GuestAddress(run.gpa), run.len);
        }
    }
}

impl FusedIterator for Slices<'_> {}

impl<'s> GuestMemorySliceIterator<'s, ()> for Slices<'s> {}

//! A function's I/O virtual address space under its guard.
#![forbid(unsafe_code)]

use std::iter::FusedIterator;
use std::sync::RwLockReadGuard;

use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, Permissions, VolatileSlice};

use super::port::{DmaPort, Gate};
use super::{DmaError, MAX_DMA_LEN};
use crate::mem::{RamMap, Snapshot};
use crate::pviommu::{Access, DmaFault, FaultCause, Translation, touches_interrupts};

/// A function's I/O virtual address space for the time of one [`Dma::session`].
///
/// `virtio-queue` and other users of [`GuestMemory`] work on it unchanged. Each access is
/// translated as a whole before a byte of it moves.
///
/// [`Dma::session`]: super::Dma::session
#[derive(Debug)]
pub struct DmaView<'a> {
    port: &'a DmaPort,
    gate: RwLockReadGuard<'a, Gate>,
}

impl<'a> DmaView<'a> {
    pub(super) fn new(port: &'a DmaPort, gate: RwLockReadGuard<'a, Gate>) -> Self {
        Self { port, gate }
    }

    #[inline]
    fn ram(&self) -> &Snapshot {
        &self.gate.ram
    }

    /// The host memory of an access, in order; recorded if there is none.
    #[inline]
    pub(super) fn slices(
        &self,
        iova: u64,
        len: usize,
        access: Access,
    ) -> Result<Slices<'_>, DmaError> {
        self.translate(iova, len, access)
            .map_err(|()| DmaError::Fault {
                iova,
                len: len as u64,
            })
    }

    /// Translates a whole access, or records why it does not translate.
    #[inline(always)]
    fn translate(&self, iova: u64, len: usize, access: Access) -> Result<Slices<'_>, ()> {
        self.resolve(iova, len, access)
            .map_err(|(offset, cause)| self.record(iova, len, access, offset, cause))
    }

    #[cold]
    #[inline(never)]
    fn record(&self, iova: u64, len: usize, access: Access, offset: u64, cause: FaultCause) {
        let fault = DmaFault {
            domain: self.gate.attachment.domain,
            iova: iova.wrapping_add(offset),
            len: len as u64 - offset,
            access,
            cause,
        };
        self.port.record(&self.gate, fault);
    }

    /// The same without a record. On failure, the offset of the first byte that does not translate.
    // Inlined with what it calls: its result is put into registers, not memory.
    #[inline(always)]
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
        let slices = |first, len| Slices {
            view: self,
            first,
            iova,
            len,
            access,
        };
        if len == 0 {
            // An empty access is anywhere but behind a domain that blocks.
            return match self.gate.attachment.translation {
                Translation::Blocked => Err(at_start(FaultCause::Blocked)),
                _ => Ok(slices(None, 0)),
            };
        }
        let (gpa, count) = self.first_run(iova, len, access).map_err(at_start)?;
        if count == len
            && let Some(slice) = self.ram().slice(gpa, len, access.writes())
        {
            // The access leaves neither its page nor its region: nearly all of them.
            return Ok(slices(Some(slice), 0));
        }
        self.check_runs(iova, len, access)?;
        Ok(slices(None, len))
    }

    /// Where the first bytes of an access are in guest physical memory, and how many follow each
    /// other there.
    #[inline(always)]
    fn first_run(&self, iova: u64, len: usize, access: Access) -> Result<(u64, usize), FaultCause> {
        match &self.gate.attachment.translation {
            Translation::Blocked => Err(FaultCause::Blocked),
            Translation::Identity => Ok((iova, len)),
            Translation::Paged(table) => {
                let (gpa, left) = self.gate.translate(table, iova, access)?;
                Ok((gpa, left.min(len as u64) as usize))
            }
        }
    }

    /// The memory that an access starts with; recorded if there is none.
    #[cold]
    #[inline(never)]
    fn run(
        &self,
        iova: u64,
        len: usize,
        access: Access,
    ) -> vm_memory::guest_memory::Result<VolatileSlice<'_>> {
        let run = self.first_run(iova, len, access);
        let slice = run.and_then(|(gpa, count)| {
            let slice = self.ram().prefix(gpa, count, access.writes());
            slice.ok_or(FaultCause::NotRam)
        });
        slice.map_err(|cause| {
            self.record(iova, len, access, 0, cause);
            GuestMemoryError::InvalidGuestAddress(GuestAddress(iova))
        })
    }

    /// Checks that each part of an access translates to RAM.
    #[cold]
    #[inline(never)]
    fn check_runs(&self, iova: u64, len: usize, access: Access) -> Result<(), (u64, FaultCause)> {
        let mut done = 0;
        while done < len {
            let fault = |cause| (done as u64, cause);
            let run = self.first_run(iova + done as u64, len - done, access);
            let (gpa, count) = run.map_err(fault)?;
            let checked = self.ram().check(gpa, count as u64, access.writes());
            checked.map_err(|_| fault(FaultCause::NotRam))?;
            if count < len && len > MAX_DMA_LEN {
                // Work of unknown length.
                return Err(fault(FaultCause::NotRam));
            }
            done += count;
        }
        Ok(())
    }
}

impl GuestMemory for DmaView<'_> {
    type PhysicalMemory = RamMap;
    type Bitmap = ();

    #[inline]
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

    #[inline(always)]
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

#[inline]
fn direction(access: Permissions) -> Access {
    match access {
        Permissions::Write | Permissions::ReadWrite => Access::Write,
        Permissions::No | Permissions::Read => Access::Read,
    }
}

/// The host memory of an access that was found to translate as a whole.
///
/// What does not fit into one slice is translated once more when it is asked for. That finds the
/// same, unless the guest changes its table during the access: what was taken out then is a fault.
pub(super) struct Slices<'s> {
    view: &'s DmaView<'s>,
    /// What comes first, if it has been looked up already.
    first: Option<VolatileSlice<'s>>,
    /// What comes after it.
    iova: u64,
    len: usize,
    access: Access,
}

impl<'s> Iterator for Slices<'s> {
    type Item = vm_memory::guest_memory::Result<VolatileSlice<'s>>;

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        match self.first.take() {
            Some(slice) => Some(Ok(slice)),
            None if self.len == 0 => None,
            None => Some(self.next_run()),
        }
    }
}

impl<'s> Slices<'s> {
    /// The memory, if one slice is all of it.
    #[inline]
    pub(super) fn single(&self) -> Option<&VolatileSlice<'s>> {
        self.first.as_ref().filter(|_| self.len == 0)
    }

    /// Looks the next run up. What is called gets no reference to the iterator, so that the
    /// iterator of the usual access is in registers and not in memory.
    #[inline(always)]
    fn next_run(&mut self) -> vm_memory::guest_memory::Result<VolatileSlice<'s>> {
        let run = self.view.run(self.iova, self.len, self.access);
        let count = run.as_ref().map_or(self.len, VolatileSlice::len);
        self.iova += count as u64;
        self.len -= count;
        run
    }
}

impl FusedIterator for Slices<'_> {}

impl<'s> GuestMemorySliceIterator<'s, ()> for Slices<'s> {
    // What the trait provides peeks, which moves the iterator through memory several times.
    #[inline(always)]
    fn stop_on_error(
        mut self,
    ) -> vm_memory::guest_memory::Result<impl Iterator<Item = VolatileSlice<'s>>> {
        if self.first.is_none() && self.len != 0 {
            self.first = Some(self.next_run()?);
        }
        Ok(self.map_while(Result::ok))
    }
}

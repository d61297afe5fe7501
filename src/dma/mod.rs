//! The one way in which a device on the bus reaches guest memory.
//!
//! Every access happens inside a closure, under a guard of the function's [`DmaPort`]: an address
//! that was translated cannot be used after the right to use it is gone, and whoever takes that
//! right away (bus mastering switched off, reset, removal, a pvIOMMU flush or move) waits for the
//! accesses under way, which are bounded copies. Therefore a closure must not block: no host I/O,
//! no lock that is held across such, no call that raises an interrupt and waits.
//!
//! Addresses are I/O virtual. What they mean is up to the domain that the guest put the function
//! into ([`crate::pviommu`]); without a pvIOMMU they are guest physical addresses.
#![forbid(unsafe_code)]

mod port;
mod view;

use arrayvec::ArrayVec;
use std::sync::Arc;
use vm_memory::VolatileSlice;

use crate::hv::pviommu::INTERRUPT_RANGE;
use crate::mem::PAGE_SIZE;

pub use crate::pviommu::Access;
pub use port::{DmaPort, MessageTarget};
pub use view::DmaView;

/// Longest single access through [`Dma::with`], in bytes. Devices split longer transfers, so that
/// the guard is held for a bounded time.
pub const MAX_DMA_LEN: usize = 64 * 1024;

/// Most host slices that one access can need: one a page, plus one for an unaligned start.
const MAX_SLICES: usize = MAX_DMA_LEN / PAGE_SIZE as usize + 1;

/// Why a DMA access did not happen. No byte was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The guest has not enabled bus mastering in the command register, or the function is being
    /// reset or removed.
    #[error("bus mastering is off")]
    NotMaster,
    /// The range does not translate to guest RAM. [`DmaPort::last_fault`] knows more.
    #[error("DMA fault at {iova:#x}+{len:#x}")]
    Fault {
        /// First I/O virtual address of the access.
        iova: u64,
        /// Length of the access in bytes.
        len: u64,
    },
    /// The access is longer than [`MAX_DMA_LEN`].
    #[error("DMA access of {len} bytes is longer than {MAX_DMA_LEN}")]
    TooLong {
        /// Length asked for, in bytes.
        len: usize,
    },
}

/// Counts of a function's DMA since it was plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DmaCounters {
    /// Accesses refused because bus mastering was off.
    pub not_master: u64,
    /// Accesses that did not translate.
    pub faults: u64,
    /// Writes to the interrupt range that were one of the function's live messages.
    pub messages: u64,
}

/// A device's handle for DMA. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dma {
    port: Arc<DmaPort>,
}

impl Dma {
    /// The device's side of `port`.
    pub fn new(port: Arc<DmaPort>) -> Self {
        Self { port }
    }

    /// Gives `f` the host memory of `iova..iova + len`, in order, under the guard.
    ///
    /// # Errors
    ///
    /// [`DmaError`], in which case `f` did not run.
    pub fn with<R>(
        &self,
        iova: u64,
        len: usize,
        access: Access,
        f: impl FnOnce(&[VolatileSlice<'_>]) -> R,
    ) -> Result<R, DmaError> {
        if len > MAX_DMA_LEN {
            return Err(DmaError::TooLong { len });
        }
        self.session(|view| {
            let found = view.slices(iova, len, access)?;
            if let Some(slice) = found.single() {
                return Ok(f(std::slice::from_ref(slice)));
            }
            let fault = DmaError::Fault {
                iova,
                len: len as u64,
            };
            let mut slices = ArrayVec::<_, MAX_SLICES>::new();
            for slice in found {
                let slice = slice.map_err(|_| fault)?;
                slices.try_push(slice).map_err(|_| fault)?;
            }
            Ok(f(&slices))
        })?
    }

    /// Copies guest memory at `iova` to `buf`.
    ///
    /// # Errors
    ///
    /// [`DmaError`]; nothing was copied then.
    pub fn read(&self, iova: u64, buf: &mut [u8]) -> Result<(), DmaError> {
        let mut rest = buf;
        self.with(iova, rest.len(), Access::Read, |slices| {
            for slice in slices {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(slice.len());
                slice.copy_to(now);
                rest = later;
            }
        })
    }

    /// Copies `buf` to guest memory at `iova`. A write of 4 aligned bytes to the interrupt range is
    /// a message instead: it raises what the guest has the function's message of that address and
    /// data raise, and is a fault if there is no such message (docs/spec/pviommu.md#IO-5-05).
    ///
    /// # Errors
    ///
    /// [`DmaError`]; nothing was copied then.
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<(), DmaError> {
        if INTERRUPT_RANGE.contains(&iova)
            && let Ok(data) = buf.try_into()
        {
            return self.port.message(iova, u32::from_le_bytes(data));
        }
        let mut rest = buf;
        self.with(iova, rest.len(), Access::Write, |slices| {
            for slice in slices {
                let (now, later) = rest.split_at(slice.len());
                slice.copy_from(now);
                rest = later;
            }
        })
    }

    /// Runs `f` with a view of the function's I/O virtual address space that `virtio-queue` and
    /// other users of [`vm_memory::GuestMemory`] take. The guard is held until `f` returns, so `f`
    /// may take a bounded number of descriptors and copy a bounded number of bytes, must not keep
    /// a slice, and must use the view rather than this handle (the guard is not reentrant).
    ///
    /// # Errors
    ///
    /// [`DmaError::NotMaster`], in which case `f` did not run.
    pub fn session<R>(&self, f: impl FnOnce(&DmaView<'_>) -> R) -> Result<R, DmaError> {
        Ok(f(&self.port.open()?))
    }
}

#[cfg(test)]
mod tests;

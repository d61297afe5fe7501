//! The one way in which a device on the bus reaches guest memory.
//!
//! Every access happens inside a closure, under a guard of the function's [`DmaPort`]: an address
//! that was translated cannot be used after the right to use it is gone, and whoever takes that
//! right away (bus mastering switched off, reset, removal, later a pvIOMMU flush) waits for the
//! accesses under way, which are bounded copies. Therefore a closure must not block: no host I/O,
//! no lock that is held across such, no call that raises an interrupt and waits.
//!
//! Without a pvIOMMU the translation is the identity: an I/O virtual address is a guest physical
//! address.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard};

use arrayvec::ArrayVec;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryLoadGuard, GuestMemoryRegion,
    Permissions, VolatileSlice,
};

use crate::mem::{GuestRam, PAGE_SIZE, RamMap};

/// Longest single access through [`Dma::with`], in bytes. Devices split longer transfers, so that
/// the guard is held for a bounded time.
pub const MAX_DMA_LEN: usize = 64 * 1024;

/// Most host slices that one access can need: one a page, plus one for an unaligned start.
const MAX_SLICES: usize = MAX_DMA_LEN / PAGE_SIZE as usize + 1;

/// Direction of a DMA access, seen from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
}

/// Why a DMA access did not happen. No byte was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// The guest has not enabled bus mastering in the command register, or the function is being
    /// reset or removed.
    #[error("bus mastering is off")]
    NotMaster,
    /// The range does not translate to guest RAM.
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
}

/// The bus's side of a function's DMA: grants and revokes.
///
/// Lock order: the guard is a leaf towards the library; nothing else is locked while it is held.
#[derive(Debug)]
pub struct DmaPort {
    ram: GuestRam,
    /// True while the function may master the bus. Readers are accesses under way.
    master: RwLock<bool>,
    not_master: AtomicU64,
    faults: AtomicU64,
}

impl DmaPort {
    /// A port over all guest RAM, with bus mastering off.
    pub fn new(ram: GuestRam) -> Arc<Self> {
        Arc::new(Self {
            ram,
            master: RwLock::new(false),
            not_master: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        })
    }

    /// Switches bus mastering. When this returns, no access that began under the former setting is
    /// still under way. Bounded: accesses are bounded copies.
    pub fn set_master(&self, on: bool) {
        *self.master.write().unwrap_or_else(|e| e.into_inner()) = on;
    }

    /// True while the function may master the bus.
    pub fn is_master(&self) -> bool {
        *self.guard()
    }

    /// Counts since the function was plugged in.
    pub fn counters(&self) -> DmaCounters {
        DmaCounters {
            not_master: self.not_master.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
        }
    }

    fn guard(&self) -> RwLockReadGuard<'_, bool> {
        self.master.read().unwrap_or_else(|e| e.into_inner())
    }
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
            let mut slices = ArrayVec::<_, MAX_SLICES>::new();
            view.collect(iova, len, access, &mut slices)?;
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

    /// Copies `buf` to guest memory at `iova`.
    ///
    /// # Errors
    ///
    /// [`DmaError`]; nothing was copied then.
    pub fn write(&self, iova: u64, buf: &[u8]) -> Result<(), DmaError> {
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
        let guard = self.port.guard();
        if !*guard {
            self.port.not_master.fetch_add(1, Ordering::Relaxed);
            return Err(DmaError::NotMaster);
        }
        let view = DmaView {
            ram: self.port.ram.memory(),
            port: &self.port,
            _guard: guard,
        };
        Ok(f(&view))
    }
}

/// A function's I/O virtual address space for the time of one [`Dma::session`].
#[derive(Debug)]
pub struct DmaView<'a> {
    ram: GuestMemoryLoadGuard<RamMap>,
    port: &'a DmaPort,
    _guard: RwLockReadGuard<'a, bool>,
}

impl DmaView<'_> {
    fn collect<'s>(
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
        let mode = match access {
            Access::Read => Permissions::Read,
            Access::Write => Permissions::Write,
        };
        let found = self
            .get_slices(GuestAddress(iova), len, mode)
            .map_err(|_| fault)?;
        for slice in found {
            let slice = slice.map_err(|_| fault)?;
            slices.try_push(slice).map_err(|_| fault)?;
        }
        Ok(())
    }
}

impl GuestMemory for DmaView<'_> {
    type PhysicalMemory = RamMap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, _access: Permissions) -> bool {
        // `GuestMemoryBackend::check_range` adds without care for the last byte of the address
        // space, hence the own walk.
        let Some(end) = addr.0.checked_add(count as u64) else {
            return false;
        };
        let mut next = addr.0;
        while next < end {
            let Some(region) = self.ram.find_region(GuestAddress(next)) else {
                return false;
            };
            next = region.start_addr().0.saturating_add(region.len());
        }
        true
    }

    fn get_slices<'s>(
        &'s self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> vm_memory::guest_memory::Result<impl GuestMemorySliceIterator<'s, ()>> {
        // The whole range or nothing: a transfer that runs off the end of RAM moves no byte.
        if !self.check_range(addr, count, access) {
            self.port.faults.fetch_add(1, Ordering::Relaxed);
            return Err(vm_memory::GuestMemoryError::InvalidGuestAddress(addr));
        }
        Ok(GuestMemoryBackend::get_slices(&*self.ram, addr, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestMemoryAtomic;

    fn port() -> Arc<DmaPort> {
        let ranges = [
            (GuestAddress(0), 0x2000),
            (GuestAddress(0x2000), 0x20000),
            (GuestAddress(0x100_0000), 0x1000),
        ];
        let map = RamMap::from_ranges(&ranges).expect("test RAM");
        DmaPort::new(GuestRam::new(GuestMemoryAtomic::new(map)))
    }

    #[test]
    fn nothing_moves_before_bus_mastering_is_on() {
        let port = port();
        let dma = Dma::new(port.clone());
        assert_eq!(dma.write(0x1000, &[1]), Err(DmaError::NotMaster));
        port.set_master(true);
        dma.write(0x1000, &[1]).unwrap();
        port.set_master(false);
        assert_eq!(dma.read(0x1000, &mut [0]), Err(DmaError::NotMaster));
        assert_eq!(port.counters().not_master, 2);
    }

    #[test]
    fn a_transfer_crosses_regions_and_stops_at_the_end_of_ram() {
        let port = port();
        port.set_master(true);
        let dma = Dma::new(port.clone());
        let data: Vec<u8> = (0..=255).collect();
        dma.write(0x1f80, &data).unwrap();
        let mut back = vec![0; 256];
        dma.read(0x1f80, &mut back).unwrap();
        assert_eq!(back, data);
        let fault = dma.write(0x100_0ff0, &data).unwrap_err();
        assert_eq!(
            fault,
            DmaError::Fault {
                iova: 0x100_0ff0,
                len: 256
            }
        );
        let mut tail = [0xff; 16];
        dma.read(0x100_0ff0, &mut tail).unwrap();
        assert_eq!(tail, [0; 16]);
        assert_eq!(port.counters().faults, 1);
    }

    #[test]
    fn lengths_are_bounded_and_addresses_do_not_wrap() {
        let port = port();
        port.set_master(true);
        let dma = Dma::new(port);
        let long = vec![0; MAX_DMA_LEN + 1];
        assert_eq!(
            dma.write(0, &long),
            Err(DmaError::TooLong {
                len: MAX_DMA_LEN + 1
            })
        );
        dma.write(0, &long[..MAX_DMA_LEN]).unwrap();
        assert!(dma.write(u64::MAX, &[0; 2]).is_err());
        assert!(dma.write(u64::MAX - 1, &[0; 1]).is_err());
    }

    #[test]
    fn revoking_waits_for_the_access_under_way() {
        let port = port();
        port.set_master(true);
        let dma = Dma::new(port.clone());
        let inside = Arc::new(std::sync::Barrier::new(2));
        let done = Arc::new(AtomicU64::new(0));
        let worker = {
            let (inside, done) = (inside.clone(), done.clone());
            std::thread::spawn(move || {
                dma.with(0, 8, Access::Write, |_| {
                    inside.wait();
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    done.store(1, Ordering::SeqCst);
                })
            })
        };
        inside.wait();
        port.set_master(false);
        assert_eq!(done.load(Ordering::SeqCst), 1);
        worker.join().unwrap().unwrap();
    }
}

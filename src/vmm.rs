//! What the library needs of the VMM that embeds it.
//!
//! Each trait says one thing, in the library's own terms, so that an embedder is not tied to the
//! versions of the KVM or VFIO crates that this library uses.
//!
//! Calls into these traits may come with locks of the library held, from those of the whole partition
//! to that of an interrupt vector; each trait says which. So no implementation may call back into the
//! library, take a lock that is held while the library is called, or wait for a thread that does
//! either.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};

use crate::mem::DeviceMemory;

/// A message-signalled interrupt as the interrupt fabric takes it: already translated to its
/// destination, never what a guest wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// x86 MSI address: 0xFEE in bits 31:20, destination APIC id bits 7:0 in bits 19:12; bits 31:8
    /// of the APIC id in bits 63:40 (KVM's extended form, `KVM_X2APIC_API_USE_32BIT_IDS`).
    pub address: u64,
    /// MSI data: the vector in bits 7:0, edge-triggered fixed delivery.
    pub data: u32,
}

impl Msi {
    /// Fixed, edge-triggered delivery of `vector` to the one local APIC `apic_id`, physical
    /// destination mode.
    pub fn fixed(apic_id: u32, vector: u8) -> Self {
        let low = u64::from(apic_id & 0xff) << 12;
        let high = u64::from(apic_id & 0xffff_ff00) << 32;
        Self {
            address: 0xfee0_0000 | low | high,
            data: u32::from(vector),
        }
    }
}

/// Raises interrupts in the guest.
pub trait MsiSink: Send + Sync + Debug {
    /// Delivers one edge-triggered message. Must not block, take a lock that is held while calling
    /// the library, or call back into the library: it runs inside the guard of an interrupt vector.
    fn raise_msi(&self, msi: Msi);
}

/// Wakes a worker: the next time the VMM's loop runs, it calls [`Worker::process`].
///
/// Both methods are called with whatever locks are held where there is work: that of the partition's
/// buses, VMBus' `step`, a BAR's, those of a device. So [`trigger`](Self::trigger) never runs the
/// worker itself.
pub trait Trigger: Send + Sync + Debug {
    /// Requests a run of the worker. Several triggers may collapse into one run, but each run
    /// starts after the last trigger before it. Must not block; callable from any thread.
    fn trigger(&self);

    /// An eventfd whose signal is a trigger too, so that a doorbell can wake the worker straight
    /// from the kernel. Absent when the loop has none; doorbell stores then arrive as MMIO.
    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Work that the library does outside virtual CPU threads, in bounded steps.
pub trait Worker: Send + Sync + Debug {
    /// Name for threads and logs, such as `vmbus` or `vpci-1`.
    fn name(&self) -> String;
    /// Does one bounded step. Returns true when more work is waiting: the caller runs it again
    /// without a trigger, after other workers had their turn. Never called twice at once.
    fn process(&self) -> bool;
}

/// The VMM's loop: turns triggers into calls of [`Worker::process`].
///
/// The library starts no threads for its workers. An embedder backs this with its own loop (one eventfd a worker),
/// the ready-made one of feature `devices`, or, in tests, a list that is drained by hand.
pub trait WorkerHost: Send + Sync + Debug {
    /// Adopts a worker and returns what wakes it. A worker whose weak reference no longer upgrades
    /// is gone and may be forgotten. Called with no lock of the library held, so it may wait for the
    /// loop, though somebody has stopped that to save the VM.
    ///
    /// # Errors
    ///
    /// An I/O error when the loop cannot take another worker, for example for want of file
    /// descriptors.
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>>;
}

/// A store of the guest that rings an eventfd in the kernel instead of leaving the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest physical address of the store.
    pub gpa: u64,
    /// Width of the store in bytes (1, 2, 4 or 8), or 0 for any width.
    pub len: u8,
    /// Only this value rings, or any when absent.
    pub data: Option<u64>,
}

/// Short-circuits doorbell registers (ioeventfd). Optional: without it the stores arrive as MMIO.
/// Called with the placement lock of the function held.
pub trait Doorbells: Send + Sync + Debug {
    /// Connects a doorbell to an eventfd.
    ///
    /// # Errors
    ///
    /// The host's error; the store then simply arrives as MMIO.
    fn add(&self, doorbell: Doorbell, eventfd: BorrowedFd<'_>) -> io::Result<()>;
    /// Disconnects a doorbell that was connected.
    ///
    /// # Errors
    ///
    /// The host's error, which is logged.
    fn remove(&self, doorbell: Doorbell, eventfd: BorrowedFd<'_>) -> io::Result<()>;
}

/// Shows a host device's memory to the guest, so that its accesses do not leave it. Called with the
/// placement lock of the function held.
pub trait BarMapper: Send + Sync + Debug {
    /// Makes `len` bytes of `memory` from `offset` on appear at guest physical address `gpa`; all of them
    /// multiples of the page size, and nothing else is there, unless an [`unmap`](Self::unmap) has
    /// failed: refuse then.
    ///
    /// # Errors
    ///
    /// The host's error; accesses then simply arrive as MMIO.
    fn map(&self, gpa: u64, memory: &Arc<DeviceMemory>, offset: u64, len: u64) -> io::Result<()>;
    /// Takes away what [`BarMapper::map`] put at `gpa`. When this returns the guest cannot reach it.
    ///
    /// # Errors
    ///
    /// The host's error, which is counted and logged; the guest reaches it as before, and the memory must
    /// stay in place. This is called again: when the command register of the function is written, when it
    /// is reset and when it goes, then for the last time.
    fn unmap(&self, gpa: u64) -> io::Result<()>;
}

/// Is told of the files of VFIO by which the VM has devices of the host, because KVM must know them: by
/// them it learns of devices whose DMA does not snoop the CPU's caches, and then heeds the guest's WBINVD
/// and PAT. The file is that of the group for a device that is opened by its group, otherwise the device's
/// own.
///
/// [`add`](Self::add) is called with the lock of the VM's list of devices held, and
/// [`remove`](Self::remove) with whatever is held where a device is dropped, such as the lock of the
/// partition's buses.
pub trait HostFiles: Send + Sync + Debug {
    /// A file was opened, but no device by it yet: some drivers need to know the VM from then on.
    ///
    /// # Errors
    ///
    /// The host's error; the device is not opened then.
    fn add(&self, file: BorrowedFd<'_>) -> io::Result<()>;
    /// A file is to be closed, and this is the last use of it: whoever keeps a reference keeps the device
    /// from its host.
    fn remove(&self, file: BorrowedFd<'_>);
}

/// Makes lines by which the host's kernel interrupts the guest without this process (an irqfd and a
/// route). Called, as each [`HostLine`] is, inside the guard of an interrupt vector.
pub trait HostLines: Send + Sync + Debug {
    /// A line that leads nowhere yet.
    ///
    /// # Errors
    ///
    /// The host's error, or that the VM has as many as it can have.
    fn add(&self) -> io::Result<Arc<dyn HostLine>>;
}

/// One of [`HostLines`]. Dropping it takes it away.
pub trait HostLine: Send + Sync + Debug {
    /// A signal of it is an event. While the line leads nowhere, signals are kept in it.
    fn eventfd(&self) -> BorrowedFd<'_>;
    /// Leads the line to a message: each signal from now on becomes one, and so do those that were kept,
    /// together. When this returns nothing is delivered the former way.
    ///
    /// # Errors
    ///
    /// The host's error; the line then leads nowhere.
    fn connect(&self, to: Msi) -> io::Result<()>;
    /// Leads the line nowhere. When this returns nothing is delivered.
    fn disconnect(&self);
    /// True if a signal is kept.
    fn is_pending(&self) -> bool;
    /// Forgets what is kept.
    fn discard(&self);
}

/// Lets HvSignalEvent on a connection ring an eventfd in the kernel instead of leaving the guest
/// (KVM_HYPERV_EVENTFD). Optional, and of use in hybrid mode only: without it the signals arrive as
/// hypercalls. Called with VMBus' `step` held.
pub trait ConnectionEvents: Send + Sync + Debug {
    /// Connects flag 0 of a connection, whose id is below 2^24, to an eventfd.
    ///
    /// # Errors
    ///
    /// The host's error; the signals then simply arrive as hypercalls.
    fn add(&self, connection_id: u32, eventfd: BorrowedFd<'_>) -> io::Result<()>;
    /// Disconnects it. When this returns, no signal under way reaches the eventfd any more.
    ///
    /// # Errors
    ///
    /// The host's error, which is logged; [`io::ErrorKind::NotFound`] if it was not connected.
    fn remove(&self, connection_id: u32) -> io::Result<()>;
}

/// Takes the right to write some pages of RAM from the vCPUs, so that their stores come to
/// [`Shadow::store`](crate::backend::shadow::Shadow::store) instead. Needed only for domains with page
/// tables on hosts that cannot walk these themselves.
pub trait TrackedPages: Send + Sync + Debug {
    /// Tracks the pages of `track` and lets go of those of `untrack`: page-aligned addresses in RAM,
    /// by address, each once. When this returns, all that vCPUs stored to the pages of `track` so
    /// far is in RAM, and each later store traps before it has an effect.
    ///
    /// Called on vCPU threads, among others, and with locks of the library held: must not call back,
    /// and must not wait for a vCPU that is not inside the guest.
    ///
    /// # Errors
    ///
    /// The host's error. Pages of `track` may be tracked or not then; those of `untrack` must still be,
    /// because they may become tables again. A later call names them again, those of `track` to be tracked
    /// or let go of.
    fn change(&self, track: &[u64], untrack: &[u64]) -> io::Result<()>;
}

/// The partition's reference time.
pub trait Clock: Send + Sync + Debug {
    /// Units of 100 ns since the partition was created; monotonic over all virtual CPUs
    /// (docs/spec/hyperv-guest-interface.md, section 8).
    fn reference_time(&self) -> u64;
}

/// A [`Clock`] that counts on from a given time, 0 by default, with the host's monotonic clock.
#[derive(Debug)]
pub struct MonotonicClock {
    start: std::time::Instant,
    at_start: u64,
}

impl MonotonicClock {
    /// Goes on at `time`, in units of 100 ns: what [`Clock::reference_time`] was when the partition
    /// was saved.
    pub fn starting_at(time: u64) -> Self {
        Self {
            start: std::time::Instant::now(),
            at_start: time,
        }
    }
}

impl Default for MonotonicClock {
    fn default() -> Self {
        Self::starting_at(0)
    }
}

impl Clock for MonotonicClock {
    fn reference_time(&self) -> u64 {
        let elapsed = (self.start.elapsed().as_nanos() / 100) as u64;
        self.at_start.wrapping_add(elapsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_goes_on_where_it_was() {
        let clock = MonotonicClock::starting_at(1 << 40);
        let now = clock.reference_time();
        assert!((1 << 40..1 << 41).contains(&now));
        assert!(clock.reference_time() >= now);
        // A saved time is not trusted.
        let _ = MonotonicClock::starting_at(u64::MAX).reference_time();
    }

    #[test]
    fn wide_apic_ids_go_to_the_high_half_of_the_address() {
        assert_eq!(Msi::fixed(3, 0x41).address, 0xfee0_3000);
        let wide = Msi::fixed(300, 0xf3);
        assert_eq!(wide.address, 0x0000_0100_fee2_c000);
        assert_eq!(wide.data, 0xf3);
    }
}

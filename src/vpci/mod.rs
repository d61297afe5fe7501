//! The virtual PCI bus (docs/spec/vpci.md).
//!
//! ```text
//!   vCPU threads                                            worker of the bus
//!   ------------                                            -----------------
//!   MMIO -> MmioSpace -+-> ConfigWindow -> FunctionSlot <-- Protocol <- ring
//!                      |                    |  ConfigSpace
//!                      +-> BAR -------------+  Interrupts -> MsiSink
//!                           |  MSI-X table     DmaPort
//!   RETARGET ---------------|----------------> Interrupts
//!                           +-> PciFunction -> InterruptLines, Dma
//! ```
//!
//! One [`bus::Bus`] is one VMBus channel with up to eight functions. A device implements
//! [`function::PciFunction`]; the bus emulates everything around it.
//!
//! # Lock order
//!
//! Each lock may be taken while holding those above it, never the other way round.
//!
//! 1. the channel lock of a bus: held for one step of its worker, and by open, close, reset, save;
//! 2. the pvIOMMU's own lock, when a bus is brought to D0; or the placement lock of a function:
//!    configuration writes, BAR mapping, reset;
//! 3. a BAR's lock: shared during an access, exclusive when it is unmapped;
//! 4. one of: the edit lock of the MMIO space; the guard of the function's DMA port; an MSI-X
//!    entry or the MSI state of its interrupts; the allocator of its message handles;
//! 5. the route of a message handle, in which [`crate::vmm::MsiSink::raise_msi`] runs.
//!
//! [`function::PciFunction`] is called with the lock of the BAR that is accessed, shared; for a
//! store to a capability, and when bus mastering is switched, with the placement lock; for a reset
//! with the channel lock. What it calls, DMA and interrupts, comes behind all of them.
//!
//! Reading the configuration space takes no lock, so a vCPU that polls the vendor id with interrupts
//! off never waits for a worker. There are two exceptions, neither of which Linux polls: a register
//! that a capability has the device answer takes the device's locks, and the MSI pending bits of a
//! function whose messages the host delivers the MSI state's (4). RETARGET takes only the route (5).
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

mod assignment;
pub mod bus;
mod config;
mod ejection;
pub mod function;
pub mod interrupts;
pub mod layout;
pub mod mmio;
mod protocol;
pub mod registry;
mod slot;
mod state;
#[cfg(test)]
pub(crate) mod testing;
mod window;

pub use crate::device_id::{self, LogicalDeviceId};
pub use bus::{Bus, BusConfig, BusError, BusHost, BusReport, FunctionReport};
pub use ejection::{EjectError, Ejected};
pub use mmio::{MmioError, MmioSpace};
pub use protocol::ProtocolCounters;
pub use state::{BusState, FunctionState, RestoreError};

/// Takes a lock. Every critical section here leaves its data consistent at each point where it
/// calls out, so a panic in a callback does not spoil them.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

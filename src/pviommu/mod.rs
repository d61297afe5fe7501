//! The pvIOMMU (docs/spec/pviommu.md): the guest makes domains, puts devices into them, and gives
//! them page tables of its own.
//!
//! ```text
//!   hypercall -> IommuGroup -> PvIommu: domains, devices, who is where
//!                                 |  attach, flush: returns when drained
//!                                 v
//!                            DeviceBackend, one for each device
//!                                 |  software: dma::DmaPort
//!   device -> Dma -> DMA guard [ IOTLB -> walk of the guest's tables ] -> guest RAM
//! ```
//!
//! A map never exits. An unmap ends in a flush, and the promise behind it is the heart of this
//! module: when a flush returns, no access that used an older translation of the range is under way
//! or can start. Accesses run under the device's DMA guard, held shared for bounded copies; a
//! flush, a move or a configuration takes the guard exclusively, changes what the device's cache
//! holds, and lets go. So it waits for the accesses under way and for nothing else, and what comes
//! later walks the tables as they are later. A translation is never used outside the guard in which
//! it was made.
//!
//! # Lock order
//!
//! 1. [`PvIommu`]'s own lock: shared by flushes and questions, exclusive for whatever changes
//!    domains or devices;
//! 2. the DMA guard of a device: exclusive for a flush or a move, shared during an access.
//!
//! An access takes the guard only. Hence a call waits for accesses, never an access for a call but
//! for the moment in which its own device is flushed.
#![forbid(unsafe_code)]

mod backend;
mod calls;
mod directory;
mod iotlb;
mod state;
mod table;
mod translation;
mod unit;
mod walk;

pub use backend::{BackendError, BackendReport, DeviceBackend, PortSettings};
pub use calls::IommuGroup;
pub use directory::IommuMode;
pub(crate) use iotlb::Iotlb;
pub use iotlb::IotlbCounters;
pub use state::{DeviceState, DomainState, IommuState, IommuStateError};
pub use translation::{
    Access, Attachment, DmaFault, FaultCause, FlushRange, Levels, PageTable, Translation,
};
pub(crate) use translation::{leaf_size, touches_interrupts};
pub use unit::{
    AddDeviceError, DeviceReport, DomainName, DomainReport, IommuConfig, IommuConfigError,
    IommuCounters, IommuReport, PvIommu,
};
pub(crate) use walk::{judge, walk};

#[cfg(all(test, not(loom)))]
mod tests;

//! Devices of the host, by VFIO (docs/spec/vfio-rig.md#vfio-rig-5).
//!
//! ```text
//!   check            what the host's files tell: can a device be passed through, by what interface?
//!   VfioHost         of a VM: opens devices, by group and container (type1) or by iommufd
//!   VfioDevice       an opened device: regions, interrupts, reset
//!   VfioDma          its DMA obeys a domain: the DeviceBackend of the pvIOMMU
//!     Unit           the devices of a group, which are always in one domain
//!     Mover          a unit's way from one translation to another, by either interface
//!     Space          an address space of the kernel, with books on what is mapped
//! ```
//!
//! Decisions are made in `unit`, `moves` and `space`, which reach the kernel through a trait and so
//! are tested against one that fails anywhere. Unsafe code is in `ioctl` only.

mod carry;
mod check;
mod config;
mod container;
mod device;
mod dma;
mod error;
mod function;
mod group;
mod host;
mod info;
mod ioctl;
mod iommufd;
mod known;
mod moves;
pub mod nested;
mod node;
mod space;
mod sysfs;
#[cfg(test)]
mod tests;
mod unit;
mod vectors;

pub use carry::{Carrier, Carry, Nesting};
pub use check::{HostFacts, Interface, check, check_memlock};
pub use config::ConfigError;
pub use device::{
    CONFIG_REGION, ERROR_IRQ, IrqInfo, MSI_IRQ, MSIX_IRQ, REGIONS, REQUEST_IRQ, VfioDevice,
};
pub use dma::VfioDma;
pub use error::VfioError;
pub use function::{FunctionError, VfioFunction};
pub use host::VfioHost;
pub use info::{Region, Type1Info};
pub use ioctl::HwInfo;
pub use iommufd::IommuFd;
pub use sysfs::{Group as IommuGroup, Iommu, PciDevice, Survey, memlock_limit, survey};

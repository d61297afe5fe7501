//! Devices of the host, by VFIO (docs/spec/vfio-rig.md#vfio-rig-5).
//!
//! Unsafe code is in `ioctl` only.
// The address spaces that use the rest come with the next change.
#![allow(dead_code)]

mod container;
mod device;
mod error;
mod info;
mod ioctl;
mod iommufd;
mod node;

pub use device::{
    CONFIG_REGION, ERROR_IRQ, IrqInfo, MSI_IRQ, MSIX_IRQ, REGIONS, REQUEST_IRQ, VfioDevice,
};
pub use error::VfioError;
pub use info::{Region, Type1Info};
pub use ioctl::HwInfo;
pub use iommufd::IommuFd;

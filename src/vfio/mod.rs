//! Devices of the host, by VFIO (docs/spec/vfio-rig.md#vfio-rig-5).
//!
//! Unsafe code is in `ioctl` only.
// The address spaces that use the rest come with the next change.
#![allow(dead_code)]

mod config;
mod container;
mod device;
mod error;
mod function;
mod info;
mod ioctl;
mod iommufd;
pub mod nested;
mod node;
mod vectors;

pub use config::ConfigError;
pub use device::{
    CONFIG_REGION, ERROR_IRQ, IrqInfo, MSI_IRQ, MSIX_IRQ, REGIONS, REQUEST_IRQ, VfioDevice,
};
pub use error::VfioError;
pub use function::{FunctionError, VfioFunction};
pub use info::{Region, Type1Info};
pub use ioctl::HwInfo;
pub use iommufd::IommuFd;

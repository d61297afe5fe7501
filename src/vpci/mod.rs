//! The virtual PCI bus.
#![forbid(unsafe_code)]

pub(crate) mod config;
pub mod device_id;
pub mod function;
pub mod interrupts;
pub mod layout;
pub mod mmio;

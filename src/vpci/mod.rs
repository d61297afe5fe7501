//! The virtual PCI bus.
#![forbid(unsafe_code)]

pub mod function;

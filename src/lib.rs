//! Hyper-V virtual PCI bus and pvIOMMU for KVM-based VMMs.
#![deny(unsafe_code)]

pub mod cpuid;
pub mod devices;
pub mod dma;
pub mod hv;
pub mod hypercall;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod mem;
pub mod msr;
pub mod partition;
pub mod synic;
pub mod vmbus;
pub mod vmm;
pub mod vpci;

pub use partition::{BusSpec, Partition, PartitionConfig, PartitionHost};

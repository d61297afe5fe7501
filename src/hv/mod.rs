//! Wire definitions of the Hyper-V guest interface: plain data, no behaviour.
//!
//! One source of truth for each fact of the ABI. Every item names where it comes from, in
//! `docs/spec/` or in the kernel.
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod hypercall;
pub mod msr;
pub mod pviommu;
pub mod status;
pub mod synic;
pub mod vmbus;
pub mod vpci;

pub use status::HvStatus;

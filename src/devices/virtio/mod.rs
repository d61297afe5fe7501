//! Virtio 1.2 devices on modern virtio-pci, over split rings.
//!
//! [`Blk`] and [`Rng`] are [`PciFunction`](crate::vpci::function::PciFunction)s. Both sit on one
//! transport (`transport`), which owns the registers, negotiates, and guards the rings (`ring`).
//! A device sees a ring as a source of requests: it copies what it needs of guest memory in short
//! DMA sessions and does its host I/O on buffers of its own in between, with nothing held.
//!
//! What a driver may get wrong, and what happens then:
//!
//! | Mistake | Outcome |
//! |---|---|
//! | register write out of order, of a wrong width or value | ignored and counted |
//! | features that were not offered, or without `VIRTIO_F_VERSION_1` | `FEATURES_OK` stays clear |
//! | ring outside RAM, bad index, loop, over-long or unordered chain | `DEVICE_NEEDS_RESET` |
//! | a request the device cannot do, data outside RAM | the request's own error status |
#![forbid(unsafe_code)]

mod blk;
mod ring;
mod rng;
pub mod spec;
mod transport;

#[cfg(test)]
mod bus_tests;
#[cfg(test)]
mod testing;

pub use blk::{Blk, BlkConfig, BlkCounters, BlkError, BlkState, MAX_BLK_QUEUES};
pub use rng::{MAX_RNG_REQUEST, Rng, RngConfig, RngCounters};
pub use transport::{
    TransportCounters, VIRTIO_STATE_VERSION, VirtioQueueState, VirtioState, VirtioStateError,
};

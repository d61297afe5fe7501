//! VMBus: control messages and ring buffers (docs/spec/vmbus.md).
//!
//! Every structure is little-endian, as the hosts are that this library runs on.
#![forbid(unsafe_code)]

pub mod ring;

//! Emulated functions for a vPCI bus, and the event loop that runs their workers.
#![forbid(unsafe_code)]

#[cfg(feature = "devices")]
pub mod event_loop;
pub mod testdev;
#[cfg(feature = "devices")]
pub mod virtio;

//! VMBus server (docs/spec/vmbus.md).
#![forbid(unsafe_code)]

pub mod channel;
pub mod ring;

pub use channel::{ChannelDevice, ChannelIdentity, ChannelSignal, OpenError, OpenedChannel};

//! VMBus server (docs/spec/vmbus.md).
//!
//! [`VmBus`] connects three things: virtual CPUs, which post messages and signal channels; the
//! [`server`], a state machine free of I/O; and devices behind channels ([`ChannelDevice`]). Virtual
//! CPUs only enqueue. The VMBus worker takes one message a step, performs what the server asks for,
//! and posts its messages.
//!
//! # Lock order
//!
//! | # | lock | held for | while held, calls out to |
//! |---|---|---|---|
//! | 1 | `step` | one step of the worker, a removal, or a reset | devices (open, close), SynIC |
//! | 2 | `server` | one transition of the state machine | nothing |
//! | 3 | `devices` | one look-up or change | nothing |
//! | 4 | `inbox` | one message in or out | nothing |
//! | 5 | target of a [`ChannelSignal`] | one event, or its change | the SynIC's `signal_event` |
//!
//! A lock is taken only while holding locks of smaller numbers. Virtual CPUs take 4 (messages) or
//! none (signals). [`VmBus::offer`] and [`VmBus::revoke`] take 2 and 3, so a device may call them
//! from its callbacks; [`VmBus::reset`] takes 1, and so does the removal of a bus: a device must do
//! neither.
#![forbid(unsafe_code)]

use uuid::Uuid;

use crate::synic::DEFAULT_QUEUE_LIMIT;

mod bus;
pub mod channel;
mod counters;
mod gpadl;
pub mod ring;
pub mod server;

pub use bus::{RingsState, VmBus, VmBusState, VmBusStateError};
pub use channel::{ChannelDevice, ChannelIdentity, ChannelSignal, OpenError, OpenedChannel};
pub use counters::VmBusCounters;
pub use gpadl::GpadlState;
pub use server::ChannelId;

/// Bounds on what a guest can make the server keep, per VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Channels offered, at most 2047.
    pub channels: usize,
    /// GPADLs, those in progress included.
    pub gpadls: usize,
    /// GPADLs in progress.
    pub gpadls_in_progress: usize,
    /// Bytes of all GPADLs' page lists: 8 for each page.
    pub gpadl_bytes: usize,
    /// Messages of the guest that wait for the worker.
    pub inbox: usize,
    /// Messages to the guest that wait for room at the SynIC. Above it no message of the guest is
    /// handled, but one that ends the connection.
    pub outbox: usize,
    /// Messages to the guest that wait for a slot of the SynIC, for each VP.
    pub synic_queue: usize,
}

impl Default for Limits {
    /// Room for some hundred channels with rings of some megabytes.
    fn default() -> Self {
        Self {
            channels: 256,
            gpadls: 4096,
            gpadls_in_progress: 256,
            gpadl_bytes: 4 << 20,
            inbox: 256,
            outbox: 64,
            synic_queue: DEFAULT_QUEUE_LIMIT,
        }
    }
}

/// How to build a [`VmBus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VmBusConfig {
    /// Bounds.
    pub limits: Limits,
}

/// Why a channel was not offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OfferError {
    /// Another channel has this instance GUID, or had it and the guest has not let go of it yet.
    #[error("instance {instance} is in use")]
    InstanceInUse {
        /// The instance GUID.
        instance: Uuid,
    },
    /// The limit on channels is reached.
    #[error("{limit} channels are offered already")]
    TooManyChannels {
        /// The limit.
        limit: usize,
    },
}

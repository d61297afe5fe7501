//! VMBus messages, every field of the guest's free (docs/spec/vmbus.md, sections 1 to 5).
#![forbid(unsafe_code)]

use uuid::Uuid;

use super::V5_0;
use crate::check::{Failure, equal};
use crate::model::kernel::VMBUS_SINT;
use crate::model::vm::{PAGE, Vm};
use crate::model::wire::{Bytes, u16_at, u32_at};

/// Message numbers (docs/spec/vmbus.md#vmbus-1-1).
pub mod message {
    /// Host: a channel.
    pub const OFFER_CHANNEL: u32 = 1;
    /// Host: a channel is gone.
    pub const RESCIND: u32 = 2;
    /// Asks for offers.
    pub const REQUEST_OFFERS: u32 = 3;
    /// Host: no more of them.
    pub const ALL_OFFERS_DELIVERED: u32 = 4;
    /// Opens a channel.
    pub const OPEN_CHANNEL: u32 = 5;
    /// Host: how that went.
    pub const OPEN_CHANNEL_RESULT: u32 = 6;
    /// Closes a channel.
    pub const CLOSE_CHANNEL: u32 = 7;
    /// Begins a list of pages.
    pub const GPADL_HEADER: u32 = 8;
    /// Goes on with it.
    pub const GPADL_BODY: u32 = 9;
    /// Host: the list is complete.
    pub const GPADL_CREATED: u32 = 10;
    /// Takes a list back.
    pub const GPADL_TEARDOWN: u32 = 11;
    /// Host: it is the guest's again.
    pub const GPADL_TORNDOWN: u32 = 12;
    /// Lets a channel id go.
    pub const RELID_RELEASED: u32 = 13;
    /// Connects.
    pub const INITIATE_CONTACT: u32 = 14;
    /// Host: how that went.
    pub const VERSION_RESPONSE: u32 = 15;
    /// Disconnects.
    pub const UNLOAD: u32 = 16;
    /// Host: done, and the last message.
    pub const UNLOAD_RESPONSE: u32 = 17;
    /// Moves a channel's interrupt.
    pub const MODIFY_CHANNEL: u32 = 22;
    /// Host: how that went, from 5.3 on.
    pub const MODIFY_CHANNEL_RESPONSE: u32 = 24;
}

/// INITIATE_CONTACT, every field free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contact {
    /// Message connection that it is posted to.
    pub connection: u32,
    /// Version.
    pub version: u32,
    /// VP for messages.
    pub vp: u32,
    /// Bytes 16 to 23: interrupt page, or SINT, VTL and feature flags.
    pub target: u64,
    /// Monitor pages.
    pub monitor: [u64; 2],
}

impl Contact {
    /// As Linux fills it for a version.
    ///
    /// # Errors
    ///
    /// [`Failure`].
    pub fn linux(vm: &Vm, version: u32, vp: u32) -> Result<Self, Failure> {
        let pages = vm.pages(3)?;
        let (connection, target) = match version {
            V5_0.. => (4, VMBUS_SINT.into()),
            _ => (1, pages),
        };
        Ok(Self {
            connection,
            version,
            vp,
            target,
            monitor: [pages + PAGE, pages + 2 * PAGE],
        })
    }

    /// The message: 40 bytes.
    pub fn encode(&self) -> Bytes {
        Bytes::words(&[message::INITIATE_CONTACT, 0, self.version, self.vp])
            .u64(self.target)
            .u64(self.monitor[0])
            .u64(self.monitor[1])
    }
}

/// VERSION_RESPONSE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionResponse {
    /// The whole message.
    pub raw: Vec<u8>,
    /// Whether the version is supported.
    pub supported: bool,
    /// Connection state.
    pub state: u8,
    /// Selected version, or from 5.0 on the connection for all other messages.
    pub connection: u32,
}

/// OFFER_CHANNEL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// The whole message: 196 bytes.
    pub raw: Vec<u8>,
    /// Class GUID.
    pub class: Uuid,
    /// Instance GUID.
    pub instance: Uuid,
    /// Channel id.
    pub relid: u32,
    /// Connection id for signals.
    pub connection: u32,
}

impl Offer {
    pub(super) fn decode(raw: Vec<u8>) -> Result<Self, Failure> {
        equal("length of OFFER_CHANNEL", raw.len(), 196)?;
        let guid = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&raw[at..at + 16]);
            Uuid::from_bytes_le(bytes)
        };
        Ok(Self {
            class: guid(8),
            instance: guid(24),
            relid: u32_at(&raw, 184),
            connection: u32_at(&raw, 192),
            raw,
        })
    }
}

/// OPEN_CHANNEL, every field free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    /// Channel.
    pub relid: u32,
    /// Echoed in the result.
    pub id: u32,
    /// GPADL of the rings.
    pub gpadl: u32,
    /// VP for interrupts.
    pub vp: u32,
    /// First page of the host-to-guest ring.
    pub downstream: u32,
}

impl Open {
    /// The message: 148 bytes.
    pub fn encode(&self) -> Bytes {
        let Self {
            relid,
            id,
            gpadl,
            vp,
            downstream,
        } = *self;
        Bytes::words(&[message::OPEN_CHANNEL, 0, relid, id, gpadl, vp, downstream]).up_to(148)
    }
}

/// Flags of an offer: bit 0 of the word at 190 is the dedicated interrupt.
pub fn is_dedicated(offer: &Offer) -> bool {
    u16_at(&offer.raw, 190) & 1 != 0
}

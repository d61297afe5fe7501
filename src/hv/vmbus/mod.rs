//! VMBus: control messages and ring buffers (docs/spec/vmbus.md).
//!
//! Every structure is little-endian, as the hosts are that this library runs on.
#![forbid(unsafe_code)]

use std::fmt;

pub mod guest;
pub mod host;
pub mod ring;

pub use guest::{GuestMessage, MessageError};
pub use host::{HostMessage, MessageBytes};

pub use super::synic::VMBUS_SINT as SINT;

/// SynIC message type of every VMBus control message, in both directions.
pub const SYNIC_MESSAGE_TYPE: u32 = 1;
/// Connection of HvPostMessage for control messages; before version 5.0 the only one.
pub const CONNECTION_MESSAGE: u32 = 1;
/// Connection of HvPostMessage for INITIATE_CONTACT from version 5.0 on.
pub const CONNECTION_CONTACT: u32 = 4;
/// Highest channel id; 0 is reserved (docs/spec/vmbus.md#vmbus-3-1).
pub const MAX_RELID: u16 = 2047;
/// Connection of HvSignalEvent for a channel: this, or'ed with its relid.
pub const CONNECTION_CHANNEL: u32 = (SINT as u32) << 12;
/// Target VP that stands for "no interrupts".
pub const VP_NONE: u32 = 0xffff_ffff;

/// Status in a reply: success.
pub const STATUS_SUCCESS: u32 = 0;
/// Status in a reply: failure (`STATUS_UNSUCCESSFUL` as hosts send it here).
pub const STATUS_FAILURE: u32 = 0x8000_ffff;
/// Status of TL_CONNECT_RESULT when nobody listens (`STATUS_CONNECTION_REFUSED`).
pub const STATUS_CONNECTION_REFUSED: u32 = 0xc000_0236;

/// A protocol version: major in bits 31:16, minor in bits 15:0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Version(pub u32);

impl Version {
    /// 3.0 (Windows 8.1): the first with a target VP for messages.
    pub const V3_0: Self = Self::new(3, 0);
    /// 4.0 (Windows 10).
    pub const V4_0: Self = Self::new(4, 0);
    /// 4.1 (Windows 10 RS3): MODIFY_CHANNEL.
    pub const V4_1: Self = Self::new(4, 1);
    /// 5.0 (Windows 10 RS4): contact on a connection of its own, SINT and VTL in it.
    pub const V5_0: Self = Self::new(5, 0);
    /// 5.1 (Windows 10 RS5).
    pub const V5_1: Self = Self::new(5, 1);
    /// 5.2 (Windows Server 2019 and later).
    pub const V5_2: Self = Self::new(5, 2);
    /// 5.3 (Windows Server 2022): MODIFY_CHANNEL is answered.
    pub const V5_3: Self = Self::new(5, 3);
    /// 6.0: feature flags.
    pub const V6_0: Self = Self::new(6, 0);

    const fn new(major: u16, minor: u16) -> Self {
        Self((major as u32) << 16 | minor as u32)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Type numbers of control messages (docs/spec/vmbus.md#vmbus-1-1).
pub mod message_type {
    /// Host: a channel exists.
    pub const OFFER_CHANNEL: u32 = 1;
    /// Host: a channel is gone.
    pub const RESCIND_CHANNEL_OFFER: u32 = 2;
    /// Guest: asks for the offers.
    pub const REQUEST_OFFERS: u32 = 3;
    /// Host: these were all.
    pub const ALL_OFFERS_DELIVERED: u32 = 4;
    /// Guest: opens a channel.
    pub const OPEN_CHANNEL: u32 = 5;
    /// Host: answer to OPEN_CHANNEL.
    pub const OPEN_CHANNEL_RESULT: u32 = 6;
    /// Guest: closes a channel; not answered.
    pub const CLOSE_CHANNEL: u32 = 7;
    /// Guest: starts to describe a list of pages.
    pub const GPADL_HEADER: u32 = 8;
    /// Guest: more pages of a list.
    pub const GPADL_BODY: u32 = 9;
    /// Host: answer to a complete list.
    pub const GPADL_CREATED: u32 = 10;
    /// Guest: takes a list of pages back.
    pub const GPADL_TEARDOWN: u32 = 11;
    /// Host: the pages are the guest's again.
    pub const GPADL_TORNDOWN: u32 = 12;
    /// Guest: the channel id may be used again.
    pub const RELID_RELEASED: u32 = 13;
    /// Guest: proposes a version, and connects.
    pub const INITIATE_CONTACT: u32 = 14;
    /// Host: answer to INITIATE_CONTACT.
    pub const VERSION_RESPONSE: u32 = 15;
    /// Guest: disconnects.
    pub const UNLOAD: u32 = 16;
    /// Host: answer to UNLOAD, and the last message.
    pub const UNLOAD_RESPONSE: u32 = 17;
    /// Guest: opens a reserved channel; not provided.
    pub const OPEN_RESERVED: u32 = 18;
    /// Guest: closes a reserved channel; not provided.
    pub const CLOSE_RESERVED: u32 = 19;
    /// Host: answer to CLOSE_RESERVED.
    pub const CLOSE_RESERVED_RESPONSE: u32 = 20;
    /// Guest: asks for an hvsock connection.
    pub const TL_CONNECT_REQUEST: u32 = 21;
    /// Guest: moves a channel's interrupt to another VP.
    pub const MODIFY_CHANNEL: u32 = 22;
    /// Host: answer to TL_CONNECT_REQUEST.
    pub const TL_CONNECT_RESULT: u32 = 23;
    /// Host: answer to MODIFY_CHANNEL from version 5.3 on.
    pub const MODIFY_CHANNEL_RESPONSE: u32 = 24;
    /// Guest: needs a feature of 6.0 that is not offered.
    pub const MODIFY_CONNECTION: u32 = 25;
    /// Host: answer to MODIFY_CONNECTION.
    pub const MODIFY_CONNECTION_RESPONSE: u32 = 26;
    /// Guest: needs a feature of 6.0 that is not offered.
    pub const PAUSE: u32 = 27;
    /// Host: answer to PAUSE.
    pub const PAUSE_RESPONSE: u32 = 28;
    /// Guest: needs a feature of 6.0 that is not offered.
    pub const RESUME: u32 = 29;
}

/// Bytes before the body of every message: {u32 type, u32 zero}.
pub const HEADER_LEN: usize = 8;
/// Longest message in bytes, with its header: what a SynIC message carries.
pub const MAX_MESSAGE: usize = 240;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_order_and_print_as_major_and_minor() {
        assert_eq!(format!("{:?}", Version::V5_3), "5.3");
        assert_eq!(Version::V6_0.0, 0x0006_0000);
        assert!(Version::V4_1 < Version::V5_0);
    }
}

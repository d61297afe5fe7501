//! Control messages of the host (docs/spec/vmbus.md#vmbus-1-1; Linux `hyperv.h`).
//!
//! Structures are message bodies: they start [`HEADER_LEN`] bytes into the message. Linux drops a
//! message that is shorter than its structure.
#![forbid(unsafe_code)]

use arrayvec::ArrayVec;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{HEADER_LEN, MAX_MESSAGE, message_type};

/// The device shows up as a device interface in the guest.
pub const OFFER_ENUMERATE_DEVICE_INTERFACE: u16 = 1;
/// Monitor id of a channel that has none.
pub const NO_MONITOR: u8 = 0xff;
/// The channel signals by its connection alone, without the interrupt page.
pub const DEDICATED_INTERRUPT: u16 = 1;

/// OFFER_CHANNEL (docs/spec/vmbus.md#vmbus-3-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OfferChannel {
    /// Interface (class) GUID as it lies in memory.
    pub class: [u8; 16],
    /// Instance GUID as it lies in memory.
    pub instance: [u8; 16],
    /// Zero.
    pub reserved: [u8; 16],
    /// Such as [`OFFER_ENUMERATE_DEVICE_INTERFACE`].
    pub flags: u16,
    /// MMIO space wanted, in MiB; only a video driver looks at it.
    pub mmio_megabytes: u16,
    /// For the guest's driver; zero for vPCI.
    pub user_data: [u8; 120],
    /// 0 for a primary channel.
    pub subchannel: u16,
    /// Zero.
    pub mmio_megabytes_optional: u16,
    /// Channel id.
    pub relid: u32,
    /// Monitor id, or [`NO_MONITOR`].
    pub monitor_id: u8,
    /// Bit 0: the monitor id is in use.
    pub monitor_allocated: u8,
    /// [`DEDICATED_INTERRUPT`].
    pub dedicated: u16,
    /// Connection of HvSignalEvent for the channel.
    pub connection_id: u32,
}

/// RESCIND_CHANNEL_OFFER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RescindChannelOffer {
    /// Channel.
    pub relid: u32,
}

/// OPEN_CHANNEL_RESULT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenChannelResult {
    /// Channel.
    pub relid: u32,
    /// As in the request.
    pub open_id: u32,
    /// 0 for success; Linux takes any other value as "try again".
    pub status: u32,
}

/// GPADL_CREATED.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlCreated {
    /// Channel.
    pub relid: u32,
    /// GPADL.
    pub gpadl: u32,
    /// 0 for success.
    pub status: u32,
}

/// GPADL_TORNDOWN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlTorndown {
    /// GPADL.
    pub gpadl: u32,
}

/// VERSION_RESPONSE up to version 5.3 (docs/spec/vmbus.md#vmbus-2-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VersionResponse {
    /// 1 if the guest is connected: the only field that Linux checks.
    pub supported: u8,
    /// 0.
    pub state: u8,
    /// Zero.
    pub reserved: u16,
    /// Before 5.0 the version; then the connection of HvPostMessage for later messages.
    pub selected: u32,
}

/// VERSION_RESPONSE of version 6.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VersionResponse6 {
    /// As before.
    pub common: VersionResponse,
    /// Feature flags, those asked for and supported.
    pub features: u32,
}

/// TL_CONNECT_RESULT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TlConnectResult {
    /// As in the request.
    pub endpoint: [u8; 16],
    /// As in the request.
    pub service: [u8; 16],
    /// NTSTATUS.
    pub status: u32,
}

/// MODIFY_CHANNEL_RESPONSE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ModifyChannelResponse {
    /// Channel.
    pub relid: u32,
    /// 0 for success.
    pub status: u32,
}

/// A control message to the guest. In a saved state it is the bytes that the SynIC carries.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(into = "Vec<u8>", try_from = "Vec<u8>"))]
pub enum HostMessage {
    /// A channel exists.
    OfferChannel(OfferChannel),
    /// A channel is gone.
    RescindChannelOffer(RescindChannelOffer),
    /// These were all offers.
    AllOffersDelivered,
    /// Answer to OPEN_CHANNEL.
    OpenChannelResult(OpenChannelResult),
    /// Answer to a complete GPADL.
    GpadlCreated(GpadlCreated),
    /// The GPADL's pages are the guest's again.
    GpadlTorndown(GpadlTorndown),
    /// Answer to INITIATE_CONTACT up to version 5.3, or a refusal.
    VersionResponse(VersionResponse),
    /// Answer to INITIATE_CONTACT of version 6.0.
    VersionResponse6(VersionResponse6),
    /// Answer to UNLOAD, and the last message.
    UnloadResponse,
    /// Answer to TL_CONNECT_REQUEST.
    TlConnectResult(TlConnectResult),
    /// Answer to MODIFY_CHANNEL.
    ModifyChannelResponse(ModifyChannelResponse),
}

/// A message as the SynIC carries it.
pub type MessageBytes = ArrayVec<u8, MAX_MESSAGE>;

impl HostMessage {
    /// The message with its header.
    pub fn encode(&self) -> MessageBytes {
        use message_type as t;
        let (number, body) = match self {
            Self::OfferChannel(body) => (t::OFFER_CHANNEL, body.as_bytes()),
            Self::RescindChannelOffer(body) => (t::RESCIND_CHANNEL_OFFER, body.as_bytes()),
            Self::AllOffersDelivered => (t::ALL_OFFERS_DELIVERED, &[][..]),
            Self::OpenChannelResult(body) => (t::OPEN_CHANNEL_RESULT, body.as_bytes()),
            Self::GpadlCreated(body) => (t::GPADL_CREATED, body.as_bytes()),
            Self::GpadlTorndown(body) => (t::GPADL_TORNDOWN, body.as_bytes()),
            Self::VersionResponse(body) => (t::VERSION_RESPONSE, body.as_bytes()),
            Self::VersionResponse6(body) => (t::VERSION_RESPONSE, body.as_bytes()),
            Self::UnloadResponse => (t::UNLOAD_RESPONSE, &[][..]),
            Self::TlConnectResult(body) => (t::TL_CONNECT_RESULT, body.as_bytes()),
            Self::ModifyChannelResponse(body) => (t::MODIFY_CHANNEL_RESPONSE, body.as_bytes()),
        };
        let mut bytes = MessageBytes::new();
        bytes.extend(number.to_le_bytes());
        bytes.extend([0; HEADER_LEN - 4]);
        bytes.extend(body.iter().copied());
        bytes
    }
}

impl From<HostMessage> for Vec<u8> {
    fn from(message: HostMessage) -> Self {
        message.encode().to_vec()
    }
}

/// Bytes that are no message to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes are no message to a guest")]
pub struct NoHostMessage {
    /// Number of bytes.
    pub len: usize,
}

impl TryFrom<Vec<u8>> for HostMessage {
    type Error = NoHostMessage;

    /// What [`HostMessage::encode`] gives, back: the whole of it and nothing else.
    fn try_from(bytes: Vec<u8>) -> Result<Self, Self::Error> {
        decode(&bytes).ok_or(NoHostMessage { len: bytes.len() })
    }
}

fn decode(bytes: &[u8]) -> Option<HostMessage> {
    use message_type as t;
    fn of<T: FromBytes>(body: &[u8], message: fn(T) -> HostMessage) -> Option<HostMessage> {
        T::read_from_bytes(body).ok().map(message)
    }
    let (header, body) = bytes.split_at_checked(HEADER_LEN)?;
    let (number, zero) = header.split_first_chunk()?;
    if zero.iter().any(|byte| *byte != 0) {
        return None;
    }
    match u32::from_le_bytes(*number) {
        t::OFFER_CHANNEL => of(body, HostMessage::OfferChannel),
        t::RESCIND_CHANNEL_OFFER => of(body, HostMessage::RescindChannelOffer),
        t::ALL_OFFERS_DELIVERED if body.is_empty() => Some(HostMessage::AllOffersDelivered),
        t::OPEN_CHANNEL_RESULT => of(body, HostMessage::OpenChannelResult),
        t::GPADL_CREATED => of(body, HostMessage::GpadlCreated),
        t::GPADL_TORNDOWN => of(body, HostMessage::GpadlTorndown),
        t::VERSION_RESPONSE => of(body, HostMessage::VersionResponse)
            .or_else(|| of(body, HostMessage::VersionResponse6)),
        t::UNLOAD_RESPONSE if body.is_empty() => Some(HostMessage::UnloadResponse),
        t::TL_CONNECT_RESULT => of(body, HostMessage::TlConnectResult),
        t::MODIFY_CHANNEL_RESPONSE => of(body, HostMessage::ModifyChannelResponse),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn every_message_comes_back_from_its_bytes() {
        fn zero<T: FromBytes>() -> T {
            T::new_zeroed()
        }
        for message in [
            HostMessage::OfferChannel(zero()),
            HostMessage::RescindChannelOffer(zero()),
            HostMessage::AllOffersDelivered,
            HostMessage::OpenChannelResult(zero()),
            HostMessage::GpadlCreated(zero()),
            HostMessage::GpadlTorndown(zero()),
            HostMessage::VersionResponse(zero()),
            HostMessage::VersionResponse6(zero()),
            HostMessage::UnloadResponse,
            HostMessage::TlConnectResult(zero()),
            HostMessage::ModifyChannelResponse(zero()),
        ] {
            let bytes = Vec::from(message.clone());
            assert_eq!(HostMessage::try_from(bytes.clone()), Ok(message));
            let longer = [&bytes[..], &[0]].concat();
            assert!(HostMessage::try_from(longer).is_err());
            let shorter = bytes[..bytes.len() - 1].to_vec();
            assert!(HostMessage::try_from(shorter).is_err());
            let mut other = bytes;
            other[4] = 1;
            assert!(HostMessage::try_from(other).is_err());
        }
        assert!(HostMessage::try_from(vec![0xff; 8]).is_err());
    }

    #[test]
    fn bodies_have_their_wire_sizes() {
        let sizes = [
            (size_of::<OfferChannel>(), 196),
            (size_of::<RescindChannelOffer>(), 12),
            (size_of::<OpenChannelResult>(), 20),
            (size_of::<GpadlCreated>(), 20),
            (size_of::<GpadlTorndown>(), 12),
            (size_of::<VersionResponse>(), 16),
            (size_of::<VersionResponse6>(), 20),
            (size_of::<TlConnectResult>(), 44),
            (size_of::<ModifyChannelResponse>(), 16),
        ];
        for (size, message) in sizes {
            assert_eq!(size + HEADER_LEN, message);
        }
    }

    #[test]
    fn fields_lie_at_their_wire_offsets() {
        let offsets = [
            (offset_of!(OfferChannel, class), 8),
            (offset_of!(OfferChannel, instance), 24),
            (offset_of!(OfferChannel, reserved), 40),
            (offset_of!(OfferChannel, flags), 56),
            (offset_of!(OfferChannel, mmio_megabytes), 58),
            (offset_of!(OfferChannel, user_data), 60),
            (offset_of!(OfferChannel, subchannel), 180),
            (offset_of!(OfferChannel, mmio_megabytes_optional), 182),
            (offset_of!(OfferChannel, relid), 184),
            (offset_of!(OfferChannel, monitor_id), 188),
            (offset_of!(OfferChannel, monitor_allocated), 189),
            (offset_of!(OfferChannel, dedicated), 190),
            (offset_of!(OfferChannel, connection_id), 192),
            (offset_of!(RescindChannelOffer, relid), 8),
            (offset_of!(OpenChannelResult, relid), 8),
            (offset_of!(OpenChannelResult, open_id), 12),
            (offset_of!(OpenChannelResult, status), 16),
            (offset_of!(GpadlCreated, relid), 8),
            (offset_of!(GpadlCreated, gpadl), 12),
            (offset_of!(GpadlCreated, status), 16),
            (offset_of!(GpadlTorndown, gpadl), 8),
            (offset_of!(VersionResponse, supported), 8),
            (offset_of!(VersionResponse, state), 9),
            (offset_of!(VersionResponse, selected), 12),
            (offset_of!(VersionResponse6, features), 16),
            (offset_of!(TlConnectResult, endpoint), 8),
            (offset_of!(TlConnectResult, service), 24),
            (offset_of!(TlConnectResult, status), 40),
            (offset_of!(ModifyChannelResponse, relid), 8),
            (offset_of!(ModifyChannelResponse, status), 12),
        ];
        for (offset, message) in offsets {
            assert_eq!(offset + HEADER_LEN, message);
        }
    }

    #[test]
    fn a_message_is_its_header_and_body() {
        let message = HostMessage::GpadlTorndown(GpadlTorndown { gpadl: 0xe1e10 });
        let expected = [12, 0, 0, 0, 0, 0, 0, 0, 0x10, 0x1e, 0x0e, 0];
        assert_eq!(message.encode().as_slice(), expected);
        assert_eq!(HostMessage::UnloadResponse.encode().len(), 8);
    }
}

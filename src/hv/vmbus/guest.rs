//! Control messages of the guest (docs/spec/vmbus.md#vmbus-1-1; Linux `hyperv.h`).
//!
//! Structures are message bodies: they start [`HEADER_LEN`] bytes into the message. A guest may
//! send more bytes than a structure has.
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{HEADER_LEN, message_type};

/// OPEN_CHANNEL.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OpenChannel {
    /// Channel.
    pub relid: u32,
    /// Echoed in the result.
    pub open_id: u32,
    /// GPADL of both rings.
    pub ring_gpadl: u32,
    /// VP that takes the channel's interrupts, or [`VP_NONE`](super::VP_NONE).
    pub target_vp: u32,
    /// First page of the host-to-guest ring.
    pub downstream_page: u32,
    /// For the device.
    pub user_data: [u8; 120],
}

/// CLOSE_CHANNEL.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct CloseChannel {
    /// Channel.
    pub relid: u32,
}

/// GPADL_HEADER; range bytes follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlHeader {
    /// Channel.
    pub relid: u32,
    /// GPADL, an id of the guest's choice.
    pub gpadl: u32,
    /// Bytes of all ranges, over this and the following GPADL_BODY messages.
    pub range_len: u16,
    /// Number of ranges.
    pub range_count: u16,
}

/// What each range of a GPADL starts with; page numbers (u64) follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpaRange {
    /// Bytes in the range.
    pub byte_count: u32,
    /// Offset of its first byte in its first page.
    pub byte_offset: u32,
}

/// GPADL_BODY; range bytes follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlBody {
    /// Number of the message; Linux leaves 0.
    pub number: u32,
    /// GPADL.
    pub gpadl: u32,
}

/// GPADL_TEARDOWN.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct GpadlTeardown {
    /// Channel.
    pub relid: u32,
    /// GPADL.
    pub gpadl: u32,
}

/// RELID_RELEASED.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RelidReleased {
    /// Channel.
    pub relid: u32,
}

/// INITIATE_CONTACT (docs/spec/vmbus.md#vmbus-2-1).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitiateContact {
    /// Version asked for.
    pub version: u32,
    /// VP that takes the host's messages (from 3.0 on).
    pub target_vp: u32,
    /// Before 5.0 the low byte of the interrupt page's address; then the SINT for messages.
    pub sint: u8,
    /// From 5.1 on the VTL.
    pub vtl: u8,
    /// Before 5.0 part of the interrupt page's address; then reserved.
    pub reserved: u16,
    /// Before 5.0 part of the interrupt page's address; from 6.0 on feature flags.
    pub features: u32,
    /// Parent-to-child monitor page, or 0.
    pub monitor_to_guest: u64,
    /// Child-to-parent monitor page, or 0.
    pub monitor_to_host: u64,
}

/// TL_CONNECT_REQUEST.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct TlConnectRequest {
    /// Endpoint GUID as it lies in memory.
    pub endpoint: [u8; 16],
    /// Service GUID as it lies in memory.
    pub service: [u8; 16],
}

/// MODIFY_CHANNEL.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ModifyChannel {
    /// Channel.
    pub relid: u32,
    /// New VP for the channel's interrupts.
    pub target_vp: u32,
}

/// A control message that a guest may send and this host understands.
#[derive(Debug, Clone, Copy)]
pub enum GuestMessage<'a> {
    /// Proposes a version, and connects.
    InitiateContact(InitiateContact),
    /// Asks for the offers.
    RequestOffers,
    /// Opens a channel.
    OpenChannel(OpenChannel),
    /// Closes a channel.
    CloseChannel(CloseChannel),
    /// Starts a GPADL; the slice holds range bytes and perhaps padding.
    GpadlHeader(GpadlHeader, &'a [u8]),
    /// Continues a GPADL; the slice holds range bytes and perhaps padding.
    GpadlBody(GpadlBody, &'a [u8]),
    /// Takes a GPADL back.
    GpadlTeardown(GpadlTeardown),
    /// Gives a channel id back.
    RelidReleased(RelidReleased),
    /// Disconnects.
    Unload,
    /// Asks for an hvsock connection.
    TlConnectRequest(TlConnectRequest),
    /// Moves a channel's interrupt.
    ModifyChannel(ModifyChannel),
}

/// Why bytes are not a [`GuestMessage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Fewer bytes than the message has.
    #[error("message of {len} bytes is too short")]
    Short {
        /// Bytes there are.
        len: usize,
    },
    /// A message that only a host sends.
    #[error("guest sent message {0}, which only a host sends")]
    HostOnly(u32),
    /// A message of a feature that is not offered.
    #[error("guest sent message {0}, which needs a feature that was not offered")]
    NotOffered(u32),
    /// No such message.
    #[error("unknown message {0}")]
    Unknown(u32),
}

impl<'a> GuestMessage<'a> {
    /// Decodes a message, given with its header. Extra bytes are ignored.
    ///
    /// # Errors
    ///
    /// [`MessageError`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, MessageError> {
        use message_type as t;
        let short = MessageError::Short { len: bytes.len() };
        let (header, body) = bytes.split_at_checked(HEADER_LEN).ok_or(short)?;
        let number = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        fn read<T: FromBytes>(
            body: &[u8],
            short: MessageError,
        ) -> Result<(T, &[u8]), MessageError> {
            T::read_from_prefix(body).map_err(|_| short)
        }
        Ok(match number {
            t::INITIATE_CONTACT => Self::InitiateContact(read(body, short)?.0),
            t::REQUEST_OFFERS => Self::RequestOffers,
            t::OPEN_CHANNEL => Self::OpenChannel(read(body, short)?.0),
            t::CLOSE_CHANNEL => Self::CloseChannel(read(body, short)?.0),
            t::GPADL_HEADER => {
                let (header, ranges) = read(body, short)?;
                Self::GpadlHeader(header, ranges)
            }
            t::GPADL_BODY => {
                let (header, ranges) = read(body, short)?;
                Self::GpadlBody(header, ranges)
            }
            t::GPADL_TEARDOWN => Self::GpadlTeardown(read(body, short)?.0),
            t::RELID_RELEASED => Self::RelidReleased(read(body, short)?.0),
            t::UNLOAD => Self::Unload,
            t::TL_CONNECT_REQUEST => Self::TlConnectRequest(read(body, short)?.0),
            t::MODIFY_CHANNEL => Self::ModifyChannel(read(body, short)?.0),
            t::OPEN_RESERVED | t::CLOSE_RESERVED => return Err(MessageError::NotOffered(number)),
            t::MODIFY_CONNECTION | t::PAUSE | t::RESUME => {
                return Err(MessageError::NotOffered(number));
            }
            t::OFFER_CHANNEL..=t::RESUME => return Err(MessageError::HostOnly(number)),
            _ => return Err(MessageError::Unknown(number)),
        })
    }
}

/// The type number of a message, if it is long enough to have one.
pub fn peek_type(bytes: &[u8]) -> Option<u32> {
    let number = bytes.first_chunk::<4>()?;
    (bytes.len() >= HEADER_LEN).then(|| u32::from_le_bytes(*number))
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn bodies_have_their_wire_sizes() {
        let sizes = [
            (size_of::<OpenChannel>(), 148),
            (size_of::<CloseChannel>(), 12),
            (size_of::<GpadlHeader>(), 20),
            (size_of::<GpadlBody>(), 16),
            (size_of::<GpadlTeardown>(), 16),
            (size_of::<RelidReleased>(), 12),
            (size_of::<InitiateContact>(), 40),
            (size_of::<TlConnectRequest>(), 40),
            (size_of::<ModifyChannel>(), 16),
            (size_of::<GpaRange>(), 16),
        ];
        for (size, message) in sizes {
            assert_eq!(size + HEADER_LEN, message);
        }
    }

    #[test]
    fn fields_lie_at_their_wire_offsets() {
        let offsets = [
            (offset_of!(OpenChannel, relid), 8),
            (offset_of!(OpenChannel, open_id), 12),
            (offset_of!(OpenChannel, ring_gpadl), 16),
            (offset_of!(OpenChannel, target_vp), 20),
            (offset_of!(OpenChannel, downstream_page), 24),
            (offset_of!(OpenChannel, user_data), 28),
            (offset_of!(CloseChannel, relid), 8),
            (offset_of!(GpadlHeader, relid), 8),
            (offset_of!(GpadlHeader, gpadl), 12),
            (offset_of!(GpadlHeader, range_len), 16),
            (offset_of!(GpadlHeader, range_count), 18),
            (offset_of!(GpadlBody, number), 8),
            (offset_of!(GpadlBody, gpadl), 12),
            (offset_of!(GpadlTeardown, relid), 8),
            (offset_of!(GpadlTeardown, gpadl), 12),
            (offset_of!(RelidReleased, relid), 8),
            (offset_of!(InitiateContact, version), 8),
            (offset_of!(InitiateContact, target_vp), 12),
            (offset_of!(InitiateContact, sint), 16),
            (offset_of!(InitiateContact, vtl), 17),
            (offset_of!(InitiateContact, features), 20),
            (offset_of!(InitiateContact, monitor_to_guest), 24),
            (offset_of!(InitiateContact, monitor_to_host), 32),
            (offset_of!(TlConnectRequest, endpoint), 8),
            (offset_of!(TlConnectRequest, service), 24),
            (offset_of!(ModifyChannel, relid), 8),
            (offset_of!(ModifyChannel, target_vp), 12),
        ];
        for (offset, message) in offsets {
            assert_eq!(offset + HEADER_LEN, message);
        }
    }

    #[test]
    fn every_number_is_of_the_guest_of_the_host_not_offered_or_unknown() {
        let mut bytes = [0; 240];
        let (mut guest, mut host, mut not_offered) = (0, 0, 0);
        for number in 0..40u32 {
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            match GuestMessage::decode(&bytes) {
                Ok(_) => guest += 1,
                Err(MessageError::HostOnly(n)) => host += usize::from(n == number),
                Err(MessageError::NotOffered(n)) => not_offered += usize::from(n == number),
                Err(error) => {
                    assert_eq!(error, MessageError::Unknown(number));
                    assert!(number == 0 || number > 29);
                }
            }
        }
        assert_eq!((guest, host, not_offered), (11, 13, 5));
    }

    #[test]
    fn a_message_one_byte_short_is_refused() {
        let lens = [
            (message_type::REQUEST_OFFERS, 8),
            (message_type::OPEN_CHANNEL, 148),
            (message_type::CLOSE_CHANNEL, 12),
            (message_type::GPADL_HEADER, 20),
            (message_type::GPADL_BODY, 16),
            (message_type::GPADL_TEARDOWN, 16),
            (message_type::RELID_RELEASED, 12),
            (message_type::INITIATE_CONTACT, 40),
            (message_type::UNLOAD, 8),
            (message_type::TL_CONNECT_REQUEST, 40),
            (message_type::MODIFY_CHANNEL, 16),
        ];
        for (number, len) in lens {
            let mut bytes = [0; 240];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            assert!(GuestMessage::decode(&bytes[..len]).is_ok(), "{number}");
            let error = GuestMessage::decode(&bytes[..len - 1]).unwrap_err();
            assert_eq!(error, MessageError::Short { len: len - 1 });
        }
    }
}

//! Ring buffers: the control page and the framing of packets (docs/spec/vmbus.md#vmbus-7;
//! Linux `hyperv.h`, `struct hv_ring_buffer` and `struct vmpacket_descriptor`).
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Offset in the control page of the write index: bytes into the data area, stored by the producer.
pub const WRITE_INDEX: u64 = 0;
/// Offset in the control page of the read index: bytes into the data area, stored by the consumer.
pub const READ_INDEX: u64 = 4;
/// Offset in the control page of the interrupt mask: the consumer stores 1 for "do not signal me".
pub const INTERRUPT_MASK: u64 = 8;
/// Offset in the control page of the pending send size: bytes that the producer waits for, or 0.
pub const PENDING_SEND_SIZE: u64 = 12;
/// Offset in the control page of the feature bits, stored by the producer.
pub const FEATURE_BITS: u64 = 64;
/// Feature bit: the producer stores the pending send size and wants a signal for it.
pub const FEATURE_PENDING_SEND_SIZE: u32 = 1;

/// Unit of indices, packet lengths and payload padding, in bytes.
pub const ALIGN: u32 = 8;
/// Longest packet that a host may send, in bytes with its descriptor and without its trailer: a
/// Linux guest copies no more than this out of the ring, and loses its place if there is more
/// (Linux `VMBUS_DEFAULT_MAX_PKT_SIZE`).
pub const MAX_HOST_PACKET: usize = 4096;
/// Bytes behind a packet: zero in the low half, the packet's ring offset in the high half.
pub const TRAILER_LEN: u32 = 8;
/// Flag in a descriptor: the sender waits for a completion packet.
pub const FLAG_COMPLETION_REQUESTED: u16 = 1;

/// Packet type: payload in the ring.
pub const TYPE_IN_BAND: u16 = 6;
/// Packet type: payload described by ranges of a page set that was agreed on before.
pub const TYPE_TRANSFER_PAGES: u16 = 7;
/// Packet type: payload described by a GPADL.
pub const TYPE_GPADL: u16 = 8;
/// Packet type: payload described by guest page numbers.
pub const TYPE_GPA_DIRECT: u16 = 9;
/// Packet type: answer to a packet that asked for a completion.
pub const TYPE_COMPLETION: u16 = 0xb;

/// What a packet starts with (docs/spec/vmbus.md#vmbus-7-2).
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PacketDescriptor {
    /// Packet type, such as [`TYPE_IN_BAND`].
    pub packet_type: u16,
    /// Start of the payload in units of 8 bytes, counted from the descriptor's start.
    pub offset8: u16,
    /// Descriptor and payload in units of 8 bytes, without the trailer.
    pub len8: u16,
    /// [`FLAG_COMPLETION_REQUESTED`] or 0.
    pub flags: u16,
    /// Chosen by the requester; its completion carries the same.
    pub transaction_id: u64,
}

impl PacketDescriptor {
    /// The descriptor as the two 64-bit words that it is in the ring.
    #[inline]
    pub const fn to_words(self) -> [u64; 2] {
        let low = self.packet_type as u64 | (self.offset8 as u64) << 16;
        let high = self.len8 as u64 | (self.flags as u64) << 16;
        [low | high << 32, self.transaction_id]
    }

    /// The descriptor of two words of the ring.
    #[inline]
    pub const fn from_words(words: [u64; 2]) -> Self {
        Self {
            packet_type: words[0] as u16,
            offset8: (words[0] >> 16) as u16,
            len8: (words[0] >> 32) as u16,
            flags: (words[0] >> 48) as u16,
            transaction_id: words[1],
        }
    }
}

/// Bytes of a descriptor.
pub const DESCRIPTOR_LEN: u32 = size_of::<PacketDescriptor>() as u32;

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn the_descriptor_has_its_wire_layout() {
        assert_eq!(size_of::<PacketDescriptor>(), 16);
        assert_eq!(offset_of!(PacketDescriptor, packet_type), 0);
        assert_eq!(offset_of!(PacketDescriptor, offset8), 2);
        assert_eq!(offset_of!(PacketDescriptor, len8), 4);
        assert_eq!(offset_of!(PacketDescriptor, flags), 6);
        assert_eq!(offset_of!(PacketDescriptor, transaction_id), 8);
    }

    #[test]
    fn words_are_the_wire_layout() {
        let descriptor = PacketDescriptor {
            packet_type: 0x1122,
            offset8: 0x3344,
            len8: 0x5566,
            flags: 0x7788,
            transaction_id: 0x99aa_bbcc_ddee_ff00,
        };
        let bytes: Vec<u8> = descriptor
            .to_words()
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        assert_eq!(descriptor.as_bytes(), bytes);
        assert_eq!(
            PacketDescriptor::from_words(descriptor.to_words()),
            descriptor
        );
    }
}

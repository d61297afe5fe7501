//! SynIC registers, message slots and event flags (docs/spec/hyperv-guest-interface.md, section 6).
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Synthetic interrupt sources of a VP.
pub const SINT_COUNT: usize = 16;
/// The SINT on which VMBus speaks.
pub const VMBUS_SINT: u8 = 2;

/// A SINT register (docs/spec/hyperv-guest-interface.md, section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sint(pub u64);

impl Sint {
    /// Value at reset: masked, vector 0.
    pub const RESET: Self = Self(1 << 16);

    /// Bits 7:0: the vector to raise.
    pub const fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Bit 16: no interrupt is raised and no event is taken.
    pub const fn is_masked(self) -> bool {
        self.0 & (1 << 16) != 0
    }

    /// Bit 17: the vector's EOI is implied by its delivery.
    pub const fn is_auto_eoi(self) -> bool {
        self.0 & (1 << 17) != 0
    }

    /// Bit 18: the guest polls, no interrupt is raised.
    pub const fn is_polling(self) -> bool {
        self.0 & (1 << 18) != 0
    }
}

/// Bytes of one slot of the message page and of one SINT's part of the event flags page.
pub const SLOT_SIZE: u64 = 256;
/// Longest payload of a message in bytes.
pub const MAX_PAYLOAD: usize = 240;
/// Event flags of one SINT.
pub const EVENT_FLAGS: u16 = 2048;

/// Message type of a free slot.
pub const MESSAGE_NONE: u32 = 0;
/// Offset of the message type in a slot: the word that says who owns the slot.
pub const MESSAGE_TYPE_OFFSET: u64 = 0;
/// Offset of the 32-bit word that holds payload size and flags.
pub const MESSAGE_SIZE_FLAGS_OFFSET: u64 = 4;
/// The message-pending flag (bit 0 of the flags byte) in the word at
/// [`MESSAGE_SIZE_FLAGS_OFFSET`].
pub const MESSAGE_PENDING: u32 = 1 << 8;

/// A slot of the message page without its first field, the message type, which is stored last and
/// atomically (docs/spec/hyperv-guest-interface.md, section 6.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, packed)]
pub struct MessageBody {
    /// Slot offset 4: payload bytes in use, at most [`MAX_PAYLOAD`].
    pub payload_size: u8,
    /// Slot offset 5: bit 0 is "another message is pending".
    pub flags: u8,
    /// Slot offset 6: zero.
    pub reserved: u16,
    /// Slot offset 8: sender or port id; zero here.
    pub sender: u64,
    /// Slot offset 16.
    pub payload: [u8; MAX_PAYLOAD],
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn a_message_slot_has_the_documented_layout() {
        let base = MESSAGE_SIZE_FLAGS_OFFSET as usize;
        assert_eq!(base + size_of::<MessageBody>(), SLOT_SIZE as usize);
        assert_eq!(base + offset_of!(MessageBody, payload_size), 4);
        assert_eq!(base + offset_of!(MessageBody, flags), 5);
        assert_eq!(base + offset_of!(MessageBody, reserved), 6);
        assert_eq!(base + offset_of!(MessageBody, sender), 8);
        assert_eq!(base + offset_of!(MessageBody, payload), 16);
        assert_eq!(MESSAGE_PENDING.to_le_bytes(), [0, 1, 0, 0]);
        assert_eq!(u64::from(EVENT_FLAGS) / 8, SLOT_SIZE);
    }

    #[test]
    fn sint_fields_sit_at_their_bits() {
        assert!(Sint::RESET.is_masked());
        assert_eq!(Sint::RESET.0, 0x1_0000);
        let sint = Sint(0x6_00f3);
        assert_eq!(sint.vector(), 0xf3);
        assert!(sint.is_auto_eoi() && sint.is_polling() && !sint.is_masked());
    }
}

//! Messages about a function's resources: memory and interrupts.
#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, Unaligned};

use super::{BAR_COUNT, MAX_PROCESSORS};

/// Types of a [`ResourceDescriptor`].
pub mod resource_type {
    /// No resource.
    pub const NONE: u8 = 0;
    /// Memory with a 32-bit length.
    pub const MEMORY: u8 = 3;
    /// Memory with a scaled length.
    pub const LARGE_MEMORY: u8 = 7;
}

/// Flags of a [`ResourceDescriptor`] of type [`resource_type::LARGE_MEMORY`]: by how many bits
/// its length is shifted.
pub mod large_memory {
    /// Length in units of 2^8 bytes.
    pub const SHIFT_8: u16 = 1 << 9;
    /// Length in units of 2^16 bytes.
    pub const SHIFT_16: u16 = 1 << 10;
    /// Length in units of 2^32 bytes.
    pub const SHIFT_32: u16 = 1 << 11;
}

/// One resource of a function, after `CM_PARTIAL_RESOURCE_DESCRIPTOR` of Windows.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct ResourceDescriptor {
    /// [`resource_type`].
    pub resource_type: u8,
    /// Share disposition.
    pub share: u8,
    /// [`large_memory`] flags for large memory.
    pub flags: U16,
    /// First address.
    pub address: U64,
    /// Length, scaled as `flags` say.
    pub length: U32,
    /// Zero.
    pub reserved: U32,
}

/// Head of RESOURCES_ASSIGNED, 2 and 3; the interrupt entries follow.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct ResourcesAssigned {
    /// [`MessageType`](super::MessageType).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Memory of each BAR.
    pub memory: [ResourceDescriptor; BAR_COUNT],
    /// Number of interrupt entries.
    pub msi_count: U32,
    /// Zero.
    pub reserved: U32,
}

/// Head of the completion of RESOURCES_ASSIGNED, 2 and 3; the translated entries follow, each
/// a [`Message`] padded to [`REPLY_ENTRY_V1`] or [`REPLY_ENTRY_V2`] bytes.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct ResourcesAssignedReply {
    /// [`Status`](super::Status).
    pub status: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// The request's descriptors.
    pub memory: [ResourceDescriptor; BAR_COUNT],
    /// Number of interrupt entries.
    pub msi_count: U32,
    /// Zero.
    pub reserved: U32,
}

/// Bytes of an interrupt entry in RESOURCES_ASSIGNED.
pub const REQUEST_ENTRY_V1: usize = 16;
/// Bytes of an interrupt entry in RESOURCES_ASSIGNED2.
pub const REQUEST_ENTRY_V2: usize = 72;
/// Bytes of an interrupt entry in RESOURCES_ASSIGNED3.
pub const REQUEST_ENTRY_V3: usize = 80;
/// Bytes of an entry in the completion of RESOURCES_ASSIGNED.
pub const REPLY_ENTRY_V1: usize = 16;
/// Bytes of an entry in the completion of RESOURCES_ASSIGNED2 and 3.
pub const REPLY_ENTRY_V2: usize = 72;

/// GET_RESOURCES.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct GetResources {
    /// [`MessageType::GetResources`](super::MessageType::GetResources).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Zero.
    pub reserved: [u8; 24],
}

/// Completion of GET_RESOURCES: no status goes before it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct GetResourcesReply {
    /// 1.
    pub version: U16,
    /// 1.
    pub revision: U16,
    /// 6.
    pub count: U32,
    /// Memory of each BAR.
    pub memory: [ResourceDescriptor; BAR_COUNT],
}

/// What a guest asks of an interrupt in CREATE_INTERRUPT.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct InterruptDescriptor {
    /// First vector.
    pub vector: u8,
    /// [`DELIVERY_FIXED`](super::DELIVERY_FIXED) or
    /// [`DELIVERY_LOWEST_PRIORITY`](super::DELIVERY_LOWEST_PRIORITY).
    pub delivery_mode: u8,
    /// Number of messages.
    pub count: U16,
    /// Zero.
    pub reserved: U32,
    /// VPs 0 to 63 that may take the interrupt.
    pub processor_mask: U64,
}

/// What a guest asks of an interrupt in CREATE_INTERRUPT2.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct InterruptDescriptor2 {
    /// First vector.
    pub vector: u8,
    /// [`DELIVERY_FIXED`](super::DELIVERY_FIXED) or
    /// [`DELIVERY_LOWEST_PRIORITY`](super::DELIVERY_LOWEST_PRIORITY).
    pub delivery_mode: u8,
    /// Number of messages.
    pub count: U16,
    /// Number of entries used in `processors`.
    pub processor_count: U16,
    /// VP indices that may take the interrupt.
    pub processors: [U16; MAX_PROCESSORS],
}

/// What a guest asks of an interrupt in CREATE_INTERRUPT3.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct InterruptDescriptor3 {
    /// First vector.
    pub vector: U32,
    /// [`DELIVERY_FIXED`](super::DELIVERY_FIXED) or
    /// [`DELIVERY_LOWEST_PRIORITY`](super::DELIVERY_LOWEST_PRIORITY).
    pub delivery_mode: u8,
    /// Zero.
    pub reserved: u8,
    /// Number of messages.
    pub count: U16,
    /// Number of entries used in `processors`.
    pub processor_count: U16,
    /// VP indices that may take the interrupt.
    pub processors: [U16; MAX_PROCESSORS],
}

/// CREATE_INTERRUPT.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct CreateInterrupt {
    /// [`MessageType::CreateInterrupt`](super::MessageType::CreateInterrupt).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// The interrupt.
    pub interrupt: InterruptDescriptor,
}

/// CREATE_INTERRUPT2.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct CreateInterrupt2 {
    /// [`MessageType::CreateInterrupt2`](super::MessageType::CreateInterrupt2).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// The interrupt.
    pub interrupt: InterruptDescriptor2,
}

/// CREATE_INTERRUPT3.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct CreateInterrupt3 {
    /// [`MessageType::CreateInterrupt3`](super::MessageType::CreateInterrupt3).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// The interrupt.
    pub interrupt: InterruptDescriptor3,
}

/// Interrupt messages as a guest programs them: an opaque handle to it.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Message {
    /// Zero.
    pub reserved: U16,
    /// Number of messages.
    pub count: U16,
    /// Data of the first message.
    pub data: U32,
    /// Address of all messages.
    pub address: U64,
}

/// Completion of CREATE_INTERRUPT, 2 and 3.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct CreateInterruptReply {
    /// [`Status`](super::Status).
    pub status: U32,
    /// Zero.
    pub reserved: U32,
    /// The messages.
    pub message: Message,
}

/// DELETE_INTERRUPT and 2.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DeleteInterrupt {
    /// [`MessageType::DeleteInterrupt`](super::MessageType::DeleteInterrupt) or
    /// [`MessageType::DeleteInterrupt2`](super::MessageType::DeleteInterrupt2).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// As CREATE_INTERRUPT returned it.
    pub message: Message,
}

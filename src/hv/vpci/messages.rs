//! Messages other than those about resources and interrupts, and what they are made of.
#![forbid(unsafe_code)]

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, Unaligned};

use super::BAR_COUNT;

/// A message that carries its type alone: QUERY_BUS_RELATIONS, BUS_D0EXIT.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// [`MessageType`](super::MessageType).
    pub message_type: U32,
}

/// A message to one function with nothing behind the slot: QUERY_RESOURCE_REQUIREMENTS,
/// RESOURCES_RELEASED, EJECT, RESET_DEVICE.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct SlotMessage {
    /// [`MessageType`](super::MessageType).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
}

/// QUERY_PROTOCOL_VERSION.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct QueryProtocolVersion {
    /// [`MessageType::QueryProtocolVersion`](super::MessageType::QueryProtocolVersion).
    pub message_type: U32,
    /// [`ProtocolVersion`](super::ProtocolVersion) asked for.
    pub version: U32,
}

/// Completion of QUERY_PROTOCOL_VERSION.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct QueryProtocolVersionReply {
    /// [`Status`](super::Status).
    pub status: U32,
    /// The version in force when the status is success.
    pub version: U32,
}

/// Completion of QUERY_RESOURCE_REQUIREMENTS.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct ResourceRequirementsReply {
    /// [`Status`](super::Status).
    pub status: U32,
    /// What each BAR reads after a write of all ones; 0 when it is not implemented.
    pub bars: [U32; BAR_COUNT],
}

/// BUS_D0ENTRY.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct BusD0Entry {
    /// [`MessageType::BusD0Entry`](super::MessageType::BusD0Entry).
    pub message_type: U32,
    /// Zero.
    pub reserved: U32,
    /// Guest physical address of the config window.
    pub window: U64,
}

/// Head of BUS_RELATIONS and BUS_RELATIONS2; the descriptions follow.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct BusRelations {
    /// [`MessageType::BusRelations`](super::MessageType::BusRelations) or
    /// [`MessageType::BusRelations2`](super::MessageType::BusRelations2).
    pub message_type: U32,
    /// Number of descriptions.
    pub count: U32,
}

/// One function in BUS_RELATIONS.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DeviceDescription {
    /// Vendor id.
    pub vendor: U16,
    /// Device id.
    pub device: U16,
    /// Revision id.
    pub revision: u8,
    /// Programming interface.
    pub prog_if: u8,
    /// Sub-class code.
    pub subclass: u8,
    /// Base class code.
    pub base_class: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: U16,
    /// Subsystem id.
    pub subsystem: U16,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Serial number.
    pub serial: U32,
}

/// One function in BUS_RELATIONS2.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct DeviceDescription2 {
    /// As in BUS_RELATIONS.
    pub base: DeviceDescription,
    /// [`DESCRIPTION_NUMA_VALID`](super::DESCRIPTION_NUMA_VALID) or zero.
    pub flags: U32,
    /// NUMA node of the function.
    pub numa_node: U16,
    /// Zero.
    pub reserved: U16,
}

/// EJECTION_COMPLETE, as Linux sends it; OpenVMM's guest leaves the status out.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct EjectionComplete {
    /// [`MessageType::EjectionComplete`](super::MessageType::EjectionComplete).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Zero.
    pub status: U32,
}

/// POWER_STATE_CHANGE.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct PowerStateChange {
    /// [`MessageType::PowerStateChange`](super::MessageType::PowerStateChange).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// [`POWER_D0`](super::POWER_D0) or [`POWER_D3`](super::POWER_D3).
    pub state: U32,
}

/// READ_BLOCK.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct ReadBlock {
    /// [`MessageType::ReadBlock`](super::MessageType::ReadBlock).
    pub message_type: U32,
    /// Block id.
    pub block: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Bytes asked for, at most [`MAX_BLOCK_LEN`](super::MAX_BLOCK_LEN).
    pub length: U32,
}

/// Head of WRITE_BLOCK; the data follow.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct WriteBlock {
    /// [`MessageType::WriteBlock`](super::MessageType::WriteBlock).
    pub message_type: U32,
    /// Block id.
    pub block: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Bytes of data, at most [`MAX_BLOCK_LEN`](super::MAX_BLOCK_LEN).
    pub length: U32,
}

/// INVALIDATE_BLOCK.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct InvalidateBlock {
    /// [`MessageType::InvalidateBlock`](super::MessageType::InvalidateBlock).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Blocks 0 to 63 that changed.
    pub blocks: U64,
}

/// Head of a TDISP command; the data follow.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, Unaligned,
)]
#[repr(C)]
pub struct TdispCommand {
    /// [`MessageType::TdispCommand`](super::MessageType::TdispCommand).
    pub message_type: U32,
    /// [`Slot`](super::Slot).
    pub slot: U32,
    /// Bytes of data.
    pub length: U64,
}

//! vPCI: the messages that a guest's virtual PCI bus driver and the host exchange on a channel.
//!
//! Source, unless an item says otherwise: docs/spec/vpci.md#vpci-4; Linux `pci-hyperv.c`,
//! OpenVMM `vpci_protocol`. All integers are little-endian, structures have no padding of their
//! own, and offsets count from the payload's first byte, behind the VMBus packet descriptor.
#![forbid(unsafe_code)]

use uuid::{Uuid, uuid};

mod messages;
mod resources;

pub use messages::*;
pub use resources::*;

/// Class GUID of a vPCI channel's offer (docs/spec/vpci.md#vpci-1).
pub const CLASS_ID: Uuid = uuid!("44c4f61d-4444-4400-9d52-802e27ede19f");

/// Size of the config window in bytes: the slot page and the config page
/// (docs/spec/vpci.md#vpci-6).
pub const CONFIG_WINDOW_SIZE: u64 = 0x2000;

/// Offset of the config page in the config window.
pub const CONFIG_PAGE_OFFSET: u64 = 0x1000;

/// Base address registers that the messages carry, and resource descriptors.
pub const BAR_COUNT: usize = 6;

/// Most processors that a CREATE_INTERRUPT2 or 3 names.
pub const MAX_PROCESSORS: usize = 32;

/// Most interrupt messages that a function has live at once: 500 resources less 6 BARs.
pub const MAX_MESSAGES: usize = 494;

/// Most bytes of a READ_BLOCK or WRITE_BLOCK.
pub const MAX_BLOCK_LEN: usize = 128;

/// Longest packet of either direction, descriptor included: what Linux takes out of a ring at
/// once (docs/spec/vmbus.md#vmbus-7-2).
pub const MAX_PACKET_LEN: usize = 4096;

/// Longest payload: [`MAX_PACKET_LEN`] less the 16-byte packet descriptor.
pub const MAX_PAYLOAD_LEN: usize = MAX_PACKET_LEN - 16;

/// Delivery mode: fixed.
pub const DELIVERY_FIXED: u8 = 0;
/// Delivery mode: lowest priority.
pub const DELIVERY_LOWEST_PRIORITY: u8 = 1;

/// POWER_STATE_CHANGE: fully on.
pub const POWER_D0: u32 = 1;
/// POWER_STATE_CHANGE: off.
pub const POWER_D3: u32 = 4;

/// [`DeviceDescription2::flags`]: the NUMA node is valid.
pub const DESCRIPTION_NUMA_VALID: u32 = 1;

/// Message types (docs/spec/vpci.md#vpci-3-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MessageType {
    /// Functions on the bus; host to guest, below version 1.3.
    BusRelations = 0x4249_0000,
    /// Asks for the bus relations.
    QueryBusRelations = 0x4249_0001,
    /// Host to guest; no guest of today acts on it.
    InvalidateDevice = 0x4249_0002,
    /// Host to guest; no guest of today acts on it.
    InvalidateBus = 0x4249_0003,
    /// Memory decode on or off.
    PowerStateChange = 0x4249_0004,
    /// Asks for the probed values of the BARs.
    QueryResourceRequirements = 0x4249_0005,
    /// Asks for the assigned resources.
    GetResources = 0x4249_0006,
    /// Maps the config window.
    BusD0Entry = 0x4249_0007,
    /// Unmaps the config window.
    BusD0Exit = 0x4249_0008,
    /// Reads from a function's back channel.
    ReadBlock = 0x4249_0009,
    /// Writes to a function's back channel.
    WriteBlock = 0x4249_000a,
    /// Asks the guest to let a function go; host to guest.
    Eject = 0x4249_000b,
    /// Unknown use.
    QueryStop = 0x4249_000c,
    /// Unknown use.
    Reenable = 0x4249_000d,
    /// Unknown use.
    QueryStopFailed = 0x4249_000e,
    /// The guest let a function go.
    EjectionComplete = 0x4249_000f,
    /// The function is in use, version 1.1.
    ResourcesAssigned = 0x4249_0010,
    /// The function is in use no more.
    ResourcesReleased = 0x4249_0011,
    /// Blocks changed; host to guest.
    InvalidateBlock = 0x4249_0012,
    /// Version negotiation.
    QueryProtocolVersion = 0x4249_0013,
    /// Maps interrupt messages, version 1.1.
    CreateInterrupt = 0x4249_0014,
    /// Unmaps interrupt messages.
    DeleteInterrupt = 0x4249_0015,
    /// The function is in use, versions 1.2 and up.
    ResourcesAssigned2 = 0x4249_0016,
    /// Maps interrupt messages, versions 1.2 and up.
    CreateInterrupt2 = 0x4249_0017,
    /// Unmaps interrupt messages, as [`MessageType::DeleteInterrupt`].
    DeleteInterrupt2 = 0x4249_0018,
    /// Functions on the bus with their NUMA nodes; host to guest, versions 1.3 and up.
    BusRelations2 = 0x4249_0019,
    /// The function is in use, version 1.4.
    ResourcesAssigned3 = 0x4249_001a,
    /// Maps interrupt messages, version 1.4.
    CreateInterrupt3 = 0x4249_001b,
    /// Resets a function, version 1.5.
    ResetDevice = 0x4249_001c,
    /// A command to a function's trusted execution module.
    TdispCommand = 0x4249_001d,
}

impl MessageType {
    /// The type as it stands in the first word of a message.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The type that `code` stands for, if any.
    pub const fn from_code(code: u32) -> Option<Self> {
        use MessageType as T;
        const ALL: [MessageType; 30] = [
            T::BusRelations,
            T::QueryBusRelations,
            T::InvalidateDevice,
            T::InvalidateBus,
            T::PowerStateChange,
            T::QueryResourceRequirements,
            T::GetResources,
            T::BusD0Entry,
            T::BusD0Exit,
            T::ReadBlock,
            T::WriteBlock,
            T::Eject,
            T::QueryStop,
            T::Reenable,
            T::QueryStopFailed,
            T::EjectionComplete,
            T::ResourcesAssigned,
            T::ResourcesReleased,
            T::InvalidateBlock,
            T::QueryProtocolVersion,
            T::CreateInterrupt,
            T::DeleteInterrupt,
            T::ResourcesAssigned2,
            T::CreateInterrupt2,
            T::DeleteInterrupt2,
            T::BusRelations2,
            T::ResourcesAssigned3,
            T::CreateInterrupt3,
            T::ResetDevice,
            T::TdispCommand,
        ];
        let index = code.wrapping_sub(T::BusRelations.code()) as usize;
        if index < ALL.len() {
            Some(ALL[index])
        } else {
            None
        }
    }
}

/// Protocol versions that this library speaks
/// (docs/spec/vpci.md#vpci-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum ProtocolVersion {
    /// Baseline; 64-bit VP masks.
    V1_1 = 0x0001_0001,
    /// VP lists.
    V1_2 = 0x0001_0002,
    /// NUMA nodes.
    V1_3 = 0x0001_0003,
    /// 32-bit vectors.
    V1_4 = 0x0001_0004,
}

impl ProtocolVersion {
    /// The version as it stands in QUERY_PROTOCOL_VERSION.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// The version that `code` stands for, if this library speaks it.
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            0x0001_0001 => Some(Self::V1_1),
            0x0001_0002 => Some(Self::V1_2),
            0x0001_0003 => Some(Self::V1_3),
            0x0001_0004 => Some(Self::V1_4),
            _ => None,
        }
    }
}

/// NTSTATUS of a completion. Bit 31 set is a failure
/// (docs/spec/vpci.md#vpci-3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Success = 0,
    /// The protocol version is not spoken here; the guest may ask for another.
    RevisionMismatch = 0xc000_0059,
    /// The request is malformed, or names no function of the bus.
    BadData = 0xc000_090b,
    /// The function has no such facility.
    NotSupported = 0xc000_00bb,
    /// The request is not legal now.
    InvalidDeviceState = 0xc000_0184,
    /// A field has a value that is not possible.
    InvalidParameter = 0xc000_000d,
    /// A limit is reached.
    InsufficientResources = 0xc000_009a,
}

impl Status {
    /// The status as it stands in a completion.
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// Place of a function on the bus: device in bits 4:0, function in bits 7:5, zeros above
/// (docs/spec/vpci.md#vpci-3-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

impl Slot {
    /// The slot as it stands in messages and in the config window.
    pub const fn code(self) -> u32 {
        (self.device & 0x1f) as u32 | ((self.function & 7) as u32) << 5
    }

    /// The slot that `code` stands for, or `None` when reserved bits are set.
    pub const fn from_code(code: u32) -> Option<Self> {
        if code > 0xff {
            return None;
        }
        Some(Self {
            device: (code & 0x1f) as u8,
            function: (code >> 5) as u8,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn message_sizes_are_those_of_the_wire() {
        let sizes = [
            (size_of::<Header>(), 4),
            (size_of::<SlotMessage>(), 8),
            (size_of::<QueryProtocolVersion>(), 8),
            (size_of::<QueryProtocolVersionReply>(), 8),
            (size_of::<ResourceRequirementsReply>(), 28),
            (size_of::<BusD0Entry>(), 16),
            (size_of::<BusRelations>(), 8),
            (size_of::<DeviceDescription>(), 20),
            (size_of::<DeviceDescription2>(), 28),
            (size_of::<ResourceDescriptor>(), 20),
            (size_of::<ResourcesAssigned>(), 136),
            (size_of::<ResourcesAssignedReply>(), 136),
            (size_of::<InterruptDescriptor>(), 16),
            (size_of::<InterruptDescriptor2>(), 70),
            (size_of::<InterruptDescriptor3>(), 74),
            (size_of::<CreateInterrupt>(), 24),
            (size_of::<CreateInterrupt2>(), 78),
            (size_of::<CreateInterrupt3>(), 82),
            (size_of::<Message>(), 16),
            (size_of::<CreateInterruptReply>(), 24),
            (size_of::<DeleteInterrupt>(), 24),
            (size_of::<EjectionComplete>(), 12),
            (size_of::<PowerStateChange>(), 12),
            (size_of::<GetResources>(), 32),
            (size_of::<GetResourcesReply>(), 128),
            (size_of::<ReadBlock>(), 16),
            (size_of::<WriteBlock>(), 16),
            (size_of::<InvalidateBlock>(), 16),
            (size_of::<TdispCommand>(), 16),
        ];
        for (index, (have, want)) in sizes.into_iter().enumerate() {
            assert_eq!(have, want, "entry {index}");
        }
    }

    #[test]
    fn fields_lie_at_their_offsets() {
        assert_eq!(offset_of!(BusD0Entry, window), 8);
        assert_eq!(offset_of!(DeviceDescription, subsystem_vendor), 8);
        assert_eq!(offset_of!(DeviceDescription, slot), 12);
        assert_eq!(offset_of!(DeviceDescription, serial), 16);
        assert_eq!(offset_of!(DeviceDescription2, flags), 20);
        assert_eq!(offset_of!(DeviceDescription2, numa_node), 24);
        assert_eq!(offset_of!(ResourceDescriptor, flags), 2);
        assert_eq!(offset_of!(ResourceDescriptor, address), 4);
        assert_eq!(offset_of!(ResourceDescriptor, length), 12);
        assert_eq!(offset_of!(ResourcesAssigned, memory), 8);
        assert_eq!(offset_of!(ResourcesAssigned, msi_count), 128);
        assert_eq!(offset_of!(ResourcesAssignedReply, msi_count), 128);
        assert_eq!(offset_of!(InterruptDescriptor, count), 2);
        assert_eq!(offset_of!(InterruptDescriptor, processor_mask), 8);
        assert_eq!(offset_of!(InterruptDescriptor2, processor_count), 4);
        assert_eq!(offset_of!(InterruptDescriptor2, processors), 6);
        assert_eq!(offset_of!(InterruptDescriptor3, delivery_mode), 4);
        assert_eq!(offset_of!(InterruptDescriptor3, count), 6);
        assert_eq!(offset_of!(InterruptDescriptor3, processor_count), 8);
        assert_eq!(offset_of!(InterruptDescriptor3, processors), 10);
        assert_eq!(offset_of!(CreateInterrupt3, interrupt), 8);
        assert_eq!(offset_of!(Message, count), 2);
        assert_eq!(offset_of!(Message, data), 4);
        assert_eq!(offset_of!(Message, address), 8);
        assert_eq!(offset_of!(CreateInterruptReply, message), 8);
        assert_eq!(offset_of!(DeleteInterrupt, message), 8);
        assert_eq!(offset_of!(ReadBlock, block), 4);
        assert_eq!(offset_of!(ReadBlock, slot), 8);
        assert_eq!(offset_of!(WriteBlock, length), 12);
        assert_eq!(offset_of!(GetResourcesReply, memory), 8);
        assert_eq!(offset_of!(InvalidateBlock, blocks), 8);
        assert_eq!(offset_of!(TdispCommand, length), 8);
    }

    #[test]
    fn the_class_id_has_its_wire_bytes() {
        assert_eq!(
            CLASS_ID.to_bytes_le(),
            [
                0x1d, 0xf6, 0xc4, 0x44, 0x44, 0x44, 0x00, 0x44, 0x9d, 0x52, 0x80, 0x2e, 0x27, 0xed,
                0xe1, 0x9f
            ]
        );
    }

    #[test]
    fn every_message_type_is_found_by_its_code_and_no_other_code_is_one() {
        for n in 0..=0x1d {
            let code = 0x4249_0000 + n;
            assert_eq!(MessageType::from_code(code).unwrap().code(), code);
        }
        for code in [0, 0x4248_ffff, 0x4249_001e, u32::MAX] {
            assert_eq!(MessageType::from_code(code), None);
        }
    }

    #[test]
    fn a_slot_holds_the_device_low_and_the_function_high() {
        let slot = Slot {
            device: 3,
            function: 5,
        };
        assert_eq!(slot.code(), 0xa3);
        for code in 0..=0xff {
            assert_eq!(Slot::from_code(code).unwrap().code(), code);
        }
        assert_eq!(Slot::from_code(0x100), None);
    }

    #[test]
    fn versions_beyond_those_spoken_are_refused() {
        for code in 0x0001_0001..=0x0001_0004 {
            assert_eq!(ProtocolVersion::from_code(code).unwrap().code(), code);
        }
        for code in [0, 0x0001_0000, 0x0001_0005, u32::MAX] {
            assert_eq!(ProtocolVersion::from_code(code), None);
        }
    }
}

//! Hypercall control and result words, call codes and input structures
//! (docs/spec/hyperv-guest-interface.md, sections 3 and 5; docs/spec/vpci.md, section 7.2).
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::hv::HvStatus;
use crate::hv::synic::MAX_PAYLOAD;

/// HvFlushVirtualAddressSpace. This and the other calls up to [`SEND_SYNTHETIC_CLUSTER_IPI_EX`] are
/// answered by the host's kernel or not at all (docs/spec/hyperv-guest-interface.md, section 3.5).
pub const FLUSH_VIRTUAL_ADDRESS_SPACE: u16 = 0x0002;
/// HvFlushVirtualAddressList.
pub const FLUSH_VIRTUAL_ADDRESS_LIST: u16 = 0x0003;
/// HvNotifyLongSpinWait.
pub const NOTIFY_LONG_SPIN_WAIT: u16 = 0x0008;
/// HvSendSyntheticClusterIpi.
pub const SEND_SYNTHETIC_CLUSTER_IPI: u16 = 0x000b;
/// HvFlushVirtualAddressSpaceEx: with a sparse set of VPs.
pub const FLUSH_VIRTUAL_ADDRESS_SPACE_EX: u16 = 0x0013;
/// HvFlushVirtualAddressListEx: with a sparse set of VPs.
pub const FLUSH_VIRTUAL_ADDRESS_LIST_EX: u16 = 0x0014;
/// HvSendSyntheticClusterIpiEx: with a sparse set of VPs.
pub const SEND_SYNTHETIC_CLUSTER_IPI_EX: u16 = 0x0015;
/// HvPostMessage: simple, memory form.
pub const POST_MESSAGE: u16 = 0x005c;
/// HvSignalEvent: simple, 8 bytes, usually fast.
pub const SIGNAL_EVENT: u16 = 0x005d;
/// HvRetargetDeviceInterrupt: simple, with a variable header.
pub const RETARGET_DEVICE_INTERRUPT: u16 = 0x007e;

/// The partition id that means "the caller's own".
pub const PARTITION_SELF: u64 = u64::MAX;

/// The hypercall input value: what to call and how
/// (docs/spec/hyperv-guest-interface.md, section 3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Control(pub u64);

impl Control {
    /// Bits 30:27, 31 (nested), 47:44 and 63:60: zero for a host that is not nested.
    pub const RESERVED: u64 = 0xf000_f000_f800_0000;
    const REP_START_SHIFT: u32 = 48;
    const REP_MASK: u64 = 0xfff;

    /// Bit 16: input is in registers.
    pub const FAST: u64 = 1 << 16;

    /// Bits 15:0: call code.
    pub const fn code(self) -> u16 {
        self.0 as u16
    }

    /// Bit 16: input is in registers.
    pub const fn is_fast(self) -> bool {
        self.0 & Self::FAST != 0
    }

    /// Bits 26:17: size of the variable header in units of 8 bytes.
    pub const fn variable_qwords(self) -> u16 {
        (self.0 >> 17) as u16 & 0x3ff
    }

    /// Bits 43:32: number of elements of a rep call.
    pub const fn rep_count(self) -> u16 {
        ((self.0 >> 32) & Self::REP_MASK) as u16
    }

    /// Bits 59:48: first element of a rep call that is still to be done.
    pub const fn rep_start(self) -> u16 {
        ((self.0 >> Self::REP_START_SHIFT) & Self::REP_MASK) as u16
    }

    /// True if a reserved bit is set.
    pub const fn has_reserved_bits(self) -> bool {
        self.0 & Self::RESERVED != 0
    }

    /// The same call, to be continued at element `start` (0 to 4095).
    pub const fn with_rep_start(self, start: u16) -> Self {
        let cleared = self.0 & !(Self::REP_MASK << Self::REP_START_SHIFT);
        Self(cleared | ((start as u64 & Self::REP_MASK) << Self::REP_START_SHIFT))
    }
}

/// The hypercall result value: status in bits 15:0, elements done since the first in bits 43:32
/// (docs/spec/hyperv-guest-interface.md, section 3.1).
pub const fn result_word(status: Result<(), HvStatus>, reps_done: u16) -> u64 {
    let code = match status {
        Ok(()) => 0,
        Err(status) => status.code(),
    };
    code as u64 | ((reps_done as u64 & Control::REP_MASK) << 32)
}

/// Input of HvPostMessage (docs/spec/hyperv-guest-interface.md, section 5.1). All 256 bytes are the
/// input list, however short the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PostMessageInput {
    /// Offset 0: connection id in bits 23:0; the rest is reserved.
    pub connection_id: u32,
    /// Offset 4: zero.
    pub reserved: u32,
    /// Offset 8: message type, not 0, bit 31 clear.
    pub message_type: u32,
    /// Offset 12: bytes of `payload` in use, at most 240.
    pub payload_size: u32,
    /// Offset 16.
    pub payload: [u8; MAX_PAYLOAD],
}

/// Input of HvSignalEvent (docs/spec/hyperv-guest-interface.md, section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SignalEventInput {
    /// Offset 0: connection id in bits 23:0; the rest is reserved.
    pub connection_id: u32,
    /// Offset 4: event flag.
    pub flag: u16,
    /// Offset 6: zero.
    pub reserved: u16,
}

/// Fixed header of HvRetargetDeviceInterrupt on x86 (docs/spec/vpci.md, section 7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct RetargetInput {
    /// Offset 0: [`PARTITION_SELF`].
    pub partition_id: u64,
    /// Offset 8: logical device id; the low 32 bits count.
    pub device_id: u64,
    /// Offset 16: [`INTERRUPT_SOURCE_MSI`].
    pub source: u32,
    /// Offset 20: zero.
    pub reserved0: u32,
    /// Offset 24: low 32 bits of the MSI address, part of the handle.
    pub msi_address: u32,
    /// Offset 28: MSI data, part of the handle.
    pub msi_data: u32,
    /// Offset 32: zero.
    pub reserved1: u64,
    /// Offset 40: vector from now on.
    pub vector: u32,
    /// Offset 44: [`RETARGET_MULTICAST`] and [`RETARGET_PROCESSOR_SET`].
    pub flags: u32,
    /// Offset 48: mask of VPs 0 to 63, or with [`RETARGET_PROCESSOR_SET`] the format of the set
    /// that follows: [`VP_SET_SPARSE_4K`].
    pub target: u64,
}

/// [`RetargetInput::source`]: MSI or MSI-X.
pub const INTERRUPT_SOURCE_MSI: u32 = 1;
/// [`RetargetInput::flags`]: deliver to every VP of the set instead of one.
pub const RETARGET_MULTICAST: u32 = 1 << 0;
/// [`RetargetInput::flags`]: the targets are a sparse set in the variable header.
pub const RETARGET_PROCESSOR_SET: u32 = 1 << 1;
/// Format of a VP set: a mask of valid banks, then one qword of 64 VPs for each.
pub const VP_SET_SPARSE_4K: u64 = 0;
/// Banks of a sparse VP set.
pub const VP_SET_BANKS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::{offset_of, size_of};

    #[test]
    fn the_control_word_splits_at_the_documented_bits() {
        let control = Control(0x0abc_0def_0407_005d);
        assert_eq!(control.code(), 0x5d);
        assert!(control.is_fast());
        assert_eq!(control.variable_qwords(), 0x203);
        assert_eq!(control.rep_count(), 0xdef);
        assert_eq!(control.rep_start(), 0xabc);
        assert!(!control.has_reserved_bits());
        for bit in [27, 30, 31, 44, 47, 60, 63] {
            assert!(Control(1 << bit).has_reserved_bits(), "bit {bit}");
        }
        for bit in [0, 15, 16, 17, 26, 32, 43, 48, 59] {
            assert!(!Control(1 << bit).has_reserved_bits(), "bit {bit}");
        }
        assert_eq!(control.with_rep_start(0xdee).rep_start(), 0xdee);
        assert_eq!(control.with_rep_start(0xabc), control);
    }

    #[test]
    fn the_result_word_carries_status_and_absolute_progress() {
        assert_eq!(result_word(Ok(()), 0), 0);
        assert_eq!(
            result_word(Err(HvStatus::INVALID_PARAMETER), 0xfff),
            0xfff_0000_0005
        );
    }

    #[test]
    fn inputs_have_the_documented_layout() {
        assert_eq!(size_of::<PostMessageInput>(), 256);
        assert_eq!(offset_of!(PostMessageInput, reserved), 4);
        assert_eq!(offset_of!(PostMessageInput, message_type), 8);
        assert_eq!(offset_of!(PostMessageInput, payload_size), 12);
        assert_eq!(offset_of!(PostMessageInput, payload), 16);
        assert_eq!(size_of::<SignalEventInput>(), 8);
        assert_eq!(offset_of!(SignalEventInput, flag), 4);
        assert_eq!(offset_of!(SignalEventInput, reserved), 6);
        assert_eq!(size_of::<RetargetInput>(), 56);
        assert_eq!(offset_of!(RetargetInput, device_id), 8);
        assert_eq!(offset_of!(RetargetInput, source), 16);
        assert_eq!(offset_of!(RetargetInput, msi_address), 24);
        assert_eq!(offset_of!(RetargetInput, msi_data), 28);
        assert_eq!(offset_of!(RetargetInput, reserved1), 32);
        assert_eq!(offset_of!(RetargetInput, vector), 40);
        assert_eq!(offset_of!(RetargetInput, flags), 44);
        assert_eq!(offset_of!(RetargetInput, target), 48);
    }
}

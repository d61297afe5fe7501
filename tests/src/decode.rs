//! Names for what is on the wire, from docs/spec, for people who read a report.
#![forbid(unsafe_code)]

use crate::guest::Call;
use crate::model::wire::{u32_at, u64_at};

/// Bytes shown of what is not decoded.
const SHOWN: usize = 64;

/// An MSR by name (docs/spec/hyperv-guest-interface.md, section 2).
pub fn msr(number: u32) -> String {
    let name = match number {
        0x4000_0000 => "GUEST_OS_ID",
        0x4000_0001 => "HYPERCALL",
        0x4000_0002 => "VP_INDEX",
        0x4000_0020 => "TIME_REF_COUNT",
        0x4000_0021 => "REFERENCE_TSC",
        0x4000_0022 => "TSC_FREQUENCY",
        0x4000_0023 => "APIC_FREQUENCY",
        0x4000_0073 => "VP_ASSIST_PAGE",
        0x4000_0080 => "SCONTROL",
        0x4000_0081 => "SVERSION",
        0x4000_0082 => "SIEFP",
        0x4000_0083 => "SIMP",
        0x4000_0084 => "EOM",
        0x4000_0118 => "TSC_INVARIANT_CONTROL",
        0x4000_0090..=0x4000_009f => return format!("SINT{}", number - 0x4000_0090),
        _ => return format!("{number:#x}"),
    };
    name.to_owned()
}

/// A hypercall with its input.
pub fn hypercall(call: &Call, input: &[u8]) -> String {
    let name = match call.control as u16 {
        0x5c => "HvPostMessage",
        0x5d => "HvSignalEvent",
        0x7e => "HvRetargetDeviceInterrupt",
        0xb1 => "HvCreateDeviceDomain",
        0xb2 => "HvAttachDeviceDomain",
        0xc4 => "HvDetachDeviceDomain",
        0xc5 => "HvDeleteDeviceDomain",
        0xce => "HvConfigureDeviceDomain",
        0xd0 => "HvFlushDeviceDomain",
        0xd1 => "HvFlushDeviceDomainVirtualAddressList",
        0x125 => "HvGetIommuCapabilities",
        0x127 => "HvGetLogicalDeviceProperty",
        _ => "hypercall",
    };
    let mut text = format!("{name} {call}");
    match call.control as u16 {
        0x5c if input.len() >= 16 => {
            let (connection, size) = (u32_at(input, 0), u32_at(input, 12) as usize);
            let payload = &input[16..];
            let message = vmbus(&payload[..size.min(payload.len())]);
            text += &format!(" connection {connection:#x}: {message}");
        }
        0x7e if input.len() >= 56 => {
            text += &format!(
                " device {:#x} message {:#x}/{:#x} -> vector {:#x} flags {:#x} target {}",
                u64_at(input, 8),
                u32_at(input, 24),
                u32_at(input, 28),
                u32_at(input, 40),
                u32_at(input, 44),
                hex(&input[48..]),
            );
        }
        0xb1 | 0xb2 | 0xc5 | 0xce | 0xd0 | 0xd1 if input.len() >= 48 => {
            text += &format!(" domain {:#x} [{}]", u64_at(input, 16), hex(&input[24..48]));
        }
        0xc4 | 0x127 if input.len() >= 24 => {
            text += &format!(" device {:#x} [{}]", u64_at(input, 8), hex(&input[16..24]));
        }
        _ => {}
    }
    text
}

/// A hypercall's result word.
pub fn result(rax: u64) -> String {
    let name = match rax as u16 {
        0 => "SUCCESS",
        2 => "INVALID_HYPERCALL_CODE",
        3 => "INVALID_HYPERCALL_INPUT",
        4 => "INVALID_ALIGNMENT",
        5 => "INVALID_PARAMETER",
        6 => "ACCESS_DENIED",
        8 => "OPERATION_DENIED",
        9 => "UNKNOWN_PROPERTY",
        0xb => "INSUFFICIENT_MEMORY",
        0xd => "INVALID_PARTITION_ID",
        0xe => "INVALID_VP_INDEX",
        0x11 => "INVALID_PORT_ID",
        0x12 => "INVALID_CONNECTION_ID",
        0x13 => "INSUFFICIENT_BUFFERS",
        0x18 => "INVALID_SYNIC_STATE",
        0x19 => "OBJECT_IN_USE",
        0x38 => "INSUFFICIENT_DEVICE_DOMAINS",
        0x57 => "INVALID_DEVICE_ID",
        0x58 => "INVALID_DEVICE_STATE",
        0x65 => "KEY_ALREADY_EXISTS",
        0x66 => "DEVICE_ALREADY_IN_DOMAIN",
        0x71 => "OPERATION_FAILED",
        _ => "status",
    };
    format!("{name} ({rax:#x})")
}

/// Names of VMBus messages by number (docs/spec/vmbus.md#vmbus-1-1).
const VMBUS: [&str; 30] = [
    "type 0",
    "OFFER_CHANNEL",
    "RESCIND_CHANNEL_OFFER",
    "REQUEST_OFFERS",
    "ALL_OFFERS_DELIVERED",
    "OPEN_CHANNEL",
    "OPEN_CHANNEL_RESULT",
    "CLOSE_CHANNEL",
    "GPADL_HEADER",
    "GPADL_BODY",
    "GPADL_CREATED",
    "GPADL_TEARDOWN",
    "GPADL_TORNDOWN",
    "RELID_RELEASED",
    "INITIATE_CONTACT",
    "VERSION_RESPONSE",
    "UNLOAD",
    "UNLOAD_RESPONSE",
    "OPEN_RESERVED",
    "CLOSE_RESERVED",
    "CLOSE_RESERVED_RESPONSE",
    "TL_CONNECT_REQUEST",
    "MODIFY_CHANNEL",
    "TL_CONNECT_RESULT",
    "MODIFY_CHANNEL_RESPONSE",
    "MODIFY_CONNECTION",
    "MODIFY_CONNECTION_RESPONSE",
    "PAUSE",
    "PAUSE_RESPONSE",
    "RESUME",
];

/// A VMBus control message.
pub fn vmbus(message: &[u8]) -> String {
    if message.len() < 8 {
        return format!("short message [{}]", hex(message));
    }
    let number = u32_at(message, 0);
    let name = match VMBUS.get(number as usize) {
        Some(name) => (*name).to_owned(),
        None => format!("type {number:#x}"),
    };
    let word = |at: usize| match message.len() {
        len if len >= at + 4 => format!("{:#x}", u32_at(message, at)),
        _ => "cut".to_owned(),
    };
    let fields = match number {
        1 => format!("relid {} connection {}", word(184), word(192)),
        2 | 7 | 13 => format!("relid {}", word(8)),
        5 => format!(
            "relid {} id {} gpadl {} vp {} downstream {}",
            word(8),
            word(12),
            word(16),
            word(20),
            word(24)
        ),
        6 => format!("relid {} id {} status {}", word(8), word(12), word(16)),
        8 => format!(
            "relid {} gpadl {} [{}]",
            word(8),
            word(12),
            hex(message.get(16..).unwrap_or_default())
        ),
        10 => format!("relid {} gpadl {} status {}", word(8), word(12), word(16)),
        11 => format!("relid {} gpadl {}", word(8), word(12)),
        12 => format!("gpadl {}", word(8)),
        14 => format!("version {} vp {} target {}", word(8), word(12), word(16)),
        15 => format!("supported/state {} [12] {}", word(8), word(12)),
        22 => format!("relid {} vp {}", word(8), word(12)),
        24 => format!("relid {} status {}", word(8), word(12)),
        _ => format!("[{}]", hex(&message[8..])),
    };
    format!("{name} {fields} ({} bytes)", message.len())
}

/// Names of vPCI messages by number (docs/spec/vpci.md#vpci-3-1).
const VPCI: [&str; 30] = [
    "BUS_RELATIONS",
    "QUERY_BUS_RELATIONS",
    "INVALIDATE_DEVICE",
    "INVALIDATE_BUS",
    "POWER_STATE_CHANGE",
    "QUERY_RESOURCE_REQUIREMENTS",
    "GET_RESOURCES",
    "BUS_D0ENTRY",
    "BUS_D0EXIT",
    "READ_BLOCK",
    "WRITE_BLOCK",
    "EJECT",
    "QUERY_STOP",
    "REENABLE",
    "QUERY_STOP_FAILED",
    "EJECTION_COMPLETE",
    "RESOURCES_ASSIGNED",
    "RESOURCES_RELEASED",
    "INVALIDATE_BLOCK",
    "QUERY_PROTOCOL_VERSION",
    "CREATE_INTERRUPT",
    "DELETE_INTERRUPT",
    "RESOURCES_ASSIGNED2",
    "CREATE_INTERRUPT2",
    "DELETE_INTERRUPT2",
    "BUS_RELATIONS2",
    "RESOURCES_ASSIGNED3",
    "CREATE_INTERRUPT3",
    "RESET_DEVICE",
    "TDISP",
];

/// A ring packet of a vPCI channel.
pub fn packet(kind: u16, sent: bool, payload: &[u8]) -> String {
    if payload.len() < 4 {
        return format!("type {kind:#x}, {} bytes", payload.len());
    }
    let first = u32_at(payload, 0);
    let rest = hex(&payload[4..]);
    let number = first.wrapping_sub(0x4249_0000) as usize;
    match (kind, sent) {
        (0xb, false) => format!("completion, status {first:#x} [{rest}]"),
        (6, _) if number < VPCI.len() => format!("{} [{rest}]", VPCI[number]),
        _ => format!("type {kind:#x} {first:#x} [{rest}]"),
    }
}

fn hex(bytes: &[u8]) -> String {
    let mut text: String = bytes
        .chunks(4)
        .take(SHOWN / 4)
        .map(|word| word.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect::<Vec<String>>()
        .join(" ");
    if bytes.len() > SHOWN {
        text += &format!(" ... {} bytes", bytes.len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_named_and_garbage_is_shown() {
        let mut contact = vec![14, 0, 0, 0, 0, 0, 0, 0, 3, 0, 5, 0];
        contact.resize(40, 0);
        let text = vmbus(&contact);
        assert!(
            text.starts_with("INITIATE_CONTACT version 0x50003"),
            "{text}"
        );
        assert_eq!(vmbus(&[1, 2]), "short message [0102]");
        assert!(vmbus(&[0xff; 240]).starts_with("type 0xffffffff"));
        for number in 0..40 {
            for len in 8..64 {
                let mut cut = vec![number, 0, 0, 0];
                cut.resize(len, 0);
                assert!(vmbus(&cut).contains("bytes)"), "{number} of {len}");
            }
        }
        assert!(vmbus(&[5, 0, 0, 0, 0, 0, 0, 0]).contains("cut"));
        let d0 = packet(6, true, &0x4249_0007u32.to_le_bytes());
        assert!(d0.starts_with("BUS_D0ENTRY"), "{d0}");
    }
}

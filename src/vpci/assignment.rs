//! Resources of a function: RESOURCES_ASSIGNED, 2 and 3, and GET_RESOURCES.
//!
//! Linux sends an empty list and places BARs itself afterwards. Other guests send the memory of
//! each BAR and the interrupts that they want mapped, and get the latter back translated
//! (docs/spec/vpci.md#vpci-5).
#![forbid(unsafe_code)]

use super::function::BAR_COUNT;
use super::protocol::{BusCore, InterruptRequest, Replies, parse};
use super::slot::FunctionSlot;
use crate::hv::vpci as wire;
use crate::hv::vpci::{MessageType, ResourceDescriptor, Status};
use crate::hv::vpci::{large_memory, resource_type};

/// Handles RESOURCES_ASSIGNED, 2 and 3. On failure no message is mapped and no BAR is placed.
pub(super) fn assign(
    core: &BusCore,
    message: MessageType,
    payload: &[u8],
    replies: &mut Replies,
) -> Result<(), Status> {
    let request: wire::ResourcesAssigned = parse(payload)?;
    let function = core.find(request.slot)?;
    let (asked_len, reply_len) = match message {
        MessageType::ResourcesAssigned => (wire::REQUEST_ENTRY_V1, wire::REPLY_ENTRY_V1),
        MessageType::ResourcesAssigned2 => (wire::REQUEST_ENTRY_V2, wire::REPLY_ENTRY_V2),
        _ => (wire::REQUEST_ENTRY_V3, wire::REPLY_ENTRY_V2),
    };
    let count = request.msi_count.get() as usize;
    let entries = &payload[size_of::<wire::ResourcesAssigned>()..];
    if count > wire::MAX_MESSAGES || count * asked_len > entries.len() {
        return Err(Status::BadData);
    }
    if size_of::<wire::ResourcesAssignedReply>() + count * reply_len > replies.limit {
        return Err(Status::InsufficientResources);
    }
    let mut addresses = [0; BAR_COUNT];
    for (bar, descriptor) in request.memory.iter().enumerate() {
        addresses[bar] = placed_at(&function, bar, descriptor)?;
    }
    replies.complete(&wire::ResourcesAssignedReply {
        status: Status::Success.code().into(),
        slot: request.slot,
        memory: request.memory,
        msi_count: request.msi_count,
        reserved: 0.into(),
    });
    let vps = function.interrupts.handles.vp_count();
    let mapped_from = replies.completion.len();
    for entry in entries.chunks_exact(asked_len).take(count) {
        let mapped = match message {
            MessageType::ResourcesAssigned => InterruptRequest::v1(&parse(entry)?, vps),
            MessageType::ResourcesAssigned2 => InterruptRequest::v2(&parse(entry)?, vps),
            _ => InterruptRequest::v3(&parse(entry)?, vps),
        }
        .and_then(|request| request.create(&function));
        match mapped {
            Ok(message) => {
                replies.complete(&message);
                let padding = reply_len - size_of::<wire::Message>();
                let end = replies.completion.len() + padding;
                replies.completion.resize(end, 0);
            }
            Err(status) => {
                unmap(&function, &replies.completion[mapped_from..], reply_len);
                return Err(status);
            }
        }
    }
    function.assign_bars(addresses);
    Ok(())
}

/// Takes back the messages of a list that could not be completed.
fn unmap(function: &FunctionSlot, entries: &[u8], entry_len: usize) {
    for entry in entries.chunks_exact(entry_len) {
        if let Ok(message) = parse::<wire::Message>(entry) {
            let interrupts = &function.interrupts;
            interrupts.delete(message.address.get(), message.data.get());
        }
    }
}

/// The address that a descriptor gives BAR `bar`, 0 for none. The place itself is checked when
/// decode is switched on.
fn placed_at(
    function: &FunctionSlot,
    bar: usize,
    descriptor: &ResourceDescriptor,
) -> Result<u64, Status> {
    let length = u64::from(descriptor.length.get());
    let length = match descriptor.resource_type {
        resource_type::NONE => return Ok(0),
        resource_type::MEMORY => length,
        resource_type::LARGE_MEMORY => {
            let flags = descriptor.flags.get();
            let shifts = [
                (large_memory::SHIFT_8, 8),
                (large_memory::SHIFT_16, 16),
                (large_memory::SHIFT_32, 32),
            ];
            let shift = shifts.iter().find(|(flag, _)| flags & flag != 0);
            length << shift.map_or(0, |(_, shift)| *shift)
        }
        _ => return Err(Status::InvalidParameter),
    };
    let size = function.layout.bars[bar].size();
    let address = descriptor.address.get();
    let fits_register = match function.layout.bars[bar] {
        super::function::BarSpec::Memory32 { .. } => address <= u64::from(u32::MAX),
        _ => true,
    };
    if size == 0 || length != size || !address.is_multiple_of(size) || !fits_register {
        return Err(Status::InvalidParameter);
    }
    Ok(address)
}

/// Answers GET_RESOURCES.
pub(super) fn resources(function: &FunctionSlot, replies: &mut Replies) {
    let addresses = function.bar_addresses();
    let memory = std::array::from_fn(|bar| {
        let size = function.layout.bars[bar].size();
        descriptor(addresses[bar], size)
    });
    replies.complete(&wire::GetResourcesReply {
        version: 1.into(),
        revision: 1.into(),
        count: (BAR_COUNT as u32).into(),
        memory,
    });
}

/// The descriptor of a BAR of `size` bytes (a power of two, or 0) at `address`; none while it is
/// not placed.
fn descriptor(address: u64, size: u64) -> ResourceDescriptor {
    if size == 0 || address == 0 {
        return ResourceDescriptor::default();
    }
    let (resource_type, flags, length) = match u32::try_from(size) {
        Ok(size) => (resource_type::MEMORY, 0, size),
        // 2^63 bytes at most: in units of 2^32 that fits.
        Err(_) => (
            resource_type::LARGE_MEMORY,
            large_memory::SHIFT_32,
            (size >> 32) as u32,
        ),
    };
    ResourceDescriptor {
        resource_type,
        share: 0,
        flags: flags.into(),
        address: address.into(),
        length: length.into(),
        reserved: 0.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::IntoBytes;

    #[test]
    fn descriptors_scale_lengths_beyond_four_gigabytes() {
        assert_eq!(descriptor(0, 0x1000), ResourceDescriptor::default());
        assert_eq!(descriptor(0x1000, 0), ResourceDescriptor::default());
        let small = descriptor(0x8000_0000, 0x8000_0000);
        assert_eq!(small.resource_type, resource_type::MEMORY);
        assert_eq!(small.length.get(), 0x8000_0000);
        let large = descriptor(1 << 40, 1 << 33);
        assert_eq!(large.resource_type, resource_type::LARGE_MEMORY);
        assert_eq!(large.flags.get(), large_memory::SHIFT_32);
        assert_eq!(large.length.get(), 2);
        assert_eq!(large.as_bytes()[4..12], (1u64 << 40).to_le_bytes());
    }
}

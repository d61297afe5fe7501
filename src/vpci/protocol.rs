//! The bus's side of the vPCI protocol, free of I/O: a request's payload comes in, the messages
//! that answer it go out. What a request asks for happens to the functions of a [`BusCore`].
//!
//! Requests are handled one at a time, in ring order
//! (docs/spec/vpci.md#VP-3-06). Every request yields the payload of a completion;
//! the caller sends it if the guest asked for one.
#![forbid(unsafe_code)]

use std::sync::Arc;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::assignment;
use super::interrupts::handles::{HANDLE_ADDRESS, HandleError};
use super::mmio::{MmioRegion, MmioSpace};
use super::slot::FunctionSlot;
use super::window::{ConfigWindow, Functions};
use crate::hv::vpci as wire;
use crate::hv::vpci::{MessageType, ProtocolVersion, Slot, Status};

/// What the protocol acts on.
#[derive(Debug)]
pub(crate) struct BusCore {
    pub(crate) functions: Arc<Functions>,
    pub(crate) window: Arc<ConfigWindow>,
    pub(crate) mmio: Arc<MmioSpace>,
    pub(crate) numa_node: Option<u16>,
}

impl BusCore {
    /// The functions there are, by number.
    pub(crate) fn functions(&self) -> impl Iterator<Item = Arc<FunctionSlot>> + use<> {
        self.functions.iter()
    }

    pub(super) fn find(&self, slot: U32) -> Result<Arc<FunctionSlot>, Status> {
        Slot::from_code(slot.get())
            .and_then(|slot| self.functions.find(slot))
            .ok_or(Status::BadData)
    }
}

/// Counts of requests since the bus was plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProtocolCounters {
    /// Requests handled.
    pub requests: u64,
    /// Requests answered with a failure.
    pub refused: u64,
    /// DELETE_INTERRUPTs of messages that are not live; harmless.
    pub unknown_deletes: u64,
    /// Config windows that could not be where the guest wanted them.
    pub refused_windows: u64,
    /// Interrupt messages refused because the function has as many as it can.
    pub exhausted_interrupts: u64,
}

/// Messages that answer a request. Reused from request to request.
#[derive(Debug)]
pub(crate) struct Replies {
    /// BUS_RELATIONS or 2, to be sent before the completion; empty for none.
    pub(crate) relations: Vec<u8>,
    /// Payload of the completion; never empty.
    pub(crate) completion: Vec<u8>,
    /// Longest completion that the guest's ring takes.
    pub(crate) limit: usize,
}

impl Replies {
    /// Longest bus relations: eight functions.
    pub(crate) const MAX_RELATIONS: usize =
        size_of::<wire::BusRelations>() + 8 * size_of::<wire::DeviceDescription2>();

    /// Empty buffers that grow no more: completions of up to `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            relations: Vec::with_capacity(Self::MAX_RELATIONS),
            completion: Vec::with_capacity(limit),
            limit,
        }
    }

    /// The relations of now, which no request asked for.
    pub(super) fn announce(&mut self, core: &BusCore, version: ProtocolVersion) -> &[u8] {
        self.clear();
        relations(core, version, &mut self.relations);
        &self.relations
    }

    fn clear(&mut self) {
        self.relations.clear();
        self.completion.clear();
    }

    pub(super) fn complete(&mut self, message: &(impl IntoBytes + Immutable)) {
        self.completion.extend_from_slice(message.as_bytes());
    }

    pub(super) fn status(&mut self, status: Status) {
        self.complete(&U32::new(status.code()));
    }
}

/// The protocol of one opening of the channel.
#[derive(Debug, Default)]
pub(crate) struct Protocol {
    version: Option<ProtocolVersion>,
    /// The config window, while the bus is in D0.
    window: Option<MmioRegion>,
    /// Functions, as bits, that EJECTION_COMPLETE named since [`Self::take_ejected`].
    ejected: u8,
    pub(crate) counters: ProtocolCounters,
}

impl Protocol {
    /// Handles a request. `payload` is a private copy, and may be longer than the message.
    pub(crate) fn handle(&mut self, core: &BusCore, payload: &[u8], replies: &mut Replies) {
        replies.clear();
        self.counters.requests += 1;
        if let Err(status) = self.dispatch(core, payload, replies) {
            self.counters.refused += 1;
            replies.clear();
            replies.status(status);
        }
    }

    /// Answers a packet that is no request.
    pub(crate) fn refuse(&mut self, replies: &mut Replies) {
        replies.clear();
        self.counters.requests += 1;
        self.counters.refused += 1;
        replies.status(Status::BadData);
    }

    /// The channel closed: everything that the guest did is undone
    /// (docs/spec/vpci.md#vpci-9).
    pub(crate) fn close(&mut self, core: &BusCore) {
        self.leave_d0(core);
        self.version = None;
    }

    /// The functions that the guest has let go of since the last call, as bits.
    pub(crate) fn take_ejected(&mut self) -> u8 {
        std::mem::take(&mut self.ejected)
    }

    /// Version in force, if negotiated.
    pub(crate) fn version(&self) -> Option<ProtocolVersion> {
        self.version
    }

    /// Guest physical address of the config window, while the bus is in D0.
    pub(crate) fn window(&self) -> Option<u64> {
        self.window.as_ref().map(MmioRegion::base)
    }

    /// Takes over saved state. The functions are not touched.
    pub(crate) fn restore(
        &mut self,
        core: &BusCore,
        version: Option<ProtocolVersion>,
        window: Option<u64>,
    ) -> Result<(), super::mmio::MmioError> {
        self.window = window.map(|gpa| Self::map(core, gpa)).transpose()?;
        self.version = version;
        Ok(())
    }

    fn map(core: &BusCore, gpa: u64) -> Result<MmioRegion, super::mmio::MmioError> {
        core.mmio
            .register(gpa, wire::CONFIG_WINDOW_SIZE, core.window.clone())
    }

    fn dispatch(
        &mut self,
        core: &BusCore,
        payload: &[u8],
        replies: &mut Replies,
    ) -> Result<(), Status> {
        use MessageType as T;
        let header: wire::Header = parse(payload)?;
        let message = MessageType::from_code(header.message_type.get()).ok_or(Status::BadData)?;
        let version = match (message, self.version) {
            (T::QueryProtocolVersion, _) if mutant!("vpci-version-twice") => {
                return self.negotiate(payload, replies);
            }
            (T::QueryProtocolVersion, None) => return self.negotiate(payload, replies),
            (T::QueryProtocolVersion, Some(_)) | (_, None) => {
                return Err(Status::InvalidDeviceState);
            }
            (_, Some(version)) => version,
        };
        if introduced(message) > version && !mutant!("vpci-newer-message") {
            return Err(Status::BadData);
        }
        match message {
            T::QueryBusRelations => {
                relations(core, version, &mut replies.relations);
                replies.status(Status::Success);
            }
            T::QueryResourceRequirements => requirements(core, payload, replies)?,
            T::GetResources => {
                let request: wire::GetResources = parse(payload)?;
                let function = core.find(request.slot)?;
                assignment::resources(&function, replies);
            }
            T::BusD0Entry => {
                self.enter_d0(core, payload)?;
                relations(core, version, &mut replies.relations);
                replies.status(Status::Success);
            }
            T::BusD0Exit => {
                self.leave_d0(core);
                replies.status(Status::Success);
            }
            T::ResourcesAssigned | T::ResourcesAssigned2 | T::ResourcesAssigned3 => {
                self.require_d0()?;
                let assigned = assignment::assign(core, message, payload, replies);
                if assigned == Err(Status::InsufficientResources) {
                    self.counters.exhausted_interrupts += 1;
                }
                assigned?;
            }
            // Without the status that Linux adds, as OpenVMM's guest sends it, the latter has the
            // same shape.
            T::ResourcesReleased | T::EjectionComplete => {
                let request: wire::SlotMessage = parse(payload)?;
                let function = core.find(request.slot)?;
                function.reset(self.window.is_some());
                if message == T::EjectionComplete {
                    self.ejected |= 1 << function.number;
                }
                replies.status(Status::Success);
            }
            T::PowerStateChange => {
                let request: wire::PowerStateChange = parse(payload)?;
                let function = core.find(request.slot)?;
                self.require_d0()?;
                match request.state.get() {
                    wire::POWER_D0 => function.set_memory_decode(true),
                    wire::POWER_D3 => function.set_memory_decode(false),
                    _ => return Err(Status::BadData),
                }
                replies.status(Status::Success);
            }
            T::CreateInterrupt | T::CreateInterrupt2 | T::CreateInterrupt3 => {
                self.require_d0()?;
                let created = create_interrupt(core, message, payload, replies);
                if created == Err(Status::InsufficientResources) {
                    self.counters.exhausted_interrupts += 1;
                }
                created?;
            }
            T::DeleteInterrupt | T::DeleteInterrupt2 => {
                let request: wire::DeleteInterrupt = parse(payload)?;
                let message = request.message;
                let interrupts = &core.find(request.slot)?.interrupts;
                if interrupts.delete(message.address.get(), message.data.get()) == 0 {
                    self.counters.unknown_deletes += 1;
                }
                replies.status(Status::Success);
            }
            T::ReadBlock | T::WriteBlock => block(core, message, payload)?,
            T::ResetDevice => {
                let request: wire::SlotMessage = parse(payload)?;
                core.find(request.slot)?;
                return Err(Status::NotSupported);
            }
            T::TdispCommand => tdisp(core, payload)?,
            T::QueryStop | T::Reenable | T::QueryStopFailed => return Err(Status::NotSupported),
            // Messages of the host, and the one that is handled above.
            T::BusRelations
            | T::BusRelations2
            | T::InvalidateDevice
            | T::InvalidateBus
            | T::Eject
            | T::InvalidateBlock
            | T::QueryProtocolVersion => return Err(Status::BadData),
        }
        Ok(())
    }

    fn negotiate(&mut self, payload: &[u8], replies: &mut Replies) -> Result<(), Status> {
        let request: wire::QueryProtocolVersion = parse(payload)?;
        let version =
            ProtocolVersion::from_code(request.version.get()).ok_or(Status::RevisionMismatch)?;
        self.version = Some(version);
        replies.complete(&wire::QueryProtocolVersionReply {
            status: U32::new(Status::Success.code()),
            version: U32::new(version.code()),
        });
        Ok(())
    }

    fn require_d0(&self) -> Result<(), Status> {
        match self.window {
            Some(_) => Ok(()),
            None if mutant!("vpci-without-d0") => Ok(()),
            None => Err(Status::InvalidDeviceState),
        }
    }

    /// Maps the config window; a second time moves it. On failure it stays where it was.
    fn enter_d0(&mut self, core: &BusCore, payload: &[u8]) -> Result<(), Status> {
        let request: wire::BusD0Entry = parse(payload)?;
        let gpa = request.window.get();
        if self.window() != Some(gpa) {
            match Self::map(core, gpa) {
                Ok(region) => self.window = Some(region),
                Err(error) => {
                    self.counters.refused_windows += 1;
                    if self.counters.refused_windows.is_power_of_two() {
                        log::warn!("config window refused: {error}");
                    }
                    return Err(Status::InvalidParameter);
                }
            }
        }
        for function in core.functions() {
            function.set_powered(true);
        }
        Ok(())
    }

    /// Unmaps the config window and releases all functions: on unbind Linux does not release them
    /// itself (docs/spec/vpci.md#vpci-5).
    fn leave_d0(&mut self, core: &BusCore) {
        if !mutant!("d0-exit-keeps-window") {
            self.window = None;
        }
        for function in core
            .functions()
            .filter(|_| !mutant!("close-keeps-functions"))
        {
            function.reset(false);
        }
    }
}

/// Version that brought a message.
fn introduced(message: MessageType) -> ProtocolVersion {
    use MessageType as T;
    match message {
        T::ResourcesAssigned2 | T::CreateInterrupt2 | T::DeleteInterrupt2 => ProtocolVersion::V1_2,
        T::ResourcesAssigned3 | T::CreateInterrupt3 => ProtocolVersion::V1_4,
        // Later ones are answered as not supported.
        _ => ProtocolVersion::V1_1,
    }
}

/// Reads a message from the start of a payload.
pub(super) fn parse<T: FromBytes>(payload: &[u8]) -> Result<T, Status> {
    match T::read_from_prefix(payload) {
        Ok((message, _)) => Ok(message),
        Err(_) => Err(Status::BadData),
    }
}

fn relations(core: &BusCore, version: ProtocolVersion, out: &mut Vec<u8>) {
    let second = version >= ProtocolVersion::V1_3;
    let message_type = if second {
        MessageType::BusRelations2
    } else {
        MessageType::BusRelations
    };
    let head = wire::BusRelations {
        message_type: message_type.code().into(),
        count: (core.functions().count() as u32).into(),
    };
    out.extend_from_slice(head.as_bytes());
    for function in core.functions() {
        let base = description(&function);
        if second {
            let description = wire::DeviceDescription2 {
                base,
                flags: match core.numa_node {
                    Some(_) => wire::DESCRIPTION_NUMA_VALID.into(),
                    None => 0.into(),
                },
                numa_node: core.numa_node.unwrap_or(0).into(),
                reserved: 0.into(),
            };
            out.extend_from_slice(description.as_bytes());
        } else {
            out.extend_from_slice(base.as_bytes());
        }
    }
}

fn description(function: &FunctionSlot) -> wire::DeviceDescription {
    let id = &function.layout.identity;
    let slot = Slot {
        device: 0,
        function: function.number,
    };
    wire::DeviceDescription {
        vendor: id.vendor.into(),
        device: id.device.into(),
        revision: id.revision,
        prog_if: id.prog_if,
        subclass: id.subclass,
        base_class: id.base_class,
        subsystem_vendor: id.subsystem_vendor.into(),
        subsystem: id.subsystem.into(),
        slot: slot.code().into(),
        serial: id.serial.into(),
    }
}

fn requirements(core: &BusCore, payload: &[u8], replies: &mut Replies) -> Result<(), Status> {
    let request: wire::SlotMessage = parse(payload)?;
    let function = core.find(request.slot)?;
    replies.complete(&wire::ResourceRequirementsReply {
        status: Status::Success.code().into(),
        bars: function.probed_bars().map(U32::new),
    });
    Ok(())
}

/// What a guest asks of an interrupt, whatever the version.
#[derive(Debug, Clone, Copy)]
pub(super) struct InterruptRequest {
    vector: u32,
    count: u16,
    /// The VP that takes it until the first retarget; one of those named.
    vp: u32,
}

impl InterruptRequest {
    fn checked(vector: u32, mode: u8, count: u16, vp: Option<u32>) -> Result<Self, Status> {
        if !matches!(mode, wire::DELIVERY_FIXED | wire::DELIVERY_LOWEST_PRIORITY) {
            return Err(Status::InvalidParameter);
        }
        let vp = vp.ok_or(Status::InvalidParameter)?;
        Ok(Self { vector, count, vp })
    }

    /// `vp_count` bounds the mask: all ones, which Linux sends, means any VP.
    pub(super) fn v1(from: &wire::InterruptDescriptor, vp_count: u32) -> Result<Self, Status> {
        let mask = from.processor_mask.get();
        let vp = Some(mask.trailing_zeros()).filter(|vp| *vp < vp_count.min(64));
        Self::checked(from.vector.into(), from.delivery_mode, from.count.get(), vp)
    }

    pub(super) fn v2(from: &wire::InterruptDescriptor2, vp_count: u32) -> Result<Self, Status> {
        let vp = first_vp(from.processor_count.get(), &from.processors, vp_count);
        Self::checked(from.vector.into(), from.delivery_mode, from.count.get(), vp)
    }

    pub(super) fn v3(from: &wire::InterruptDescriptor3, vp_count: u32) -> Result<Self, Status> {
        let vp = first_vp(from.processor_count.get(), &from.processors, vp_count);
        Self::checked(from.vector.get(), from.delivery_mode, from.count.get(), vp)
    }

    /// Maps the messages.
    pub(super) fn create(self, function: &FunctionSlot) -> Result<wire::Message, Status> {
        let created = function.interrupts.create(self.vector, self.count, self.vp);
        let data = created.map_err(|error| match error {
            HandleError::Full => Status::InsufficientResources,
            _ => Status::InvalidParameter,
        })?;
        Ok(wire::Message {
            reserved: 0.into(),
            count: self.count.into(),
            data: data.into(),
            address: u64::from(HANDLE_ADDRESS).into(),
        })
    }
}

/// The first of the VPs named, if all of them exist and there are 1 to 32.
fn first_vp(
    count: u16,
    processors: &[zerocopy::little_endian::U16; wire::MAX_PROCESSORS],
    vp_count: u32,
) -> Option<u32> {
    let named = processors.get(..usize::from(count))?;
    let exist =
        mutant!("create-missing-vp") || named.iter().all(|vp| u32::from(vp.get()) < vp_count);
    named
        .first()
        .filter(|_| exist)
        .map(|vp| u32::from(vp.get()))
}

fn create_interrupt(
    core: &BusCore,
    message: MessageType,
    payload: &[u8],
    replies: &mut Replies,
) -> Result<(), Status> {
    let head: wire::SlotMessage = parse(payload)?;
    let function = core.find(head.slot)?;
    let vps = function.interrupts.handles.vp_count();
    let request = match message {
        MessageType::CreateInterrupt => {
            InterruptRequest::v1(&parse::<wire::CreateInterrupt>(payload)?.interrupt, vps)
        }
        MessageType::CreateInterrupt2 => {
            InterruptRequest::v2(&parse::<wire::CreateInterrupt2>(payload)?.interrupt, vps)
        }
        _ => InterruptRequest::v3(&parse::<wire::CreateInterrupt3>(payload)?.interrupt, vps),
    }?;
    replies.complete(&wire::CreateInterruptReply {
        status: Status::Success.code().into(),
        reserved: 0.into(),
        message: request.create(&function)?,
    });
    Ok(())
}

/// No function has a back channel: a sound request is not supported.
fn block(core: &BusCore, message: MessageType, payload: &[u8]) -> Result<(), Status> {
    let request: wire::ReadBlock = parse(payload)?;
    core.find(request.slot)?;
    let length = request.length.get() as usize;
    let data = payload.len() - size_of::<wire::WriteBlock>();
    let covered = message == MessageType::ReadBlock || length <= data;
    if length > wire::MAX_BLOCK_LEN || !covered {
        return Err(Status::BadData);
    }
    Err(Status::NotSupported)
}

/// No function has a trusted execution module: a sound request is not supported.
fn tdisp(core: &BusCore, payload: &[u8]) -> Result<(), Status> {
    let request: wire::TdispCommand = parse(payload)?;
    core.find(request.slot)?;
    if request.length.get() > (payload.len() - size_of::<wire::TdispCommand>()) as u64 {
        return Err(Status::BadData);
    }
    Err(Status::NotSupported)
}

#[cfg(test)]
#[path = "protocol_tests.rs"]
mod tests;

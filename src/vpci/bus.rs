//! A vPCI bus: one VMBus channel and the functions behind it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use uuid::Uuid;

use super::device_id::LogicalDeviceId;
use super::ejection::{EjectError, Ejected, Ejection};
use super::function::{BAR_COUNT, FunctionSpec, PciFunction};
use super::interrupts::VectorCounters;
use super::interrupts::handles::{Route, Target};
use super::layout::LayoutError;
use super::lock;
use super::mmio::MmioSpace;
use super::protocol::{BusCore, Protocol, ProtocolCounters, Replies};
use super::slot::{FunctionSlot, IommuLink, SlotHost};
use super::window::{ConfigWindow, Functions, Places};
use crate::dma::DmaCounters;
use crate::hv::HvStatus;
use crate::hv::vpci::{CLASS_ID, MAX_PAYLOAD_LEN, ProtocolVersion};
use crate::hypercall::RetargetInterrupt;
use crate::mem::GuestRam;
use crate::pviommu::{DeviceBackend, DmaFault, IommuMode, PvIommu};
use crate::vmbus::ring::{PacketKind, Reservation, RingError};
use crate::vmbus::{ChannelDevice, ChannelIdentity, OpenError, OpenedChannel, RingsState};
use crate::vmm::{BarMapper, Doorbells, MsiSink, Trigger, Worker, WorkerHost};

/// Least room for a completion in the host-to-guest ring: that of GET_RESOURCES, with a reserve.
const MIN_COMPLETION: usize = 256;

/// What a bus is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BusConfig {
    /// Instance GUID of the channel. Its data2 is the PCI domain that Linux gives the bus, and
    /// with data3 it makes the [`LogicalDeviceId`]s of the functions.
    pub instance: Uuid,
    /// NUMA node of the functions, for guests that ask with version 1.3 or later.
    pub numa_node: Option<u16>,
}

/// What a bus needs of its VM.
#[derive(Debug, Clone)]
pub struct BusHost {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Where the config window and the BARs live.
    pub mmio: Arc<MmioSpace>,
    /// Raises interrupts.
    pub msi: Arc<dyn MsiSink>,
    /// APIC id of each VP, by VP index.
    pub apic_ids: Arc<[u32]>,
    /// Doorbells, where the host has them.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// Maps BARs of host devices into the guest, where the VMM can.
    pub bars: Option<Arc<dyn BarMapper>>,
    /// The VM's pvIOMMU, if it has one.
    pub iommu: Option<Arc<PvIommu>>,
}

/// Why a bus cannot be.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Linux finds no function on a bus without function 0.
    #[error("the bus has no function 0")]
    NoFunction0,
    /// Function numbers are 0 to 7.
    #[error("function number {number} is more than 7")]
    FunctionNumber {
        /// Number asked for.
        number: u8,
    },
    /// Two functions have one number.
    #[error("two functions have the number {number}")]
    DuplicateFunction {
        /// The number.
        number: u8,
    },
    /// A function is to be behind a pvIOMMU that the VM does not have.
    #[error("function {number} is to be behind a pvIOMMU, but the VM has none")]
    NoIommu {
        /// Function number.
        number: u8,
    },
    /// A device describes itself in an impossible way.
    #[error("function {number} ({kind}): {source}")]
    Layout {
        /// Function number.
        number: u8,
        /// Kind of the device.
        kind: &'static str,
        /// What is impossible.
        source: LayoutError,
    },
    /// The VMM's loop refused the bus's worker.
    #[error("the worker loop refused the worker of the bus")]
    Worker(#[source] io::Error),
}

/// State of a bus, for people and tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusReport {
    /// Instance GUID.
    pub instance: Uuid,
    /// The guest has the channel open.
    pub open: bool,
    /// Version in force.
    pub version: Option<ProtocolVersion>,
    /// Guest physical address of the config window, while in D0.
    pub window: Option<u64>,
    /// Counts of requests.
    pub protocol: ProtocolCounters,
    /// Openings that ended with a corrupt ring.
    pub corrupt_rings: u64,
    /// The functions, by number.
    pub functions: Vec<FunctionReport>,
}

/// State of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FunctionReport {
    /// Function number.
    pub number: u8,
    /// Id in hypercalls.
    pub id: LogicalDeviceId,
    /// Kind of the device.
    pub kind: &'static str,
    /// Counts of each interrupt vector.
    pub vectors: Vec<VectorCounters>,
    /// Interrupt messages that are mapped.
    pub live_messages: usize,
    /// Where each BAR is mapped.
    pub bars: [Option<u64>; BAR_COUNT],
    /// BARs that could not be mapped where the guest wanted them.
    pub refused_bars: u64,
    /// Times that memory of a device of the host could not be taken from the guest, which goes on reaching
    /// it, with decode off too. It is tried again each time that the guest writes the command register,
    /// and at a reset.
    pub failed_unmaps: u64,
    /// Counts of DMA.
    pub dma: DmaCounters,
    /// The last DMA access that did not translate.
    pub last_fault: Option<DmaFault>,
    /// Whether it is behind the pvIOMMU.
    pub iommu: IommuMode,
}

/// An open channel.
#[derive(Debug)]
struct Open {
    channel: OpenedChannel,
    /// Private copy of the request being handled.
    request: Box<[u8]>,
    replies: Replies,
    /// Room for the answers of the next request.
    rooms: Option<(Reservation, Reservation)>,
    /// The guest is to be signalled once. Not part of a saved state: each restore makes it so anew.
    signal_due: bool,
}

/// What the worker works on.
#[derive(Debug, Default)]
pub(super) struct Channel {
    open: Option<Open>,
    pub(super) protocol: Protocol,
    corrupt_rings: u64,
    /// The bus was taken away; it is never opened again.
    removed: bool,
    /// The guest was asked to let go of functions.
    ejection: Option<Ejection>,
    /// A function was taken away, and the guest has not been told which are left.
    pub(super) relations_due: bool,
}

impl Channel {
    /// The rings, while the channel is open.
    pub(super) fn save_rings(&self) -> Option<RingsState> {
        let rings = &self.open.as_ref()?.channel;
        Some(RingsState {
            reader: rings.reader.save(),
            writer: rings.writer.save(),
        })
    }
}

/// A vPCI bus.
#[derive(Debug)]
pub struct Bus {
    config: BusConfig,
    pub(super) core: BusCore,
    /// Locked for each step of the worker: see the lock order in [`crate::vpci`].
    pub(super) channel: Mutex<Channel>,
    trigger: OnceLock<Arc<dyn Trigger>>,
}

impl Bus {
    /// Builds a bus of devices, and has `workers` adopt the bus's worker. The caller connects the
    /// devices ([`Bus::connect`]) and then offers the bus as a channel.
    ///
    /// # Errors
    ///
    /// [`BusError`]; the devices know nothing of it.
    pub fn new(
        config: BusConfig,
        functions: Vec<FunctionSpec>,
        host: BusHost,
        workers: &dyn WorkerHost,
    ) -> Result<Arc<Self>, BusError> {
        let slot_host = SlotHost {
            ram: host.ram,
            mmio: host.mmio.clone(),
            msi: host.msi,
            apic_ids: host.apic_ids,
            doorbells: host.doorbells,
            bars: host.bars,
        };
        let instance = config.instance;
        let link = |spec: &FunctionSpec| match (spec.iommu, &host.iommu) {
            (IommuMode::Off, _) => Ok(None),
            (_, None) => Err(BusError::NoIommu {
                number: spec.number,
            }),
            (mode, Some(iommu)) => Ok(Some(IommuLink {
                iommu: iommu.clone(),
                id: LogicalDeviceId::new(&instance, spec.number),
                mode,
            })),
        };
        let functions = Arc::new(Functions::new(plug(functions, &slot_host, link)?));
        let bus = Arc::new(Self {
            config,
            core: BusCore {
                window: Arc::new(ConfigWindow::new(functions.clone())),
                functions,
                mmio: host.mmio,
                numa_node: config.numa_node,
            },
            channel: Mutex::default(),
            trigger: OnceLock::new(),
        });
        let weak: Weak<Self> = Arc::downgrade(&bus);
        let trigger = workers.adopt(weak).map_err(BusError::Worker)?;
        // The cell was made a moment ago: nobody else has filled it.
        let _ = bus.trigger.set(trigger);
        Ok(bus)
    }

    /// Gives the devices their DMA and their interrupts, which they take once. The last step before
    /// the offer: a device whose bus was refused before can be plugged in later.
    pub fn connect(&self) {
        for slot in self.core.functions() {
            slot.connect();
        }
    }

    /// The bus's name.
    pub fn config(&self) -> &BusConfig {
        &self.config
    }

    /// Ids of the functions in hypercalls, by function number.
    pub fn ids(&self) -> Vec<LogicalDeviceId> {
        let slots = self.core.functions();
        slots.map(|slot| self.id(slot.number)).collect()
    }

    /// Numbers of the functions whose state is in hardware of the host.
    pub(crate) fn hosted_functions(&self) -> Vec<u8> {
        let slots = self.core.functions().filter(|slot| slot.is_hosted());
        slots.map(|slot| slot.number).collect()
    }

    /// The functions as the pvIOMMU must know them: those behind it with what makes their DMA obey.
    pub(crate) fn iommu_devices(
        &self,
    ) -> impl Iterator<Item = (LogicalDeviceId, IommuMode, Option<Arc<dyn DeviceBackend>>)> {
        self.core.functions().map(|slot| {
            let mode = slot.iommu_mode();
            // A device of the host hears of it in any case: it may come back from an earlier removal.
            let told = mode != IommuMode::Off || slot.has_backend();
            let backend = told.then(|| slot.dma_backend());
            (self.id(slot.number), mode, backend)
        })
    }

    /// The bus is being removed: it has no say in the pvIOMMU any more, where its ids may soon be
    /// those of others.
    pub(crate) fn leave_iommu(&self) {
        for slot in self.core.functions() {
            slot.leave_iommu();
        }
    }

    /// The same for one function.
    pub(crate) fn function_leaves_iommu(&self, number: u8) {
        if let Some(slot) = self.core.functions.get(number) {
            slot.leave_iommu();
        }
    }

    /// The functions by id, and whether each is quiet ([`FunctionSlot::is_quiet`]).
    pub(crate) fn quiet_functions(&self) -> impl Iterator<Item = (LogicalDeviceId, bool)> {
        let slots = self.core.functions();
        slots.map(|slot| (self.id(slot.number), slot.is_quiet()))
    }

    fn id(&self, number: u8) -> LogicalDeviceId {
        LogicalDeviceId::new(&self.config.instance, number)
    }

    /// Moves an interrupt of a function to another vector and other VPs. Effective when this
    /// returns: nothing is delivered the old way any more, and no event is lost. Never waits for a
    /// worker (docs/spec/vpci.md#vpci-7-2).
    ///
    /// # Errors
    ///
    /// [`HvStatus::INVALID_DEVICE_ID`] if the bus has no such function,
    /// [`HvStatus::INVALID_PARAMETER`] if the message is not one of its live ones, or the vector or
    /// the targets are impossible; several targets at once are for a device whose interrupts the
    /// host's kernel delivers.
    pub fn retarget(&self, function: u8, request: &RetargetInterrupt) -> Result<(), HvStatus> {
        let slot = self
            .core
            .functions
            .get(function)
            .ok_or(HvStatus::INVALID_DEVICE_ID)?;
        let first = request.targets.first().ok_or(HvStatus::INVALID_PARAMETER)?;
        let target =
            if request.multicast && request.targets.len() > 1 && !mutant!("multicast-to-one") {
                Target::All(request.targets.iter().collect())
            } else {
                Target::One(first)
            };
        let route = Route {
            vector: request.vector,
            target,
        };
        slot.interrupts
            .retarget(request.msi_address.into(), request.msi_data, route)
            .map_err(|_| HvStatus::INVALID_PARAMETER)
    }

    /// The VM was reset: as [`ChannelDevice::close`], and all counts of interrupts start anew.
    pub fn reset(&self) {
        self.close();
        self.core.window.select(0);
        for slot in self.core.functions() {
            slot.interrupts.reset_counters();
        }
    }

    /// Asks the guest to let go of all functions (docs/spec/vpci.md#VP-8-01). `done` runs
    /// once: when the guest has said so of each, or closes the channel, or the bus is removed or reset;
    /// at once if the channel is not open. A guest may also never answer: the caller decides how long
    /// to wait. The bus stays until the caller removes it.
    ///
    /// # Errors
    ///
    /// [`EjectError::Busy`]; `done` does not run.
    pub fn eject(&self, done: Ejected) -> Result<(), EjectError> {
        let all = |mask, slot: Arc<FunctionSlot>| mask | 1 << slot.number;
        let channel = lock(&self.channel);
        self.ask(channel, self.core.functions().fold(0, all), done)
    }

    /// Asks the guest to let go of one function, as [`Bus::eject`] does for all. The function stays
    /// until the caller takes it away with [`Bus::remove_function`].
    ///
    /// # Errors
    ///
    /// [`EjectError`]; `done` does not run.
    pub fn eject_function(&self, number: u8, done: Ejected) -> Result<(), EjectError> {
        let channel = lock(&self.channel);
        self.removable(number)?;
        self.ask(channel, 1 << number, done)
    }

    /// The function of a number, unless it has to stay as long as the bus.
    fn removable(&self, number: u8) -> Result<Arc<FunctionSlot>, EjectError> {
        let slot = self.core.functions.get(number);
        let slot = slot.ok_or(EjectError::NoSuchFunction { number })?;
        match number {
            0 => Err(EjectError::Function0),
            _ => Ok(slot),
        }
    }

    fn ask(
        &self,
        mut channel: MutexGuard<'_, Channel>,
        functions: u8,
        done: Ejected,
    ) -> Result<(), EjectError> {
        if channel.ejection.is_some() {
            return Err(EjectError::Busy);
        }
        let ejection = Ejection::new(functions, done);
        if channel.open.is_none() {
            ejection.finish();
            return Ok(());
        }
        channel.ejection = Some(ejection);
        drop(channel);
        self.trigger();
        Ok(())
    }

    /// Takes the functions away from the guest at once, whatever it is doing (surprise removal,
    /// docs/spec/vpci.md#VP-8-02). When this returns no DMA of theirs is under way or to come, no
    /// interrupt is raised, config window and BARs read all ones, and the ring is not read any
    /// more; for good, but for memory that cannot be unmapped ([`Bus::remove_function`]). The caller
    /// revokes the offer.
    pub fn remove(&self) {
        lock(&self.channel).removed = true;
        self.close();
    }

    /// Has the worker signal the guest once, if the channel is open: after a restore, over which a signal
    /// may have been lost (docs/spec/vmbus.md#VB-10-04). Whether there is anything to read does not
    /// matter: it may have waited for room. Not at once: during a restore the host's kernel has the SINT
    /// masked, and who raises it then loses the interrupt (docs/spec/kvm.md#kvm-7-2).
    pub(crate) fn owe_signal(&self) {
        if let Some(open) = &mut lock(&self.channel).open {
            open.signal_due = true;
        }
        self.trigger();
    }

    /// Takes one function away at once, whatever the guest is doing with it. When this returns no DMA
    /// of it is under way or to come, it raises no interrupt, its BARs and its configuration space read
    /// all ones, and no request of the guest finds it; for good. The others go on undisturbed. The
    /// guest is told by new bus relations, on which Linux drops the function from its list but not its
    /// driver: ask first ([`Bus::eject_function`]), and come here when it has let go or its time is
    /// over.
    ///
    /// The device is what this returns; it is connected to nothing any more. One exception is what the
    /// VMM cannot undo: where [`BarMapper::unmap`] fails, and again when the function's last user is gone,
    /// the guest goes on reaching that memory of a device of the host until the VM ends. That is logged.
    /// The mapper has what it needs to keep the memory in place, and with it the host's device in use, so
    /// that nobody else is given it.
    ///
    /// # Errors
    ///
    /// [`EjectError::NoSuchFunction`], [`EjectError::Function0`]; nothing has changed.
    pub fn remove_function(&self, number: u8) -> Result<Arc<dyn PciFunction>, EjectError> {
        self.take_function(number, |_| {})
    }

    /// As [`Bus::remove_function`]. `gone` runs when the function is switched off for good, and before
    /// the guest is told: with whether it is quiet ([`FunctionSlot::is_quiet`]).
    pub(crate) fn take_function(
        &self,
        number: u8,
        gone: impl FnOnce(bool),
    ) -> Result<Arc<dyn PciFunction>, EjectError> {
        let mut channel = lock(&self.channel);
        let slot = self.removable(number)?;
        // In this order: whoever has found it before finds it switched off. Only the bus's worker can
        // switch it on, which needs the channel's lock and finds it no more.
        slot.reset(false);
        self.core.functions.take(number);
        gone(slot.is_quiet());
        let mut left = self.core.functions();
        if let (Some(last), None) = (left.next(), left.next()) {
            last.set_alone();
        }
        channel.relations_due = channel.open.is_some();
        if let Some(ejection) = &mut channel.ejection {
            ejection.gone(number);
        }
        if let Some(ejection) = channel.ejection.take_if(|e| e.is_complete()) {
            ejection.finish();
        }
        drop(channel);
        self.trigger();
        Ok(slot.device().clone())
    }

    /// True if there is such a function, and it can go without its bus.
    ///
    /// # Errors
    ///
    /// As for [`Bus::remove_function`].
    pub(crate) fn check_removable(&self, number: u8) -> Result<(), EjectError> {
        self.removable(number).map(drop)
    }

    /// State for people and tests.
    pub fn report(&self) -> BusReport {
        let channel = lock(&self.channel);
        let functions = self.core.functions().map(|slot| FunctionReport {
            number: slot.number,
            id: self.id(slot.number),
            kind: slot.layout.kind,
            vectors: slot.interrupts.counters(),
            live_messages: slot.interrupts.handles.live(),
            bars: slot.mapped_bars(),
            refused_bars: slot.refused_bars(),
            failed_unmaps: slot.failed_unmaps(),
            dma: slot.dma.counters(),
            last_fault: slot.dma.last_fault(),
            iommu: slot.iommu_mode(),
        });
        BusReport {
            instance: self.config.instance,
            open: channel.open.is_some(),
            version: channel.protocol.version(),
            window: channel.protocol.window(),
            protocol: channel.protocol.counters,
            corrupt_rings: channel.corrupt_rings,
            functions: functions.collect(),
        }
    }

    fn trigger(&self) {
        if let Some(trigger) = self.trigger.get() {
            trigger.trigger();
        }
    }

    /// Handles at most one request. True if there may be more.
    fn step(&self, channel: &mut Channel) -> Result<bool, RingError> {
        let Some(open) = &mut channel.open else {
            return Ok(false);
        };
        if let Some(ejection) = &mut channel.ejection
            && ejection.to_send()
            && !open.eject(ejection)?
        {
            return Ok(false);
        }
        if channel.relations_due {
            // Who has no version yet asks for the relations later.
            if let Some(version) = channel.protocol.version()
                && !open.announce(&self.core, version)?
            {
                return Ok(false);
            }
            channel.relations_due = false;
        }
        if !open.reserve()? {
            return Ok(false);
        }
        let ring = &mut open.channel;
        let Some(packet) = ring.reader.read(&mut open.request)? else {
            if ring.reader.publish()? {
                ring.signal.signal();
            }
            return ring.reader.unmask();
        };
        let replies = &mut open.replies;
        let protocol = &mut channel.protocol;
        match open.request.get(..packet.payload_len) {
            _ if packet.kind == PacketKind::Completion => {}
            Some(payload) if packet.kind == PacketKind::InBand => {
                protocol.handle(&self.core, payload, replies);
                let ejected = protocol.take_ejected();
                if let Some(ejection) = &mut channel.ejection {
                    ejection.released(ejected);
                }
            }
            _ => protocol.refuse(replies),
        }
        let mut signal = ring.reader.publish()?;
        if packet.kind != PacketKind::Completion {
            let Some((relations_room, completion_room)) = open.rooms.take() else {
                return Ok(true);
            };
            if replies.relations.is_empty() {
                ring.writer.release(relations_room);
            } else {
                signal |= ring.writer.send(relations_room, &replies.relations)?;
            }
            if packet.completion_requested && !mutant!("vpci-no-completion") {
                signal |= ring.writer.complete(
                    completion_room,
                    packet.transaction_id,
                    &replies.completion,
                )?;
            } else {
                ring.writer.release(completion_room);
            }
        }
        if signal {
            ring.signal.signal();
        }
        Ok(true)
    }
}

impl Open {
    fn new(channel: OpenedChannel) -> Result<Self, OpenError> {
        // Relations and a completion must fit side by side, with their descriptors and trailers.
        let most = channel.writer.max_payload();
        let beside = Replies::MAX_RELATIONS.next_multiple_of(8) + 24;
        let limit = MAX_PAYLOAD_LEN.min(most.saturating_sub(beside));
        if limit < MIN_COMPLETION {
            return Err(OpenError::Ring(RingError::TooLong {
                len: MIN_COMPLETION,
                limit,
            }));
        }
        Ok(Self {
            channel,
            request: vec![0; MAX_PAYLOAD_LEN].into(),
            replies: Replies::new(limit),
            rooms: None,
            signal_due: false,
        })
    }

    /// Sends the EJECTs of an ejection. False if there is no room yet: the guest signals when there
    /// is.
    fn eject(&mut self, ejection: &mut Ejection) -> Result<bool, RingError> {
        self.release();
        let ring = &mut self.channel;
        if ejection.send(&mut ring.writer)? {
            ring.signal.signal();
        }
        Ok(!ejection.to_send())
    }

    /// Sends the relations of now, unasked. False if there is no room yet, as above.
    fn announce(&mut self, core: &BusCore, version: ProtocolVersion) -> Result<bool, RingError> {
        self.release();
        let ring = &mut self.channel;
        let relations = self.replies.announce(core, version);
        let Some(room) = ring.writer.reserve(relations.len())? else {
            return Ok(false);
        };
        if ring.writer.send(room, relations)? {
            ring.signal.signal();
        }
        Ok(true)
    }

    /// Gives up the room for answers to requests that are yet to come: in a small ring it may be all
    /// there is.
    fn release(&mut self) {
        if let Some((relations, completion)) = self.rooms.take() {
            self.channel.writer.release(relations);
            self.channel.writer.release(completion);
        }
    }

    /// Reserves room for the answers of the next request. False if there is none yet: the guest
    /// signals when there is.
    fn reserve(&mut self) -> Result<bool, RingError> {
        if self.rooms.is_some() {
            return Ok(true);
        }
        let writer = &mut self.channel.writer;
        let Some(relations) = writer.reserve(Replies::MAX_RELATIONS)? else {
            return Ok(false);
        };
        match writer.reserve(self.replies.limit)? {
            Some(completion) => {
                self.rooms = Some((relations, completion));
                Ok(true)
            }
            None => {
                writer.release(relations);
                Ok(false)
            }
        }
    }
}

/// Makes the slots of the devices.
fn plug(
    mut specs: Vec<FunctionSpec>,
    host: &SlotHost,
    link: impl Fn(&FunctionSpec) -> Result<Option<IommuLink>, BusError>,
) -> Result<Places, BusError> {
    specs.sort_by_key(|spec| spec.number);
    let multi_function = specs.len() > 1;
    let mut functions = Places::default();
    for spec in specs {
        let number = spec.number;
        let place = functions
            .get_mut(usize::from(number))
            .ok_or(BusError::FunctionNumber { number })?;
        if place.is_some() {
            return Err(BusError::DuplicateFunction { number });
        }
        let link = link(&spec)?;
        let device = spec.device;
        let first = multi_function && number == 0;
        let slot = FunctionSlot::new(number, first, device.clone(), host, link);
        *place = Some(slot.map_err(|source| BusError::Layout {
            number,
            kind: device.layout().kind,
            source,
        })?);
    }
    if functions[0].is_none() {
        return Err(BusError::NoFunction0);
    }
    Ok(functions)
}

impl ChannelDevice for Bus {
    fn identity(&self) -> ChannelIdentity {
        ChannelIdentity {
            class: CLASS_ID,
            instance: self.config.instance,
        }
    }

    fn open(&self, opened: OpenedChannel) -> Result<(), OpenError> {
        let mut channel = lock(&self.channel);
        if channel.open.is_some() || channel.removed {
            return Err(OpenError::NotReady);
        }
        channel.open = Some(Open::new(opened)?);
        drop(channel);
        self.trigger();
        Ok(())
    }

    fn close(&self) {
        let mut channel = lock(&self.channel);
        if !mutant!("closed-bus-still-answers") {
            channel.open = None;
        }
        channel.protocol.close(&self.core);
        channel.relations_due = false;
        if let Some(ejection) = channel.ejection.take() {
            ejection.finish();
        }
    }

    fn signalled(&self) {
        self.trigger();
    }

    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.trigger.get()?.eventfd()
    }
}

impl Worker for Bus {
    fn name(&self) -> String {
        let (_, domain, ..) = self.config.instance.as_fields();
        format!("vpci-{domain:04x}")
    }

    fn process(&self) -> bool {
        let mut channel = lock(&self.channel);
        if let Some(open) = &mut channel.open
            && std::mem::take(&mut open.signal_due)
        {
            open.channel.signal.signal();
        }
        let stepped = self.step(&mut channel);
        if let Some(ejection) = channel.ejection.take_if(|e| e.is_complete()) {
            ejection.finish();
        }
        match stepped {
            Ok(more) => more,
            Err(error) => {
                // The ring stays stopped until the guest closes the channel: once an opening.
                if !matches!(error, RingError::Stopped) {
                    channel.corrupt_rings += 1;
                    let count = channel.corrupt_rings;
                    // A guest can open and corrupt as often as it likes: log at powers of two.
                    if count.is_power_of_two() {
                        log::warn!("{}: ring stopped, {count} so far: {error}", self.name());
                    }
                }
                false
            }
        }
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        // Mapped regions and functions hold each other: a reset unmaps them.
        self.close();
    }
}

#[cfg(test)]
#[path = "bus_tests.rs"]
mod tests;

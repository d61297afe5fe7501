//! A guest on a vPCI bus, for tests: RAM, rings, a loop that is run by hand, a log of interrupts,
//! and the requests that a driver makes.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use uuid::{Uuid, uuid};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::bus::{Bus, BusConfig, BusHost};
use super::function::{FunctionSpec, HostVectors, InterruptMode, PciFunction, VectorRoute};
use super::lock;
use super::mmio::MmioSpace;
use crate::hv::vpci as wire;
use crate::hv::vpci::MessageType;
use crate::mem::GuestRam;
use crate::synic::{SynicError, SynicPort};
use crate::vmbus::ring::guest::{GuestRing, ram};
use crate::vmbus::ring::{RingReader, RingWriter};
use crate::vmbus::{ChannelDevice, ChannelSignal, OpenedChannel};
use crate::vmm::{Msi, MsiSink, Trigger, Worker, WorkerHost};

/// RAM of the guest in pages, from address 0.
pub(crate) const RAM_PAGES: u64 = 256;
/// Aperture below 4 GiB.
pub(crate) const LOW: u64 = 0xf800_0000;
/// Aperture above 4 GiB.
pub(crate) const HIGH: u64 = 0x10_0000_0000;
/// Instance GUID of the bus: PCI domain 0x1234.
pub(crate) const INSTANCE: Uuid = uuid!("00000007-1234-ab78-8000-000000000001");
/// Interrupt messages' address.
pub(crate) const ADDRESS: u64 = 0xfee0_0000;

const TO_HOST: [u64; 5] = [1, 2, 3, 4, 5];
const TO_GUEST: [u64; 5] = [6, 7, 8, 9, 10];

/// Delivered interrupts, in order.
#[derive(Debug, Default)]
pub(crate) struct MsiLog(Mutex<Vec<Msi>>);

impl MsiLog {
    pub(crate) fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl MsiSink for MsiLog {
    fn raise_msi(&self, msi: Msi) {
        lock(&self.0).push(msi);
    }
}

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Trigger for Flag {
    fn trigger(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

type Adopted = (Weak<dyn Worker>, Arc<Flag>);

/// A loop that is run by hand.
#[derive(Debug, Default)]
pub(crate) struct HandLoop(Mutex<Vec<Adopted>>);

impl WorkerHost for HandLoop {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let flag = Arc::new(Flag::default());
        lock(&self.0).push((worker, flag.clone()));
        Ok(flag)
    }
}

impl HandLoop {
    /// Runs each triggered worker for one step; false if there was none.
    pub(crate) fn step(&self) -> bool {
        let mut ran = false;
        for (worker, flag) in &*lock(&self.0) {
            if let (true, Some(worker)) = (flag.0.swap(false, Ordering::SeqCst), worker.upgrade()) {
                ran = true;
                if worker.process() {
                    flag.trigger();
                }
            }
        }
        ran
    }

    /// Runs workers until none has work.
    pub(crate) fn run(&self) {
        for _ in 0..100_000 {
            if !self.step() {
                return;
            }
        }
        panic!("the workers do not come to rest");
    }
}

/// Counts the guest's channel interrupts.
#[derive(Debug, Default)]
pub(crate) struct Interrupted(AtomicU64);

impl SynicPort for Interrupted {
    fn vp_count(&self) -> u32 {
        4
    }

    fn post_message(&self, vp: u32, _: u8, _: u32, _: &[u8]) -> Result<(), SynicError> {
        Err(SynicError::NoVp { vp })
    }

    fn signal_event(&self, _vp: u32, _sint: u8, _flag: u16) -> Result<(), SynicError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn discard_messages(&self, _sint: u8) {}

    fn set_drain_trigger(&self, _trigger: Arc<dyn Trigger>) {}
}

/// A guest with one bus.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) ram: GuestRam,
    pub(crate) mmio: Arc<MmioSpace>,
    pub(crate) msi: Arc<MsiLog>,
    pub(crate) workers: Arc<HandLoop>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) interrupted: Arc<Interrupted>,
    pub(crate) to_host: GuestRing,
    pub(crate) to_guest: GuestRing,
    /// Config window, as this guest believes.
    pub(crate) window: u64,
}

/// What a bus needs, for a guest with four VPs of even APIC ids.
pub(crate) fn host(ram: &GuestRam, msi: &Arc<MsiLog>) -> BusHost {
    let apertures = vec![LOW..LOW + 0x100_0000, HIGH..HIGH + 0x1000_0000];
    BusHost {
        ram: ram.clone(),
        mmio: MmioSpace::new(ram.clone(), apertures).unwrap(),
        msi: msi.clone(),
        apic_ids: Arc::from([0, 2, 4, 6]),
        doorbells: None,
        bars: None,
        iommu: None,
    }
}

/// Functions behind no pvIOMMU.
pub(crate) fn specs(functions: Vec<(u8, Arc<dyn PciFunction>)>) -> Vec<FunctionSpec> {
    let specs = functions.into_iter();
    specs
        .map(|(n, device)| FunctionSpec::new(n, device))
        .collect()
}

impl Guest {
    /// A guest with `functions`, its channel not open.
    pub(crate) fn new(
        workers: Arc<HandLoop>,
        functions: Vec<(u8, Arc<dyn PciFunction>)>,
        change: impl FnOnce(&mut BusHost),
    ) -> Self {
        let ram = ram(RAM_PAGES);
        let msi = Arc::new(MsiLog::default());
        let mut host = host(&ram, &msi);
        change(&mut host);
        let mmio = host.mmio.clone();
        let config = BusConfig {
            instance: INSTANCE,
            numa_node: Some(1),
        };
        let bus = Bus::new(config, specs(functions), host, &*workers).unwrap();
        bus.connect();
        Self {
            to_host: GuestRing::new(&ram, &TO_HOST),
            to_guest: GuestRing::new(&ram, &TO_GUEST),
            bus,
            interrupted: Arc::default(),
            ram,
            mmio,
            msi,
            workers,
            window: LOW,
        }
    }

    /// Opens the channel.
    pub(crate) fn open(&mut self) {
        self.to_host = GuestRing::new(&self.ram, &TO_HOST);
        self.to_guest = GuestRing::new(&self.ram, &TO_GUEST);
        let channel = OpenedChannel {
            reader: RingReader::open(self.ram.clone(), &TO_HOST).unwrap(),
            writer: RingWriter::open(self.ram.clone(), &TO_GUEST).unwrap(),
            signal: ChannelSignal::new(self.interrupted.clone(), 2, 1, Some(0)),
        };
        self.bus.open(channel).unwrap();
        self.workers.run();
    }

    /// Number of channel interrupts since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupted.0.swap(0, Ordering::SeqCst)
    }

    /// Puts a packet on the ring, and signals the host if it wants that.
    pub(crate) fn send(&self, id: u64, completion: bool, payload: &[u8]) {
        let signal = self.to_host.send(id, completion, payload).expect("room");
        if signal {
            self.bus.signalled();
        }
    }

    /// Everything the host has sent: transaction id and payload, in order.
    pub(crate) fn receive(&self) -> Vec<(u64, Vec<u8>)> {
        let mut all = Vec::new();
        while let Some((packet, signal)) = self.to_guest.receive() {
            if signal {
                self.bus.signalled();
            }
            let kind = if packet.transaction_id == 0 { 6 } else { 0xb };
            assert_eq!(packet.packet_type, kind);
            assert!(packet.payload.len() >= 8, "Linux drops shorter packets");
            all.push((packet.transaction_id, packet.payload));
        }
        all
    }

    /// Sends a request and returns the payloads that answer it: unsolicited ones, the completion.
    pub(crate) fn exchange(&self, payload: &[u8]) -> (Vec<Vec<u8>>, Vec<u8>) {
        self.send(77, true, payload);
        self.workers.run();
        let mut packets = self.receive();
        let (id, completion) = packets.pop().expect("a completion");
        assert_eq!(id, 77);
        let unsolicited = packets.into_iter().map(|(id, payload)| {
            assert_eq!(id, 0, "one completion a request");
            payload
        });
        (unsolicited.collect(), completion)
    }

    /// Sends a request and returns the completion as `T`; panics unless it succeeded.
    pub(crate) fn request<T: FromBytes>(&self, message: &(impl IntoBytes + Immutable)) -> T {
        let (_, completion) = self.exchange(message.as_bytes());
        assert_eq!(status(&completion), 0, "{completion:x?}");
        T::read_from_prefix(&completion).unwrap().0
    }

    /// Sends a request and returns the status of the completion.
    pub(crate) fn status(&self, message: &(impl IntoBytes + Immutable)) -> u32 {
        status(&self.exchange(message.as_bytes()).1)
    }

    /// Opens the channel, negotiates version `version` and enters D0.
    pub(crate) fn power_on(&mut self, version: u32) {
        self.open();
        assert_eq!(self.status(&query_version(version)), 0);
        assert_eq!(self.status(&d0_entry(self.window)), 0);
    }

    /// A 4-byte load from the configuration space of function `function`.
    pub(crate) fn config_read(&self, function: u8, offset: u64) -> u32 {
        self.select(function);
        let mut data = [0; 4];
        assert!(
            self.mmio
                .mmio_read(self.window + 0x1000 + offset, &mut data)
        );
        u32::from_le_bytes(data)
    }

    /// A 4-byte store to the configuration space of function `function`.
    pub(crate) fn config_write(&self, function: u8, offset: u64, value: u32) {
        self.select(function);
        let gpa = self.window + 0x1000 + offset;
        assert!(self.mmio.mmio_write(gpa, &value.to_le_bytes()));
    }

    fn select(&self, function: u8) {
        let slot = u32::from(function) << 5;
        assert!(self.mmio.mmio_write(self.window, &slot.to_le_bytes()));
    }

    /// Byte offset of the capability `id` of function `function`.
    pub(crate) fn capability(&self, function: u8, id: u8) -> u64 {
        let mut at = self.config_read(function, 0x34) & 0xff;
        while at != 0 {
            let head = self.config_read(function, at.into());
            if head as u8 == id {
                return at.into();
            }
            at = head >> 8 & 0xff;
        }
        panic!("no capability {id:#x}");
    }

    pub(crate) fn load32(&self, gpa: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.mmio.mmio_read(gpa, &mut data));
        u32::from_le_bytes(data)
    }

    pub(crate) fn load64(&self, gpa: u64) -> u64 {
        let mut data = [0; 8];
        assert!(self.mmio.mmio_read(gpa, &mut data));
        u64::from_le_bytes(data)
    }

    pub(crate) fn store32(&self, gpa: u64, value: u32) {
        assert!(self.mmio.mmio_write(gpa, &value.to_le_bytes()));
    }

    pub(crate) fn store64(&self, gpa: u64, value: u64) {
        assert!(self.mmio.mmio_write(gpa, &value.to_le_bytes()));
    }
}

/// Status of a completion.
pub(crate) fn status(completion: &[u8]) -> u32 {
    u32::from_le_bytes(completion[..4].try_into().unwrap())
}

pub(crate) fn query_version(version: u32) -> wire::QueryProtocolVersion {
    wire::QueryProtocolVersion {
        message_type: MessageType::QueryProtocolVersion.code().into(),
        version: version.into(),
    }
}

pub(crate) fn d0_entry(window: u64) -> wire::BusD0Entry {
    wire::BusD0Entry {
        message_type: MessageType::BusD0Entry.code().into(),
        reserved: 0.into(),
        window: window.into(),
    }
}

pub(crate) fn header(message: MessageType) -> wire::Header {
    wire::Header {
        message_type: message.code().into(),
    }
}

/// A message to a function that carries the slot alone.
pub(crate) fn to_slot(message: MessageType, slot: u32) -> wire::SlotMessage {
    wire::SlotMessage {
        message_type: message.code().into(),
        slot: slot.into(),
    }
}

/// RESOURCES_ASSIGNED2 as Linux sends it.
pub(crate) fn assigned(slot: u32) -> wire::ResourcesAssigned {
    wire::ResourcesAssigned {
        message_type: MessageType::ResourcesAssigned2.code().into(),
        slot: slot.into(),
        ..Default::default()
    }
}

/// CREATE_INTERRUPT3 for one VP.
pub(crate) fn create(slot: u32, vector: u32, count: u16, vp: u16) -> wire::CreateInterrupt3 {
    let mut message = wire::CreateInterrupt3 {
        message_type: MessageType::CreateInterrupt3.code().into(),
        slot: slot.into(),
        interrupt: wire::InterruptDescriptor3 {
            vector: vector.into(),
            count: count.into(),
            processor_count: 1.into(),
            ..Default::default()
        },
    };
    message.interrupt.processors[0] = vp.into();
    message
}

pub(crate) fn delete(slot: u32, message: wire::Message) -> wire::DeleteInterrupt {
    wire::DeleteInterrupt {
        message_type: MessageType::DeleteInterrupt.code().into(),
        slot: slot.into(),
        message,
    }
}

/// A host that delivers nothing.
#[derive(Debug)]
pub(crate) struct NoVectors;

impl HostVectors for NoVectors {
    fn set_mode(&self, _mode: InterruptMode) {}
    fn route(&self, _vector: u16, _to: VectorRoute) {}
    fn is_pending(&self, _vector: u16) -> bool {
        false
    }
}

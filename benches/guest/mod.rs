//! A guest on the façade, made of the least that brings a bus into use: contact, rings, D0, a BAR.
//!
//! Offsets and numbers are those of `docs/spec`. After [`Guest::new`] nothing here allocates, so that
//! what is measured is the library.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use uuid::{Uuid, uuid};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vm_vpci::cpuid::Features;
use vm_vpci::devices::testdev::TestDevice;
use vm_vpci::hypercall::{CallRegisters, Outcome};
use vm_vpci::mem::GuestRam;
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::vmbus::VmBusConfig;
use vm_vpci::vmm::{MonotonicClock, Msi, MsiSink, Trigger, Worker, WorkerHost};
use vm_vpci::{BusSpec, FunctionSpec, Partition, PartitionConfig, PartitionHost};

const INSTANCE: Uuid = uuid!("00000001-1234-ab78-8000-000000000000");
/// First address of the aperture below 4 GiB, where the config window goes.
const WINDOW: u64 = 0xf000_0000;
/// First address of the aperture above 4 GiB.
const HIGH: u64 = 0x10_0000_0000;
/// Where BAR 0 goes.
const BAR: u64 = HIGH + 0x10_0000;
/// Input page of memory hypercalls.
const INPUT: u64 = 0x6000;
/// Input page of HVCALL_RETARGET_INTERRUPT.
const RETARGET: u64 = 0x9000;
/// First page of the ring to the host, and of the ring to the guest; four data pages each.
const TO_HOST: u64 = 0x20_000;
const TO_GUEST: u64 = 0x25_000;
const RING: u32 = 0x4000;
/// Message slot of VP 0 for VMBus.
const SLOT: u64 = 0x10_200;
/// Where device and guest exchange data.
const SOURCE: u64 = 0x30_000;
const DESTINATION: u64 = 0x31_000;

/// Memory of `bytes` bytes from address 0.
pub(crate) fn map(bytes: usize) -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("RAM")
}

/// RAM of `bytes` bytes from address 0.
pub(crate) fn ram(bytes: usize) -> GuestRam {
    GuestRam::new(&map(bytes))
}

/// Counts interrupts.
#[derive(Debug, Default)]
pub(crate) struct Interrupts(pub(crate) AtomicU64);

impl MsiSink for Interrupts {
    fn raise_msi(&self, _msi: Msi) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct Pending(AtomicBool);

impl Trigger for Pending {
    fn trigger(&self) {
        self.0.store(true, Ordering::Release);
    }
}

type Adopted = (Arc<Pending>, Weak<dyn Worker>);

/// Runs workers on the calling thread.
#[derive(Debug, Default)]
pub(crate) struct Loop(Mutex<Vec<Adopted>>);

impl WorkerHost for Loop {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let pending = Arc::new(Pending::default());
        let mut workers = self.0.lock().expect("the workers");
        workers.push((pending.clone(), worker));
        Ok(pending)
    }
}

impl Loop {
    fn run(&self) {
        let workers = self.0.lock().expect("the workers");
        let mut idle = false;
        while !idle {
            idle = true;
            for (pending, worker) in &*workers {
                while pending.0.swap(false, Ordering::AcqRel) {
                    idle = false;
                    if worker.upgrade().is_some_and(|worker| worker.process()) {
                        pending.trigger();
                    }
                }
            }
        }
    }
}

/// Registers of a VP at a hypercall.
#[derive(Debug)]
pub(crate) struct Registers {
    pub(crate) control: u64,
    pub(crate) rdx: u64,
    pub(crate) r8: u64,
}

impl CallRegisters for Registers {
    fn cpl(&self) -> u8 {
        0
    }
    fn control(&self) -> u64 {
        self.control
    }
    fn input(&self) -> u64 {
        self.rdx
    }
    fn output(&self) -> u64 {
        self.r8
    }
}

/// A partition over `ram` with two VPs, and its loop.
pub(crate) fn partition(ram: GuestRam, msi: Arc<dyn MsiSink>) -> (Partition, Arc<Loop>) {
    let workers = Arc::new(Loop::default());
    let config = PartitionConfig {
        apic_ids: vec![0, 1],
        tsc_hz: 2_000_000_000,
        apic_hz: 1_000_000_000,
        mmio: vec![WINDOW..WINDOW + 0x100_0000, HIGH..HIGH + 0x1_0000_0000],
        features: Features::default(),
        hypercall_port: DEFAULT_HYPERCALL_PORT,
        vmbus: VmBusConfig::default(),
        iommu: None,
    };
    let host = PartitionHost {
        ram,
        msi,
        workers: workers.clone(),
        clock: Arc::new(MonotonicClock::default()),
        doorbells: None,
        bars: None,
    };
    (Partition::new(config, host).expect("a partition"), workers)
}

/// First words of a completion.
pub(crate) type Reply = [u32; 6];

/// A guest whose bus is in D0, whose function is switched on and has MSI-X vector 0.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) partition: Partition,
    pub(crate) interrupts: Arc<Interrupts>,
    ram: GuestRam,
    workers: Arc<Loop>,
    /// Connection id of the channel.
    signal: u64,
    transaction: u64,
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

impl Guest {
    /// Boots, connects with VMBus 6.0, opens the channel, and brings up the function with vPCI
    /// 1.4.
    pub(crate) fn new() -> Self {
        let ram = ram(1 << 20);
        let interrupts = Arc::new(Interrupts::default());
        let (partition, workers) = partition(ram.clone(), interrupts.clone());
        let device = TestDevice::new(1, &*workers).expect("a device");
        let functions = vec![FunctionSpec::new(0, device)];
        let instance = INSTANCE;
        let spec = BusSpec {
            instance,
            functions,
        };
        partition.plug(spec).expect("a bus");
        let mut guest = Self {
            partition,
            interrupts,
            ram,
            workers,
            signal: 0,
            transaction: 0,
        };
        guest.boot();
        guest.connect();
        guest.probe();
        guest
    }

    fn set_msr(&self, msr: u32, value: u64) {
        let partition = &self.partition;
        let effect = partition.write_msr_forwarding(0, msr, value, &mut |_, _| {});
        let _ = effect.expect("an MSR that exists");
    }

    fn boot(&self) {
        self.set_msr(0x4000_0000, 0x8100 << 48);
        self.set_msr(0x4000_0001, 0x5001);
        self.set_msr(0x4000_0083, 0x1_0001);
        self.set_msr(0x4000_0082, 0x1_1001);
        self.set_msr(0x4000_0092, 0xf3);
        self.set_msr(0x4000_0080, 1);
    }

    /// A hypercall; the whole result word.
    pub(crate) fn call(&self, control: u64, rdx: u64) -> u64 {
        let mut registers = Registers {
            control,
            rdx,
            r8: 0,
        };
        match self.partition.hypercall(&mut registers) {
            Outcome::Complete { result } => result,
            other => panic!("{other:?}"),
        }
    }

    fn post(&self, connection: u32, payload: &[u8]) {
        let mut input = bytes(&[connection, 0, 1, payload.len() as u32]);
        input.extend(payload);
        input.resize(256, 0);
        self.ram.write(INPUT, &input).expect("RAM");
        assert_eq!(self.call(0x5c, INPUT), 0);
        self.workers.run();
    }

    /// Takes the next message of VMBus, which is to be of type `kind`.
    fn message(&self, kind: u32) -> [u8; 240] {
        let occupied = self.ram.load_u32(SLOT, Ordering::Acquire).expect("RAM");
        assert_eq!(occupied, 1);
        let (mut head, mut payload) = ([0; 16], [0; 240]);
        self.ram.read(SLOT, &mut head).expect("RAM");
        self.ram.read(SLOT + 16, &mut payload).expect("RAM");
        self.ram.store_u32(SLOT, 0, Ordering::SeqCst).expect("RAM");
        if head[5] & 1 != 0 {
            self.set_msr(0x4000_0084, 0);
        }
        self.workers.run();
        assert_eq!(word(&payload, 0), kind);
        payload
    }

    fn connect(&mut self) {
        let contact = [14, 0, 0x6_0000, 0, 2, 0, 0x7000, 0, 0x8000, 0];
        self.post(4, &bytes(&contact));
        assert_eq!(self.message(15)[8], 1);
        self.post(1, &bytes(&[3, 0, 0, 0, 0, 0, 0, 0]));
        let offer = self.message(1);
        let (relid, connection) = (word(&offer, 184), word(&offer, 192));
        self.message(4);
        let mut header = bytes(&[8, 0, relid, 0xe1e10, 1 << 16 | 88, 10 * 4096, 0]);
        for page in 0..10u64 {
            header.extend((TO_HOST / 4096 + page).to_le_bytes());
        }
        self.post(1, &header);
        assert_eq!(word(&self.message(10), 16), 0);
        for ring in [TO_HOST, TO_GUEST] {
            self.ram
                .store_u32(ring + 64, 1, Ordering::Release)
                .expect("RAM");
        }
        let mut open = bytes(&[5, 0, relid, 7, 0xe1e10, 0, 5]);
        open.resize(148, 0);
        self.post(1, &open);
        assert_eq!(word(&self.message(6), 16), 0);
        self.signal = connection.into();
    }

    fn probe(&mut self) {
        assert_eq!(self.request(&[0x4249_0013, 0x1_0004])[0], 0);
        self.send(&[0x4249_0001], 0);
        self.workers.run();
        while self.receive().is_some() {}
        let window = [0x4249_0007, 0, WINDOW as u32, (WINDOW >> 32) as u32];
        assert_eq!(self.request(&window)[0], 0);
        let mut assigned = [0; 50];
        assigned[0] = 0x4249_0016;
        assert_eq!(self.request(&assigned)[0], 0);
        self.select();
        self.write(WINDOW + 0x1010, &(BAR as u32).to_le_bytes());
        self.write(WINDOW + 0x1014, &((BAR >> 32) as u32).to_le_bytes());
        self.write(WINDOW + 0x1004, &6u16.to_le_bytes());
        let mut magic = [0; 4];
        assert!(self.partition.mmio_read(BAR, &mut magic));
        assert_eq!(u32::from_le_bytes(magic), 0x5654_5044);
        self.interrupts.0.store(0, Ordering::Relaxed);
        self.set_up_interrupt();
    }

    /// Gives MSI-X vector 0 a message and a destination.
    fn set_up_interrupt(&mut self) {
        let mut create = [0; 21];
        create[0] = 0x4249_001b;
        create[2] = 0xef;
        create[3] = 1 << 16;
        create[4] = 1;
        let reply = self.request(&create);
        assert_eq!(reply[0], 0);
        let (data, address, high) = (reply[3], reply[4], reply[5]);
        let mut retarget = vec![0xff; 8];
        retarget.extend(0x1234_ab78u64.to_le_bytes());
        let words = [1, 0, address, data, 0, 0, 0x41, 2, 0, 0, 1, 0, 1, 0];
        retarget.extend(bytes(&words));
        self.ram.write(RETARGET, &retarget).expect("RAM");
        for (at, value) in (0..).step_by(4).zip([address, high, data, 0]) {
            self.write(BAR + 0x1000 + at, &value.to_le_bytes());
        }
        assert_eq!(self.retarget(), 0);
        let mut at = u64::from(self.config(0x34) & 0xff);
        while self.config(at) & 0xff != 0x11 {
            at = u64::from(self.config(at) >> 8 & 0xff);
        }
        self.write(WINDOW + 0x1000 + at + 2, &0x8000u16.to_le_bytes());
        self.raise();
        assert_eq!(self.interrupts.0.load(Ordering::Relaxed) & 1, 1);
    }

    /// HVCALL_RETARGET_INTERRUPT of vector 0 to VP 0.
    pub(crate) fn retarget(&self) -> u64 {
        self.call(0x7e | 2 << 17, RETARGET)
    }

    /// Has the device raise vector 0.
    pub(crate) fn raise(&self) {
        self.write(BAR + 0x60, &0u32.to_le_bytes());
    }

    fn write(&self, gpa: u64, data: &[u8]) {
        assert!(self.partition.mmio_write(gpa, data));
    }

    fn index(&self, ring: u64, word: u64) -> u32 {
        let index = self.ram.load_u32(ring + word, Ordering::Acquire);
        index.expect("RAM")
    }

    /// Copies between `data` and a ring's data area, which wraps.
    fn at(ring: u64, index: u32) -> u64 {
        ring + 4096 + u64::from(index % RING)
    }

    /// Writes a packet of at most 256 bytes to the host and signals it if need be.
    fn send(&mut self, payload: &[u32], flags: u16) {
        let (write, read) = (self.index(TO_HOST, 0), self.index(TO_HOST, 4));
        let len = 16 + (payload.len() * 4).next_multiple_of(8);
        let mut packet = [0; 256];
        packet[0..2].copy_from_slice(&6u16.to_le_bytes());
        packet[2..4].copy_from_slice(&2u16.to_le_bytes());
        packet[4..6].copy_from_slice(&((len / 8) as u16).to_le_bytes());
        packet[6..8].copy_from_slice(&flags.to_le_bytes());
        self.transaction += 1;
        packet[8..16].copy_from_slice(&self.transaction.to_le_bytes());
        for (at, word) in payload.iter().enumerate() {
            packet[16 + at * 4..20 + at * 4].copy_from_slice(&word.to_le_bytes());
        }
        let packet = &packet[..len + 8];
        let first = packet.len().min((RING - write) as usize);
        let (head, tail) = packet.split_at(first);
        self.ram.write(Self::at(TO_HOST, write), head).expect("RAM");
        if !tail.is_empty() {
            self.ram.write(Self::at(TO_HOST, 0), tail).expect("RAM");
        }
        let next = (write + packet.len() as u32) % RING;
        self.ram
            .store_u32(TO_HOST, next, Ordering::SeqCst)
            .expect("RAM");
        if read == write && self.index(TO_HOST, 8) == 0 {
            assert_eq!(self.call(0x1_005d, self.signal), 0);
        }
    }

    /// Takes the next packet of the host: its type and the first words of its payload.
    fn receive(&self) -> Option<(u16, Reply)> {
        let (write, read) = (self.index(TO_GUEST, 0), self.index(TO_GUEST, 4));
        if write == read {
            return None;
        }
        let mut head = [0; 16];
        // The area wraps at a multiple of 8.
        for (piece, at) in head.chunks_exact_mut(8).zip([0, 8]) {
            let gpa = Self::at(TO_GUEST, read + at);
            self.ram.read(gpa, piece).expect("RAM");
        }
        let len = u32::from(u16::from_le_bytes([head[4], head[5]])) * 8;
        let mut reply = [0; 6];
        for (at, word) in (16..len).step_by(4).zip(&mut reply) {
            let gpa = Self::at(TO_GUEST, read + at);
            *word = self.ram.load_u32(gpa, Ordering::Relaxed).expect("RAM");
        }
        let next = (read + len + 8) % RING;
        self.ram
            .store_u32(TO_GUEST + 4, next, Ordering::SeqCst)
            .expect("RAM");
        Some((u16::from_le_bytes([head[0], head[1]]), reply))
    }

    /// A vPCI request, from the packet to its completion.
    pub(crate) fn request(&mut self, payload: &[u32]) -> Reply {
        self.send(payload, 1);
        self.workers.run();
        while let Some((kind, reply)) = self.receive() {
            if kind == 0xb {
                return reply;
            }
        }
        panic!("no completion");
    }

    /// The request that is measured: QUERY_RESOURCE_REQUIREMENTS.
    pub(crate) fn query(&mut self) -> u32 {
        self.request(&[0x4249_0005, 0])[0]
    }

    /// Selects function 0 in the config window.
    pub(crate) fn select(&self) {
        self.write(WINDOW, &[0; 4]);
    }

    /// Reads a dword of the configuration space of the function selected.
    pub(crate) fn config(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        assert!(
            self.partition
                .mmio_read(WINDOW + 0x1000 + offset, &mut data)
        );
        u32::from_le_bytes(data)
    }

    /// Has the device copy `len` bytes from one place to another; returns the bytes of the
    /// destination that are right.
    pub(crate) fn copy(&self, len: u32) -> u64 {
        self.write(BAR + 0x10, &SOURCE.to_le_bytes());
        self.write(BAR + 0x18, &DESTINATION.to_le_bytes());
        self.write(BAR + 0x20, &len.to_le_bytes());
        self.write(BAR + 0x24, &u32::MAX.to_le_bytes());
        self.write(BAR + 0x30, &1u32.to_le_bytes());
        self.workers.run();
        self.ram
            .load_u64(DESTINATION, Ordering::Acquire)
            .expect("RAM")
    }

    /// Fills the source of [`Guest::copy`].
    pub(crate) fn fill(&self, byte: u8) {
        self.ram.fill(SOURCE, 4096, byte).expect("RAM");
    }
}

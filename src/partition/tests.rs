//! A guest in the shape of Linux does the main job on the façade, from CPUID to DMA and interrupts.
//!
//! It is written against the wire, with offsets from `docs/spec`, and shares no definition with
//! the code under test.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use uuid::{Uuid, uuid};

use super::*;
use crate::devices::testdev::TestDevice;
use crate::hypercall::CallInstruction;
use crate::msr::DEFAULT_HYPERCALL_PORT;
use crate::pviommu::{FaultCause, IommuMode};
use crate::vmbus::ring::guest::{GuestRing, Received, ram};
use crate::vmm::{MonotonicClock, Msi, Trigger, Worker};

mod hostile;
mod iommu;
mod plug;
mod state;

const INSTANCE: Uuid = uuid!("00000001-1234-ab78-8000-000000000000");
const APERTURE: u64 = 0xf000_0000;
const WINDOW: u64 = APERTURE;
const HIGH_APERTURE: u64 = 0x10_0000_0000;
const SELF: u64 = u64::MAX;

/// A worker, and whether it was triggered.
type Adopted = (Arc<Pending>, Weak<dyn Worker>);

/// Runs workers when told to, on the calling thread.
#[derive(Debug, Default)]
struct Loop {
    workers: Mutex<Vec<Adopted>>,
}

#[derive(Debug, Default)]
struct Pending(AtomicBool);

impl Trigger for Pending {
    fn trigger(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl WorkerHost for Loop {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        let pending = Arc::new(Pending::default());
        self.workers.lock().unwrap().push((pending.clone(), worker));
        Ok(pending)
    }
}

impl Loop {
    /// One step of each worker that has something to do.
    fn step(&self) {
        let workers = self.workers.lock().unwrap().clone();
        for (pending, worker) in workers {
            if pending.0.swap(false, Ordering::AcqRel)
                && worker.upgrade().is_some_and(|worker| worker.process())
            {
                pending.trigger();
            }
        }
    }

    fn run(&self) {
        loop {
            let workers = self.workers.lock().unwrap().clone();
            let mut idle = true;
            for (pending, worker) in workers {
                while pending.0.swap(false, Ordering::AcqRel) {
                    idle = false;
                    if worker.upgrade().is_some_and(|worker| worker.process()) {
                        pending.trigger();
                    }
                }
            }
            if idle {
                return;
            }
        }
    }
}

/// Keeps what was raised.
#[derive(Debug, Default)]
struct Interrupts(Mutex<Vec<Msi>>);

impl MsiSink for Interrupts {
    fn raise_msi(&self, msi: Msi) {
        self.0.lock().unwrap().push(msi);
    }
}

/// The host's kernel in hybrid mode: its copies of MSRs, and the SINTs that it raises.
#[derive(Debug)]
struct Kernel {
    msrs: Mutex<BTreeMap<(u32, u32), u64>>,
    interrupts: Arc<Interrupts>,
}

impl Kernel {
    fn put(&self, vp: u32, msr: u32, value: u64) {
        self.msrs.lock().unwrap().insert((vp, msr), value);
    }

    fn msr(&self, vp: u32, msr: u32) -> Option<u64> {
        self.msrs.lock().unwrap().get(&(vp, msr)).copied()
    }
}

impl SintLines for Kernel {
    fn raise(&self, vp: u32, sint: u8) -> bool {
        let value = self.msr(vp, 0x4000_0090 + u32::from(sint)).unwrap();
        assert_eq!(value & 1 << 16, 0, "lost: masked in the kernel");
        self.interrupts.raise_msi(Msi::fixed(vp, value as u8));
        true
    }
}

/// All that a kernel can answer.
const KERNEL_CALLS: KernelCalls = KernelCalls {
    instruction: CallInstruction::Vmmcall,
    flush: true,
    send_ipi: true,
    spin_wait: true,
    signal_event: true,
};

/// Registers of a VP at a hypercall.
#[derive(Debug)]
struct Registers {
    control: u64,
    rdx: u64,
    r8: u64,
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

struct Guest {
    partition: Partition,
    ram: GuestRam,
    host: Arc<Loop>,
    interrupts: Arc<Interrupts>,
    device: Arc<TestDevice>,
    /// In hybrid mode.
    kernel: Option<Arc<Kernel>>,
    rings: Option<(GuestRing, GuestRing)>,
    signal: u64,
    transaction: u64,
}

fn put(buffer: &mut Vec<u8>, words: &[u32]) {
    for word in words {
        buffer.extend(word.to_le_bytes());
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

impl Guest {
    fn new() -> Self {
        Self::build(ram(256), false, None)
    }

    /// A guest on a new partition over `ram`.
    fn over(ram: GuestRam) -> Self {
        Self::build(ram, false, None)
    }

    /// The same, whose function is behind a pvIOMMU.
    fn with_iommu(ram: GuestRam, iommu: IommuConfig) -> Self {
        Self::build(ram, false, Some(iommu))
    }

    fn build(ram: GuestRam, hybrid: bool, iommu: Option<IommuConfig>) -> Self {
        let mode = match iommu {
            Some(_) => IommuMode::On,
            None => IommuMode::Off,
        };
        let host = Arc::new(Loop::default());
        let interrupts = Arc::new(Interrupts::default());
        let config = PartitionConfig {
            apic_ids: vec![0, 1],
            tsc_hz: 2_000_000_000,
            apic_hz: 1_000_000_000,
            mmio: vec![
                APERTURE..APERTURE + 0x100_0000,
                HIGH_APERTURE..HIGH_APERTURE + 0x1_0000_0000,
            ],
            features: Features::default(),
            hypercall_port: DEFAULT_HYPERCALL_PORT,
            vmbus: VmBusConfig::default(),
            iommu,
        };
        let services = PartitionHost {
            ram: ram.clone(),
            msi: interrupts.clone(),
            workers: host.clone(),
            clock: Arc::new(MonotonicClock::default()),
            doorbells: None,
            bars: None,
        };
        let kernel = hybrid.then(|| {
            Arc::new(Kernel {
                msrs: Mutex::default(),
                interrupts: interrupts.clone(),
            })
        });
        let partition = match &kernel {
            None => Partition::new(config, services),
            Some(kernel) => {
                let mode = KernelMode {
                    lines: kernel.clone(),
                    connections: None,
                    calls: KERNEL_CALLS,
                };
                Partition::with_kernel(config, services, mode)
            }
        };
        let partition = partition.unwrap();
        let device = TestDevice::new(1, &*host).unwrap();
        let spec = BusSpec {
            instance: INSTANCE,
            functions: vec![FunctionSpec::new(0, device.clone()).with_iommu(mode)],
        };
        partition.plug(spec).unwrap();
        let guest = Self {
            partition,
            ram,
            host,
            interrupts,
            device,
            kernel,
            rings: None,
            signal: 0,
            transaction: 0,
        };
        guest.give_kernel();
        guest
    }

    /// What a VMM does before the guest runs and after a reset.
    fn give_kernel(&self) {
        for vp in 0..2 {
            let msrs = self.partition.kernel_msrs(vp);
            assert_eq!(msrs.is_empty(), self.kernel.is_none());
            for (msr, value) in msrs {
                self.kernel.as_ref().unwrap().put(vp, msr, value);
            }
        }
    }

    fn call(&self, control: u64, rdx: u64) -> u64 {
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

    fn set_msr(&self, vp: u32, msr: u32, value: u64) {
        let mut forwarded = false;
        let forward = &mut |msr, value| {
            forwarded = true;
            self.kernel.as_ref().unwrap().put(vp, msr, value);
        };
        let effect = self.partition.write_msr_forwarding(vp, msr, value, forward);
        let _effect = effect.unwrap();
        let shared = msr == 0x4000_0000 || (0x4000_0080..0x4000_00a0).contains(&msr);
        assert_eq!(forwarded, shared && self.kernel.is_some(), "{msr:#x}");
    }

    /// Linux hyperv_init and hv_synic_enable_regs.
    fn boot(&self) {
        self.set_msr(0, 0x4000_0000, 0x8100 << 48);
        self.set_msr(0, 0x4000_0001, 0x5001);
        for vp in 0..2 {
            let page = u64::from(vp) * 0x2000;
            self.set_msr(vp, 0x4000_0083, 0x10001 + page);
            self.set_msr(vp, 0x4000_0082, 0x11001 + page);
            self.set_msr(vp, 0x4000_0092, 0xf3);
            self.set_msr(vp, 0x4000_0080, 1);
        }
    }

    fn post(&self, connection: u32, payload: &[u8]) -> u64 {
        let mut input = Vec::new();
        put(&mut input, &[connection, 0, 1, payload.len() as u32]);
        input.extend(payload);
        input.resize(256, 0);
        self.ram.write(0x6000, &input).unwrap();
        let result = self.call(0x5c, 0x6000);
        self.host.run();
        result
    }

    /// Takes the message in VP 0's VMBus slot.
    fn message(&self) -> Option<Vec<u8>> {
        let slot = 0x10200;
        if self.ram.load_u32(slot, Ordering::Acquire).unwrap() == 0 {
            return None;
        }
        let mut size = [0];
        self.ram.read(slot + 4, &mut size).unwrap();
        let mut payload = vec![0; usize::from(size[0])];
        self.ram.read(slot + 16, &mut payload).unwrap();
        self.ram.store_u32(slot, 0, Ordering::SeqCst).unwrap();
        let mut flags = [0];
        self.ram.read(slot + 5, &mut flags).unwrap();
        if flags[0] & 1 != 0 {
            self.set_msr(0, 0x4000_0084, 0);
        }
        self.host.run();
        Some(payload)
    }

    fn expect_message(&self, kind: u32) -> Vec<u8> {
        let message = self.message().expect("a message");
        assert_eq!(word(&message, 0), kind);
        message
    }

    /// Contact at `version`; returns whether the host took it.
    fn contact(&self, version: u32) -> bool {
        let mut message = Vec::new();
        put(&mut message, &[14, 0, version, 0, 2, 0]);
        put(&mut message, &[0x7000, 0, 0x8000, 0]);
        let connection = if version >= 0x5_0000 { 4 } else { 1 };
        assert_eq!(self.post(connection, &message), 0);
        self.expect_message(15)[8] == 1
    }

    /// REQUEST_OFFERS; returns relid and connection id of each vPCI bus.
    fn offers(&self) -> Vec<(u32, u32)> {
        assert_eq!(self.post(1, &[3, 0, 0, 0, 0, 0, 0, 0]), 0);
        let mut found = Vec::new();
        loop {
            let message = self.message().expect("ALL_OFFERS_DELIVERED");
            if word(&message, 0) == 4 {
                return found;
            }
            assert_eq!(message.len(), 196);
            let class = uuid!("44c4f61d-4444-4400-9d52-802e27ede19f");
            assert_eq!(message[8..24], class.to_bytes_le());
            assert_eq!(message[24..40], INSTANCE.to_bytes_le());
            found.push((word(&message, 184), word(&message, 192)));
        }
    }

    /// vmbus_open with rings of five pages each.
    fn open(&mut self, relid: u32, connection: u32) {
        let pfns: Vec<u64> = (0x20..0x2a).collect();
        let mut header = Vec::new();
        put(&mut header, &[8, 0, relid, 0xe1e10, 1 << 16 | 88]);
        put(&mut header, &[10 * 4096, 0]);
        for pfn in &pfns {
            header.extend(pfn.to_le_bytes());
        }
        assert_eq!(self.post(1, &header), 0);
        assert_eq!(word(&self.expect_message(10), 16), 0);
        let rings = (
            GuestRing::new(&self.ram, &pfns[..5]),
            GuestRing::new(&self.ram, &pfns[5..]),
        );
        let mut open = Vec::new();
        put(&mut open, &[5, 0, relid, 7, 0xe1e10, 0, 5]);
        open.resize(148, 0);
        assert_eq!(self.post(1, &open), 0);
        assert_eq!(word(&self.expect_message(6), 16), 0);
        self.rings = Some(rings);
        self.signal = u64::from(connection);
    }

    fn close(&mut self, relid: u32) {
        let mut message = Vec::new();
        put(&mut message, &[7, 0, relid]);
        assert_eq!(self.post(1, &message), 0);
        let mut message = Vec::new();
        put(&mut message, &[11, 0, relid, 0xe1e10]);
        assert_eq!(self.post(1, &message), 0);
        self.expect_message(12);
        self.rings = None;
    }

    fn send(&mut self, completion: bool, payload: &[u8]) {
        self.transaction += 1;
        let (out, _) = self.rings.as_ref().unwrap();
        if out.send(self.transaction, completion, payload).unwrap() {
            assert_eq!(self.call(0x1_005d, self.signal), 0);
        }
        self.host.run();
    }

    fn receive(&mut self) -> Received {
        let (_, inbound) = self.rings.as_ref().unwrap();
        let (packet, signal) = inbound.receive().expect("a packet");
        if signal {
            assert_eq!(self.call(0x1_005d, self.signal), 0);
        }
        packet
    }

    /// A vPCI request; returns the payload of its completion.
    fn request(&mut self, message: u32, words: &[u32]) -> Vec<u8> {
        let mut payload = Vec::new();
        put(&mut payload, &[0x4249_0000 + message]);
        put(&mut payload, words);
        self.send(true, &payload);
        loop {
            let packet = self.receive();
            if packet.packet_type == 0xb {
                assert_eq!(packet.transaction_id, self.transaction);
                return packet.payload;
            }
        }
    }

    fn read<const N: usize>(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.partition.mmio_read(gpa, &mut bytes[..N]));
        u64::from_le_bytes(bytes)
    }

    fn write<const N: usize>(&self, gpa: u64, value: u64) {
        assert!(self.partition.mmio_write(gpa, &value.to_le_bytes()[..N]));
    }

    fn config(&self, offset: u64) -> u64 {
        self.write::<4>(WINDOW, 0);
        self.read::<4>(WINDOW + 0x1000 + offset)
    }

    fn set_config<const N: usize>(&self, offset: u64, value: u64) {
        self.write::<4>(WINDOW, 0);
        self.write::<N>(WINDOW + 0x1000 + offset, value);
    }
}

const LOW_BAR: u64 = HIGH_APERTURE + 0x10_0000;
const MSIX_TABLE: u64 = LOW_BAR + 0x1000;

impl Guest {
    /// hv_pci_probe up to the bus scan; returns the relid.
    fn probe(&mut self, protocol: u32) -> u32 {
        let [(relid, connection)] = self.offers()[..] else {
            panic!("one bus");
        };
        self.open(relid, connection);
        assert_eq!(word(&self.request(0x13, &[protocol]), 0), 0);
        self.send(false, &0x4249_0001u32.to_le_bytes());
        let relations = self.receive().payload;
        let kind = if protocol >= 0x1_0003 { 0x19 } else { 0 };
        assert_eq!(word(&relations, 0), 0x4249_0000 + kind);
        assert_eq!(word(&relations, 4), 1);
        assert_eq!(word(&relations, 8), 0x5650_1234);
        let masks = self.request(5, &[0]);
        assert_eq!(word(&masks, 4), 0xffff_c004);
        assert_eq!(word(&masks, 8), 0xffff_ffff);
        let window = [0, WINDOW as u32, (WINDOW >> 32) as u32];
        assert_eq!(word(&self.request(7, &window), 0), 0);
        let assigned = if protocol >= 0x1_0002 { 0x16 } else { 0x10 };
        assert_eq!(word(&self.request(assigned, &[0; 49]), 0), 0);
        relid
    }

    /// Places BAR 0 and switches the function on, as the PCI core and a driver do.
    fn enable(&self) {
        self.set_config::<2>(0x04, 0);
        self.set_config::<4>(0x10, LOW_BAR & 0xffff_ffff);
        self.set_config::<4>(0x14, LOW_BAR >> 32);
        self.set_config::<2>(0x04, 6);
        assert_eq!(self.read::<4>(LOW_BAR), 0x5654_5044);
    }

    /// Offset of a capability in configuration space.
    fn capability(&self, id: u64) -> u64 {
        let mut at = self.config(0x34) & 0xff;
        while at != 0 {
            let header = self.config(at);
            if header & 0xff == id {
                return at;
            }
            at = header >> 8 & 0xff;
        }
        panic!("no capability {id:#x}");
    }

    /// hv_compose_msi_msg with protocol 1.1 and later; returns address and data.
    fn create_interrupt(&mut self, protocol: u32) -> (u64, u32) {
        let reply = match protocol {
            0x1_0001 => self.request(0x14, &[0, 1 << 16 | 0xef, 0, u32::MAX, u32::MAX]),
            0x1_0004 => {
                let mut words = [0; 20];
                words[1] = 0xef;
                words[2] = 1 << 16;
                words[3] = 1;
                self.request(0x1b, &words)
            }
            _ => {
                let mut words = [0; 19];
                words[1] = 1 << 16 | 0xef;
                words[2] = 1;
                self.request(0x17, &words)
            }
        };
        assert_eq!(word(&reply, 0), 0);
        assert_eq!(word(&reply, 8) >> 16, 1);
        let address = u64::from(word(&reply, 16)) | u64::from(word(&reply, 20)) << 32;
        (address, word(&reply, 12))
    }

    /// HVCALL_RETARGET_INTERRUPT to one VP.
    fn retarget(&self, (address, data): (u64, u32), vector: u32, vp: u32) -> u64 {
        let mut input = Vec::new();
        input.extend(SELF.to_le_bytes());
        input.extend(0x1234_ab78u64.to_le_bytes());
        put(&mut input, &[1, 0, address as u32, data, 0, 0, vector, 2]);
        put(&mut input, &[0, 0, 1, 0, 1 << vp, 0]);
        self.ram.write(0x6000, &input).unwrap();
        self.call(0x7e | 2 << 17, 0x6000)
    }

    /// Gives MSI-X vector 0 a message for `vector` on `vp`.
    fn set_up_interrupt(&mut self, protocol: u32, vector: u32, vp: u32) -> (u64, u32) {
        let message = self.create_interrupt(protocol);
        self.write::<4>(MSIX_TABLE, message.0);
        self.write::<4>(MSIX_TABLE + 4, message.0 >> 32);
        self.write::<4>(MSIX_TABLE + 8, message.1.into());
        assert_eq!(self.retarget(message, vector, vp), 0);
        self.write::<4>(MSIX_TABLE + 12, 0);
        let msix = self.capability(0x11);
        self.set_config::<2>(msix + 2, 0x8000);
        message
    }

    /// Has the device copy 64 bytes, with an interrupt on vector 0; returns what was raised.
    fn copy(&self, byte: u8) -> Vec<Msi> {
        self.ram.fill(0x30000, 64, byte).unwrap();
        self.ram.fill(0x31000, 64, 0).unwrap();
        self.interrupts.0.lock().unwrap().clear();
        self.write::<8>(LOW_BAR + 0x10, 0x30000);
        self.write::<8>(LOW_BAR + 0x18, 0x31000);
        self.write::<4>(LOW_BAR + 0x20, 64);
        self.write::<4>(LOW_BAR + 0x24, 0);
        self.write::<4>(LOW_BAR + 0x30, 1);
        self.host.run();
        self.interrupts.0.lock().unwrap().clone()
    }

    fn copied(&self) -> [u8; 64] {
        let mut bytes = [0; 64];
        self.ram.read(0x31000, &mut bytes).unwrap();
        bytes
    }

    /// From boot to data and an interrupt; returns the relid.
    fn main_job(&mut self, version: u32, protocol: u32) -> u32 {
        self.boot();
        assert!(self.contact(version));
        let relid = self.probe(protocol);
        self.enable();
        self.set_up_interrupt(protocol, 0x41, 1);
        assert_eq!(self.copy(0x5a), [Msi::fixed(1, 0x41)]);
        assert_eq!(self.copied(), [0x5a; 64]);
        relid
    }
}

fn main_job(version: u32, protocol: u32) -> (Guest, u32) {
    let mut guest = Guest::new();
    let relid = guest.main_job(version, protocol);
    (guest, relid)
}

#[test]
fn a_guest_does_the_main_job_with_every_vmbus_and_vpci_version() {
    for version in [
        0x6_0000, 0x5_0003, 0x5_0002, 0x5_0001, 0x5_0000, 0x4_0001, 0x4_0000,
    ] {
        main_job(version, 0x1_0004);
    }
    for protocol in 0x1_0001..=0x1_0004 {
        main_job(0x5_0003, protocol);
    }
}

#[test]
fn a_guest_does_the_main_job_in_hybrid_mode_and_again_after_a_reset() {
    let mut guest = Guest::build(ram(256), true, None);
    guest.main_job(0x6_0000, 0x1_0004);
    let kernel = guest.kernel.clone().unwrap();
    assert_eq!(kernel.msr(0, 0x4000_0000), Some(0x8100 << 48));
    assert_eq!(kernel.msr(1, 0x4000_0083), Some(0x12001));
    // A write that faults is not forwarded.
    let never = &mut |msr, _| panic!("{msr:#x}");
    for (msr, value) in [(0x4000_0083, !0), (0x4000_0092, 0xf), (0x4000_0002, 1)] {
        let result = guest.partition.write_msr_forwarding(0, msr, value, never);
        assert_eq!(result, Err(GpFault), "{msr:#x}");
    }
    guest.partition.reset();
    guest.host.run();
    guest.give_kernel();
    for vp in 0..2 {
        for msr in (0x4000_0080..0x4000_00a0).chain([0x4000_0000]) {
            let expected = guest.partition.read_msr(vp, msr).ok();
            if ![0x4000_0081, 0x4000_0084].contains(&msr) {
                assert_eq!(kernel.msr(vp, msr), expected, "{msr:#x}");
            }
        }
    }
    guest.rings = None;
    guest.main_job(0x5_0003, 0x1_0003);
}

#[test]
fn hybrid_mode_shows_in_the_hypercall_page_and_in_one_leaf() {
    let (plain, hybrid) = (Guest::new(), Guest::build(ram(256), true, None));
    let page = |guest: &Guest| {
        guest.boot();
        let mut page = vec![0; 0x1000];
        guest.ram.read(0x5000, &mut page).unwrap();
        page
    };
    let (plain_page, hybrid_page) = (page(&plain), page(&hybrid));
    assert!(plain_page.starts_with(&[0xf3, 0x0f, 0x1e, 0xfa, 0xe7, 0x8d, 0xc3]));
    let code = PageCode::hybrid(0x8d, &KERNEL_CALLS);
    assert!(hybrid_page.starts_with(code.bytes()));
    let leaves = plain.partition.cpuid_leaves();
    let hybrid_leaves = hybrid.partition.cpuid_leaves();
    let differing: Vec<_> = leaves
        .iter()
        .zip(&hybrid_leaves)
        .filter(|(plain, hybrid)| plain != hybrid)
        .map(|(_, hybrid)| (hybrid.function, hybrid.eax, hybrid.ebx))
        .collect();
    assert_eq!(differing, [(0x4000_0004, 0xe24, 0xfff)]);
}

#[test]
fn an_unknown_version_is_refused_and_the_next_one_taken() {
    let guest = Guest::new();
    guest.boot();
    assert!(!guest.contact(0x7_0000));
    assert!(guest.contact(0x5_0003));
}

#[test]
fn a_moved_interrupt_arrives_at_its_new_vp_only() {
    let (mut guest, _) = main_job(0x6_0000, 0x1_0004);
    let message = guest.create_interrupt(0x1_0004);
    guest.write::<4>(MSIX_TABLE + 8, message.1.into());
    assert_eq!(guest.retarget(message, 0x52, 0), 0);
    assert_eq!(guest.copy(1), [Msi::fixed(0, 0x52)]);
    assert_eq!(guest.retarget(message, 0x53, 1), 0);
    assert_eq!(guest.copy(2), [Msi::fixed(1, 0x53)]);
    let unknown = (message.0, message.1 + 100);
    assert_eq!(guest.retarget(unknown, 0x54, 0), 5);
    assert_eq!(guest.copy(3), [Msi::fixed(1, 0x53)]);
}

#[test]
fn a_closed_bus_does_no_dma_and_raises_nothing_and_opens_again() {
    let (mut guest, relid) = main_job(0x5_0003, 0x1_0004);
    guest.close(relid);
    assert_eq!(guest.copy(7), []);
    assert_eq!(guest.copied(), [0; 64]);
    assert_eq!(guest.read::<4>(LOW_BAR), 0xffff_ffff);
    assert_eq!(guest.config(0), 0xffff_ffff);
    assert_eq!(guest.post(1, &[16, 0, 0, 0, 0, 0, 0, 0]), 0);
    guest.expect_message(17);
    assert!(guest.contact(0x5_0003));
    guest.probe(0x1_0004);
    guest.enable();
    guest.set_up_interrupt(0x1_0004, 0x61, 0);
    assert_eq!(guest.copy(9), [Msi::fixed(0, 0x61)]);
}

#[test]
fn a_kexec_leaves_nothing_of_the_old_kernel_behind() {
    let (mut guest, _) = main_job(0x5_0003, 0x1_0004);
    // No vPCI message at all: only UNLOAD, with the channel open.
    assert_eq!(guest.post(1, &[16, 0, 0, 0, 0, 0, 0, 0]), 0);
    guest.expect_message(17);
    assert!(guest.message().is_none());
    guest.rings = None;
    assert_eq!(guest.copy(7), []);
    assert_eq!(guest.copied(), [0; 64]);
    guest.set_msr(0, 0x4000_0000, 0);
    let mut registers = Registers {
        control: 0x1_005d,
        rdx: guest.signal,
        r8: 0,
    };
    let outcome = guest.partition.hypercall(&mut registers);
    assert!(matches!(outcome, Outcome::InvalidOpcode));
    guest.boot();
    assert!(guest.contact(0x6_0000));
    guest.probe(0x1_0003);
}

#[test]
fn a_reset_returns_everything_to_power_on() {
    let (mut guest, _) = main_job(0x6_0000, 0x1_0004);
    guest.partition.reset();
    guest.host.run();
    for msr in [0x4000_0000, 0x4000_0001, 0x4000_0080, 0x4000_0083] {
        assert_eq!(guest.partition.read_msr(1, msr), Ok(0), "{msr:#x}");
    }
    assert_eq!(guest.partition.read_msr(0, 0x4000_0092), Ok(0x10000));
    assert_eq!(guest.copy(7), []);
    let [bus] = &guest.partition.buses()[..] else {
        panic!("one bus");
    };
    assert!(!bus.open);
    assert_eq!(bus.functions[0].live_messages, 0);
    guest.rings = None;
    guest.boot();
    assert!(guest.contact(0x6_0000));
    guest.probe(0x1_0004);
}

#[test]
fn a_removed_bus_is_gone_at_once_and_comes_back_when_the_guest_let_go() {
    let (mut guest, relid) = main_job(0x5_0003, 0x1_0004);
    let message = guest.create_interrupt(0x1_0004);
    assert!(guest.partition.remove(&INSTANCE));
    assert!(!guest.partition.remove(&INSTANCE), "only once");
    // The VMBus interrupt of the rescinded offer, nothing of the device.
    assert_eq!(guest.copy(7), [Msi::fixed(0, 0xf3)]);
    assert_eq!(guest.copied(), [0; 64]);
    assert_eq!(guest.config(0), 0xffff_ffff);
    assert_eq!(guest.read::<4>(LOW_BAR), 0xffff_ffff);
    assert_eq!(guest.retarget(message, 0x52, 0), 0x57);
    let rescind = guest.expect_message(2);
    assert_eq!(word(&rescind, 8), relid);
    let plug = |guest: &Guest| {
        let device = TestDevice::new(9, &*guest.host).unwrap();
        let functions = vec![FunctionSpec::new(0, device)];
        let instance = INSTANCE;
        guest.partition.plug(BusSpec {
            instance,
            functions,
        })
    };
    assert!(matches!(plug(&guest), Err(PlugError::Offer(_))));
    guest.rings = None;
    assert_eq!(
        guest.post(1, &[13, 0, 0, 0, 0, 0, 0, 0, relid as u8, 0, 0, 0]),
        0
    );
    guest.host.run();
    plug(&guest).unwrap();
    guest.host.run();
    guest.expect_message(1);
    assert_eq!(guest.partition.buses()[0].functions[0].live_messages, 0);
}

#[test]
fn functions_with_one_logical_id_are_refused_by_name() {
    let guest = Guest::new();
    let device = TestDevice::new(2, &*guest.host).unwrap();
    let twin = uuid!("00000002-1234-ab7f-9000-000000000000");
    let spec = BusSpec {
        instance: twin,
        functions: vec![FunctionSpec::new(0, device)],
    };
    let error = guest.partition.plug(spec).unwrap_err().to_string();
    for part in ["0x1234ab78", &twin.to_string(), &INSTANCE.to_string()] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(guest.partition.buses().len(), 1);
}

#[test]
fn a_partition_has_one_to_2048_vps() {
    let guest = Guest::new();
    for count in [0, 2049] {
        let config = PartitionConfig {
            apic_ids: (0..count).collect(),
            tsc_hz: 1,
            apic_hz: 1,
            mmio: Vec::new(),
            features: Features::default(),
            hypercall_port: DEFAULT_HYPERCALL_PORT,
            vmbus: VmBusConfig::default(),
            iommu: None,
        };
        let error = Partition::new(config, guest.partition.host.clone()).unwrap_err();
        assert!(matches!(error, PartitionError::VpCount { .. }));
    }
}

//! A guest that does everything right, up to where a target begins, and the instructions that a
//! hostile one uses as well.
//!
//! Offsets and numbers are those of `docs/spec`.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use vm_vpci::hypercall::{CallRegisters, Outcome, XmmBlock};
use vm_vpci::mem::GuestRam;
use vm_vpci::partition::PartitionState;

use crate::machine::{Device, Function, HIGH_MMIO, LOW_MMIO, Machine, Plugged, VPS, map};
use crate::values::words;

/// The hypercall page.
pub const HYPERCALL_PAGE: u64 = 0x5000;
/// Input page of VP 0; that of VP 1 is the next.
pub const INPUT: u64 = 0x6000;
/// Output page.
pub const OUTPUT: u64 = 0x8000;
/// Message page of VP 0; its event flags page is the next, then those of VP 1.
pub const SIMP: u64 = 0x1_0000;
/// Rings of bus 0; those of the next bus are 16 pages on.
pub const RINGS: u64 = 0x2_0000;
/// Pages of a ring, with its control page.
const RING_PAGES: u64 = 3;
/// First-stage tables.
pub const TABLES: u64 = 0x4_0000;
/// BAR 0 of bus 0; that of the next bus is this much further.
pub const BAR: u64 = HIGH_MMIO.start + 0x10_0000;
/// Distance between the BARs of two buses, and of two functions of a bus.
pub const BAR_STRIDE: u64 = 0x10_0000;
/// The VMBus SINT's message slot in a message page.
const SLOT: u64 = 0x200;
/// Executions of the hypercall page after which a call is taken for one without an end.
const MOST_EXECUTIONS: usize = 5000;

/// One ring of a channel, in consecutive pages.
#[derive(Debug, Clone, Copy)]
pub struct Ring(u64);

impl Ring {
    /// GPA of the control page.
    pub fn control(self) -> u64 {
        self.0
    }

    /// Bytes of the data area.
    pub const fn size() -> u32 {
        (RING_PAGES as u32 - 1) * 4096
    }

    /// The control page as a driver sets it up.
    fn set_up(self, ram: &GuestRam) {
        store(ram, self.0, 0);
        store(ram, self.0 + 4, 0);
        store(ram, self.0 + 8, 0);
        store(ram, self.0 + 12, 0);
        store(ram, self.0 + 64, 1);
    }

    fn index(self, ram: &GuestRam, word: u64) -> u32 {
        let index = load(ram, self.0 + word);
        // Whatever it was overwritten with: stores go on inside the ring.
        index % Self::size() / 8 * 8
    }

    /// GPA of a byte of the data area.
    pub fn at(self, index: u32) -> u64 {
        self.0 + 4096 + u64::from(index % Self::size())
    }

    /// Appends a packet with this descriptor, wherever the write index is, and whether or not it
    /// fits.
    pub fn send(self, ram: &GuestRam, descriptor: [u16; 4], id: u64, payload: &[u8]) {
        let write = self.index(ram, 0);
        let mut packet: Vec<u8> = descriptor.iter().flat_map(|n| n.to_le_bytes()).collect();
        packet.extend(id.to_le_bytes());
        packet.extend(payload);
        packet.resize(packet.len().next_multiple_of(8), 0);
        packet.extend((u64::from(write) << 32).to_le_bytes());
        for (at, word) in (write..).step_by(8).zip(packet.chunks_exact(8)) {
            ram.write(self.at(at), word).expect("RAM");
        }
        store(ram, self.0, (write + packet.len() as u32) % Self::size());
    }

    /// Takes a packet: its type and payload.
    fn receive(self, ram: &GuestRam) -> Option<(u16, Vec<u8>)> {
        let (write, read) = (load(ram, self.0), load(ram, self.0 + 4));
        if write == read {
            return None;
        }
        let word = |at: u32| {
            let mut bytes = [0; 8];
            ram.read(self.at(at), &mut bytes).expect("RAM");
            bytes
        };
        let head = word(read);
        let len = u32::from(u16::from_le_bytes([head[4], head[5]])) * 8;
        let payload = (16..len).step_by(8).flat_map(|at| word(read + at));
        let packet = (u16::from_le_bytes([head[0], head[1]]), payload.collect());
        store(ram, self.0 + 4, (read + len + 8) % Self::size());
        Some(packet)
    }

    /// Takes all that is there, unread.
    pub fn drain(self, ram: &GuestRam) {
        store(ram, self.0 + 4, load(ram, self.0));
    }
}

fn load(ram: &GuestRam, gpa: u64) -> u32 {
    ram.load_u32(gpa, Ordering::Acquire).expect("RAM")
}

fn store(ram: &GuestRam, gpa: u64, value: u32) {
    ram.store_u32(gpa, value, Ordering::Release).expect("RAM");
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Registers of a VP at a hypercall.
#[derive(Debug, Clone, Copy)]
pub struct Registers {
    /// Privilege level.
    pub cpl: u8,
    /// RCX.
    pub control: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// XMM0 to XMM5; none if the VMM cannot get at them.
    pub xmm: Option<XmmBlock>,
}

impl CallRegisters for Registers {
    fn cpl(&self) -> u8 {
        self.cpl
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

    fn xmm(&mut self) -> Option<XmmBlock> {
        self.xmm
    }

    fn set_xmm(&mut self, xmm: &XmmBlock) {
        self.xmm = Some(*xmm);
    }
}

/// What the guest knows of an open channel.
#[derive(Debug, Clone, Copy)]
pub struct Channel {
    /// Its id.
    pub relid: u32,
    /// Connection for signals.
    pub connection: u32,
}

/// A guest in a machine.
#[derive(Debug)]
pub struct Guest {
    /// The machine.
    pub machine: Machine,
    /// The channels of the buses that are plugged in when it connects, in their order.
    pub channels: Vec<Channel>,
    transaction: u64,
}

impl Guest {
    /// A guest that has done nothing.
    pub fn new(machine: Machine) -> Self {
        Self {
            machine,
            channels: Vec::new(),
            transaction: 0,
        }
    }

    /// RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.machine.ram
    }

    /// The rings of a bus: to the host, and to the guest.
    pub fn rings(bus: usize) -> [Ring; 2] {
        let first = RINGS + (bus % 2) as u64 * 0x1_0000;
        [Ring(first), Ring(first + RING_PAGES * 4096)]
    }

    /// A hypercall, executed until it is done; none if it is #UD.
    ///
    /// # Panics
    ///
    /// If it is never done, or goes back.
    pub fn call(&self, mut registers: Registers) -> Option<u64> {
        for _ in 0..MOST_EXECUTIONS {
            match self.machine.partition.hypercall(&mut registers) {
                Outcome::Complete { result } => {
                    let (status, done) = (result & 0xffff, result >> 32);
                    assert!(status <= 0x78, "status {status:#x}");
                    assert_eq!(result >> 16 & 0xffff, 0, "{result:#x}");
                    let count = registers.control >> 32 & 0xfff;
                    assert!(done <= count, "{done} elements done of {count}");
                    return Some(result);
                }
                Outcome::InvalidOpcode => return None,
                Outcome::Restart { control } => {
                    let start = |control: u64| control >> 48 & 0xfff;
                    assert!(start(control) > start(registers.control), "no progress");
                    registers.control = control;
                }
            }
        }
        panic!("the hypercall is never done");
    }

    /// A hypercall with its input in memory, as a driver makes it.
    pub fn memory_call(&self, vp: u32, control: u64, input: &[u8]) -> Option<u64> {
        let at = INPUT + u64::from(vp % VPS) * 4096;
        let len = input.len().min(4096);
        self.ram().write(at, &input[..len]).expect("RAM");
        self.call(Registers {
            cpl: 0,
            control,
            rdx: at,
            r8: OUTPUT,
            xmm: None,
        })
    }

    /// HvSignalEvent.
    pub fn signal(&self, connection: u32, flag: u16) -> Option<u64> {
        self.call(Registers {
            cpl: 0,
            control: 0x1_005d,
            rdx: u64::from(connection) | u64::from(flag) << 32,
            r8: 0,
            xmm: None,
        })
    }

    /// HvPostMessage.
    pub fn post(&self, vp: u32, connection: u32, payload: &[u8]) -> Option<u64> {
        let mut input = words(&[connection, 0, 1, payload.len() as u32]);
        input.extend(payload);
        input.resize(256, 0);
        self.memory_call(vp, 0x5c, &input)
    }

    /// Takes the message in a VP's VMBus slot, if there is one.
    pub fn take_message(&self, vp: u32) -> Option<Vec<u8>> {
        let slot = SIMP + u64::from(vp % VPS) * 0x2000 + SLOT;
        let ram = self.ram();
        if load(ram, slot) == 0 {
            return None;
        }
        let mut message = [0; 256];
        ram.read(slot, &mut message).expect("RAM");
        store(ram, slot, 0);
        if message[5] & 1 != 0 {
            self.set_msr(vp % VPS, 0x4000_0084, 0);
        }
        let len = usize::from(message[4]).min(240);
        Some(message[16..16 + len].to_vec())
    }

    fn set_msr(&self, vp: u32, msr: u32, value: u64) {
        let partition = &self.machine.partition;
        let effect = partition.write_msr_forwarding(vp, msr, value, &mut |_, _| {});
        let _ = effect.expect("an MSR that exists");
    }

    /// Identity, hypercall page, SynICs.
    pub fn boot(&mut self) {
        self.set_msr(0, 0x4000_0000, 0x8100 << 48);
        self.set_msr(0, 0x4000_0001, HYPERCALL_PAGE | 1);
        for vp in 0..VPS {
            let page = SIMP + u64::from(vp) * 0x2000;
            self.set_msr(vp, 0x4000_0083, page | 1);
            self.set_msr(vp, 0x4000_0082, page | 0x1001);
            self.set_msr(vp, 0x4000_0092, 0xf3);
            self.set_msr(vp, 0x4000_0080, 1);
        }
    }

    /// Posts a message of VMBus, which the host has to take.
    fn send_message(&self, connection: u32, payload: &[u8]) {
        assert_eq!(self.post(0, connection, payload), Some(0));
        self.machine.workers.settle();
    }

    /// The next message, which has to be of this number.
    fn expect_message(&self, number: u32) -> Vec<u8> {
        let message = self.take_message(0).expect("a message of the host");
        self.machine.workers.settle();
        assert_eq!(word(&message, 0), number);
        message
    }

    /// Contact at `version`, and offers, which are remembered.
    pub fn connect(&mut self, version: u32) {
        let target = if version < 0x5_0000 { 0x9000 } else { 2 };
        let contact = words(&[14, 0, version, 0, target, 0, 0xa000, 0, 0xb000, 0]);
        self.send_message(if version < 0x5_0000 { 1 } else { 4 }, &contact);
        assert_eq!(self.expect_message(15)[8], 1, "version {version:#x}");
        self.send_message(1, &words(&[3, 0, 0, 0, 0, 0, 0, 0]));
        let mut offers = Vec::new();
        loop {
            let message = self.take_message(0).expect("an offer, or the end of them");
            self.machine.workers.settle();
            if word(&message, 0) == 4 {
                break;
            }
            let channel = Channel {
                relid: word(&message, 184),
                connection: word(&message, 192),
            };
            offers.push((message[24..40].to_vec(), channel));
        }
        let of = |bus: &Plugged| {
            let instance = bus.instance.to_bytes_le();
            let offer = offers.iter().find(|(guid, _)| *guid == instance);
            offer.expect("an offer of each bus").1
        };
        self.channels = self.machine.buses.iter().map(of).collect();
        assert_eq!(self.channels.len(), offers.len());
    }

    /// Opens the channel of a bus.
    pub fn open(&mut self, bus: usize) {
        let relid = self.channels[bus].relid;
        let rings = Self::rings(bus);
        let gpadl = 0xe1e10 + bus as u32;
        let pages = 2 * RING_PAGES;
        let range = (8 + pages * 8) as u32;
        let mut header = words(&[8, 0, relid, gpadl, 1 << 16 | range, pages as u32 * 4096, 0]);
        for page in 0..pages {
            header.extend((rings[0].control() / 4096 + page).to_le_bytes());
        }
        self.send_message(1, &header);
        assert_eq!(word(&self.expect_message(10), 16), 0);
        for ring in rings {
            ring.set_up(self.ram());
        }
        let mut open = words(&[5, 0, relid, 7, gpadl, 0, RING_PAGES as u32]);
        open.resize(148, 0);
        self.send_message(1, &open);
        assert_eq!(word(&self.expect_message(6), 16), 0);
    }

    /// Sends a request to a bus and returns the completion's payload.
    fn request(&mut self, bus: usize, payload: &[u8]) -> Vec<u8> {
        let [out, inbound] = Self::rings(bus);
        self.transaction += 1;
        let len8 = 2 + payload.len().div_ceil(8) as u16;
        out.send(self.ram(), [6, 2, len8, 1], self.transaction, payload);
        assert_eq!(self.signal(self.channels[bus].connection, 0), Some(0));
        self.machine.workers.settle();
        while let Some((kind, payload)) = inbound.receive(self.ram()) {
            if kind == 0xb {
                return payload;
            }
        }
        panic!("no completion");
    }

    fn must(&mut self, bus: usize, payload: &[u8]) -> Vec<u8> {
        let reply = self.request(bus, payload);
        assert_eq!(word(&reply, 0), 0, "{payload:x?}");
        reply
    }

    /// GPA of a bus's config window.
    pub fn window(bus: usize) -> u64 {
        LOW_MMIO.start + bus as u64 * 0x2000
    }

    /// GPA of BAR 0 of a function.
    pub fn bar(bus: usize, function: u8) -> u64 {
        BAR + (bus as u64 * 8 + u64::from(function)) * BAR_STRIDE
    }

    /// Version, D0, resources; every function placed, switched on, and with a message for MSI-X
    /// vector 0.
    pub fn probe(&mut self, bus: usize, version: u32) {
        self.must(bus, &words(&[0x4249_0013, version]));
        let window = Self::window(bus);
        let d0 = [0x4249_0007, 0, window as u32, (window >> 32) as u32];
        self.must(bus, &words(&d0));
        for function in self.machine.buses[bus].functions.clone() {
            self.start(bus, &function, version);
        }
    }

    fn start(&mut self, bus: usize, function: &Function, version: u32) {
        let slot = u32::from(function.number) << 5;
        let number = match version {
            0x1_0001 => 0x4249_0010,
            0x1_0004 => 0x4249_001a,
            _ => 0x4249_0016,
        };
        let mut assigned = words(&[number, slot]);
        assigned.resize(200, 0);
        self.must(bus, &assigned);
        self.place(bus, function.number);
        let bar = Self::bar(bus, function.number);
        let mut magic = [0; 4];
        assert!(self.machine.partition.mmio_read(bar, &mut magic));
        if let Device::Test = function.device {
            assert_eq!(u32::from_le_bytes(magic), 0x5654_5044);
        }
        let create = match version {
            0x1_0001 => words(&[0x4249_0014, slot, 1 << 16 | 0x41, 0, 1, 0]),
            0x1_0004 => words(&[0x4249_001b, slot, 0x41, 1 << 16, 1]),
            _ => words(&[0x4249_0017, slot, 1 << 16 | 0x41, 1, 0]),
        };
        let mut create = create;
        match version {
            0x1_0001 => {}
            0x1_0004 => create.resize(84, 0),
            _ => create.resize(80, 0),
        }
        let reply = self.must(bus, &create);
        let (data, address) = (word(&reply, 12), word(&reply, 16));
        let window = Self::window(bus);
        let capability = self.capability(window, 0x11);
        let table = bar + u64::from(self.config(window, capability + 4) & !7);
        for (at, value) in (0..).step_by(4).zip([address, 0, data, 0]) {
            self.store(table + at, &value.to_le_bytes());
        }
        self.store(window + 0x1000 + capability + 2, &0x8000u16.to_le_bytes());
    }

    /// Places a function's BAR 0, with decoding and bus mastering on. The function stays selected.
    pub fn place(&self, bus: usize, function: u8) {
        let (window, bar) = (Self::window(bus), Self::bar(bus, function));
        self.select(bus, function);
        self.store(window + 0x1004, &0u16.to_le_bytes());
        self.store(window + 0x1010, &(bar as u32).to_le_bytes());
        self.store(window + 0x1014, &((bar >> 32) as u32).to_le_bytes());
        self.set_command(bus, function, 6);
    }

    /// Sets a function's command register. The function stays selected.
    pub fn set_command(&self, bus: usize, function: u8, command: u16) {
        self.select(bus, function);
        self.store(Self::window(bus) + 0x1004, &command.to_le_bytes());
    }

    fn select(&self, bus: usize, function: u8) {
        let slot = u32::from(function) << 5;
        self.store(Self::window(bus), &slot.to_le_bytes());
    }

    /// A word of the configuration space of the function that is selected.
    fn config(&self, window: u64, at: u64) -> u32 {
        let mut data = [0; 4];
        let partition = &self.machine.partition;
        assert!(partition.mmio_read(window + 0x1000 + at, &mut data));
        u32::from_le_bytes(data)
    }

    fn capability(&self, window: u64, wanted: u32) -> u64 {
        let mut at = u64::from(self.config(window, 0x34) & 0xff);
        while self.config(window, at) & 0xff != wanted {
            at = u64::from(self.config(window, at) >> 8 & 0xff);
            assert_ne!(at, 0, "no capability {wanted:#x}");
        }
        at
    }

    /// A store to a window or BAR that is there.
    pub fn store(&self, gpa: u64, data: &[u8]) {
        assert!(self.machine.partition.mmio_write(gpa, data), "{gpa:#x}");
    }

    /// Everything, with the newest versions.
    pub fn bring_up(&mut self) {
        self.boot();
        self.connect(0x6_0000);
        for bus in 0..self.machine.buses.len().min(2) {
            self.open(bus);
            self.probe(bus, 0x1_0004);
        }
    }

    /// The machine as plain data.
    ///
    /// # Panics
    ///
    /// If it has a function whose state is in hardware: none does.
    pub fn save(&self) -> PartitionState {
        let state = self.machine.partition.save();
        state.expect("all functions are emulated")
    }

    /// Saves the machine and goes on with another, made of what was saved over the same RAM.
    ///
    /// # Panics
    ///
    /// If what was saved is not taken, or is not the same when it is saved again.
    pub fn migrate(&mut self) {
        let state = self.save();
        assert!(self.replace(&state), "refused as it was saved: {state:#x?}");
        assert_eq!(self.save(), state);
    }

    /// Goes on with another machine over the same RAM, made of a state that was saved, if it is
    /// taken; otherwise with a machine that has just been reset. True if it is taken.
    pub fn replace(&mut self, state: &PartitionState) -> bool {
        let empty = Machine::new(crate::machine::ram());
        self.machine = std::mem::replace(&mut self.machine, empty).replaced();
        self.machine.partition.restore(state).is_ok()
    }

    /// Resets the machine, and brings everything up again.
    pub fn reset(&mut self) {
        self.machine.workers.settle();
        self.machine.partition.reset();
        self.machine.workers.settle();
        // RAM of zeros, as many VMMs do it: by another map.
        self.ram().replace(&map());
        self.bring_up();
    }

    /// After anything at all, a reset machine works again, and leaves nothing behind in the end.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub fn starts_again(mut self) {
        self.reset();
        self.machine.drop_all();
    }
}

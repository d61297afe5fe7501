//! A VP that means harm.
#![forbid(unsafe_code)]

mod calls;

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::dice::Dice;
use super::operator::BUSES;
use crate::bed::BedKind;
use crate::check::{Failure, Verdict};
use crate::guest::Call;
use crate::host::{HIGH_MMIO, LOW_MMIO};
use crate::model::kernel::{LINUX_ID, msr, post_input};
use crate::model::vm::{PAGE, Vm};
use crate::model::vpci::{Create, message as request};
use crate::model::wire::Bytes;

/// Pages that the guest names to the host.
pub(super) const PAGES: u64 = 256;
/// In the arena, by page: message and event flags pages, rings, tables, data.
const SYNIC: u64 = 0;
const RINGS: u64 = 16;
const TABLES: u64 = 128;
const DATA: u64 = 160;
/// Pages of a ring, and of the rings of a channel.
const RING_PAGES: u64 = 3;
const CHANNEL_PAGES: u64 = 2 * RING_PAGES;
/// Bytes of a ring's data area.
const RING: u32 = (RING_PAGES as u32 - 1) * PAGE as u32;
/// Vectors: none that the guest's own code uses.
const VECTORS: std::ops::Range<u64> = 0x40..0xf0;
/// Distance between two BARs.
const BAR_STRIDE: u64 = 0x1_0000;

#[derive(Debug)]
pub(super) struct Attacker {
    vm: Vm,
    vp: u32,
    arena: u64,
    /// Hypercall page, and the page for input; they are not in the arena.
    page: u64,
    input: u64,
    dice: Dice,
}

impl Attacker {
    pub(super) fn new(vm: &Vm, vp: u32, arena: u64, seed: u64) -> Result<Self, Failure> {
        // Where the kernel before had it.
        let page = vm.rdmsr(vp, msr::HYPERCALL)? & !0xfff;
        Ok(Self {
            vm: vm.clone(),
            vp,
            arena,
            page,
            input: vm.pages(2)?,
            dice: Dice::new(seed),
        })
    }

    /// Does one thing.
    ///
    /// # Errors
    ///
    /// [`Failure`]; an exception is one as well.
    pub(super) fn step(&mut self) -> Verdict {
        match self.dice.below(1024) {
            0..3 => self.revive(),
            3..23 => {
                let relid = self.relid();
                self.bring_up(relid)
            }
            23..55 => self.message(),
            55..75 => self.msr(),
            75..255 => self.request(),
            255..315 => self.ring_word(),
            315..480 => self.config(),
            480..640 => self.bar(),
            640..720 => self.retarget(),
            720..840 => self.domains(),
            840..900 => self.table(),
            900..940 => self.take(),
            940..1000 => {
                let relid = self.relid();
                self.signal(relid)
            }
            _ => self.any_call(),
        }
    }

    fn at(&self, page: u64) -> u64 {
        self.arena + page * PAGE
    }

    /// One of the `count` pages from `first` on.
    fn one_of(&mut self, first: u64, count: u64) -> u64 {
        let page = self.dice.below(count);
        self.at(first + page)
    }

    fn relid(&mut self) -> u32 {
        match self.dice.once_in(32) {
            true => self.dice.roll() as u32,
            // The guest knows well which ids the host gives.
            false => 1 + self.dice.below(BUSES) as u32,
        }
    }

    fn vector(&mut self) -> u8 {
        (VECTORS.start + self.dice.below(VECTORS.end - VECTORS.start)) as u8
    }

    fn ring(&self, relid: u32, inbound: bool) -> u64 {
        let channel = RINGS + u64::from(relid % 8) * CHANNEL_PAGES;
        self.at(channel + u64::from(inbound) * RING_PAGES)
    }

    fn window(relid: u32) -> u64 {
        LOW_MMIO + u64::from(relid % 8) * 0x2000
    }

    fn bar_at(relid: u32, function: u64) -> u64 {
        HIGH_MMIO + (u64::from(relid % 8) * 2 + function % 2) * BAR_STRIDE
    }

    /// A page of data, or now and then one of the others that the guest has named.
    fn gpa(&mut self) -> u64 {
        match self.dice.once_in(4) {
            true => self.arena + self.dice.below(PAGES * PAGE),
            false => self.at(DATA) + self.dice.below((PAGES - DATA) * PAGE) / 8 * 8,
        }
    }

    fn device(&mut self) -> u64 {
        (1 + self.dice.below(BUSES)) << 16 | 0xab78 | self.dice.below(2)
    }

    fn call(&mut self, control: u64, input: &[u8]) -> Verdict {
        self.vm.write(self.input, input)?;
        self.registers(control, self.input, self.input + PAGE)
    }

    fn registers(&mut self, control: u64, rdx: u64, r8: u64) -> Verdict {
        let call = Call {
            entry: self.page,
            control,
            rdx,
            r8,
            ..Call::default()
        };
        Ok(self.vm.hypercall(self.vp, &call).map(drop)?)
    }

    fn signal(&mut self, relid: u32) -> Verdict {
        let flag = u64::from(self.dice.once_in(16));
        self.registers(0x1_005d, u64::from(0x2000 | relid) | flag << 32, 0)
    }

    fn post(&mut self, connection: u32, message: &Bytes) -> Verdict {
        let input = post_input(connection, 1, &message.0);
        self.call(0x5c, &input.0)
    }

    /// What a kernel does at boot, up to the buses, whether or not it works.
    fn revive(&mut self) -> Verdict {
        let (vm, vp) = (self.vm.clone(), self.vp);
        vm.wrmsr(vp, msr::GUEST_OS_ID, LINUX_ID)?;
        vm.wrmsr(vp, msr::HYPERCALL, self.page | 1)?;
        for vp in 0..2 {
            let page = self.at(SYNIC + u64::from(vp) * 2);
            vm.wrmsr(vp, msr::SIMP, page | 1)?;
            vm.wrmsr(vp, msr::SIEFP, (page + PAGE) | 1)?;
            vm.wrmsr(vp, msr::SINT0 + 2, self.vector().into())?;
            vm.wrmsr(vp, msr::SCONTROL, 1)?;
        }
        let version = self.dice.pick(&[0x6_0000, 0x5_0003, 0x5_0000]);
        self.post(4, &Bytes::words(&[14, 0, version, vp, 2, 0, 0, 0, 0, 0]))?;
        self.wait(2)?;
        self.post(1, &Bytes::words(&[3, 0]))?;
        self.wait(8)?;
        for relid in 1..=BUSES as u32 {
            self.bring_up(relid)?;
        }
        Ok(())
    }

    /// Gives the host time for some steps, and takes its messages.
    fn wait(&mut self, steps: u32) -> Verdict {
        for _ in 0..steps {
            if self.vm.bed() == BedKind::Kvm {
                thread::yield_now();
            }
            self.vm.step();
            self.take()?;
        }
        Ok(())
    }

    /// What a driver does to bring a bus into use, whether or not it works.
    fn bring_up(&mut self, relid: u32) -> Verdict {
        if self.dice.once_in(2) {
            self.post(1, &Bytes::words(&[7, 0, relid]))?;
            self.post(1, &Bytes::words(&[11, 0, relid, relid]))?;
            self.wait(3)?;
        }
        self.gpadl(relid, relid)?;
        self.wait(2)?;
        self.open(relid, relid)?;
        self.wait(4)?;
        let window = Self::window(relid);
        let version = self.dice.pick(&[0x1_0004, 0x1_0003, 0x1_0001]);
        let query = [request::QUERY_PROTOCOL_VERSION, version];
        self.send(relid, &Bytes::words(&query))?;
        let d0 = [
            request::BUS_D0ENTRY,
            0,
            window as u32,
            (window >> 32) as u32,
        ];
        self.send(relid, &Bytes::words(&d0))?;
        self.wait(4)?;
        for function in 0..2 {
            let assigned = Bytes::words(&[request::RESOURCES_ASSIGNED2, function << 5]);
            self.send(relid, &assigned.up_to(202))?;
            let vp = self.dice.below(2) as u16;
            let create = Create::one(function << 5, self.vector(), vp);
            self.send(relid, &create.encode(version))?;
            self.wait(3)?;
            self.place(relid, function.into())?;
            let table = Self::bar_at(relid, function.into()) + 0x1000;
            for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0), (12, 0)] {
                self.vm.store(self.vp, table + at, 4, value)?;
            }
        }
        Ok(())
    }

    fn place(&mut self, relid: u32, function: u64) -> Verdict {
        let (vm, vp, window) = (self.vm.clone(), self.vp, Self::window(relid));
        let bar = Self::bar_at(relid, function);
        vm.store(vp, window, 4, function << 5)?;
        vm.store(vp, window + 0x1004, 2, 0)?;
        vm.store(vp, window + 0x1010, 4, bar & 0xffff_ffff)?;
        vm.store(vp, window + 0x1014, 4, bar >> 32)?;
        vm.store(vp, window + 0x1004, 2, 6)?;
        // MSI-X on.
        Ok(vm.store(vp, window + 0x1040, 4, 0x8000_0000)?)
    }

    fn gpadl(&mut self, relid: u32, gpadl: u32) -> Verdict {
        for inbound in [false, true] {
            let ring = self.ring(relid, inbound);
            self.vm.ram().fill(ring, PAGE, 0)?;
            self.vm.ram().store_u32(ring + 64, 1, Ordering::Release)?;
        }
        let bytes = CHANNEL_PAGES as u32 * PAGE as u32;
        let mut header = Bytes::words(&[8, 0, relid, gpadl, 1 << 16 | 56, bytes, 0]);
        let first = self.ring(relid, false) / PAGE;
        for page in first..first + CHANNEL_PAGES {
            header = header.u64(page);
        }
        self.post(1, &header)
    }

    fn open(&mut self, relid: u32, gpadl: u32) -> Verdict {
        let open = [5, 0, relid, 7, gpadl, self.vp, RING_PAGES as u32];
        self.post(1, &Bytes::words(&open).up_to(148))
    }

    fn message(&mut self) -> Verdict {
        let (relid, gpadl) = (self.relid(), self.relid());
        let vp = self.dice.pick(&[0, 1, 1, u32::MAX]);
        match self.dice.below(24) {
            0 if self.dice.once_in(4) => self.post(1, &Bytes::words(&[16, 0])),
            1 if self.dice.once_in(4) => self.post(
                4,
                &Bytes::words(&[14, 0, 0x5_0003, self.vp, 2, 0, 0, 0, 0, 0]),
            ),
            0..4 => self.post(1, &Bytes::words(&[3, 0])),
            4..8 => self.gpadl(relid, gpadl),
            8..12 => self.open(relid, gpadl),
            12..14 => self.post(1, &Bytes::words(&[7, 0, relid])),
            14..16 => self.post(1, &Bytes::words(&[11, 0, relid, gpadl])),
            16..19 => self.post(1, &Bytes::words(&[13, 0, relid])),
            19..21 => self.post(1, &Bytes::words(&[22, 0, relid, vp])),
            21 => {
                // A list that is announced and does not come, or comes alone.
                let header = [8, 0, relid, gpadl, 1 << 16 | 0x808, 0x10_0000, 0];
                self.post(1, &Bytes::words(&header).u64(self.at(DATA) / PAGE))
            }
            22 => {
                let body = Bytes::words(&[9, 0, 0, gpadl]);
                let page = self.dice.roll();
                self.post(1, &body.u64(page))
            }
            _ => {
                let words = [self.dice.below(32) as u32, 0, self.dice.roll() as u32];
                self.post(1, &Bytes::words(&words))
            }
        }
    }

    fn msr(&mut self) -> Verdict {
        let page = self.one_of(SYNIC, 16);
        let on = u64::from(!self.dice.once_in(8));
        let sint = self.dice.below(16) as u32;
        let (msr, value) = match self.dice.below(24) {
            0 => (msr::SIMP, page | on),
            1 => (msr::SIEFP, page | on),
            2 => (msr::SCONTROL, on),
            3 => (msr::SINT0 + 2, (1 - on) << 16 | u64::from(self.vector())),
            4 => (
                msr::SINT0 + sint,
                self.dice.pick(&[0x1_0000, 0, 0x50, 0x2_0060]),
            ),
            5 => (msr::HYPERCALL, self.page | on),
            6 if self.dice.once_in(4) => (msr::GUEST_OS_ID, 0),
            7 => (msr::GUEST_OS_ID, LINUX_ID),
            8 => (msr::VP_ASSIST_PAGE, page | on),
            9 => (msr::REFERENCE_TSC, page | on),
            10 => {
                let known = 0x4000_0000 + self.dice.below(0x120) as u32;
                return Ok(self.vm.rdmsr(self.vp, known).map(drop)?);
            }
            _ => (msr::EOM, 0),
        };
        Ok(self.vm.wrmsr(self.vp, msr, value)?)
    }

    /// Puts a packet on a ring, wherever its index is, and signals.
    fn send(&mut self, relid: u32, payload: &Bytes) -> Verdict {
        let ring = self.ring(relid, false);
        let len = payload.0.len().next_multiple_of(8);
        let write = self.vm.ram().load_u32(ring, Ordering::Acquire)? % RING / 8 * 8;
        let len8 = 2 + (len / 8) as u16;
        let packet = Bytes::new().u16(6).u16(2).u16(len8).u16(1);
        let packet = packet.u64(self.dice.below(64)).bytes(&payload.0);
        let packet = packet.up_to(16 + len).u64(u64::from(write) << 32).0;
        for (at, word) in (write..).step_by(8).zip(packet.chunks_exact(8)) {
            self.vm.write(ring + PAGE + u64::from(at % RING), word)?;
        }
        let next = (write + packet.len() as u32) % RING;
        self.vm.ram().store_u32(ring, next, Ordering::Release)?;
        self.signal(relid)
    }

    fn request(&mut self) -> Verdict {
        let relid = self.relid();
        let slot = self.dice.below(3) as u32 * 0x20;
        let window = Self::window(relid);
        let create = Create {
            count: self.dice.pick(&[1, 1, 2, 4, 40]),
            ..Create::one(slot, self.vector(), self.dice.below(2) as u16)
        };
        let payload = match self.dice.below(24) {
            0 if self.dice.once_in(4) => Bytes::words(&[request::BUS_D0EXIT]),
            0..4 => Bytes::words(&[request::BUS_D0ENTRY, 0, window as u32, 0]),
            4 => Bytes::words(&[request::QUERY_PROTOCOL_VERSION, 0x1_0004]),
            5 => Bytes::words(&[request::RESOURCES_RELEASED, slot]),
            6 => Bytes::words(&[request::EJECTION_COMPLETE, slot]),
            7 => Bytes::words(&[request::RESOURCES_ASSIGNED2, slot]).up_to(202),
            8 => Bytes::words(&[request::POWER_STATE_CHANGE, slot, 1]),
            9..11 => Bytes::words(&[request::QUERY_BUS_RELATIONS]),
            11..13 => Bytes::words(&[request::QUERY_RESOURCE_REQUIREMENTS, slot]),
            13..16 => {
                let data = self.dice.below(8) as u32;
                Bytes::words(&[
                    request::DELETE_INTERRUPT,
                    slot,
                    1 << 16,
                    data,
                    0xfee0_0000,
                    0,
                ])
            }
            16 => {
                let number = request::BASE + self.dice.below(32) as u32;
                Bytes::words(&[number, self.dice.roll() as u32, self.dice.roll() as u32])
            }
            _ => {
                let version = self.dice.pick(&[0x1_0004, 0x1_0003, 0x1_0001]);
                create.encode(version)
            }
        };
        self.send(relid, &payload)
    }

    fn ring_word(&mut self) -> Verdict {
        let relid = self.relid();
        let inbound = self.dice.once_in(2);
        let ring = self.ring(relid, inbound);
        let ram = self.vm.ram().clone();
        if inbound && !self.dice.once_in(32) {
            // Takes all that is there, as a driver does.
            let write = ram.load_u32(ring, Ordering::Acquire)?;
            return Ok(ram.store_u32(ring + 4, write, Ordering::Release)?);
        }
        if !self.dice.once_in(32) {
            return self.signal(relid);
        }
        let word = self.dice.pick(&[0, 4, 8, 12, 64]);
        let value = match self.dice.once_in(4) {
            true => self.dice.roll() as u32,
            false => self.dice.below(u64::from(RING)) as u32 / 8 * 8,
        };
        Ok(ram.store_u32(ring + word, value, Ordering::Release)?)
    }

    fn config(&mut self) -> Verdict {
        let relid = self.relid();
        let (vm, vp, window) = (self.vm.clone(), self.vp, Self::window(relid));
        let offset = self.dice.below(0x100);
        match self.dice.below(12) {
            0 => self.place(relid, self.vp.into()),
            1 => Ok(vm.store(vp, window, 4, self.dice.below(3) << 5)?),
            2 => Ok(vm.store(vp, window + 0x1004, 2, self.dice.pick(&[0, 2, 4, 6]))?),
            // MSI-X control among others.
            3 => {
                let value = self.dice.pick(&[0, 0x8000, 0xc000]) << 16;
                Ok(vm.store(vp, window + 0x1000 + 0x40, 4, value)?)
            }
            4 => {
                let value = self.dice.roll();
                Ok(vm.store(vp, window + 0x1000 + offset / 4 * 4, 4, value)?)
            }
            _ => {
                let width = self.dice.pick(&[1, 2, 4]);
                let at = window + 0x1000 + offset / 4 * 4;
                Ok(vm.load(vp, at, width).map(drop)?)
            }
        }
    }

    fn bar(&mut self) -> Verdict {
        let (relid, function) = (self.relid(), self.dice.below(2));
        let (vm, vp) = (self.vm.clone(), self.vp);
        let bar = Self::bar_at(relid, function);
        match self.dice.below(8) {
            0..2 => {
                let entry = bar + 0x1000 + self.dice.below(8) * 16;
                vm.store(vp, entry, 4, 0xfee0_0000)?;
                vm.store(vp, entry + 4, 4, 0)?;
                vm.store(vp, entry + 8, 4, self.dice.below(4))?;
                Ok(vm.store(vp, entry + 12, 4, self.dice.below(2))?)
            }
            2..4 => Ok(vm.store(vp, bar + 0x60, 4, self.dice.below(8))?),
            4..6 => {
                // Addresses of the guest's own: what its DMA does to its code is its own affair.
                let (from, to) = (self.gpa(), self.gpa());
                let most = self.arena + PAGES * PAGE - from.max(to);
                vm.store(vp, bar + 0x10, 8, from)?;
                vm.store(vp, bar + 0x18, 8, to)?;
                vm.store(vp, bar + 0x20, 4, self.dice.below(most.min(0x8000)))?;
                vm.store(vp, bar + 0x24, 4, self.dice.pick(&[0, 1, 7, 0xffff_ffff]))?;
                Ok(vm.store(vp, bar + 0x30, 4, self.dice.below(4))?)
            }
            _ => {
                let width = self.dice.pick(&[4, 8]);
                let at = bar + self.dice.below(0x4000) / 8 * 8;
                Ok(vm.load(vp, at, width).map(drop)?)
            }
        }
    }

    /// Takes the message of this VP, and now and then its interrupts.
    fn take(&mut self) -> Verdict {
        let slot = self.at(SYNIC + u64::from(self.vp) * 2) + 0x200;
        self.vm.ram().store_u32(slot, 0, Ordering::SeqCst)?;
        self.vm.wrmsr(self.vp, msr::EOM, 0)?;
        if self.dice.once_in(16) {
            // All that wait; on a bed where interrupts take time, those that are there.
            self.vm.drain_interrupts(self.vp, Duration::ZERO)?;
        }
        Ok(())
    }
}

use super::*;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::GuestAddress;

use crate::hv::synic::Sint;
use crate::mem::{PAGE_SIZE, RamMap};
use crate::vmm::Msi;

mod model;
mod stress;

pub(super) const SIMP_PAGE: u64 = 0x2000;
pub(super) const SIEFP_PAGE: u64 = 0x3000;
const SLOT2: u64 = SIMP_PAGE + 0x200;
const FLAGS2: u64 = SIEFP_PAGE + 0x200;
pub(super) const RAM_SIZE: usize = 0x6000;
const SINT2: u32 = msr::SINT0 + 2;

#[derive(Debug, Default)]
pub(super) struct Recorder(Mutex<Vec<Msi>>);

impl MsiSink for Recorder {
    fn raise_msi(&self, msi: Msi) {
        lock(&self.0).push(msi);
    }
}

impl Recorder {
    pub(super) fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut *lock(&self.0))
    }
}

#[derive(Debug, Default)]
struct Counter(AtomicU32);

impl Trigger for Counter {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// The SynIC of the host's kernel, as docs/spec/kvm.md, section 7.2, tells of it: it raises the vector
/// that its own copy of a SINT holds, and what comes while that is masked is lost.
#[derive(Debug)]
pub(super) struct Kernel {
    registers: Mutex<BTreeMap<(u32, u32), u64>>,
    sink: Arc<Recorder>,
    pub(super) raised: AtomicU32,
    pub(super) lost: AtomicU32,
}

impl Kernel {
    pub(super) fn new(sink: Arc<Recorder>) -> Arc<Self> {
        Arc::new(Self {
            registers: Mutex::default(),
            sink,
            raised: AtomicU32::default(),
            lost: AtomicU32::default(),
        })
    }

    pub(super) fn take(&self, vp: u32, msr: u32, value: u64) {
        lock(&self.registers).insert((vp, msr), value);
    }

    /// What a guest reads that the kernel answers.
    fn read(&self, vp: u32, msr: u32) -> Option<u64> {
        lock(&self.registers).get(&(vp, msr)).copied()
    }
}

impl SintLines for Kernel {
    fn raise(&self, vp: u32, sint: u8) -> bool {
        if sint != 2 {
            return false;
        }
        let source = Sint(self.read(vp, SINT2).expect("the kernel knows every SINT"));
        if source.is_masked() {
            self.lost.fetch_add(1, Ordering::SeqCst);
        } else {
            self.raised.fetch_add(1, Ordering::SeqCst);
            self.sink.raise_msi(Msi::fixed(vp * 2, source.vector()));
        }
        true
    }
}

pub(super) struct Bed {
    pub(super) ram: GuestRam,
    pub(super) sink: Arc<Recorder>,
    pub(super) synic: UserSynic,
}

impl Bed {
    pub(super) fn new(vps: u32, queue_limit: usize) -> Self {
        let map = RamMap::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("test RAM");
        Self::over(GuestRam::new(&map), vps, queue_limit)
    }

    fn over(ram: GuestRam, vps: u32, queue_limit: usize) -> Self {
        let sink = Arc::new(Recorder::default());
        let config = SynicConfig {
            apic_ids: (0..vps).map(|vp| vp * 2).collect(),
            queue_limit,
        };
        let synic = UserSynic::new(&config, ram.clone(), sink.clone());
        Self { ram, sink, synic }
    }

    /// What Linux programs on a CPU, in its order.
    fn linux(vps: u32, queue_limit: usize) -> Self {
        let bed = Self::new(vps, queue_limit);
        bed.write(0, msr::SIMP, SIMP_PAGE | 1);
        bed.write(0, msr::SIEFP, SIEFP_PAGE | 1);
        bed.write(0, SINT2, 0xf3);
        bed.write(0, msr::SCONTROL, 1);
        bed
    }

    fn write(&self, vp: u32, msr: u32, value: u64) {
        assert_eq!(self.synic.write_msr(vp, msr, value), Ok(()));
        assert_eq!(self.synic.read_msr(vp, msr), Ok(value));
    }

    fn eom(&self) {
        assert_eq!(self.synic.write_msr(0, msr::EOM, 0), Ok(()));
    }

    fn post(&self, payload: &[u8]) {
        assert_eq!(self.synic.post_message(0, 2, 1, payload), Ok(()));
    }

    /// The message in slot 2: type, flags, payload.
    fn slot(&self) -> (u32, u8, Vec<u8>) {
        let mut slot = [0; 256];
        self.ram.read(SLOT2, &mut slot).unwrap();
        let message_type = u32::from_le_bytes(slot[..4].try_into().unwrap());
        let len = usize::from(slot[4]);
        (message_type, slot[5], slot[16..16 + len].to_vec())
    }

    /// Takes the message out of slot 2 as Linux does; true if the guest must write EOM.
    fn consume(&self) -> bool {
        self.ram.store_u32(SLOT2, 0, Ordering::SeqCst).unwrap();
        self.slot().1 & 1 != 0
    }

    pub(super) fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; RAM_SIZE];
        self.ram.read(0, &mut bytes).unwrap();
        bytes
    }
}

#[test]
fn registers_have_their_reset_values() {
    let bed = Bed::new(1, 4);
    for (msr, value) in [
        (msr::SCONTROL, 0),
        (msr::SVERSION, 1),
        (msr::SIEFP, 0),
        (msr::SIMP, 0),
        (msr::EOM, 0),
        (msr::SINT0, 0x1_0000),
        (msr::SINT15, 0x1_0000),
    ] {
        assert_eq!(bed.synic.read_msr(0, msr), Ok(value), "{msr:#x}");
        assert!(UserSynic::owns_msr(msr));
    }
    for msr in [0x4000_007f, 0x4000_0085, 0x4000_008f, 0x4000_00a0] {
        assert!(!UserSynic::owns_msr(msr));
        assert_eq!(bed.synic.read_msr(0, msr), Err(GpFault));
        assert_eq!(bed.synic.write_msr(0, msr, 0), Err(GpFault));
    }
    assert_eq!(bed.synic.read_msr(1, msr::SCONTROL), Err(GpFault));
    assert_eq!(bed.synic.write_msr(1, msr::SCONTROL, 1), Err(GpFault));
}

#[test]
fn bad_register_values_fault_and_change_nothing() {
    let bed = Bed::linux(1, 4);
    bed.post(b"one");
    let (memory, state) = (bed.memory(), bed.synic.save());
    for (msr, value) in [
        (msr::SVERSION, 1),
        (msr::SIMP, RAM_SIZE as u64 | 1),
        (msr::SIEFP, !0),
        (SINT2, 0xf),
        (SINT2, 0),
    ] {
        assert_eq!(bed.synic.write_msr(0, msr, value), Err(GpFault));
    }
    assert_eq!(bed.memory(), memory);
    assert_eq!(bed.synic.save(), state);
}

#[test]
fn reserved_bits_are_preserved_and_a_masked_low_vector_is_accepted() {
    let bed = Bed::new(1, 4);
    bed.write(0, SINT2, !0xff & !(1 << 16) | 0xf3);
    bed.write(0, SINT2, 1 << 16 | 3);
    bed.write(0, msr::SCONTROL, !0);
    bed.write(0, msr::SIMP, SIMP_PAGE | 0xfff);
    // A disabled page may lie anywhere.
    bed.write(0, msr::SIEFP, !1);
}

#[test]
fn a_page_in_read_only_ram_is_as_one_outside_ram() {
    let rom = 0x6000;
    let map = crate::mem::testing::with_rom(rom, &[7; 0x1000]);
    let bed = Bed::over(GuestRam::new(&map), 1, 2);
    for register in [msr::SIMP, msr::SIEFP] {
        assert_eq!(bed.synic.write_msr(0, register, rom | 1), Err(GpFault));
        assert_eq!(bed.synic.read_msr(0, register), Ok(0));
    }
}

#[test]
fn enabling_or_moving_a_page_zeroes_it_and_writing_it_again_does_not() {
    let bed = Bed::new(1, 4);
    bed.ram.fill(0, RAM_SIZE as u64, 0xaa).unwrap();
    let zero_at = |gpa| {
        let mut page = [0; PAGE_SIZE as usize];
        bed.ram.read(gpa, &mut page).unwrap();
        page.iter().all(|byte| *byte == 0)
    };
    for msr in [msr::SIMP, msr::SIEFP] {
        bed.write(0, msr, 0x1001);
        assert!(zero_at(0x1000));
        bed.write(0, msr, 0x4001);
        assert!(zero_at(0x4000));
        bed.ram.fill(0x4000, PAGE_SIZE, 0xaa).unwrap();
        bed.write(0, msr, 0x4003);
        assert!(!zero_at(0x4000));
        bed.write(0, msr, 0x4000);
        assert!(!zero_at(0x4000));
        bed.write(0, msr, 0x4001);
        assert!(zero_at(0x4000));
        bed.ram.fill(0, RAM_SIZE as u64, 0xaa).unwrap();
    }
}

#[test]
fn a_message_reaches_its_slot_and_raises_its_vector() {
    let bed = Bed::linux(2, 4);
    bed.post(b"hello");
    assert_eq!(bed.slot(), (1, 0, b"hello".to_vec()));
    assert_eq!(bed.sink.take(), [Msi::fixed(0, 0xf3)]);
}

#[test]
fn messages_queue_behind_an_occupied_slot_in_order() {
    let bed = Bed::linux(1, 4);
    for payload in [b"1", b"2", b"3"] {
        bed.post(payload);
    }
    assert_eq!(bed.slot(), (1, 1, b"1".to_vec()));
    assert_eq!(bed.sink.take().len(), 1);
    // A stray EOM delivers nothing while the slot is occupied.
    bed.eom();
    assert_eq!(bed.slot(), (1, 1, b"1".to_vec()));
    assert!(bed.consume());
    bed.eom();
    assert_eq!(bed.slot(), (1, 1, b"2".to_vec()));
    assert_eq!(bed.sink.take().len(), 1);
    // Freed without EOM: the next message pushes the queue.
    bed.consume();
    bed.post(b"4");
    assert_eq!(bed.slot(), (1, 1, b"3".to_vec()));
    assert!(bed.consume());
    bed.eom();
    assert_eq!(bed.slot(), (1, 0, b"4".to_vec()));
    assert!(!bed.consume());
    let counters = bed.synic.counters();
    assert_eq!((counters.posted, counters.delivered), (4, 4));
}

#[test]
fn a_shorter_message_leaves_nothing_of_the_longer_before_it() {
    let bed = Bed::linux(1, 4);
    bed.post(&[0xff; 240]);
    bed.consume();
    bed.post(&[1]);
    let mut payload = [0; 240];
    bed.ram.read(SLOT2 + 16, &mut payload).unwrap();
    assert_eq!(payload[0], 1);
    assert!(payload[1..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_full_queue_refuses_and_triggers_once_when_it_drains() {
    let bed = Bed::linux(1, 2);
    let trigger = Arc::new(Counter::default());
    bed.synic.set_drain_trigger(trigger.clone());
    for payload in [b"1", b"2", b"3"] {
        bed.post(payload);
    }
    let full = Err(SynicError::QueueFull { vp: 0 });
    assert_eq!(bed.synic.post_message(0, 2, 1, b"4"), full);
    assert_eq!(bed.synic.post_message(0, 2, 1, b"5"), full);
    assert_eq!(trigger.0.load(Ordering::SeqCst), 0);
    for _ in 0..3 {
        bed.consume();
        bed.eom();
    }
    assert_eq!(trigger.0.load(Ordering::SeqCst), 1);
    assert_eq!(bed.synic.counters().queue_full, 2);
}

#[test]
fn messages_wait_for_the_synic_and_its_page() {
    let bed = Bed::new(1, 4);
    let before = bed.memory();
    bed.post(b"early");
    assert_eq!(bed.memory(), before);
    bed.write(0, SINT2, 0xf3);
    bed.write(0, msr::SCONTROL, 1);
    assert_eq!(bed.memory(), before);
    bed.write(0, msr::SIMP, SIMP_PAGE | 1);
    assert_eq!(bed.slot(), (1, 0, b"early".to_vec()));
    assert_eq!(bed.sink.take(), [Msi::fixed(0, 0xf3)]);
}

#[test]
fn a_masked_sint_gets_the_message_but_no_interrupt() {
    let bed = Bed::linux(1, 4);
    bed.write(0, SINT2, 1 << 16);
    bed.post(b"silent");
    assert_eq!(bed.slot(), (1, 0, b"silent".to_vec()));
    bed.write(0, SINT2, 0xf3);
    assert!(bed.sink.take().is_empty());
}

#[test]
fn a_polled_sint_gets_messages_and_flags_but_no_interrupt() {
    let bed = Bed::linux(1, 4);
    bed.write(0, SINT2, 1 << 18 | 0xf3);
    bed.post(b"polled");
    assert_eq!(bed.synic.signal_event(0, 2, 7), Ok(()));
    assert_eq!(bed.slot().0, 1);
    assert_eq!(bed.ram.load_u32(FLAGS2, Ordering::SeqCst), Ok(1 << 7));
    assert!(bed.sink.take().is_empty());
}

#[test]
fn lines_of_the_kernel_raise_the_sints_that_have_one() {
    let mut bed = Bed::new(1, 4);
    let kernel = Kernel::new(bed.sink.clone());
    bed.synic = bed.synic.with_lines(kernel.clone());
    let write = |msr, value| {
        let forward = &mut |msr, value| kernel.take(0, msr, value);
        bed.synic.write_msr_forwarding(0, msr, value, forward)
    };
    for (msr, value) in bed.synic.forwarded_msrs(0) {
        kernel.take(0, msr, value);
    }
    for (msr, value) in [
        (msr::SIMP, SIMP_PAGE | 1),
        (msr::SIEFP, SIEFP_PAGE | 1),
        (SINT2, 0xf3),
        (SINT2 + 1, 0x51),
        (msr::SCONTROL, 1),
    ] {
        assert_eq!(write(msr, value), Ok(()));
        assert_eq!(kernel.read(0, msr), Some(value));
    }
    bed.post(b"by line");
    assert_eq!(bed.sink.take(), [Msi::fixed(0, 0xf3)]);
    assert_eq!(kernel.raised.load(Ordering::SeqCst), 1);
    assert_eq!(bed.synic.post_message(0, 3, 1, b"by MSI"), Ok(()));
    assert_eq!(bed.sink.take(), [Msi::fixed(0, 0x51)]);
    assert_eq!(kernel.raised.load(Ordering::SeqCst), 1);
    // What faults never reaches the kernel.
    assert_eq!(write(SINT2, 0xf), Err(GpFault));
    assert_eq!(write(msr::SIMP, !0), Err(GpFault));
    assert_eq!(kernel.read(0, SINT2), Some(0xf3));
    assert_eq!(kernel.read(0, msr::SIMP), Some(SIMP_PAGE | 1));
    assert_eq!(bed.synic.counters().interrupts, 2);
}

#[test]
fn a_sint_that_is_masked_and_unmasked_under_events_loses_no_interrupt_in_the_kernel() {
    const ROUNDS: u32 = 2_000;
    let mut bed = Bed::linux(1, 4);
    let kernel = Kernel::new(bed.sink.clone());
    bed.synic = bed.synic.with_lines(kernel.clone());
    for (msr, value) in bed.synic.forwarded_msrs(0) {
        kernel.take(0, msr, value);
    }
    let taken = std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..ROUNDS {
                let value = [1 << 16, 0xf3][round as usize % 2];
                let forward = &mut |msr, value| {
                    // As long as an ioctl, in which an event may come.
                    std::thread::yield_now();
                    kernel.take(0, msr, value);
                };
                let written = bed.synic.write_msr_forwarding(0, SINT2, value, forward);
                assert_eq!(written, Ok(()));
            }
        });
        let mut taken = 0;
        for _ in 0..ROUNDS {
            taken += u32::from(bed.synic.signal_event(0, 2, 1).is_ok());
            bed.ram.store_u32(FLAGS2, 0, Ordering::SeqCst).unwrap();
        }
        taken
    });
    assert_eq!(kernel.lost.load(Ordering::SeqCst), 0);
    assert_eq!(kernel.raised.load(Ordering::SeqCst), taken);
}

#[test]
fn discarded_messages_are_never_written() {
    let bed = Bed::linux(1, 4);
    bed.post(b"1");
    bed.post(b"2");
    bed.synic.discard_messages(2);
    bed.consume();
    let before = bed.memory();
    bed.eom();
    assert_eq!(bed.memory(), before);
    assert_eq!(bed.synic.counters().discarded, 1);
    bed.post(b"3");
    assert_eq!(bed.slot().2, b"3");
}

#[test]
fn discarding_one_sint_lets_the_others_pass() {
    let bed = Bed::linux(1, 4);
    bed.write(0, msr::SINT0 + 5, 0x55);
    bed.post(b"1");
    bed.post(b"2");
    assert_eq!(bed.synic.post_message(0, 5, 9, b"other"), Ok(()));
    bed.sink.take();
    bed.synic.discard_messages(2);
    assert_eq!(bed.ram.load_u32(SIMP_PAGE + 0x500, Ordering::SeqCst), Ok(9));
    assert_eq!(bed.sink.take(), [Msi::fixed(0, 0x55)]);
}

#[test]
fn an_event_sets_its_flag_and_raises_only_when_it_was_clear() {
    let bed = Bed::linux(1, 4);
    assert_eq!(bed.synic.signal_event(0, 2, 2047), Ok(()));
    assert_eq!(bed.synic.signal_event(0, 2, 2047), Ok(()));
    assert_eq!(bed.synic.signal_event(0, 2, 33), Ok(()));
    assert_eq!(bed.synic.signal_event(0, 2, 34), Ok(()));
    assert_eq!(
        bed.ram.load_u32(FLAGS2 + 0xfc, Ordering::SeqCst),
        Ok(1 << 31)
    );
    assert_eq!(bed.ram.load_u32(FLAGS2 + 4, Ordering::SeqCst), Ok(3 << 1));
    assert_eq!(bed.sink.take().len(), 3);
    let counters = bed.synic.counters();
    assert_eq!((counters.events, counters.events_merged), (3, 1));
}

#[test]
fn no_event_goes_to_a_vp_that_takes_none() {
    let disabled = Err(SynicError::Disabled { vp: 0 });
    for (msr, value) in [
        (msr::SCONTROL, 0),
        (msr::SIEFP, SIEFP_PAGE),
        (SINT2, 1 << 16 | 0xf3),
    ] {
        let bed = Bed::linux(1, 4);
        bed.write(0, msr, value);
        let before = bed.memory();
        assert_eq!(bed.synic.signal_event(0, 2, 1), disabled);
        assert_eq!(bed.memory(), before);
        assert!(bed.sink.take().is_empty());
        assert_eq!(bed.synic.counters().events_refused, 1);
    }
}

#[test]
fn arguments_out_of_range_are_refused() {
    let bed = Bed::linux(1, 4);
    let synic = &bed.synic;
    let out = |sint| Err(SynicError::OutOfRange { sint });
    assert_eq!(synic.post_message(0, 16, 1, b""), out(16));
    assert_eq!(synic.post_message(0, 2, 0, b""), out(2));
    assert_eq!(synic.post_message(0, 2, 1, &[0; 241]), out(2));
    assert_eq!(synic.post_message(0, 2, 1, &[0; 240]), Ok(()));
    assert_eq!(
        synic.post_message(1, 2, 1, b""),
        Err(SynicError::NoVp { vp: 1 })
    );
    assert_eq!(synic.signal_event(0, 16, 0), out(16));
    assert_eq!(synic.signal_event(0, 2, 2048), out(2));
    assert_eq!(synic.signal_event(1, 2, 0), Err(SynicError::NoVp { vp: 1 }));
}

#[test]
fn reset_drops_the_queue_and_keeps_out_of_memory() {
    let bed = Bed::linux(1, 4);
    bed.post(b"1");
    bed.post(b"2");
    let before = bed.memory();
    bed.synic.reset();
    assert_eq!(bed.memory(), before);
    assert_eq!(bed.synic.save(), Bed::new(1, 4).synic.save());
}

#[test]
fn states_that_no_guest_can_reach_are_refused_and_change_nothing() {
    let bed = Bed::linux(1, 2);
    for payload in [b"1", b"2", b"3"] {
        bed.post(payload);
    }
    let good = bed.synic.save();
    let broken = |change: fn(&mut SynicState)| {
        let mut state = good.clone();
        change(&mut state);
        bed.synic.restore(&state).unwrap_err()
    };
    assert_eq!(
        broken(|s| s.version = 0),
        SynicStateError::Version { version: 0 }
    );
    assert_eq!(
        broken(|s| s.vps.clear()),
        SynicStateError::VpCount {
            expected: 1,
            found: 0
        }
    );
    assert_eq!(
        broken(|s| s.vps[0].simp = !0),
        SynicStateError::Value {
            vp: 0,
            msr: msr::SIMP,
            value: !0
        }
    );
    assert_eq!(
        broken(|s| s.vps[0].sints[3] = 9),
        SynicStateError::Value {
            vp: 0,
            msr: msr::SINT0 + 3,
            value: 9
        }
    );
    assert_eq!(
        broken(|s| {
            let message = s.vps[0].queue[0].clone();
            s.vps[0].queue.push(message);
        }),
        SynicStateError::Queue { vp: 0, len: 3 }
    );
    assert_eq!(
        broken(|s| {
            s.vps[0].queue.pop();
            s.vps[0].refused = true;
        }),
        SynicStateError::Queue { vp: 0, len: 1 }
    );
    for change in [
        (|s| s.vps[0].queue[1].sint = 16) as fn(&mut SynicState),
        |s| s.vps[0].queue[1].message_type = 0,
        |s| s.vps[0].queue[1].payload = vec![0; 241],
    ] {
        assert_eq!(broken(change), SynicStateError::Message { vp: 0, index: 1 });
    }
    assert_eq!(bed.synic.save(), good);
    assert_eq!(bed.synic.restore(&good), Ok(()));
}

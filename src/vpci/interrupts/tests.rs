use super::handles::{HANDLE_ADDRESS, HandleError, Route, Target};
use super::*;
use crate::vmm::Msi;
use crate::vpci::function::{MsiSpec, MsixSpec};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicUsize};

const ADDRESS: u64 = HANDLE_ADDRESS as u64;
const ON: MsixControl = MsixControl {
    enabled: true,
    masked: false,
};
const MASKED: MsixControl = MsixControl {
    enabled: true,
    masked: true,
};

#[derive(Debug, Default)]
struct Log(Mutex<Vec<Msi>>);

impl Log {
    fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl MsiSink for Log {
    fn raise_msi(&self, msi: Msi) {
        lock(&self.0).push(msi);
    }
}

fn layout() -> FunctionLayout {
    FunctionLayout {
        msix: Some(MsixSpec {
            vectors: 66,
            table_bar: 0,
            table_offset: 0,
            pba_bar: 0,
            pba_offset: 0x1000,
        }),
        msi: Some(MsiSpec { messages: 4 }),
        ..FunctionLayout::default()
    }
}

fn interrupts() -> (Interrupts, Arc<Log>) {
    let log = Arc::new(Log::default());
    let apic_ids = Arc::from([0, 1, 2, 3]);
    (Interrupts::new(&layout(), apic_ids, log.clone(), None), log)
}

/// Programs an MSI-X entry and unmasks it.
fn program(interrupts: &Interrupts, vector: u64, address: u64, data: u32) {
    interrupts.table_write(vector * 16, &address.to_le_bytes());
    interrupts.table_write(vector * 16 + 8, &data.to_le_bytes());
    interrupts.table_write(vector * 16 + 12, &[0; 4]);
}

fn pba(interrupts: &Interrupts) -> [u64; 2] {
    [0, 8].map(|offset| {
        let mut data = [0; 8];
        interrupts.pba_read(offset, &mut data);
        u64::from_le_bytes(data)
    })
}

fn to(vector: u8, vp: u32) -> Route {
    Route {
        vector,
        target: Target::One(vp),
    }
}

#[test]
fn an_unmasked_vector_delivers_its_live_message() {
    let (interrupts, log) = interrupts();
    let data = interrupts.handles.create(0x41, 1, 2).unwrap();
    program(&interrupts, 65, ADDRESS, data);
    interrupts.raise(65);
    assert_eq!(log.take(), [], "MSI-X is off");
    interrupts.set_msix_control(ON);
    interrupts.raise(65);
    assert_eq!(log.take(), [Msi::fixed(2, 0x41)]);
    assert_eq!(
        interrupts.counters()[65],
        VectorCounters {
            raised: 1,
            suppressed: 1
        }
    );
    interrupts.raise(66);
    interrupts.raise(u16::MAX);
    assert_eq!(log.take(), []);
}

#[test]
fn a_message_that_is_no_live_handle_raises_nothing() {
    let (interrupts, log) = interrupts();
    interrupts.set_msix_control(ON);
    let data = interrupts.handles.create(0x41, 1, 0).unwrap();
    for (address, value) in [
        (0, 0),
        (ADDRESS, data + 1),
        (ADDRESS, 0x4041),
        (ADDRESS | 1 << 32, data),
        (ADDRESS + 0x1000, data),
    ] {
        program(&interrupts, 0, address, value);
        interrupts.raise(0);
    }
    assert_eq!(log.take(), []);
    assert_eq!(interrupts.counters()[0].suppressed, 5);
    program(&interrupts, 0, ADDRESS, data);
    interrupts.handles.delete(ADDRESS, data);
    interrupts.raise(0);
    assert_eq!(log.take(), []);
}

#[test]
fn an_event_of_a_masked_vector_stays_pending_until_it_is_unmasked() {
    let (interrupts, log) = interrupts();
    let data = interrupts.handles.create(0x41, 1, 0).unwrap();
    interrupts.set_msix_control(ON);
    program(&interrupts, 64, ADDRESS, data);
    interrupts.table_write(64 * 16 + 12, &1u32.to_le_bytes());
    interrupts.raise(64);
    interrupts.raise(64);
    assert_eq!(pba(&interrupts), [0, 1]);
    assert_eq!(log.take(), []);
    interrupts.table_write(64 * 16 + 12, &0u32.to_le_bytes());
    assert_eq!(log.take(), [Msi::fixed(0, 0x41)]);
    assert_eq!(pba(&interrupts), [0, 0]);
    interrupts.set_msix_control(MASKED);
    interrupts.raise(64);
    assert_eq!((pba(&interrupts), log.take()), ([0, 1], vec![]));
    interrupts.set_msix_control(ON);
    assert_eq!((pba(&interrupts), log.take().len()), ([0, 0], 1));
    interrupts.set_msix_control(MASKED);
    interrupts.raise(64);
    interrupts.set_msix_control(MsixControl::default());
    interrupts.set_msix_control(ON);
    assert_eq!((pba(&interrupts), log.take()), ([0, 0], vec![]));
}

#[test]
fn the_table_takes_aligned_double_and_quad_words_only() {
    let (interrupts, _) = interrupts();
    interrupts.table_write(0, &0x1122_3344_5566_7788u64.to_le_bytes());
    interrupts.table_write(8, &0x0000_0000_99aa_bbccu64.to_le_bytes());
    for (offset, len) in [(1, 4), (2, 2), (0, 1), (4, 8), (66 * 16, 4)] {
        interrupts.table_write(offset, &vec![0; len]);
    }
    let mut quad = [0; 8];
    interrupts.table_read(0, &mut quad);
    assert_eq!(u64::from_le_bytes(quad), 0x1122_3344_5566_7788);
    interrupts.table_read(8, &mut quad);
    assert_eq!(u64::from_le_bytes(quad), 0x99aa_bbcc);
    let mut byte = [0xff];
    interrupts.table_read(0, &mut byte);
    assert_eq!(byte, [0xff]);
    let mut beyond = [0xff; 4];
    interrupts.table_read(66 * 16, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    interrupts.pba_read(16, &mut beyond);
    assert_eq!(beyond, [0; 4]);
}

#[test]
fn msi_replaces_the_low_data_bits_and_masks_each_message() {
    let (interrupts, log) = interrupts();
    assert_eq!(interrupts.handles.create(0x50, 1, 0), Ok(0));
    assert_eq!(interrupts.handles.create(0x20, 3, 1), Ok(4));
    let mut registers = MsiRegisters {
        enabled: true,
        messages: 4,
        address: ADDRESS,
        data: 4,
        mask: 0b10,
    };
    interrupts.set_msi(registers);
    for vector in 0..6 {
        interrupts.raise(vector);
    }
    // Message 3 was never mapped; vectors 4 and 5 share messages 0 and 1.
    assert_eq!(
        log.take(),
        [0x20, 0x22, 0x20].map(|vector| Msi::fixed(1, vector))
    );
    assert_eq!(interrupts.msi_pending(), 0b10);
    interrupts
        .handles
        .retarget(ADDRESS, 5, to(0x99, 3))
        .unwrap();
    registers.mask = 0;
    interrupts.set_msi(registers);
    assert_eq!(log.take(), [Msi::fixed(3, 0x99)]);
    assert_eq!(interrupts.msi_pending(), 0);
    assert_eq!(interrupts.counters()[3].suppressed, 1);
    registers.enabled = false;
    interrupts.set_msi(registers);
    interrupts.raise(0);
    assert_eq!(log.take(), []);
}

#[test]
fn msix_goes_before_msi_when_a_guest_enables_both() {
    let (interrupts, log) = interrupts();
    interrupts.handles.create(0x50, 1, 0).unwrap();
    interrupts.handles.create(0x60, 1, 0).unwrap();
    interrupts.set_msi(MsiRegisters {
        enabled: true,
        messages: 1,
        address: ADDRESS,
        data: 0,
        mask: 0,
    });
    program(&interrupts, 0, ADDRESS, 1);
    interrupts.set_msix_control(ON);
    interrupts.raise(0);
    assert_eq!(log.take(), [Msi::fixed(0, 0x60)]);
}

#[test]
fn reset_forgets_messages_entries_and_pending_events_but_no_counts() {
    let (interrupts, log) = interrupts();
    let data = interrupts.handles.create(0x41, 1, 0).unwrap();
    program(&interrupts, 0, ADDRESS, data);
    interrupts.set_msix_control(MASKED);
    interrupts.raise(0);
    interrupts.reset();
    interrupts.set_msix_control(ON);
    interrupts.raise(0);
    assert_eq!(log.take(), []);
    assert_eq!(pba(&interrupts), [1, 0], "entries are masked after reset");
    assert_eq!(interrupts.handles.live(), 0);
    let mut entry = [0xff; 8];
    interrupts.table_read(8, &mut entry);
    assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0]);
    interrupts.reset_counters();
    assert_eq!(interrupts.counters()[0], VectorCounters::default());
}

/// Counts per (APIC id, vector), and notes deliveries to a vector that has been taken back.
#[derive(Debug)]
struct Watch {
    counts: Box<[AtomicUsize]>,
    forbidden: Box<[AtomicBool]>,
    violations: AtomicUsize,
}

impl MsiSink for Watch {
    fn raise_msi(&self, msi: Msi) {
        let vector = msi.data as usize;
        if self.forbidden[vector].load(Ordering::SeqCst) {
            self.violations.fetch_add(1, Ordering::SeqCst);
        }
        std::hint::spin_loop();
        self.counts[vector].fetch_add(1, Ordering::SeqCst);
    }
}

/// One thread raises while another moves the message about. Every event is delivered exactly once
/// and none to a vector that a completed retarget has left.
#[test]
fn no_event_is_lost_or_goes_the_old_way_while_a_message_is_retargeted() {
    const EVENTS: usize = 20_000;
    let watch = Arc::new(Watch {
        counts: (0..256).map(|_| AtomicUsize::new(0)).collect(),
        forbidden: (0..256).map(|_| AtomicBool::new(false)).collect(),
        violations: AtomicUsize::new(0),
    });
    let interrupts = Interrupts::new(&layout(), Arc::from([0, 1]), watch.clone(), None);
    let data = interrupts.handles.create(0x20, 1, 0).unwrap();
    program(&interrupts, 0, ADDRESS, data);
    interrupts.set_msix_control(ON);
    let done = AtomicBool::new(false);
    let moves = std::thread::scope(|scope| {
        let raiser = scope.spawn(|| {
            for _ in 0..EVENTS {
                interrupts.raise(0);
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut vector = 0x20u8;
        let mut moves = 0;
        while !done.load(Ordering::SeqCst) || moves < 100 {
            let next = if vector == 0xef { 0x20 } else { vector + 1 };
            watch.forbidden[usize::from(next)].store(false, Ordering::SeqCst);
            interrupts
                .handles
                .retarget(ADDRESS, data, to(next, u32::from(next) % 2))
                .unwrap();
            watch.forbidden[usize::from(vector)].store(true, Ordering::SeqCst);
            vector = next;
            moves += 1;
        }
        raiser.join().unwrap();
        moves
    });
    let delivered: usize = watch.counts.iter().map(|c| c.load(Ordering::SeqCst)).sum();
    assert_eq!(watch.violations.load(Ordering::SeqCst), 0, "{moves} moves");
    assert_eq!(delivered, EVENTS);
    assert_eq!(interrupts.counters()[0].raised, EVENTS as u64);
}

/// One thread raises one event at a time and waits for it; others mask, unmask and retarget. Each
/// event must come out once: an event that got lost would stop the raiser for good.
#[test]
fn every_event_comes_out_once_while_vectors_are_masked_and_retargeted() {
    const EVENTS: usize = 5_000;
    let watch = Arc::new(Watch {
        counts: (0..256).map(|_| AtomicUsize::new(0)).collect(),
        forbidden: (0..256).map(|_| AtomicBool::new(false)).collect(),
        violations: AtomicUsize::new(0),
    });
    let interrupts = Interrupts::new(&layout(), Arc::from([0, 1]), watch.clone(), None);
    let data = interrupts.handles.create(0x20, 1, 0).unwrap();
    program(&interrupts, 0, ADDRESS, data);
    interrupts.set_msix_control(ON);
    let total = || -> usize { watch.counts.iter().map(|c| c.load(Ordering::SeqCst)).sum() };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut vector = 0x20;
            while !done.load(Ordering::SeqCst) {
                interrupts.table_write(12, &1u32.to_le_bytes());
                let before = total();
                vector = if vector == 0xef { 0x20 } else { vector + 1 };
                interrupts
                    .handles
                    .retarget(ADDRESS, data, to(vector, 0))
                    .unwrap();
                // The mask waits for the guard, so nothing comes out behind it.
                if total() != before {
                    watch.violations.fetch_add(1, Ordering::SeqCst);
                }
                interrupts.table_write(12, &0u32.to_le_bytes());
                interrupts.set_msix_control(MASKED);
                interrupts.set_msix_control(ON);
            }
        });
        for event in 1..=EVENTS {
            interrupts.raise(0);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while total() < event {
                assert!(
                    std::time::Instant::now() < deadline,
                    "event {event} is lost"
                );
                std::thread::yield_now();
            }
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(total(), EVENTS);
    assert_eq!(watch.violations.load(Ordering::SeqCst), 0);
    assert_eq!(pba(&interrupts), [0, 0]);
}

#[derive(Debug, Clone)]
enum Step {
    Create(u8, u16, u32),
    Delete(u32),
    Retarget(u32, u8, u32),
    Program(u64, u32),
    Mask(u64, bool),
    Control(bool, bool),
    Msi(bool, u8, u16, u32),
    Raise(u16),
    TableWrite(u64, Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (any::<u8>(), 0u16..6, 0u32..5).prop_map(|(v, c, p)| Step::Create(v, c, p)),
        (0u32..12).prop_map(Step::Delete),
        (0u32..12, any::<u8>(), 0u32..5).prop_map(|(d, v, p)| Step::Retarget(d, v, p)),
        (0u64..4, 0u32..12).prop_map(|(v, d)| Step::Program(v, d)),
        (0u64..4, any::<bool>()).prop_map(|(v, m)| Step::Mask(v, m)),
        (any::<bool>(), any::<bool>()).prop_map(|(e, m)| Step::Control(e, m)),
        (any::<bool>(), 0u8..3, 0u16..12, 0u32..16).prop_map(|(e, n, d, m)| Step::Msi(
            e,
            1 << n,
            d,
            m
        )),
        (0u16..70).prop_map(Step::Raise),
        (0u64..1100, proptest::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(o, d)| Step::TableWrite(o, d)),
    ]
}

fn apply(interrupts: &Interrupts, step: &Step) -> Option<Result<u32, HandleError>> {
    match step {
        Step::Create(vector, count, vp) => {
            return Some(interrupts.handles.create(u32::from(*vector), *count, *vp));
        }
        Step::Delete(data) => {
            interrupts.handles.delete(ADDRESS, *data);
        }
        Step::Retarget(data, vector, vp) => {
            let result = interrupts
                .handles
                .retarget(ADDRESS, *data, to(*vector, *vp));
            return Some(result.map(|()| 0));
        }
        Step::Program(vector, data) => program(interrupts, *vector, ADDRESS, *data),
        Step::Mask(vector, mask) => {
            interrupts.table_write(vector * 16 + 12, &u32::from(*mask).to_le_bytes());
        }
        Step::Control(enabled, masked) => interrupts.set_msix_control(MsixControl {
            enabled: *enabled,
            masked: *masked,
        }),
        Step::Msi(enabled, messages, data, mask) => interrupts.set_msi(MsiRegisters {
            enabled: *enabled,
            messages: *messages,
            address: ADDRESS,
            data: *data,
            mask: *mask,
        }),
        Step::Raise(vector) => interrupts.raise(*vector),
        Step::TableWrite(offset, data) => interrupts.table_write(*offset, data),
    }
    None
}

/// A second function with the saved state of the first.
fn twin(interrupts: &Interrupts) -> (Interrupts, Arc<Log>) {
    let (twin, log) = self::interrupts();
    twin.restore(&interrupts.save()).unwrap();
    let control = interrupts.msix_control.load(Ordering::Relaxed);
    twin.set_msix_control(MsixControl {
        enabled: control & MSIX_ENABLED != 0,
        masked: control & MSIX_MASKED != 0,
    });
    let registers = *lock(interrupts.msi.as_ref().unwrap());
    twin.set_msi(registers);
    (twin, log)
}

proptest! {
    #[test]
    fn a_restored_function_behaves_as_the_saved_one(
        before in proptest::collection::vec(step(), 0..40),
        after in proptest::collection::vec(step(), 0..40),
    ) {
        let (original, log) = interrupts();
        for step in &before {
            apply(&original, step);
        }
        log.take();
        let (copy, copy_log) = twin(&original);
        prop_assert_eq!(copy_log.take(), vec![], "restoring delivers nothing by itself");
        for step in &after {
            prop_assert_eq!(apply(&original, step), apply(&copy, step));
            prop_assert_eq!(log.take(), copy_log.take());
        }
        prop_assert_eq!(original.save(), copy.save());
    }
}

#[test]
fn a_bad_saved_state_is_refused_and_leaves_the_interrupts_off() {
    let (interrupts, _) = interrupts();
    interrupts.handles.create(0x41, 2, 0).unwrap();
    let good = interrupts.save();
    let check = |change: &dyn Fn(&mut InterruptsState)| {
        let (other, _) = self::interrupts();
        let mut state = good.clone();
        change(&mut state);
        let error = other.restore(&state).unwrap_err();
        assert_eq!(other.handles.live(), 0);
        error
    };
    assert_eq!(
        check(&|s| s.version = 2),
        StateError::Version { version: 2 }
    );
    assert_eq!(
        check(&|s| {
            s.entries.pop();
        }),
        StateError::Vectors
    );
    for change in [
        (|s| s.messages[0].data = 1) as fn(&mut InterruptsState),
        |s| s.messages[0].data = u32::MAX - 1,
        |s| s.messages[0].routes[0].vps = vec![0, 0],
        |s| s.messages[0].routes[0].vps = vec![1, 0],
        |s| s.messages[0].routes.clear(),
        |s| s.messages[0].routes[1].vector = 3,
        |s| s.messages[0].routes[1].vps.clear(),
        |s| s.messages[0].routes[1].vps[0] = 4,
        |s| s.messages.push(s.messages[0].clone()),
    ] {
        assert!(matches!(check(&change), StateError::Handle(_)));
    }
}

/// Stays in a delivery for a while once it was asked to.
#[derive(Debug)]
struct Slow {
    inside: std::sync::Barrier,
    left: AtomicBool,
}

impl MsiSink for Slow {
    fn raise_msi(&self, _msi: Msi) {
        self.inside.wait();
        std::thread::sleep(std::time::Duration::from_millis(20));
        self.left.store(true, Ordering::SeqCst);
    }
}

#[test]
fn whoever_masks_moves_or_unmaps_a_vector_waits_for_its_delivery_under_way() {
    let actions: [fn(&Interrupts); 6] = [
        |interrupts| {
            interrupts
                .handles
                .retarget(ADDRESS, 0, to(0x99, 1))
                .unwrap();
        },
        |interrupts| assert_eq!(interrupts.delete(ADDRESS, 0), 1),
        |interrupts| interrupts.table_write(12, &1u32.to_le_bytes()),
        |interrupts| interrupts.set_msix_control(MASKED),
        |interrupts| interrupts.set_msix_control(MsixControl::default()),
        Interrupts::reset,
    ];
    for (index, action) in actions.iter().enumerate() {
        let slow = Arc::new(Slow {
            inside: std::sync::Barrier::new(2),
            left: AtomicBool::new(false),
        });
        let interrupts = Interrupts::new(&layout(), Arc::from([0, 1]), slow.clone(), None);
        let data = interrupts.handles.create(0x20, 1, 0).unwrap();
        program(&interrupts, 0, ADDRESS, data);
        interrupts.set_msix_control(ON);
        std::thread::scope(|scope| {
            scope.spawn(|| interrupts.raise(0));
            slow.inside.wait();
            action(&interrupts);
            assert!(slow.left.load(Ordering::SeqCst), "action {index}");
        });
    }
}

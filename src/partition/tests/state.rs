//! A guest that is saved and restored at any step of the main job notices nothing.
#![forbid(unsafe_code)]

use proptest::prelude::*;

use super::*;
use crate::dma::DmaPort;
use crate::pviommu::DeviceBackend;
use crate::vmbus::VmBusStateError;
use crate::vmbus::server::Phase;
use crate::vpci::function::{FunctionLayout, FunctionResources, HostVectors};
use crate::vpci::testing::NoVectors;

/// What the guest saw in a step.
type Answer = Vec<u8>;

/// A step of the main job, and what it carries on to the next.
type Step = fn(&mut Guest, &mut Found) -> Answer;

/// What the guest has found out so far.
#[derive(Debug, Default)]
struct Found {
    relid: u32,
    connection: u32,
    message: (u64, u32),
}

fn words(words: &[u32]) -> Answer {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Posts a message without letting a worker run.
fn post_only(guest: &Guest, connection: u32, payload: &[u8]) -> Answer {
    let mut input = words(&[connection, 0, 1, payload.len() as u32]);
    input.extend(payload);
    input.resize(256, 0);
    guest.ram.write(0x6000, &input).unwrap();
    guest.call(0x5c, 0x6000).to_le_bytes().to_vec()
}

/// Bytes of a job of three blocks.
const LONG: u64 = 0x18000;

fn msis(guest: &Guest) -> Answer {
    let mut raised = guest.interrupts.0.lock().unwrap();
    format!("{:?}", std::mem::take(&mut *raised)).into_bytes()
}

/// From boot to data by DMA, a job that is under way, an interrupt that moves and one that is masked,
/// a bus that is closed and opened again, unload, a second connection, and removal.
const STEPS: &[Step] = &[
    |guest, _| {
        guest.boot();
        Vec::new()
    },
    // The worker has not seen the message yet.
    |guest, _| {
        let contact = [14, 0, 0x6_0000, 0, 2, 0, 0x7000, 0, 0x8000, 0];
        post_only(guest, 4, &words(&contact))
    },
    |guest, _| {
        guest.host.run();
        guest.expect_message(15)
    },
    // All offers wait, the first in its slot.
    |guest, _| {
        let answer = post_only(guest, 1, &words(&[3, 0, 0, 0, 0, 0, 0, 0]));
        guest.host.run();
        answer
    },
    |guest, found| {
        let offer = guest.expect_message(1);
        (found.relid, found.connection) = (word(&offer, 184), word(&offer, 192));
        offer
    },
    |guest, _| guest.expect_message(4),
    |guest, found| {
        guest.open(found.relid, found.connection);
        Vec::new()
    },
    |guest, _| guest.request(0x13, &[0x1_0004]),
    // The bus has not seen the request yet.
    |guest, _| {
        guest.transaction += 1;
        let (out, _) = guest.rings.as_ref().unwrap();
        let message = 0x4249_0001u32.to_le_bytes();
        let signal = out.send(guest.transaction, false, &message).unwrap();
        assert_eq!(guest.call(0x1_005d, guest.signal), 0);
        vec![signal.into()]
    },
    |guest, _| {
        guest.host.run();
        guest.receive().payload
    },
    |guest, _| guest.request(5, &[0]),
    |guest, _| guest.request(7, &[0, WINDOW as u32, (WINDOW >> 32) as u32]),
    |guest, _| guest.request(0x16, &[0; 49]),
    |guest, _| {
        guest.enable();
        guest.read::<4>(LOW_BAR).to_le_bytes().to_vec()
    },
    |guest, found| {
        found.message = guest.set_up_interrupt(0x1_0004, 0x41, 1);
        format!("{:?}", found.message).into_bytes()
    },
    |guest, _| format!("{:?} {:?}", guest.copy(0x5a), guest.copied()).into_bytes(),
    |guest, found| {
        let status = guest.retarget(found.message, 0x52, 0);
        format!("{status} {:?}", guest.copy(0x33)).into_bytes()
    },
    // A job of which one block has moved.
    |guest, _| {
        msis(guest);
        guest.ram.fill(0x40000, LONG, 0x77).unwrap();
        guest.write::<8>(LOW_BAR + 0x10, 0x40000);
        guest.write::<8>(LOW_BAR + 0x18, 0x60000);
        guest.write::<4>(LOW_BAR + 0x20, LONG);
        guest.write::<4>(LOW_BAR + 0x30, 1);
        guest.host.step();
        let [status, moved] = [0x34, 0x48].map(|register| guest.read::<4>(LOW_BAR + register));
        assert_eq!((status & 1, moved), (1, LONG / 3));
        Vec::new()
    },
    |guest, _| {
        guest.host.run();
        let mut bytes = vec![0; LONG as usize];
        guest.ram.read(0x60000, &mut bytes).unwrap();
        assert_eq!(bytes, vec![0x77; LONG as usize]);
        [
            msis(guest),
            words(&[guest.read::<4>(LOW_BAR + 0x34) as u32]),
        ]
        .concat()
    },
    // An event while the vector is masked.
    |guest, _| {
        guest.write::<4>(MSIX_TABLE + 12, 1);
        format!("{:?}", guest.copy(0x44)).into_bytes()
    },
    |guest, _| {
        guest.write::<4>(MSIX_TABLE + 12, 0);
        msis(guest)
    },
    |guest, _| guest.request(5, &[0]),
    |guest, found| {
        let relid = found.relid;
        guest.close(relid);
        format!("{:?} {:x}", guest.copy(7), guest.config(0)).into_bytes()
    },
    |guest, found| {
        guest.open(found.relid, found.connection);
        guest.request(0x13, &[0x1_0003])
    },
    |guest, _| {
        let answer = guest.post(1, &words(&[16, 0, 0, 0, 0, 0, 0, 0]));
        guest.rings = None;
        let message = guest.expect_message(17);
        [answer.to_le_bytes().to_vec(), message].concat()
    },
    |guest, found| {
        let taken = guest.contact(0x5_0003);
        let offers = guest.offers();
        (found.relid, found.connection) = offers[0];
        format!("{taken} {offers:?}").into_bytes()
    },
    |guest, found| {
        guest.open(found.relid, found.connection);
        guest.request(0x13, &[0x1_0004])
    },
    |guest, _| guest.request(7, &[0, WINDOW as u32, (WINDOW >> 32) as u32]),
    // The guest is asked to let go, and has not looked yet.
    |guest, _| {
        // What was raised for earlier steps is the VMM's.
        msis(guest);
        guest.partition.eject(&INSTANCE, Box::new(|| ())).unwrap();
        guest.host.run();
        msis(guest)
    },
    |guest, _| guest.receive().payload,
    |guest, _| {
        guest.send(false, &words(&[0x4249_000f, 0, 0]));
        guest.partition.buses().len().to_le_bytes().to_vec()
    },
    |guest, found| {
        assert!(guest.partition.remove(&INSTANCE));
        guest.host.run();
        let rescind = guest.expect_message(2);
        assert_eq!(word(&rescind, 8), found.relid);
        format!("{:x} {rescind:?}", guest.config(0)).into_bytes()
    },
    // The guest gives the channel back, and the server has not seen it yet.
    |guest, found| {
        guest.rings = None;
        post_only(guest, 1, &words(&[13, 0, found.relid]))
    },
    |guest, _| {
        guest.host.run();
        let device = TestDevice::new(9, &*guest.host).unwrap();
        let spec = BusSpec {
            instance: INSTANCE,
            functions: vec![FunctionSpec::new(0, device)],
        };
        guest.partition.plug(spec).unwrap();
        guest.host.run();
        guest.expect_message(1)
    },
];

impl Guest {
    /// The same guest on a partition of its own, which took over the state of this one. Triggers
    /// are not part of a state: whoever restores makes every worker look.
    fn migrate(self) -> Self {
        let (state, device) = (self.partition.save().unwrap(), self.device.save());
        assert_eq!(
            self.partition.save().unwrap(),
            state,
            "saving changes nothing"
        );
        #[cfg(feature = "serde")]
        let (state, device) = serialised::through_json(&(state, device));
        let Self {
            partition,
            ram,
            rings,
            signal,
            transaction,
            kernel,
            ..
        } = self;
        // Where it came from touches nothing of the guest any more.
        drop(partition);
        let mut guest = Self::build(ram, kernel.is_some(), None);
        if state.buses.is_empty() {
            assert!(guest.partition.remove(&INSTANCE));
            guest.host.run();
        }
        guest.partition.restore(&state).unwrap();
        guest.device.restore(device).unwrap();
        assert_eq!(
            guest.partition.save().unwrap(),
            state,
            "nothing is lost or made up"
        );
        // Not before: until here the kernel has every SINT masked.
        guest.give_kernel();
        (guest.rings, guest.signal, guest.transaction) = (rings, signal, transaction);
        guest
    }
}

/// Runs the main job with a migration before each step that `migrates` names.
fn answers(hybrid: bool, migrates: impl Fn(usize) -> bool) -> Vec<Answer> {
    let mut guest = Guest::build(ram(256), hybrid, None);
    let mut found = Found::default();
    let mut answers = Vec::new();
    for (at, step) in STEPS.iter().enumerate() {
        if migrates(at) {
            guest = guest.migrate();
        }
        answers.push(step(&mut guest, &mut found));
    }
    answers
}

#[test]
fn a_migration_at_any_one_step_changes_no_later_answer() {
    let expected = answers(false, |_| false);
    for (at, hybrid) in (0..STEPS.len()).flat_map(|at| [(at, false), (at, true)]) {
        let found = answers(hybrid, |step| step == at);
        for (step, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(
                found, expected,
                "migrated before step {at}, asked at {step}, hybrid: {hybrid}"
            );
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_number_of_migrations_changes_no_answer(set in any::<u64>(), hybrid: bool) {
        let found = answers(hybrid, |step| set >> step & 1 != 0);
        prop_assert_eq!(found, answers(hybrid, |_| false));
    }
}

fn busy() -> Guest {
    main_job(0x6_0000, 0x1_0004).0
}

#[test]
fn a_state_that_cannot_be_is_refused_and_leaves_a_partition_as_after_a_reset() {
    type Change = fn(&mut PartitionState);
    let source = busy();
    let good = source.partition.save().unwrap();
    let changes: &[(Change, &str)] = &[
        (|state| state.version = 2, "version 2"),
        (|state| state.buses.clear(), "other buses"),
        (|state| state.buses[0].instance = Uuid::nil(), "other buses"),
        (|state| state.buses[0].rings = None, "has no rings"),
        (|state| state.buses[0].bus.version = 9, "version 9"),
        (
            |state| state.buses[0].bus.window = Some(8),
            "MMIO range 0x8",
        ),
        (|state| state.vmbus.version = 9, "version 9"),
        (|state| state.vmbus.server.channels.clear(), "inconsistent"),
        (|state| state.vmbus.server.gpadls.clear(), "inconsistent"),
        (
            |state| {
                let long = (crate::vmbus::server::MessagePort::Message, vec![0; 241]);
                state.vmbus.inbox.push(long);
            },
            "impossible messages",
        ),
        (
            |state| state.buses[0].rings.as_mut().unwrap().reader.next = 4,
            "ring index 0x4",
        ),
        (
            |state| state.vmbus.server.next_id = u64::MAX,
            "id of the next channel",
        ),
        (
            |state| state.vmbus.server.channels[0].1.revoked = true,
            "inconsistent channel",
        ),
        // In use, and closed.
        (
            |state| {
                state.vmbus.server.channels[0].1.phase = Phase::Offered;
                state.vmbus.server.gpadls.clear();
                state.buses[0].rings = None;
            },
            "channel is closed",
        ),
        (
            |state| {
                state.vmbus.server.channels[0].1.phase = Phase::Offered;
                state.vmbus.server.gpadls.clear();
            },
            "channel is closed",
        ),
        (|state| state.synic.version = 9, "version 9"),
        (|state| state.msrs.version = 9, "version 9"),
    ];
    for (change, words) in changes {
        let mut state = good.clone();
        change(&mut state);
        let guest = Guest::new();
        let pristine = guest.partition.save().unwrap();
        let error = guest.partition.restore(&state).unwrap_err().to_string();
        assert!(error.contains(words), "'{words}' in: {error}");
        let mut after = guest.partition.save().unwrap();
        // A reset does not take back what was given out.
        after.vmbus.server.next_id = pristine.vmbus.server.next_id;
        assert_eq!(after.msrs, pristine.msrs, "{words}");
        assert_eq!(after.synic, pristine.synic, "{words}");
        assert!(!guest.partition.buses()[0].open, "{words}");
        assert_eq!(guest.partition.buses()[0].window, None, "{words}");
        // It still works.
        let mut guest = guest;
        guest.main_job(0x6_0000, 0x1_0004);
    }
}

#[test]
fn a_state_does_not_fit_a_partition_with_another_bus() {
    let state = busy().partition.save().unwrap();
    let guest = Guest::new();
    let device = TestDevice::new(3, &*guest.host).unwrap();
    let spec = BusSpec {
        instance: uuid!("00000003-0002-0003-8000-000000000000"),
        functions: vec![FunctionSpec::new(0, device)],
    };
    guest.partition.plug(spec).unwrap();
    let error = guest.partition.restore(&state).unwrap_err();
    assert_eq!(error, PartitionStateError::Buses);
    let wrong = guest.partition.vmbus.restore(&state.vmbus, |_| None);
    assert!(
        matches!(wrong, Err(VmBusStateError::NoRings(_))),
        "{wrong:?}"
    );
}

#[test]
fn a_bus_that_was_removed_there_does_not_fit_one_that_is_plugged_in() {
    let guest = busy();
    let mut state = guest.partition.save().unwrap();
    let bus = state.buses[0].clone();
    assert!(guest.partition.remove(&INSTANCE));
    guest.host.run();
    state.vmbus = guest.partition.save().unwrap().vmbus;
    // Plugged in and unused, while its channel is one that the guest is to give back.
    state.buses = vec![PluggedState {
        bus: Guest::new().partition.save().unwrap().buses[0].bus.clone(),
        rings: None,
        ..bus
    }];
    let next = Guest::over(guest.ram.clone());
    assert_eq!(
        next.partition.restore(&state),
        Err(PartitionStateError::VmBus(VmBusStateError::Devices))
    );
}

/// Event flags of SINT2 at VP 0.
const FLAGS: u64 = 0x11200;

#[test]
fn a_restored_guest_is_signalled_on_each_open_channel_when_workers_run() {
    for hybrid in [false, true] {
        let mut guest = Guest::build(ram(256), hybrid, None);
        let relid = guest.main_job(0x6_0000, 0x1_0004);
        let seen = |guest: &Guest| {
            let set = guest.ram.load_u32(FLAGS, Ordering::SeqCst).unwrap();
            (
                set,
                std::mem::take(&mut *guest.interrupts.0.lock().unwrap()),
            )
        };
        // The second time it is saved before a worker has run.
        for (open, times) in [(true, 1), (true, 2), (false, 1)] {
            if !open {
                guest.close(relid);
            }
            // As if a signal had been lost.
            guest.ram.store_u32(FLAGS, 0, Ordering::SeqCst).unwrap();
            for _ in 0..times {
                guest = guest.migrate();
                assert_eq!(seen(&guest), (0, vec![]), "before the copies are there");
            }
            guest.host.run();
            let expected = match open {
                true => (1 << relid, vec![Msi::fixed(0, 0xf3)]),
                false => (0, vec![]),
            };
            assert_eq!(seen(&guest), expected);
            // Once.
            guest.ram.store_u32(FLAGS, 0, Ordering::SeqCst).unwrap();
            assert_eq!(guest.call(0x1_005d, guest.signal) == 0, open);
            guest.host.run();
            assert_eq!(seen(&guest), (0, vec![]));
        }
    }
}

#[test]
fn a_state_that_has_one_bus_twice_does_not_fit_two_buses() {
    let mut state = busy().partition.save().unwrap();
    let twice = state.buses[0].clone();
    state.buses.push(twice);
    let guest = Guest::new();
    let device = TestDevice::new(3, &*guest.host).unwrap();
    let spec = BusSpec {
        instance: uuid!("00000003-0002-0003-8000-000000000000"),
        functions: vec![FunctionSpec::new(0, device)],
    };
    guest.partition.plug(spec).unwrap();
    assert_eq!(
        guest.partition.restore(&state),
        Err(PartitionStateError::Buses)
    );
}

#[test]
fn a_bus_can_be_removed_after_a_migration_and_a_removed_one_stays_removed() {
    let guest = busy().migrate();
    assert!(guest.partition.remove(&INSTANCE));
    guest.host.run();
    assert_eq!(word(&guest.expect_message(2), 0), 2);
    let state = guest.partition.save().unwrap();
    let ram = guest.ram.clone();
    drop(guest);
    let next = Guest::over(ram);
    assert_eq!(
        next.partition.restore(&state),
        Err(PartitionStateError::Buses),
        "the bus is here, but not there"
    );
    assert!(next.partition.remove(&INSTANCE));
    next.host.run();
    next.partition.restore(&state).unwrap();
    assert_eq!(next.partition.save().unwrap(), state);
    assert!(next.partition.buses().is_empty());
}

/// A device whose state is, in part, with the host.
#[derive(Debug)]
struct Hosted {
    device: Arc<TestDevice>,
    vectors: bool,
    backend: Option<Arc<DmaPort>>,
}

impl PciFunction for Hosted {
    fn layout(&self) -> FunctionLayout {
        self.device.layout()
    }
    fn connect(&self, resources: FunctionResources) {
        self.device.connect(resources);
    }
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        self.device.bar_read(bar, offset, data);
    }
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        self.device.bar_write(bar, offset, data);
    }
    fn host_vectors(&self) -> Option<Arc<dyn HostVectors>> {
        self.vectors.then(|| Arc::new(NoVectors) as _)
    }
    fn dma_backend(&self) -> Option<Arc<dyn DeviceBackend>> {
        self.backend.clone().map(|backend| backend as _)
    }
    fn reset(&self) {
        self.device.reset();
    }
}

#[test]
fn a_function_whose_state_is_in_hardware_is_neither_saved_nor_restored() {
    let other = uuid!("00000003-0002-0008-8000-000000000000");
    let plug = |guest: &Guest, hosted: bool| {
        let function = |number, vectors: bool, backend: bool| {
            let device = Hosted {
                device: TestDevice::new(9, &*guest.host).unwrap(),
                vectors: hosted && vectors,
                backend: (hosted && backend).then(|| DmaPort::new(guest.ram.clone())),
            };
            FunctionSpec::new(number, Arc::new(device))
        };
        let spec = BusSpec {
            instance: other,
            functions: vec![
                function(0, false, false),
                function(1, true, false),
                function(5, false, true),
            ],
        };
        guest.partition.plug(spec).unwrap();
    };
    let guest = busy();
    plug(&guest, true);
    let refused = |functions: &[u8]| StateInHardware {
        bus: other,
        functions: functions.to_vec(),
    };
    let error = guest.partition.save().unwrap_err();
    assert_eq!(error, refused(&[1, 5]));
    let words = error.to_string();
    assert!(words.contains(&format!("functions 1, 5 of bus {other} ")));
    // The guest goes on; it is told of the other bus.
    guest.host.run();
    assert_eq!(guest.copy(0x77), [Msi::fixed(1, 0x41)]);
    assert!(guest.partition.remove_function(&other, 1).is_ok());
    assert_eq!(guest.partition.save(), Err(refused(&[5])));
    assert!(guest.partition.remove(&other));
    guest.partition.save().unwrap();

    let emulated = busy();
    plug(&emulated, false);
    let state = emulated.partition.save().unwrap();
    let next = Guest::new();
    plug(&next, true);
    assert_eq!(
        next.partition.restore(&state),
        Err(PartitionStateError::InHardware(refused(&[1, 5])))
    );
    assert!(!next.partition.buses()[0].open, "as after a reset");
    assert!(next.partition.remove(&other));
    plug(&next, false);
    next.partition.restore(&state).unwrap();
}

#[cfg(feature = "serde")]
mod serialised;

use super::super::testing::*;
use super::*;
use crate::devices::testdev::{self, TestDevice, register};
use crate::hv::vpci as wire;
use crate::hv::vpci::MessageType as T;
use crate::hypercall::VpSet;
use crate::vmm::Msi;
use crate::vpci::function::PciFunction;
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

const BAR: u64 = HIGH + 0x10_0000;
const V1_4: u32 = 0x0001_0004;

/// A bus with a testdev as function 0 and another one as function 3.
fn guest_and_devices() -> (Guest, [Arc<TestDevice>; 2]) {
    let workers = Arc::new(HandLoop::default());
    let devices = [8, 9].map(|serial| TestDevice::new(serial, &*workers).unwrap());
    let [first, second] = devices.clone();
    let functions: Vec<(u8, Arc<dyn PciFunction>)> = vec![(3, second), (0, first)];
    (Guest::new(workers, functions, |_| {}), devices)
}

fn guest() -> Guest {
    guest_and_devices().0
}

fn retarget(
    guest: &Guest,
    function: u8,
    data: u32,
    vector: u8,
    vps: &[u32],
) -> Result<(), HvStatus> {
    let mut targets = VpSet::new();
    for vp in vps {
        targets.insert(*vp);
    }
    guest.bus.retarget(
        function,
        &RetargetInterrupt {
            device_id: 0,
            msi_address: ADDRESS as u32,
            msi_data: data,
            vector,
            multicast: false,
            targets,
        },
    )
}

/// Creates an interrupt for an MSI-X vector and programs its entry, as Linux does.
fn map_vector(guest: &Guest, entry: u64, vector: u32) -> wire::Message {
    let reply: wire::CreateInterruptReply = guest.request(&create(0, vector, 1, 0));
    let table = BAR + 0x1000 + entry * 16;
    guest.store32(table, reply.message.address.get() as u32);
    guest.store32(table + 4, (reply.message.address.get() >> 32) as u32);
    guest.store32(table + 8, reply.message.data.get());
    guest.store32(table + 12, 0);
    reply.message
}

/// Brings function 0 up: BAR placed, decode and bus mastering on, MSI-X on.
fn bring_up(guest: &Guest) {
    guest.request::<wire::ResourcesAssignedReply>(&assigned(0));
    guest.config_write(0, 4, 0);
    guest.config_write(0, 0x10, BAR as u32);
    guest.config_write(0, 0x14, (BAR >> 32) as u32);
    guest.config_write(0, 4, 6);
    let msix = guest.capability(0, 0x11);
    guest.config_write(0, msix, 0x8000_0000);
}

#[test]
fn a_linux_guest_probes_the_bus_and_moves_data() {
    let mut guest = guest();
    guest.open();
    // Linux asks for 1.4 first; a host that is asked for more says so.
    assert_eq!(guest.status(&query_version(0x0001_0005)), 0xc000_0059);
    let reply: wire::QueryProtocolVersionReply = guest.request(&query_version(V1_4));
    assert_eq!(reply.version.get(), V1_4);

    guest.send(0, false, header(T::QueryBusRelations).as_bytes());
    guest.workers.run();
    let relations = guest.receive();
    assert_eq!(relations.len(), 1, "no completion was asked for");
    let (id, relations) = &relations[0];
    assert_eq!(*id, 0);
    let (head, rest) = wire::BusRelations::read_from_prefix(relations).unwrap();
    assert_eq!(head.message_type.get(), T::BusRelations2.code());
    assert_eq!(head.count.get(), 2);
    assert_eq!(rest.len(), 2 * 28);
    let (first, rest) = wire::DeviceDescription2::read_from_prefix(rest).unwrap();
    let (second, _) = wire::DeviceDescription2::read_from_prefix(rest).unwrap();
    assert_eq!(first.base.vendor.get(), testdev::VENDOR);
    assert_eq!((first.base.slot.get(), second.base.slot.get()), (0, 3 << 5));
    assert_eq!((first.base.serial.get(), second.base.serial.get()), (8, 9));
    assert_eq!((first.flags.get(), first.numa_node.get()), (1, 1));

    let reply: wire::ResourceRequirementsReply =
        guest.request(&to_slot(T::QueryResourceRequirements, 0));
    let bars = reply.bars.map(|bar| bar.get());
    assert_eq!(bars, [0xffff_c004, 0xffff_ffff, 0, 0, 0, 0]);

    let (unsolicited, completion) = guest.exchange(d0_entry(guest.window).as_bytes());
    assert_eq!(
        unsolicited,
        std::slice::from_ref(relations),
        "once more before the completion"
    );
    assert_eq!(status(&completion), 0);
    assert_eq!(guest.config_read(0, 0), 0x5650_1234);
    assert_eq!(guest.config_read(0, 0xc) >> 16 & 0xff, 0x80);
    assert_eq!(guest.config_read(3, 0xc) >> 16 & 0xff, 0);
    assert_eq!(guest.config_read(1, 0), !0);

    bring_up(&guest);
    assert_eq!(guest.load32(BAR), testdev::MAGIC);
    // The placeholder first, the real one later; the DELETE precedes the CREATE in the ring.
    let placeholder = map_vector(&guest, 2, 0xef);
    assert_eq!(placeholder.count.get(), 1);
    guest.send(0, false, delete(0, placeholder).as_bytes());
    let message = map_vector(&guest, 2, 0x41);
    retarget(&guest, 0, message.data.get(), 0x52, &[3]).unwrap();

    guest.ram.write(0x2_0000, b"bytes from the guest").unwrap();
    guest.store64(BAR + register::SOURCE, 0x2_0000);
    guest.store64(BAR + register::DESTINATION, 0x3_0000);
    guest.store32(BAR + register::LENGTH, 20);
    guest.store32(BAR + register::VECTOR, 2);
    guest.store32(BAR + register::COMMAND, testdev::COMMAND_COPY);
    guest.workers.run();
    assert_eq!(guest.msi.take(), [Msi::fixed(6, 0x52)]);
    let mut back = [0; 20];
    guest.ram.read(0x3_0000, &mut back).unwrap();
    assert_eq!(&back, b"bytes from the guest");

    let report = guest.bus.report();
    assert!(report.open);
    assert_eq!(report.version, Some(ProtocolVersion::V1_4));
    assert_eq!(report.window, Some(guest.window));
    assert_eq!(report.functions[0].vectors[2].raised, 1);
    assert_eq!(report.functions[0].live_messages, 1);
    assert_eq!(report.functions[0].bars[0], Some(BAR));
    assert_eq!(report.functions[1].id.code(), 0x1234_ab7b);
    assert_eq!(guest.bus.ids().len(), 2);
}

#[test]
fn closing_the_channel_takes_everything_back_and_the_bus_can_be_opened_again() {
    let mut guest = guest();
    for _ in 0..2 {
        guest.power_on(V1_4);
        bring_up(&guest);
        let message = map_vector(&guest, 0, 0x41);
        assert_eq!(message.data.get(), 0, "handles start anew");
        guest.store32(BAR + register::RAISE, 0);
        assert_eq!(guest.msi.take().len(), 1);
        guest.store32(BAR + register::LENGTH, 0x10000);
        guest.store32(BAR + register::COMMAND, testdev::COMMAND_FILL);
        guest.bus.close();
        guest.workers.run();
        assert!(guest.msi.take().is_empty());
        assert_eq!(guest.load32(BAR), !0);
        assert_eq!(guest.load32(guest.window + 0x1000), !0);
        assert_eq!(
            retarget(&guest, 0, 0, 0x41, &[0]),
            Err(HvStatus::INVALID_PARAMETER)
        );
        let report = guest.bus.report();
        assert_eq!(
            (report.open, report.version, report.window),
            (false, None, None)
        );
        assert_eq!(report.functions[0].live_messages, 0);
        let mut untouched = [1];
        guest.ram.read(0, &mut untouched).unwrap();
        assert_eq!(untouched, [0]);
    }
    guest.bus.reset();
    assert_eq!(guest.bus.report().functions[0].vectors[0].raised, 0);
}

#[test]
fn the_guest_may_leave_d0_without_releasing_anything() {
    let mut guest = guest();
    guest.power_on(V1_4);
    bring_up(&guest);
    map_vector(&guest, 0, 0x41);
    assert_eq!(guest.status(&header(T::BusD0Exit)), 0);
    assert_eq!(guest.load32(BAR), !0);
    assert_eq!(guest.config_read(0, 0), !0);
    assert_eq!(guest.bus.report().functions[0].live_messages, 0);
    assert_eq!(guest.status(&header(T::BusD0Exit)), 0);
    assert_eq!(guest.status(&d0_entry(guest.window)), 0);
    assert_eq!(guest.config_read(0, 4), 0x0010_0000);
    assert_eq!(guest.config_read(0, 0x10), 4);
}

#[test]
fn requests_are_answered_in_order_once_each_and_only_when_asked() {
    let mut guest = guest();
    guest.open();
    for id in 1..=64 {
        guest.send(id, id % 2 == 0, query_version(V1_4).as_bytes());
    }
    guest.workers.run();
    let answers = guest.receive();
    let ids: Vec<u64> = answers.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, (1..=32).map(|i| 2 * i).collect::<Vec<_>>());
    // The first was accepted; from then on the question is out of place.
    assert!(
        answers
            .iter()
            .all(|(_, answer)| status(answer) == 0xc000_0184)
    );
    assert_eq!(
        guest.interrupts(),
        1,
        "signalled when the ring became non-empty"
    );
    let counters = guest.bus.report().protocol;
    assert_eq!((counters.requests, counters.refused), (64, 63));
}

#[test]
fn a_guest_that_does_not_read_stalls_its_own_bus_and_loses_nothing() {
    let mut guest = guest();
    guest.power_on(V1_4);
    let question = to_slot(T::QueryResourceRequirements, 0);
    let mut sent = 0u64;
    // Far more completions than the ring holds.
    for _ in 0..10 {
        for _ in 0..60 {
            sent += 1;
            guest.send(sent, true, question.as_bytes());
        }
        guest.workers.run();
        if guest.bus.report().protocol.requests < sent {
            break;
        }
    }
    let handled = guest.bus.report().protocol.requests;
    assert!(handled < sent, "the ring never became full");
    let mut next = 1;
    for _ in 0..100 {
        for (id, answer) in guest.receive() {
            assert_eq!((id, status(&answer)), (next, 0));
            next += 1;
        }
        guest.workers.run();
    }
    assert_eq!(next, sent + 1);
}

#[test]
fn a_corrupt_ring_stops_until_the_channel_is_closed() {
    let mut guest = guest();
    guest.open();
    guest.to_host.store(0, 3);
    for _ in 0..3 {
        guest.bus.signalled();
        guest.workers.run();
    }
    assert_eq!(guest.bus.report().corrupt_rings, 1);
    guest.to_host.store(0, 0);
    guest.to_host.send(1, true, query_version(V1_4).as_bytes());
    guest.bus.signalled();
    guest.workers.run();
    assert!(guest.receive().is_empty());
    guest.bus.close();
    guest.power_on(V1_4);
    assert_eq!(guest.config_read(0, 0), 0x5650_1234);
}

/// Counts the lines that the library logs on this thread.
#[derive(Debug)]
struct LineCount;

thread_local! {
    static LINES: std::cell::Cell<u32> = const { std::cell::Cell::new(0) };
}

impl log::Log for LineCount {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, _: &log::Record<'_>) {
        LINES.set(LINES.get() + 1);
    }

    fn flush(&self) {}
}

#[test]
fn a_guest_that_keeps_corrupting_its_ring_fills_no_log() {
    log::set_logger(&LineCount).unwrap();
    log::set_max_level(log::LevelFilter::Warn);
    let mut guest = guest();
    for _ in 0..1000 {
        guest.open();
        guest.to_host.store(0, 3);
        guest.bus.signalled();
        guest.workers.run();
        guest.bus.close();
    }
    assert_eq!(guest.bus.report().corrupt_rings, 1000);
    assert!((1..=10).contains(&LINES.get()), "{} lines", LINES.get());
}

/// With the worker stuck in a request, as in the worst case.
#[test]
fn configuration_reads_and_retargets_wait_for_no_worker() {
    let mut guest = guest();
    guest.power_on(V1_4);
    bring_up(&guest);
    let message = map_vector(&guest, 0, 0x41);
    let worker = lock(&guest.bus.channel);
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let id = guest.config_read(0, 0);
            let moved = retarget(&guest, 0, message.data.get(), 0x77, &[1]);
            guest.store32(BAR + register::RAISE, 0);
            send.send((id, moved)).unwrap();
        });
        let answer = receive.recv_timeout(std::time::Duration::from_secs(10));
        drop(worker);
        assert_eq!(answer, Ok((0x5650_1234, Ok(()))));
    });
    assert_eq!(guest.msi.take(), [Msi::fixed(2, 0x77)]);
}

#[test]
fn a_retarget_is_for_a_live_message_of_an_existing_function() {
    let mut guest = guest();
    guest.power_on(V1_4);
    let message: wire::CreateInterruptReply = guest.request(&create(0, 0x41, 1, 0));
    let data = message.message.data.get();
    assert_eq!(retarget(&guest, 0, data, 0x50, &[0, 3]), Ok(()));
    for function in [1, 7, 8, 255] {
        assert_eq!(
            retarget(&guest, function, data, 0x50, &[0]),
            Err(HvStatus::INVALID_DEVICE_ID)
        );
    }
    for (function, data, vector, vps) in [
        (3, data, 0x50, &[0][..]),
        (0, data + 1, 0x50, &[0]),
        (0, u32::MAX, 0x50, &[0]),
        (0, data, 0xf, &[0]),
        (0, data, 0x50, &[]),
        (0, data, 0x50, &[4]),
    ] {
        assert_eq!(
            retarget(&guest, function, data, vector, vps),
            Err(HvStatus::INVALID_PARAMETER)
        );
    }
}

#[test]
fn impossible_buses_are_refused_with_the_reason() {
    let workers = HandLoop::default();
    let ram = crate::vmbus::ring::guest::ram(4);
    let make = |numbers: &[u8]| {
        let device = |_: &u8| -> Arc<dyn PciFunction> { TestDevice::new(1, &workers).unwrap() };
        let specs = numbers.iter().map(|n| FunctionSpec::new(*n, device(n)));
        let functions = specs.collect();
        let config = BusConfig {
            instance: INSTANCE,
            numa_node: None,
        };
        Bus::new(config, functions, host(&ram, &Arc::default()), &workers).unwrap_err()
    };
    assert!(matches!(make(&[]), BusError::NoFunction0));
    assert!(matches!(make(&[1]), BusError::NoFunction0));
    assert!(matches!(
        make(&[0, 8]),
        BusError::FunctionNumber { number: 8 }
    ));
    assert!(matches!(
        make(&[0, 2, 2]),
        BusError::DuplicateFunction { number: 2 }
    ));
}

#[test]
fn rings_too_small_for_an_answer_are_refused_at_open() {
    let guest = guest();
    let ram = &guest.ram;
    let channel = |pages: &[u64]| OpenedChannel {
        reader: crate::vmbus::ring::RingReader::open(ram.clone(), pages).unwrap(),
        writer: crate::vmbus::ring::RingWriter::open(ram.clone(), pages).unwrap(),
        signal: crate::vmbus::ChannelSignal::new(guest.interrupted.clone(), 2, 1, None),
    };
    // One data page is the smallest ring there is, and enough.
    guest.bus.open(channel(&[20, 21])).unwrap();
    let twice = guest.bus.open(channel(&[20, 21])).unwrap_err();
    assert_eq!(twice, OpenError::NotReady);
}

fn twin(of: &Guest) -> Guest {
    let other = guest();
    let state = of.bus.save();
    other.bus.restore(&state).unwrap();
    assert_eq!(other.bus.save(), state);
    other
}

#[test]
fn a_restored_bus_takes_interrupts_and_accesses_as_before() {
    let mut guest = guest();
    guest.power_on(V1_4);
    bring_up(&guest);
    let message = map_vector(&guest, 1, 0x41);
    retarget(&guest, 0, message.data.get(), 0x66, &[2]).unwrap();
    guest.store32(BAR + 0x1000 + 16 + 12, 1);
    guest.store32(BAR + register::RAISE, 1);
    assert!(guest.msi.take().is_empty());
    let copy = twin(&guest);
    assert_eq!(copy.load32(BAR), testdev::MAGIC);
    assert_eq!(copy.config_read(0, 0x14), (BAR >> 32) as u32);
    assert_eq!(copy.load64(BAR + 0x2000), 0b10);
    copy.store32(BAR + 0x1000 + 16 + 12, 0);
    assert_eq!(copy.msi.take(), [Msi::fixed(4, 0x66)]);
}

#[test]
fn an_impossible_saved_bus_is_refused_and_leaves_the_bus_reset() {
    let mut guest = guest();
    guest.power_on(V1_4);
    bring_up(&guest);
    map_vector(&guest, 0, 0x41);
    let good = guest.bus.save();
    let check = |change: &dyn Fn(&mut crate::vpci::BusState)| {
        let other = self::guest();
        let clean = other.bus.save();
        let mut state = good.clone();
        change(&mut state);
        let error = other.bus.restore(&state).unwrap_err();
        assert_eq!(other.bus.save(), clean);
        error
    };
    use crate::vpci::RestoreError as E;
    assert_eq!(check(&|s| s.version = 0), E::Version { version: 0 });
    assert_eq!(
        check(&|s| s.protocol_version = Some(7)),
        E::ProtocolVersion { version: 7 }
    );
    assert_eq!(check(&|s| s.functions.truncate(1)), E::Functions);
    assert_eq!(check(&|s| s.functions[1].number = 2), E::Functions);
    assert_eq!(
        check(&|s| s.functions[0].config[0] ^= 1),
        E::Config { number: 0 }
    );
    assert!(matches!(check(&|s| s.window = Some(0)), E::Window(_)));
    assert_eq!(check(&|s| s.protocol_version = None), E::Unnegotiated);
    let unpowered = |change: &dyn Fn(&mut crate::vpci::FunctionState)| {
        check(&|s| {
            s.window = None;
            for function in &mut s.functions {
                // COMMAND.
                function.config[1] &= !6;
                function.interrupts.messages.clear();
            }
            change(&mut s.functions[1]);
        })
    };
    assert_eq!(unpowered(&|f| f.config[1] |= 2), E::Power { number: 3 });
    assert_eq!(unpowered(&|f| f.config[1] |= 4), E::Power { number: 3 });
    assert_eq!(
        unpowered(&|f| f.interrupts.messages = good.functions[0].interrupts.messages.clone()),
        E::Power { number: 3 }
    );
    assert!(matches!(
        check(&|s| s.functions[1].interrupts.entries.clear()),
        E::Interrupts { number: 3, .. }
    ));
}

/// What a hostile guest does.
#[derive(Debug, Clone)]
enum Act {
    /// A request with a type of its own and random bytes behind.
    Packet(u32, Vec<u8>, bool),
    /// One that has a chance to succeed.
    Known(u8, u32, u64, u16),
    Config(u8, u16, u32),
    Bar(u64, u32),
    Retarget(u8, u32, u8, u32),
    Close,
}

fn act() -> impl Strategy<Value = Act> {
    let bytes = proptest::collection::vec(any::<u8>(), 0..200);
    prop_oneof![
        3 => (0u32..0x20, bytes, any::<bool>())
            .prop_map(|(n, bytes, flag)| Act::Packet(0x4249_0000 + n, bytes, flag)),
        6 => (0u8..9, 0u32..3, 0u64..4, 0u16..5)
            .prop_map(|(kind, slot, place, n)| Act::Known(kind, slot * 0x30, place, n)),
        6 => (0u8..5, 0u16..0x50, any::<u32>()).prop_map(|(f, o, v)| Act::Config(f, o * 4, v)),
        // All registers but the one that starts DMA, which could write the rings.
        4 => (0u64..0x4000, any::<u32>()).prop_map(|(offset, value)| match offset & !3 {
            register::COMMAND => Act::Bar(register::RAISE, value % 8),
            offset => Act::Bar(offset, value),
        }),
        2 => (0u8..5, 0u32..8, any::<u8>(), 0u32..5)
            .prop_map(|(f, d, v, p)| Act::Retarget(f, d, v, p)),
        1 => Just(Act::Close),
    ]
}

/// Does what a hostile guest does; returns what it sees.
fn perform(guest: &mut Guest, act: &Act) -> Vec<(u64, Vec<u8>)> {
    let send = |guest: &Guest, completion, bytes: &[u8]| {
        guest.send(5, completion, bytes);
        guest.workers.run();
        let seen = guest.receive();
        let answers = seen.iter().filter(|(id, _)| *id == 5).count();
        assert_eq!(answers, usize::from(completion));
        seen
    };
    match act {
        Act::Packet(code, bytes, completion) => {
            let mut message = code.to_le_bytes().to_vec();
            message.extend(bytes);
            return send(guest, *completion, &message);
        }
        Act::Known(kind, slot, place, n) => {
            let window = [LOW, LOW + 0x1000, HIGH, 0x1000][*place as usize];
            return match kind {
                0 => send(
                    guest,
                    true,
                    query_version(0x0001_0001 + u32::from(*n)).as_bytes(),
                ),
                1 | 2 => {
                    let seen = send(guest, true, d0_entry(window).as_bytes());
                    if status(&seen.last().unwrap().1) == 0 {
                        guest.window = window;
                    }
                    seen
                }
                3 => send(guest, true, header(T::BusD0Exit).as_bytes()),
                4 => send(guest, true, assigned(*slot).as_bytes()),
                5 => send(
                    guest,
                    false,
                    to_slot(T::ResourcesReleased, *slot).as_bytes(),
                ),
                6 => send(
                    guest,
                    true,
                    create(*slot, 0x30, *n, *place as u16).as_bytes(),
                ),
                7 => {
                    let message = wire::Message {
                        data: u32::from(*n).into(),
                        address: ADDRESS.into(),
                        ..Default::default()
                    };
                    send(guest, false, delete(*slot, message).as_bytes())
                }
                _ => send(guest, true, header(T::QueryBusRelations).as_bytes()),
            };
        }
        Act::Config(function, offset, value) => {
            // Half of the BAR writes aim at the apertures.
            let value = match offset {
                0x14 if value & 1 != 0 => (HIGH >> 32) as u32,
                0x10 if value & 1 != 0 => value & 0x00ff_f000,
                _ => *value,
            };
            guest.config_write(*function, (*offset).into(), value);
            return vec![(
                0,
                guest
                    .config_read(*function, (*offset).into())
                    .as_bytes()
                    .to_vec(),
            )];
        }
        Act::Bar(offset, value) => {
            let mapped = guest.bus.report().functions[0].bars[0];
            let gpa = mapped.unwrap_or(BAR) + offset;
            guest.store32(gpa, *value);
            guest.workers.run();
            return vec![(0, guest.load32(gpa).as_bytes().to_vec())];
        }
        Act::Retarget(function, data, vector, vp) => {
            let result = retarget(guest, *function, *data, *vector, &[*vp]);
            let code = result.map_or_else(|status| status.code(), |()| 0);
            return vec![(0, code.as_bytes().to_vec())];
        }
        Act::Close => {
            guest.bus.close();
            guest.open();
        }
    }
    Vec::new()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_hostile_guest_gets_one_answer_a_request_and_a_saved_bus_gives_the_same_ones(
        before in proptest::collection::vec(act(), 0..60),
        after in proptest::collection::vec(act(), 0..40),
    ) {
        let (mut guest, devices) = guest_and_devices();
        guest.power_on(V1_4);
        for act in &before {
            perform(&mut guest, act);
        }
        guest.msi.take();
        let (mut copy, copy_devices) = guest_and_devices();
        copy.bus.restore(&guest.bus.save()).unwrap();
        for (device, other) in devices.iter().zip(&copy_devices) {
            other.restore(device.save()).unwrap();
        }
        copy.open();
        copy.window = guest.window;
        for act in &after {
            prop_assert_eq!(perform(&mut guest, act), perform(&mut copy, act));
            prop_assert_eq!(guest.msi.take(), copy.msi.take());
        }
        prop_assert_eq!(guest.bus.save(), copy.bus.save());
        // Whatever happened, a new opening finds a working bus.
        guest.bus.close();
        guest.window = LOW;
        guest.power_on(V1_4);
        bring_up(&guest);
        prop_assert_eq!(guest.load32(BAR), testdev::MAGIC);
    }
}

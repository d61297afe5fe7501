use super::super::bus::Bus;
use super::super::testing::*;
use super::*;
use crate::devices::testdev::TestDevice;
use crate::hv::vpci::MessageType as T;
use crate::vmbus::ChannelDevice;
use crate::vpci::function::PciFunction;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const V1_4: u32 = 0x0001_0004;

/// A bus with functions 0 and 3.
fn guest() -> Guest {
    let workers = Arc::new(HandLoop::default());
    let device = |serial| TestDevice::new(serial, &*workers).unwrap();
    let functions: Vec<(u8, Arc<dyn PciFunction>)> = vec![(0, device(1)), (3, device(2))];
    Guest::new(workers, functions, |_| {})
}

/// How often the one who asked was told.
#[derive(Clone, Default)]
struct Told(Arc<AtomicU32>);

impl Told {
    fn times(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }
}

fn eject(bus: &Bus) -> Told {
    let told = Told::default();
    let count = told.0.clone();
    bus.eject(Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    }))
    .unwrap();
    told
}

/// Slots of the EJECTs among what the guest received.
fn ejects(packets: &[(u64, Vec<u8>)]) -> Vec<u32> {
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    };
    packets
        .iter()
        .filter(|(_, payload)| word(payload, 0) == T::Eject.code() && payload.len() == 8)
        .map(|(_, payload)| word(payload, 4))
        .collect()
}

fn complete(guest: &Guest, slot: u32) {
    let message = wire::EjectionComplete {
        message_type: T::EjectionComplete.code().into(),
        slot: slot.into(),
        status: 0.into(),
    };
    // Linux asks for no completion.
    guest.send(0, false, message.as_bytes());
    guest.workers.run();
}

#[test]
fn the_guest_is_asked_for_each_function_and_the_caller_told_when_it_let_go_of_all() {
    let mut guest = guest();
    guest.power_on(V1_4);
    guest.receive();
    let told = eject(&guest.bus);
    guest.workers.run();
    assert_eq!(ejects(&guest.receive()), [0, 3 << 5]);
    complete(&guest, 3 << 5);
    complete(&guest, 3 << 5);
    assert_eq!(told.times(), 0, "one function twice is not two functions");
    complete(&guest, 0);
    assert_eq!(told.times(), 1);
    complete(&guest, 0);
    assert_eq!(told.times(), 1);
    assert!(
        guest.receive().is_empty(),
        "no answer that was not asked for"
    );
    // The bus is there until it is removed.
    assert_eq!(guest.config_read(0, 0), 0x5650_1234);
    let again = eject(&guest.bus);
    guest.workers.run();
    assert_eq!(ejects(&guest.receive()).len(), 2);
    assert_eq!(again.times(), 0, "old answers do not count");
}

#[test]
fn a_bus_that_the_guest_has_not_opened_needs_no_asking() {
    let guest = guest();
    assert_eq!(eject(&guest.bus).times(), 1);
    assert_eq!(eject(&guest.bus).times(), 1);
}

#[test]
fn who_asks_twice_is_refused_and_not_told() {
    let mut guest = guest();
    guest.power_on(V1_4);
    let first = eject(&guest.bus);
    let second = guest.bus.eject(Box::new(|| panic!("told")));
    assert_eq!(second, Err(EjectError::Busy));
    guest.bus.remove();
    assert_eq!(first.times(), 1);
}

#[test]
fn close_reset_and_removal_end_the_wait_once() {
    let ends: [fn(&Bus); 3] = [|bus| bus.close(), Bus::reset, Bus::remove];
    for end in ends {
        let mut guest = guest();
        guest.power_on(V1_4);
        let told = eject(&guest.bus);
        guest.workers.run();
        end(&guest.bus);
        assert_eq!(told.times(), 1);
        end(&guest.bus);
        assert_eq!(told.times(), 1);
    }
}

#[test]
fn a_full_ring_delays_the_request_and_loses_neither_it_nor_others() {
    let mut guest = guest();
    guest.power_on(V1_4);
    guest.receive();
    // Answers fill the ring while the guest takes none of them.
    let mut sent = 0;
    let query = header(T::QueryBusRelations);
    while let Some(signal) = guest.to_host.send(1 + sent, true, query.as_bytes()) {
        if signal {
            guest.bus.signalled();
        }
        guest.workers.run();
        sent += 1;
    }
    let told = eject(&guest.bus);
    guest.workers.run();
    let mut packets = Vec::new();
    loop {
        let more = guest.receive();
        guest.workers.run();
        if more.is_empty() {
            break;
        }
        packets.extend(more);
    }
    assert_eq!(ejects(&packets), [0, 3 << 5]);
    let completions = packets.iter().filter(|(id, _)| *id != 0).count();
    assert_eq!(completions as u64, sent);
    complete(&guest, 0);
    complete(&guest, 3 << 5);
    assert_eq!(told.times(), 1);
}

#[test]
fn an_answer_before_the_question_does_not_count() {
    let mut ejection = Ejection::new(0b1001, Box::new(|| {}));
    ejection.released(!0);
    assert!(!ejection.is_complete());
    ejection.unsent = 0b1000;
    ejection.released(!0);
    assert!(!ejection.is_complete(), "function 3 was not asked for yet");
    ejection.unsent = 0;
    ejection.released(0b1000);
    assert!(ejection.is_complete());
}

/// A bus with functions 0, 2 and 3 in D0, and the device of function 2.
fn three() -> (Guest, Arc<TestDevice>) {
    let workers = Arc::new(HandLoop::default());
    let devices = [0, 2, 3].map(|serial| TestDevice::new(serial, &*workers).unwrap());
    let second = devices[1].clone();
    let functions = [0, 2, 3].into_iter().zip(devices);
    let functions = functions.map(|(number, device)| (number, device as Arc<dyn PciFunction>));
    let mut guest = Guest::new(workers, functions.collect(), |_| {});
    guest.power_on(V1_4);
    guest.receive();
    (guest, second)
}

/// Function numbers of the relations among what the guest received, message by message.
fn relations(packets: &[(u64, Vec<u8>)]) -> Vec<Vec<u8>> {
    let descriptions = |payload: &[u8]| {
        let all = payload[8..].chunks_exact(size_of::<wire::DeviceDescription2>());
        all.map(|description| description[12] >> 5).collect()
    };
    packets
        .iter()
        .filter(|(id, payload)| *id == 0 && payload[..4] == T::BusRelations2.code().to_le_bytes())
        .map(|(_, payload)| descriptions(payload))
        .collect()
}

fn eject_function(bus: &Bus, number: u8) -> Told {
    let told = Told::default();
    let count = told.0.clone();
    let done = Box::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    bus.eject_function(number, done).unwrap();
    told
}

#[test]
fn one_function_leaves_and_the_others_stay() {
    let (guest, device) = three();
    let told = eject_function(&guest.bus, 2);
    guest.workers.run();
    assert_eq!(ejects(&guest.receive()), [2 << 5]);
    complete(&guest, 3 << 5);
    assert_eq!(told.times(), 0, "the answer of another function");
    complete(&guest, 2 << 5);
    assert_eq!(told.times(), 1);
    assert_eq!(guest.config_read(2, 0), 0x5650_1234, "until it is removed");
    let back = guest.bus.remove_function(2).unwrap();
    assert_eq!(guest.config_read(2, 0), u32::MAX);
    guest.workers.run();
    assert_eq!(relations(&guest.receive()), [[0, 3]]);
    assert_eq!(guest.config_read(0, 0), 0x5650_1234);
    let numbers: Vec<u8> = guest
        .bus
        .report()
        .functions
        .iter()
        .map(|f| f.number)
        .collect();
    assert_eq!(numbers, [0, 3]);
    // Nothing of the bus holds on to it.
    drop(back);
    assert_eq!(Arc::strong_count(&device), 1);
    // The guest has never heard of it.
    for message in [T::EjectionComplete, T::GetResources, T::ResourcesReleased] {
        assert_eq!(guest.status(&to_slot(message, 2 << 5)), 0xc000_090b);
    }
    assert_eq!(told.times(), 1);
    let (unasked, _) = guest.exchange(header(T::QueryBusRelations).as_bytes());
    assert_eq!(relations(&[(0, unasked[0].clone())]), [[0, 3]]);
}

#[test]
fn function_0_and_functions_that_there_are_not_cannot_leave() {
    let (guest, _) = three();
    let before = guest.bus.report();
    for (number, error) in [
        (0, EjectError::Function0),
        (1, EjectError::NoSuchFunction { number: 1 }),
        (8, EjectError::NoSuchFunction { number: 8 }),
        (255, EjectError::NoSuchFunction { number: 255 }),
    ] {
        let told = Box::new(|| panic!("told"));
        assert_eq!(guest.bus.eject_function(number, told), Err(error));
        assert_eq!(guest.bus.remove_function(number).unwrap_err(), error);
    }
    guest.bus.remove_function(2).unwrap();
    let again = EjectError::NoSuchFunction { number: 2 };
    assert_eq!(guest.bus.remove_function(2).unwrap_err(), again);
    guest.bus.remove_function(3).unwrap();
    assert_eq!(guest.bus.report().functions, before.functions[..1]);
}

#[test]
fn a_function_that_is_taken_away_unanswered_is_waited_for_no_longer() {
    let (guest, _) = three();
    let told = eject_function(&guest.bus, 2);
    guest.workers.run();
    let busy = guest.bus.eject_function(3, Box::new(|| panic!("told")));
    assert_eq!(busy, Err(EjectError::Busy));
    guest.bus.remove_function(2).unwrap();
    assert_eq!(told.times(), 1);
    complete(&guest, 2 << 5);
    assert_eq!(told.times(), 1);
    assert_eq!(ejects(&guest.receive()), [2 << 5]);
    // The whole bus, in the middle of which another is torn out.
    let all = eject(&guest.bus);
    guest.bus.remove_function(3).unwrap();
    guest.workers.run();
    assert_eq!(ejects(&guest.receive()), [0]);
    assert_eq!(all.times(), 0);
    complete(&guest, 0);
    assert_eq!(all.times(), 1);
}

#[test]
fn new_relations_lose_no_answer_and_are_not_sent_without_a_version() {
    let workers = Arc::new(HandLoop::default());
    let device =
        |number| -> (u8, Arc<dyn PciFunction>) { (number, TestDevice::new(1, &*workers).unwrap()) };
    let functions = (0..8).map(device).collect();
    let mut guest = Guest::new(workers.clone(), functions, |_| {});
    guest.power_on(V1_4);
    guest.receive();
    let query = header(T::QueryBusRelations);
    let mut sent = 0;
    while let Some(signal) = guest.to_host.send(1 + sent, true, query.as_bytes()) {
        if signal {
            guest.bus.signalled();
        }
        guest.workers.run();
        sent += 1;
    }
    for number in 1..8 {
        guest.bus.remove_function(number).unwrap();
        guest.workers.run();
    }
    let mut all = Vec::new();
    loop {
        let more = guest.receive();
        guest.workers.run();
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    let completions = all.iter().filter(|(id, _)| *id != 0).count();
    assert_eq!(completions as u64, sent, "no answer is lost");
    assert_eq!(relations(&all).last(), Some(&vec![0]));
    assert!(!guest.bus.save().relations_due);
    // Without a version there is none to send; and what is due ends with the channel.
    let mut guest = self::guest();
    guest.open();
    guest.bus.remove_function(3).unwrap();
    guest.workers.run();
    assert!(guest.receive().is_empty());
    guest.bus.close();
    assert!(!guest.bus.save().relations_due);
    guest.open();
    assert!(guest.receive().is_empty());
}

#[test]
fn relations_that_are_due_outlive_a_restore() {
    let (guest, _) = three();
    guest.bus.remove_function(2).unwrap();
    let state = guest.bus.save();
    assert!(state.relations_due);
    let (mut other, _) = three();
    assert!(other.bus.restore(&state).is_err(), "it has function 2");
    other.bus.remove_function(2).unwrap();
    other.bus.restore(&state).unwrap();
    assert_eq!(other.bus.save(), state);
    other.open();
    assert_eq!(relations(&other.receive()), [[0, 3]]);
}

#[test]
fn a_bus_of_which_function_0_is_left_is_as_one_that_never_had_another() {
    let mut guest = guest();
    guest.power_on(V1_4);
    assert_eq!(guest.config_read(0, 12) >> 16, 0x80, "of several functions");
    guest.bus.remove_function(3).unwrap();
    guest.workers.run();
    assert_eq!(guest.config_read(0, 12) >> 16, 0);
    guest.config_write(0, 12, 0x40);
    let state = guest.bus.save();
    let workers = Arc::new(HandLoop::default());
    let device = TestDevice::new(1, &*workers).unwrap();
    let other = Guest::new(workers, vec![(0, device)], |_| {});
    other.bus.restore(&state).unwrap();
    assert_eq!(other.bus.save(), state);
    guest.bus.reset();
    guest.power_on(V1_4);
    assert_eq!(guest.config_read(0, 12) >> 16, 0);
}

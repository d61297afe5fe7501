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
    let guest = guest();
    let mut ejection = Ejection::new(&guest.bus.core, Box::new(|| {}));
    ejection.released(!0);
    assert!(!ejection.is_complete());
    ejection.unsent = 0b1000;
    ejection.released(!0);
    assert!(!ejection.is_complete(), "function 3 was not asked for yet");
    ejection.unsent = 0;
    ejection.released(0b1000);
    assert!(ejection.is_complete());
}

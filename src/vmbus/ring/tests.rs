//! Host and guest side against each other, and the host side against a hostile guest.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::guest::{GuestRing, Received, map, ram};
use super::*;
use crate::hv::vmbus::ring::*;

mod threads;

/// Control page and two data pages, in an order that makes every page a run of its own.
const PFNS: [u64; 3] = [3, 7, 5];

fn reader() -> (GuestRing, RingReader) {
    let ram = ram(10);
    let guest = GuestRing::new(&ram, &PFNS);
    (guest, RingReader::open(ram, &PFNS).unwrap())
}

fn writer() -> (GuestRing, RingWriter) {
    let ram = ram(10);
    let guest = GuestRing::new(&ram, &PFNS);
    (guest, RingWriter::open(ram, &PFNS).unwrap())
}

fn reserve(writer: &mut RingWriter, len: usize) -> Reservation {
    writer.reserve(len).unwrap().expect("room")
}

/// Whether the guest's view of the ring has room for a packet.
fn room_for(guest: &GuestRing, payload_len: usize) -> bool {
    let used = (guest.load(WRITE_INDEX) + guest.size() - guest.load(READ_INDEX)) % guest.size();
    let len = 24 + payload_len.next_multiple_of(8) as u32;
    guest.size() - used > len
}

fn padded(payload: &[u8]) -> Vec<u8> {
    let mut payload = payload.to_vec();
    payload.resize(payload.len().next_multiple_of(8), 0);
    payload
}

/// Plants a packet of two words at the ring's start and publishes `write` as write index.
fn plant(guest: &GuestRing, descriptor: PacketDescriptor, write: u32) {
    guest.put(0, descriptor.as_bytes());
    guest.store(WRITE_INDEX, write);
}

const GOOD: PacketDescriptor = PacketDescriptor {
    packet_type: TYPE_IN_BAND,
    offset8: 2,
    len8: 3,
    flags: 1,
    transaction_id: 9,
};

#[test]
fn an_initialised_ring_is_empty() {
    let (_, mut reader) = reader();
    assert_eq!(reader.read(&mut []).unwrap(), None);
    assert!(!reader.publish().unwrap());
    assert!(!reader.unmask().unwrap());
}

#[test]
fn pages_that_make_no_ring_are_refused() {
    for pfns in [
        &[][..],
        &[1],
        &[1, 10],
        &[10, 1],
        &[1, u64::MAX],
        &[u64::MAX / 4096, 1],
    ] {
        let error = RingError::Pages { pages: pfns.len() };
        assert_eq!(RingReader::open(ram(10), pfns).unwrap_err(), error);
        assert_eq!(RingWriter::open(ram(10), pfns).unwrap_err(), error);
    }
}

#[test]
fn read_only_pages_make_no_ring() {
    let ram = GuestRam::new(&crate::mem::testing::with_rom(0x3000, &[0; 0x1000]));
    for pfns in [[3, 1], [1, 3]] {
        let error = RingError::Pages { pages: 2 };
        assert_eq!(RingReader::open(ram.clone(), &pfns).unwrap_err(), error);
        assert_eq!(RingWriter::open(ram.clone(), &pfns).unwrap_err(), error);
    }
}

#[test]
fn bad_indices_are_refused_at_open() {
    for bad in [4, 0x2000, u32::MAX] {
        for word in [READ_INDEX, WRITE_INDEX] {
            let ram = ram(10);
            GuestRing::new(&ram, &PFNS).store(word, bad);
            let error = RingError::Index {
                index: bad,
                size: 0x2000,
            };
            assert_eq!(RingReader::open(ram.clone(), &PFNS).unwrap_err(), error);
            assert_eq!(RingWriter::open(ram, &PFNS).unwrap_err(), error);
        }
    }
}

#[test]
fn a_packet_is_cut_to_the_buffer_and_its_length_reported() {
    let (guest, mut reader) = reader();
    guest.send(7, true, &[0x55; 20]).unwrap();
    guest.send(8, false, &[0x66; 8]).unwrap();
    let mut buf = [0; 16];
    let packet = reader.read(&mut buf).unwrap().unwrap();
    assert_eq!(
        packet,
        Packet {
            kind: PacketKind::InBand,
            transaction_id: 7,
            completion_requested: true,
            payload_len: 24,
        }
    );
    assert_eq!(buf, [0x55; 16]);
    let packet = reader.read(&mut buf).unwrap().unwrap();
    assert_eq!((packet.transaction_id, packet.payload_len), (8, 8));
    assert_eq!(buf[..8], [0x66; 8]);
}

#[test]
fn space_returns_to_the_guest_only_when_published() {
    let (guest, mut reader) = reader();
    while guest.send(0, false, &[1; 1000]).is_some() {}
    let mut buf = [0; 1000];
    while reader.read(&mut buf).unwrap().is_some() {}
    assert_eq!(guest.send(0, false, &[1; 1000]), None);
    reader.publish().unwrap();
    assert_eq!(guest.send(0, false, &[1; 1000]), Some(true));
}

#[test]
fn malformed_packets_stop_the_reader_for_good() {
    let bad = [
        PacketDescriptor {
            packet_type: 0,
            ..GOOD
        },
        PacketDescriptor {
            packet_type: 0xc,
            ..GOOD
        },
        PacketDescriptor { offset8: 1, ..GOOD },
        PacketDescriptor {
            packet_type: TYPE_GPA_DIRECT,
            ..GOOD
        },
        PacketDescriptor {
            packet_type: TYPE_TRANSFER_PAGES,
            ..GOOD
        },
        PacketDescriptor { offset8: 4, ..GOOD },
        PacketDescriptor { len8: 0, ..GOOD },
        PacketDescriptor { flags: 2, ..GOOD },
        PacketDescriptor {
            flags: 0xffff,
            ..GOOD
        },
    ];
    for descriptor in bad {
        let (guest, mut reader) = reader();
        plant(&guest, descriptor, 32);
        let error = reader.read(&mut [0; 64]).unwrap_err();
        assert!(matches!(error, RingError::Descriptor { .. }), "{error}");
        plant(&guest, GOOD, 32);
        assert_eq!(reader.read(&mut [0; 64]), Err(RingError::Stopped));
        assert_eq!(reader.publish(), Err(RingError::Stopped));
    }
}

#[test]
fn a_packet_must_fit_between_the_indices_with_its_trailer() {
    for (len8, write) in [(3, 8), (3, 24), (4, 32), (0xffff, 0x1ff8)] {
        let (guest, mut reader) = reader();
        plant(&guest, PacketDescriptor { len8, ..GOOD }, write);
        let error = reader.read(&mut [0; 64]).unwrap_err();
        assert!(matches!(error, RingError::Truncated { .. }), "{error}");
    }
    let (guest, mut reader) = reader();
    plant(&guest, GOOD, 32);
    assert_eq!(reader.read(&mut [0; 64]).unwrap().unwrap().payload_len, 8);
}

#[test]
fn a_write_index_outside_the_ring_or_going_back_stops_the_reader() {
    for bad in [4, 0x2000, 0xffff_fff8] {
        let (guest, mut reader) = reader();
        guest.store(WRITE_INDEX, bad);
        let error = reader.read(&mut []).unwrap_err();
        assert!(matches!(error, RingError::Index { .. }), "{error}");
    }
    let (guest, mut reader) = reader();
    guest.send(0, false, &[0; 8]).unwrap();
    guest.send(0, false, &[0; 8]).unwrap();
    reader.read(&mut []).unwrap().unwrap();
    guest.store(WRITE_INDEX, 32);
    let error = reader.unmask().unwrap_err();
    assert_eq!(error, RingError::IndexWentBack { from: 64, to: 32 });
}

#[test]
fn the_hosts_own_indices_are_not_read_back() {
    let (guest, mut reader) = reader();
    guest.send(1, false, &[0; 8]).unwrap();
    guest.send(2, false, &[0; 8]).unwrap();
    reader.read(&mut []).unwrap().unwrap();
    guest.store(READ_INDEX, 0x1234);
    assert_eq!(reader.read(&mut []).unwrap().unwrap().transaction_id, 2);

    let (guest, mut writer) = writer();
    let room = reserve(&mut writer, 8);
    guest.store(WRITE_INDEX, 0x1234);
    writer.send(room, &[1; 8]).unwrap();
    assert_eq!(guest.load(WRITE_INDEX), 32);
}

#[test]
fn the_waiting_guest_is_signalled_once_when_its_room_appears() {
    let (guest, mut reader) = reader();
    while guest.send(0, false, &[1; 1000]).is_some() {}
    assert!(!guest.wait_for_room(2000));
    let mut buf = [0; 1000];
    let mut signals = Vec::new();
    while reader.read(&mut buf).unwrap().is_some() {
        signals.push(reader.publish().unwrap());
    }
    assert_eq!(signals.iter().filter(|signal| **signal).count(), 1);
    assert!(signals[0], "{signals:?}");
}

#[test]
fn a_pending_size_may_be_a_byte_short_or_absurd() {
    for (pending, expected) in [(2047, true), (2048, false), (u32::MAX, false)] {
        let (guest, mut reader) = reader();
        while guest.send(0, false, &[1; 1000]).is_some() {}
        guest.store(PENDING_SEND_SIZE, pending);
        reader.read(&mut []).unwrap().unwrap();
        assert_eq!(reader.publish().unwrap(), expected, "{pending}");
    }
}

#[test]
fn unmask_reports_packets_that_came_while_masked() {
    let (guest, mut reader) = reader();
    reader.mask().unwrap();
    assert_eq!(guest.send(0, false, &[0; 8]), Some(false));
    assert!(reader.unmask().unwrap());
    reader.read(&mut []).unwrap().unwrap();
    reader.publish().unwrap();
    assert!(!reader.unmask().unwrap());
    assert_eq!(guest.send(0, false, &[0; 8]), Some(true));
}

#[test]
fn the_host_signals_only_an_empty_unmasked_ring() {
    let (guest, mut writer) = writer();
    let rooms = [0; 3].map(|_| reserve(&mut writer, 8));
    let signals = rooms.map(|room| writer.send(room, &[1; 8]).unwrap());
    assert_eq!(signals, [true, false, false]);
    assert!(writer.is_unread().unwrap());
    while guest.receive().is_some() {}
    assert!(!writer.is_unread().unwrap());
    guest.store(INTERRUPT_MASK, 0xffff_0000);
    let room = reserve(&mut writer, 8);
    assert!(!writer.send(room, &[1; 8]).unwrap());
}

/// What a ring of dirty pages holds after packets of many lengths.
fn written(pfns: &[u64]) -> Vec<u8> {
    let ram = ram(10);
    let guest = GuestRing::new(&ram, pfns);
    guest.put(0, &vec![0xee; guest.size() as usize]);
    let mut writer = RingWriter::open(ram.clone(), pfns).unwrap();
    for len in (0..=40).chain([100, 129, 4000, 257, 3001, 9]) {
        let payload: Vec<u8> = (0..len).map(|at| at as u8 | 1).collect();
        let room = reserve(&mut writer, len);
        writer.complete(room, 0x1122_3344_5566, &payload).unwrap();
        let (received, _) = guest.receive().expect("a packet");
        assert_eq!(received.payload, padded(&payload), "{len}");
    }
    let mut data = Vec::new();
    for pfn in &pfns[1..] {
        let mut page = [0; 4096];
        ram.read(pfn * 4096, &mut page).unwrap();
        data.extend(page);
    }
    data
}

#[test]
fn a_packet_is_the_same_in_one_piece_and_in_parts() {
    // The first ring cuts packets in its middle and at its end, the second at its end only.
    assert_eq!(written(&PFNS), written(&[3, 5, 6]));
}

#[test]
fn completions_echo_the_transaction_and_sends_have_none() {
    let (guest, mut writer) = writer();
    let room = reserve(&mut writer, 4);
    writer
        .complete(room, 0xdead_beef_0123, &[1, 2, 3, 4])
        .unwrap();
    let room = reserve(&mut writer, 0);
    writer.send(room, &[]).unwrap();
    let completion = Received {
        packet_type: TYPE_COMPLETION,
        flags: 0,
        transaction_id: 0xdead_beef_0123,
        payload: vec![1, 2, 3, 4, 0, 0, 0, 0],
    };
    assert_eq!(guest.receive(), Some((completion, false)));
    let (sent, _) = guest.receive().unwrap();
    assert_eq!((sent.packet_type, sent.transaction_id), (TYPE_IN_BAND, 0));
    assert!(sent.payload.is_empty());
}

#[test]
fn room_runs_out_exactly_and_its_return_is_signalled() {
    let (guest, mut writer) = writer();
    // 0x2000 - 8 bytes are usable: 7 packets of 1024 bytes and one of 1016.
    let rooms: Vec<_> = (0..7).map(|_| reserve(&mut writer, 1000)).collect();
    assert_eq!(writer.reserve(1000).unwrap(), None);
    let last = reserve(&mut writer, 992);
    assert_eq!(writer.reserve(0).unwrap(), None);
    for room in rooms {
        writer.send(room, &[1; 1000]).unwrap();
    }
    writer.complete(last, 1, &[1; 992]).unwrap();
    assert_eq!(writer.reserve(1008).unwrap(), None);
    assert_eq!(guest.load(PENDING_SEND_SIZE), 1032);
    assert!(!guest.receive().unwrap().1, "8 bytes are still missing");
    assert_eq!(writer.reserve(1008).unwrap(), None);
    assert!(guest.receive().unwrap().1);
    let room = reserve(&mut writer, 1008);
    assert_eq!(guest.load(PENDING_SEND_SIZE), 0);
    writer.release(room);
}

#[test]
fn a_released_reservation_makes_room() {
    let (_, mut writer) = writer();
    let room = reserve(&mut writer, 4080);
    let next = reserve(&mut writer, 4000);
    assert_eq!(writer.reserve(100).unwrap(), None);
    writer.release(next);
    let small = reserve(&mut writer, 100);
    writer.release(small);
    writer.release(room);
}

#[test]
fn overlong_packets_of_the_host_are_refused_and_harmless() {
    let (guest, mut writer) = writer();
    assert_eq!(writer.max_payload(), 4080);
    let error = RingError::TooLong {
        len: 4081,
        limit: 4080,
    };
    assert_eq!(writer.reserve(4081), Err(error));
    let room = reserve(&mut writer, 8);
    let error = RingError::TooLong { len: 9, limit: 8 };
    assert_eq!(writer.send(room, &[0; 9]), Err(error));
    assert_eq!(guest.receive(), None);
    let room = reserve(&mut writer, 4080);
    assert!(writer.send(room, &[7; 4080]).unwrap());
    assert_eq!(guest.receive().unwrap().0.payload, [7; 4080]);

    let ram = ram(10);
    GuestRing::new(&ram, &PFNS[..2]);
    let writer = RingWriter::open(ram, &PFNS[..2]).unwrap();
    assert_eq!(writer.max_payload(), 4096 - 8 - 24);
}

#[test]
fn a_read_index_going_back_stops_the_writer() {
    let (guest, mut writer) = writer();
    for _ in 0..2 {
        let room = reserve(&mut writer, 8);
        writer.send(room, &[0; 8]).unwrap();
    }
    guest.receive().unwrap();
    assert!(writer.is_unread().unwrap());
    guest.store(READ_INDEX, 0x40);
    assert!(!writer.is_unread().unwrap());
    guest.store(READ_INDEX, 0);
    let error = writer.is_unread().unwrap_err();
    assert_eq!(error, RingError::IndexWentBack { from: 64, to: 0 });
    assert_eq!(writer.reserve(0), Err(RingError::Stopped));
}

#[test]
fn a_stopped_ring_stays_stopped_when_restored_and_bad_states_are_refused() {
    let (guest, mut reader) = reader();
    guest.store(WRITE_INDEX, 4);
    reader.read(&mut []).unwrap_err();
    let state = reader.save();
    let mut restored = RingReader::restore(guest.ram(), &PFNS, state).unwrap();
    assert_eq!(restored.read(&mut []), Err(RingError::Stopped));
    let bad = RingReaderState { next: 4, ..state };
    assert!(RingReader::restore(guest.ram(), &PFNS, bad).is_err());
    let (guest, writer) = writer();
    let bad = RingWriterState {
        write: 0x2000,
        ..writer.save()
    };
    assert!(RingWriter::restore(guest.ram(), &PFNS, bad).is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Send(Vec<u8>),
    Receive,
    Publish,
    Restore,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let payload = (0usize..1500, any::<u8>()).prop_map(|(len, byte)| vec![byte; len]);
    let step = prop_oneof![
        2 => payload.prop_map(Step::Send),
        2 => Just(Step::Receive),
        1 => Just(Step::Publish),
        1 => Just(Step::Restore),
    ];
    prop::collection::vec(step, 1..120)
}

#[derive(Debug, Clone)]
enum Hostile {
    Word(u64, u32),
    Bytes(u32, Vec<u8>),
    Read,
    Publish,
    Unmask,
    Reserve(usize),
    Write(bool, usize),
}

fn hostile_steps() -> impl Strategy<Value = Vec<Hostile>> {
    let word = prop::sample::select(vec![0, 4, 8, 12, 64]);
    let value = prop_oneof![
        3 => (0u32..0x400).prop_map(|value| value * 8),
        1 => any::<u32>(),
    ];
    // Small words make many descriptors plausible.
    let bytes = prop::collection::vec(prop_oneof![0u8..12, any::<u8>()], 1..64);
    let step = prop_oneof![
        4 => (word, value).prop_map(|(word, value)| Hostile::Word(word, value)),
        3 => (0u32..0x2000, bytes).prop_map(|(at, bytes)| Hostile::Bytes(at, bytes)),
        4 => Just(Hostile::Read),
        2 => Just(Hostile::Publish),
        1 => Just(Hostile::Unmask),
        2 => (0usize..5000).prop_map(Hostile::Reserve),
        2 => (any::<bool>(), 0usize..5000).prop_map(|(c, len)| Hostile::Write(c, len)),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #[test]
    fn what_the_guest_sends_arrives_in_order_and_an_empty_ring_is_signalled(steps in steps()) {
        let (guest, mut reader) = reader();
        let mut sent = VecDeque::new();
        // Packets that the guest still sees in the ring.
        let (mut in_ring, mut id) = (0, 0);
        for step in steps {
            match step {
                Step::Send(payload) => match guest.send(id, id % 2 == 0, &payload) {
                    Some(signal) => {
                        prop_assert_eq!(signal, in_ring == 0);
                        in_ring += 1;
                        sent.push_back((id, padded(&payload)));
                        id += 1;
                    }
                    None => prop_assert!(in_ring > 0),
                },
                Step::Receive => {
                    let mut buf = [0; 1504];
                    let packet = reader.read(&mut buf).unwrap();
                    let expected = sent.pop_front();
                    prop_assert_eq!(packet.is_some(), expected.is_some());
                    if let (Some(packet), Some((id, payload))) = (packet, expected) {
                        prop_assert_eq!(packet.transaction_id, id);
                        prop_assert_eq!(packet.completion_requested, id % 2 == 0);
                        prop_assert_eq!(&buf[..packet.payload_len], &payload[..]);
                    }
                }
                Step::Publish => {
                    prop_assert!(!reader.publish().unwrap());
                    in_ring = sent.len();
                    prop_assert_eq!(reader.unmask().unwrap(), in_ring > 0);
                }
                Step::Restore => {
                    let state = reader.save();
                    reader = RingReader::restore(guest.ram(), &PFNS, state).unwrap();
                    prop_assert_eq!(reader.save(), state);
                }
            }
        }
    }

    #[test]
    fn what_the_host_sends_arrives_in_order_and_room_is_never_lost(steps in steps()) {
        let (guest, mut writer) = writer();
        let mut sent = VecDeque::new();
        let mut waiting = None;
        for step in steps {
            match step {
                Step::Send(payload) => match writer.reserve(payload.len()).unwrap() {
                    Some(room) => {
                        let empty = sent.is_empty();
                        prop_assert_eq!(writer.complete(room, 5, &payload).unwrap(), empty);
                        sent.push_back(padded(&payload));
                        waiting = None;
                    }
                    None => waiting = Some(payload.len()),
                },
                Step::Restore => {
                    let state = writer.save();
                    writer = RingWriter::restore(guest.ram(), &PFNS, state).unwrap();
                    prop_assert_eq!(writer.save(), state);
                }
                Step::Receive | Step::Publish => {
                    let received = guest.receive();
                    let expected = sent.pop_front();
                    prop_assert_eq!(received.is_some(), expected.is_some());
                    let Some((received, signal)) = received else { continue };
                    prop_assert_eq!(Some(received.payload), expected);
                    if let Some(len) = waiting {
                        let room = room_for(&guest, len);
                        prop_assert_eq!(signal, room, "signalled exactly when there is room");
                        if signal {
                            waiting = None;
                            let room = writer.reserve(len).unwrap();
                            writer.release(room.expect("room as signalled"));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_hostile_guest_stops_its_rings_and_nothing_else(
        steps in hostile_steps(),
        pages in Just(vec![1u64, 2, 4, 6, 7, 8]).prop_shuffle(),
    ) {
        let ram = ram(10);
        let (first, second) = pages.split_at(3);
        let rings = [GuestRing::new(&ram, first), GuestRing::new(&ram, second)];
        for page in [0, 3, 5, 9] {
            ram.fill(page * 4096, 4096, 0xa5).unwrap();
        }
        let mut reader = RingReader::open(ram.clone(), first).unwrap();
        let mut writer = RingWriter::open(ram.clone(), second).unwrap();
        let mut rooms = Vec::new();
        let (mut reader_stopped, mut writer_stopped) = (false, false);
        let stops = |error| !matches!(error, RingError::TooLong { .. });
        for step in steps {
            let mut buf = [0; 600];
            let read = match step {
                Hostile::Word(word, value) => {
                    rings.iter().for_each(|ring| ring.store(word, value));
                    continue;
                }
                Hostile::Bytes(at, bytes) => {
                    rings[0].put(at, &bytes);
                    continue;
                }
                Hostile::Reserve(len) => {
                    match writer.reserve(len) {
                        Ok(room) => {
                            prop_assert!(!writer_stopped);
                            rooms.extend(room);
                        }
                        Err(error) => writer_stopped |= stops(error),
                    }
                    continue;
                }
                Hostile::Write(completion, len) => {
                    let Some(room) = rooms.pop() else { continue };
                    let payload = vec![0x5a; len];
                    let result = if completion {
                        writer.complete(room, 1, &payload)
                    } else {
                        writer.send(room, &payload)
                    };
                    match result {
                        Ok(_) => prop_assert!(!writer_stopped),
                        Err(error) => writer_stopped |= stops(error),
                    }
                    continue;
                }
                Hostile::Read => reader.read(&mut buf).map(|_| ()),
                Hostile::Publish => reader.publish().map(|_| ()),
                Hostile::Unmask => reader.unmask().map(|_| ()),
            };
            prop_assert!(read.is_err() || !reader_stopped);
            reader_stopped |= read.is_err();
        }
        for page in [0, 3, 5, 9] {
            let mut outside = [0; 4096];
            ram.read(page * 4096, &mut outside).unwrap();
            prop_assert!(outside.iter().all(|byte| *byte == 0xa5));
        }
    }
}

#[test]
fn a_ring_goes_on_in_a_new_memory_map() {
    let (guest, mut reader) = reader();
    let mut writer = RingWriter::open(guest.ram(), &[0, 1, 2]).unwrap();
    // Fresh memory with the same contents as the old one.
    let mut contents = vec![0; 10 * 4096];
    guest.ram().read(0, &mut contents).unwrap();
    guest.ram().replace(&map(10));
    guest.ram().write(0, &contents).unwrap();
    guest.send(7, true, b"in the new map").unwrap();
    let mut buffer = [0; 16];
    let packet = reader.read(&mut buffer).unwrap().expect("a packet");
    assert_eq!(packet.transaction_id, 7);
    assert_eq!(&buffer[..14], b"in the new map");
    reader.publish().unwrap();
    assert_ne!(guest.load(READ_INDEX), 0);
    let room = reserve(&mut writer, 8);
    writer.send(room, b"answered").unwrap();
    let there = GuestRing::attach(&guest.ram(), &[0, 1, 2]);
    assert_eq!(there.receive().expect("a packet").0.payload, b"answered");
}

#[test]
fn a_ring_whose_page_is_taken_out_of_the_memory_map_stops() {
    let (guest, mut reader) = reader();
    guest.ram().replace(&map(7));
    let gone = MemError::NotRam {
        gpa: 7 * 4096,
        len: 4096,
    };
    assert_eq!(reader.read(&mut []), Err(RingError::Memory(gone)));
    guest.ram().replace(&map(10));
    assert_eq!(reader.read(&mut []), Err(RingError::Stopped));
}

//! The bus on the user-space SynIC, against a guest that drives it as Linux does.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32};

use uuid::Uuid;

use super::*;

use crate::hv::vmbus::{VP_NONE, Version, message_type as t};
use crate::vmbus::ring::guest::{GuestRing, ram};
use crate::vmbus::server::{ServerState, StateError};
use crate::vmbus::{ChannelIdentity, OpenError, VmBusState, VmBusStateError};
use crate::vmm::{Msi, MsiSink};

mod guest_os;
mod threads;

use guest_os::{Guest, words};

/// Interrupts by VP.
#[derive(Debug, Default)]
struct Interrupts([AtomicU32; 2]);

impl MsiSink for Interrupts {
    fn raise_msi(&self, msi: Msi) {
        let apic_id = (msi.address >> 12 & 0xff) as usize;
        assert_eq!(msi.data & 0xff, 0xf3);
        self.0[apic_id].fetch_add(1, Ordering::SeqCst);
    }
}

/// Runs workers by hand.
#[derive(Debug, Default)]
struct Loop {
    workers: Mutex<Vec<Weak<dyn Worker>>>,
    triggered: Arc<Flag>,
}

#[derive(Debug, Default)]
struct Flag(AtomicBool);

impl Trigger for Flag {
    fn trigger(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl WorkerHost for Loop {
    fn adopt(&self, worker: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
        lock(&self.workers).push(worker);
        Ok(self.triggered.clone())
    }
}

impl Loop {
    /// Runs until nothing is left to do. Without a trigger nothing runs at all.
    fn run(&self) {
        while self.triggered.0.swap(false, Ordering::SeqCst) {
            let worker = lock(&self.workers)[0].upgrade().expect("worker");
            let mut steps = 0;
            while worker.process() {
                steps += 1;
                assert!(steps < 10_000, "the worker spins");
            }
        }
    }
}

/// Answers each request with its own payload.
#[derive(Debug, Default)]
struct Echo {
    instance: u128,
    /// What the kernel may ring.
    eventfd: Option<std::fs::File>,
    refuse: AtomicBool,
    channel: Mutex<Option<OpenedChannel>>,
    signals: AtomicU32,
}

impl Echo {
    fn new(instance: u128) -> Arc<Self> {
        Arc::new(Self {
            instance,
            ..Self::default()
        })
    }

    /// One run of the device's worker.
    fn run(&self) {
        let mut guard = lock(&self.channel);
        let Some(channel) = guard.as_mut() else {
            return;
        };
        let mut buf = [0; 256];
        let mut signal = false;
        while let Some(room) = channel.writer.reserve(buf.len()).expect("ring") {
            let Some(packet) = channel.reader.read(&mut buf).expect("ring") else {
                channel.writer.release(room);
                break;
            };
            signal |= channel.reader.publish().expect("ring");
            let payload = &buf[..packet.payload_len];
            let answer = channel
                .writer
                .complete(room, packet.transaction_id, payload);
            signal |= answer.expect("ring");
        }
        if signal {
            channel.signal.signal();
        }
    }

    /// A signal that nobody asked for.
    fn signal(&self) {
        if let Some(channel) = &*lock(&self.channel) {
            channel.signal.signal();
        }
    }

    fn is_open(&self) -> bool {
        lock(&self.channel).is_some()
    }
}

impl ChannelDevice for Echo {
    fn identity(&self) -> ChannelIdentity {
        ChannelIdentity {
            class: Uuid::from_u128(0x44c4_f61d),
            instance: Uuid::from_u128(self.instance),
        }
    }

    fn open(&self, channel: OpenedChannel) -> Result<(), OpenError> {
        if self.refuse.load(Ordering::SeqCst) {
            return Err(OpenError::NotReady);
        }
        *lock(&self.channel) = Some(channel);
        Ok(())
    }

    fn close(&self) {
        assert!(lock(&self.channel).take().is_some(), "closed twice");
    }

    fn signalled(&self) {
        self.signals.fetch_add(1, Ordering::SeqCst);
    }

    fn eventfd(&self) -> Option<BorrowedFd<'_>> {
        self.eventfd.as_ref().map(|file| file.as_fd())
    }
}

/// The kernel's table of connections.
#[derive(Debug, Default)]
struct Events {
    connected: Mutex<BTreeMap<u32, RawFd>>,
    full: AtomicBool,
}

impl ConnectionEvents for Events {
    fn add(&self, connection_id: u32, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        if self.full.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let former = lock(&self.connected).insert(connection_id, eventfd.as_raw_fd());
        assert_eq!(former, None, "connected twice");
        Ok(())
    }

    fn remove(&self, connection_id: u32) -> io::Result<()> {
        match lock(&self.connected).remove(&connection_id) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

fn limits() -> Limits {
    Limits {
        inbox: 4,
        outbox: 2,
        ..Limits::default()
    }
}

#[test]
fn a_guest_finds_opens_and_uses_a_channel_and_lets_go_of_it() {
    for version in [Version::V4_0, Version::V5_3, Version::V6_0] {
        let guest = Guest::new(64);
        let echo = Echo::new(1);
        guest.bus.offer(echo.clone()).unwrap();
        assert_eq!(guest.connect(version), [1]);
        let (to_host, to_guest) = guest.open(1, 1);
        assert!(echo.is_open());
        assert!(guest.take_event(1, 1), "signalled once after the result");
        let connection = 0x2001;
        for id in 1..=500u64 {
            let payload = [id as u8; 104];
            if to_host.send(id, true, &payload).unwrap() {
                guest.bus.signal_event(connection, 0).unwrap();
            }
            echo.run();
            assert!(guest.take_event(1, 1));
            let (answer, _) = to_guest.receive().unwrap();
            assert_eq!((answer.packet_type, answer.transaction_id), (0xb, id));
            assert_eq!(answer.payload, payload);
        }
        assert_eq!(echo.signals.load(Ordering::SeqCst), 500);
        guest.post(&words(t::CLOSE_CHANNEL, &[1]));
        guest.post(&words(t::GPADL_TEARDOWN, &[1, 0x10]));
        assert_eq!(guest.messages(), [words(t::GPADL_TORNDOWN, &[0x10])]);
        assert!(!echo.is_open());
        guest.post(&words(t::UNLOAD, &[]));
        assert_eq!(guest.messages(), [words(t::UNLOAD_RESPONSE, &[])]);
    }
}

#[test]
fn nothing_of_guest_memory_is_written_after_the_unload_response_or_a_reset() {
    for reset in [false, true] {
        let guest = Guest::new(64);
        let echo = Echo::new(1);
        guest.bus.offer(echo.clone()).unwrap();
        guest.connect(Version::V5_3);
        guest.open(1, 1);
        let signal = lock(&echo.channel).as_ref().unwrap().signal.clone();
        if reset {
            guest.post_only(&words(t::GPADL_TEARDOWN, &[1, 0x10]));
            guest.bus.reset();
        } else {
            guest.post(&words(t::UNLOAD, &[]));
            assert_eq!(guest.messages(), [words(t::UNLOAD_RESPONSE, &[])]);
        }
        assert!(!echo.is_open());
        let before = guest.memory();
        signal.signal();
        guest.post(&words(t::REQUEST_OFFERS, &[]));
        guest.bus.offer(Echo::new(2)).unwrap();
        guest.host.run();
        assert_eq!(
            guest.bus.signal_event(0x2001, 0),
            Err(HvStatus::INVALID_CONNECTION_ID)
        );
        assert!(guest.memory() == before);
        // The offers are still there for the next kernel.
        assert_eq!(guest.connect(Version::V5_3), [1, 2]);
    }
}

#[test]
fn the_kernel_has_the_signals_of_a_channel_exactly_while_it_is_open() {
    let guest = Guest::new(64);
    let events = Arc::new(Events::default());
    guest.bus.set_connection_events(events.clone());
    let file = std::fs::File::open("/dev/null").unwrap();
    let fd = file.as_raw_fd();
    let echo = Arc::new(Echo {
        instance: 1,
        eventfd: Some(file),
        ..Echo::default()
    });
    guest.bus.offer(echo.clone()).unwrap();
    guest.connect(Version::V5_3);
    assert!(lock(&events.connected).is_empty());
    guest.open(1, 0);
    assert_eq!(*lock(&events.connected), BTreeMap::from([(0x2001, fd)]));
    // A signal that leaves the guest all the same reaches the device too.
    assert_eq!(guest.bus.signal_event(0x2001, 0), Ok(()));
    guest.post(&words(t::CLOSE_CHANNEL, &[1]));
    assert!(lock(&events.connected).is_empty());
    guest.post(&words(t::UNLOAD, &[]));
    guest.messages();

    // A device that refuses its rings, and a kernel that refuses its eventfd.
    echo.refuse.store(true, Ordering::SeqCst);
    guest.connect(Version::V5_3);
    assert_eq!(guest.try_open(1, 0).len(), 1);
    assert!(!echo.is_open() && lock(&events.connected).is_empty());
    guest.post(&words(t::UNLOAD, &[]));
    guest.messages();
    echo.refuse.store(false, Ordering::SeqCst);
    events.full.store(true, Ordering::SeqCst);
    guest.connect(Version::V5_3);
    guest.open(1, 0);
    assert!(echo.is_open() && lock(&events.connected).is_empty());
    assert_eq!(guest.bus.signal_event(0x2001, 0), Ok(()));
    guest.bus.reset();
    assert!(!echo.is_open());
}

#[test]
fn bad_messages_and_signals_get_their_status() {
    let guest = Guest::new(64);
    let bus = &guest.bus;
    let invalid = Err(HvStatus::INVALID_CONNECTION_ID);
    for connection in [0, 2, 3, 0x80_0074, 0x2001, 0x0100_0001] {
        assert_eq!(bus.post_message(connection, 1, &[0; 8]), invalid);
    }
    let bad = Err(HvStatus::INVALID_PARAMETER);
    assert_eq!(bus.post_message(1, 2, &[0; 8]), bad);
    assert_eq!(bus.post_message(1, 1, &[0; 241]), bad);
    assert_eq!(bus.post_message(1, 1, &[]), Ok(()));
    guest.host.run();
    assert_eq!(bus.counters().dropped_short, 1);

    let echo = Echo::new(1);
    bus.offer(echo.clone()).unwrap();
    guest.connect(Version::V5_3);
    assert_eq!(bus.signal_event(0x2001, 0), invalid, "offered, but closed");
    guest.open(1, 0);
    assert_eq!(bus.signal_event(0x2001, 0), Ok(()));
    assert_eq!(bus.signal_event(0x2001, 1), bad);
    for connection in [0, 1, 4, 0x2000, 0x2002, 0x1_2001, u32::MAX] {
        assert_eq!(bus.signal_event(connection, 0), invalid);
    }
    assert_eq!(echo.signals.load(Ordering::SeqCst), 1);
}

#[test]
fn the_inbox_is_bounded_and_the_guest_told_to_retry() {
    let guest = Guest::new(64);
    for _ in 0..4 {
        guest.post_only(&words(t::REQUEST_OFFERS, &[]));
    }
    let full = Err(HvStatus::INSUFFICIENT_BUFFERS);
    let message = words(t::REQUEST_OFFERS, &[]);
    assert_eq!(guest.bus.post_message(1, 1, &message), full);
    assert_eq!(guest.bus.counters().inbox_full, 1);
    // A new kernel does not have to wait for the messages of the old one.
    guest.post_only(&guest_os::contact(Version::V5_3, 0));
    guest.host.run();
    assert_eq!(guest.bus.counters().superseded, 4);
    assert_eq!(guest.bus.counters().messages, 1);
    assert_eq!(guest.bus.counters().connections, 1);
}

/// A contact that this server does not take: for another SINT.
fn foreign_contact(vp: u32) -> Vec<u8> {
    let mut bytes = guest_os::contact(Version::V5_3, vp);
    bytes[16] = 5;
    bytes
}

#[test]
fn a_contact_that_ends_no_connection_waits_its_turn() {
    let guest = Guest::new(64);
    for _ in 0..4 {
        guest.post_only(&words(t::REQUEST_OFFERS, &[]));
    }
    let full = Err(HvStatus::INSUFFICIENT_BUFFERS);
    let missing_vp = guest_os::contact(Version::V5_3, 2);
    let short = words(t::INITIATE_CONTACT, &[]);
    for bytes in [foreign_contact(0), missing_vp, short] {
        assert_eq!(guest.bus.post_message(4, 1, &bytes), full, "{bytes:x?}");
    }
    assert_eq!(guest.bus.counters().superseded, 0);
    guest.host.run();
    assert_eq!(guest.bus.counters().messages, 4);
}

#[test]
fn a_contact_for_another_sint_leaves_what_is_owed_to_the_guest() {
    let guest = Guest::new(2);
    for n in 1..=20 {
        guest.bus.offer(Echo::new(n)).unwrap();
    }
    guest.post_only(&guest_os::contact(Version::V5_3, 1));
    guest.post_only(&words(t::REQUEST_OFFERS, &[]));
    guest.post(&foreign_contact(1));
    let types: Vec<u8> = guest.messages().iter().map(|message| message[0]).collect();
    assert_eq!(types.len(), 22, "{types:?}");
    assert_eq!(guest.bus.counters().superseded, 0);
    assert_eq!(guest.bus.counters().contacts_refused, 1);
}

#[test]
fn refusals_on_another_sint_do_not_outlive_the_connection() {
    let guest = Guest::new(64);
    let farewell = [words(t::UNLOAD_RESPONSE, &[])];
    guest.connect(Version::V5_3);
    // The first one fills the slot, which nobody empties; the second waits for it.
    guest.post(&foreign_contact(1));
    guest.post(&foreign_contact(1));
    guest.post(&words(t::UNLOAD, &[]));
    assert_eq!(guest.messages(), farewell);
    // Nor do they hold up the next one, nor outlive a reset.
    guest.post(&foreign_contact(1));
    guest.connect(Version::V5_3);
    guest.post(&words(t::UNLOAD, &[]));
    assert_eq!(guest.messages(), farewell);
    guest.post(&foreign_contact(1));
    guest.bus.reset();
    guest.connect(Version::V5_3);
    guest.post(&words(t::UNLOAD, &[]));
    assert_eq!(guest.messages(), farewell);
}

#[test]
fn a_guest_that_reads_slowly_loses_nothing_and_one_that_does_not_is_held_up() {
    let guest = Guest::new(2);
    for n in 1..=20 {
        guest.bus.offer(Echo::new(n)).unwrap();
    }
    guest.post_only(&guest_os::contact(Version::V5_3, 1));
    guest.post_only(&words(t::REQUEST_OFFERS, &[]));
    guest.host.run();
    // Nothing is taken: the outbox is above its limit, so the inbox fills up.
    for _ in 0..4 {
        guest.post_only(&words(t::TL_CONNECT_REQUEST, &[0; 8]));
        guest.host.run();
    }
    let full = Err(HvStatus::INSUFFICIENT_BUFFERS);
    assert_eq!(
        guest.bus.post_message(1, 1, &words(t::UNLOAD + 100, &[])),
        full
    );
    let types: Vec<u8> = guest.messages().iter().map(|message| message[0]).collect();
    let mut expected = vec![15];
    expected.extend([1; 20]);
    expected.push(4);
    expected.extend([23; 4]);
    assert_eq!(types, expected);
}

#[test]
fn a_crash_kernel_connects_over_the_unread_messages_of_the_old_one() {
    let guest = Guest::new(2);
    for n in 1..=20 {
        guest.bus.offer(Echo::new(n)).unwrap();
    }
    guest.post_only(&guest_os::contact(Version::V5_3, 1));
    guest.post_only(&words(t::REQUEST_OFFERS, &[]));
    guest.host.run();
    for _ in 0..3 {
        guest.post_only(&words(t::TL_CONNECT_REQUEST, &[0; 8]));
        guest.host.run();
    }
    guest.post_only(&guest_os::contact(Version::V4_1, 0));
    guest.host.run();
    assert_eq!(
        guest.messages_of(0),
        [words(t::VERSION_RESPONSE, &[1, 0x4_0001])]
    );
    assert!(guest.bus.counters().superseded >= 3);
}

#[test]
fn after_the_modify_response_only_the_new_vp_is_signalled() {
    let guest = Guest::new(64);
    let echo = Echo::new(1);
    guest.bus.offer(echo.clone()).unwrap();
    guest.connect(Version::V5_3);
    guest.open(1, 0);
    assert!(guest.take_event(0, 1));
    guest.post(&words(t::MODIFY_CHANNEL, &[1, 1]));
    let answer = words(t::MODIFY_CHANNEL_RESPONSE, &[1, 0]);
    assert_eq!(guest.messages(), [answer]);
    echo.signal();
    assert!(guest.take_event(1, 1));
    assert!(!guest.take_event(0, 1));
}

#[test]
fn a_channel_without_interrupts_is_never_signalled() {
    let guest = Guest::new(64);
    let echo = Echo::new(1);
    guest.bus.offer(echo.clone()).unwrap();
    guest.connect(Version::V5_3);
    guest.open(1, VP_NONE);
    echo.signal();
    assert!(!guest.take_event(0, 1) && !guest.take_event(1, 1));
}

#[test]
fn a_revoked_channel_is_closed_rescinded_and_released() {
    let guest = Guest::new(64);
    let echo = Echo::new(1);
    let id = guest.bus.offer(echo.clone()).unwrap();
    guest.connect(Version::V5_3);
    guest.open(1, 1);
    guest.take_event(1, 1);
    guest.bus.revoke(id);
    guest.host.run();
    assert!(!echo.is_open());
    assert_eq!(Arc::strong_count(&echo), 1, "the guest may never answer");
    assert_eq!(guest.messages(), [words(t::RESCIND_CHANNEL_OFFER, &[1])]);
    let gone = Err(HvStatus::INVALID_CONNECTION_ID);
    assert_eq!(guest.bus.signal_event(0x2001, 0), gone);
    assert!(guest.bus.is_present(id));
    let instance = echo.identity().instance;
    let taken = Err(OfferError::InstanceInUse { instance });
    assert_eq!(guest.bus.offer(Echo::new(1)), taken);

    guest.post(&words(t::CLOSE_CHANNEL, &[1]));
    guest.post(&words(t::RELID_RELEASED, &[1]));
    assert_eq!(guest.messages(), [] as [Vec<u8>; 0]);
    assert!(!guest.bus.is_present(id));
    // Hot-added anew.
    guest.bus.offer(Echo::new(1)).unwrap();
    guest.host.run();
    assert_eq!(guest.messages()[0][184], 1);
}

#[test]
fn refusals_that_a_guest_does_not_take_are_bounded_on_all_vps_together() {
    let guest = Guest::new(2304);
    let waiting = || {
        let state = guest.synic.save();
        state.vps.iter().map(|vp| vp.queue.len()).sum::<usize>()
    };
    let unknown = Version(0x7_0000);
    for n in 0..1000 {
        guest.post(&guest_os::contact(unknown, n % 2));
    }
    assert!((1..=64).contains(&waiting()), "{}", waiting());
    // Of other servers, while connected; what the connection owes is not lost.
    while !guest.messages().is_empty() {}
    guest.post(&guest_os::contact(Version::V5_3, 1));
    let owed = waiting();
    for n in 0..1000u32 {
        guest.post(&foreign_contact(n % 2));
    }
    assert!(waiting() <= owed + 64, "{}", waiting());
}

#[test]
fn a_state_with_as_much_waiting_as_can_be_is_restored_and_one_with_more_is_not() {
    let guest = Guest::new(64);
    let limits = guest.bus.limits;
    let offers: Vec<_> = (1..=limits.channels as u128)
        .map(|n| guest.bus.offer(Echo::new(n)).unwrap())
        .collect();
    // The guest takes no message.
    guest.post(&guest_os::contact(Version::V5_3, 1));
    let outbox = || lock(&guest.bus.server).outbox_len();
    while outbox() < limits.outbox - 1 {
        guest.post(&[&words(t::TL_CONNECT_REQUEST, &[])[..], &[3; 32]].concat());
    }
    guest.post(&words(t::REQUEST_OFFERS, &[]));
    for id in offers {
        guest.bus.revoke(id);
    }
    guest.host.run();
    assert!(outbox() >= limits.outbox + 2 * limits.channels);
    let state = guest.bus.save();
    guest.bus.restore(&state, |_| None).unwrap();
    assert_eq!(guest.bus.save(), state);
    let refused = |change: &dyn Fn(&mut VmBusState)| {
        let mut state = state.clone();
        change(&mut state);
        guest.bus.restore(&state, |_| None).unwrap_err()
    };
    let actions = refused(&|state| state.server.actions = vec![Action::DiscardMessages(3); 10_000]);
    assert_eq!(actions, VmBusStateError::Server(StateError::Actions));
    let outbox = refused(&|state| {
        let first = state.server.outbox[0].clone();
        state.server.outbox.resize(10_000, first);
    });
    assert_eq!(outbox, VmBusStateError::Server(StateError::Outbox));
    let mut most = state.clone();
    let (actions, outbox) = ServerState::most_waiting(&limits);
    most.server.actions = vec![Action::DiscardMessages(3); actions];
    most.server
        .outbox
        .resize(outbox, state.server.outbox[0].clone());
    guest.bus.restore(&most, |_| None).unwrap();
}

#[test]
fn a_device_or_ring_that_cannot_open_fails_the_open() {
    let guest = Guest::new(64);
    let echo = Echo::new(1);
    guest.bus.offer(echo.clone()).unwrap();
    guest.connect(Version::V5_3);
    let failed = words(t::OPEN_CHANNEL_RESULT, &[1, 0x10, wire::STATUS_FAILURE]);
    echo.refuse.store(true, Ordering::SeqCst);
    assert_eq!(guest.try_open(1, 1), std::slice::from_ref(&failed));
    assert_eq!(
        guest.bus.signal_event(0x2001, 0),
        Err(HvStatus::INVALID_CONNECTION_ID)
    );
    echo.refuse.store(false, Ordering::SeqCst);
    let bad_index = GuestRing::new(&guest.ram, &guest_os::TO_HOST);
    bad_index.store(0, 12);
    guest.post(&guest_os::open(1, 1));
    assert_eq!(guest.messages(), [failed]);
    assert!(!echo.is_open());
    bad_index.store(0, 0);
    guest.post(&guest_os::open(1, 1));
    assert_eq!(
        guest.messages(),
        [words(t::OPEN_CHANNEL_RESULT, &[1, 0x10, 0])]
    );
}

#[test]
fn a_worker_that_cannot_be_adopted_fails_the_bus() {
    #[derive(Debug)]
    struct Full;
    impl WorkerHost for Full {
        fn adopt(&self, _: Weak<dyn Worker>) -> io::Result<Arc<dyn Trigger>> {
            Err(io::ErrorKind::QuotaExceeded.into())
        }
    }
    let guest = Guest::new(1);
    let error = VmBus::new(VmBusConfig::default(), ram(1), guest.synic.clone(), &Full).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::QuotaExceeded);
}

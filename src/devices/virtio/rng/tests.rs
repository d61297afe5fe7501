//! Tests of virtio-rng through its registers and rings.

use super::*;
use crate::devices::virtio::testing::{Guest, ManualHost, VERSION_1, into, out};

const DATA: u64 = 0x10_0000;

fn bed() -> (Guest, ManualHost, Arc<Rng>) {
    let host = ManualHost::default();
    let rng = Rng::new(RngConfig::default(), &host).unwrap();
    (Guest::new(rng.clone()), host, rng)
}

#[test]
fn a_buffer_is_filled_with_bytes_that_differ_each_time() {
    let (guest, host, rng) = bed();
    let mut queue = guest.start(VERSION_1, 1).remove(0);
    let mut seen = Vec::new();
    for _ in 0..4 {
        let head = queue.add(&guest.ram, &[into(DATA, 40), into(DATA + 0x1000, 24)]);
        guest.kick(&queue);
        host.run();
        assert_eq!(queue.used(&guest.ram), Some((head, 64)));
        assert_eq!(guest.lines.take(), [1]);
        let bytes = guest.bytes(DATA + 0x1000, 24);
        assert!(!seen.contains(&bytes));
        seen.push(bytes);
    }
    let counters = rng.counters();
    assert_eq!(
        (counters.requests, counters.bytes, counters.errors),
        (4, 256, 0)
    );
}

#[test]
fn a_long_request_gets_the_limit() {
    let (guest, host, _rng) = bed();
    let mut queue = guest.start(VERSION_1, 1).remove(0);
    for (asked, given) in [
        (MAX_RNG_REQUEST as u32, MAX_RNG_REQUEST as u32),
        (MAX_RNG_REQUEST as u32 + 1, MAX_RNG_REQUEST as u32),
    ] {
        let head = queue.add(&guest.ram, &[into(DATA, asked)]);
        guest.kick(&queue);
        host.run();
        assert_eq!(queue.used(&guest.ram), Some((head, given)));
        assert_eq!(guest.bytes(DATA + u64::from(given), 1), [0]);
    }
}

#[test]
fn a_request_without_room_or_outside_guest_memory_gets_nothing() {
    let (guest, host, rng) = bed();
    let mut queue = guest.start(VERSION_1, 1).remove(0);
    for buf in [out(DATA, 64), into(1 << 40, 64)] {
        let head = queue.add(&guest.ram, &[buf]);
        guest.kick(&queue);
        host.run();
        assert_eq!(queue.used(&guest.ram), Some((head, 0)));
    }
    assert_eq!(rng.counters().errors, 2);
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn the_loop_may_refuse_the_worker() {
    let host = ManualHost {
        refuse: Some(0),
        ..ManualHost::default()
    };
    assert!(Rng::new(RngConfig::default(), &host).is_err());
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stopped() {
    let (old, host, rng) = bed();
    let mut queue = old.start(VERSION_1, 1).remove(0);
    queue.add(&old.ram, &[into(DATA, 16)]);
    old.kick(&queue);
    host.run();
    assert!(queue.used(&old.ram).is_some());
    let state = rng.save().unwrap();
    let (new, host, rng) = bed();
    new.ram.write(0, &old.bytes(0, 0x10_1000)).unwrap();
    rng.restore(&state).unwrap();
    assert_eq!(rng.save().unwrap(), state);
    let head = queue.add(&new.ram, &[into(DATA, 16)]);
    new.kick(&queue);
    host.run();
    assert_eq!(queue.used(&new.ram), Some((head, 16)));
    assert_eq!(new.lines.take(), [1]);
}

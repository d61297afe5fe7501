//! GPADLs: docs/spec/vmbus.md#vmbus-4.
#![forbid(unsafe_code)]

use super::*;

fn created(relid: u32, gpadl: u32, status: u32) -> Vec<Vec<u8>> {
    vec![words(t::GPADL_CREATED, &[relid, gpadl, status])]
}

fn header(relid: u32, gpadl: u32, len: u16, ranges: u16, data: &[u8]) -> Vec<u8> {
    let header = guest::GpadlHeader {
        relid,
        gpadl,
        range_len: len,
        range_count: ranges,
    };
    message(t::GPADL_HEADER, &[header.as_bytes(), data].concat())
}

fn range(count: u32, offset: u32, pfns: &[u64]) -> Vec<u8> {
    [[count, offset].as_bytes(), pfns.as_bytes()].concat()
}

#[test]
fn a_long_list_is_complete_with_its_last_body() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let pfns: Vec<u64> = (0..80).map(|n| n % PAGES).collect();
    let messages = gpadl_messages(1, 0x10, &pfns);
    assert_eq!(messages.len(), 3);
    assert_eq!(bed.post(&messages[0]), [] as [Vec<u8>; 0]);
    assert_eq!(bed.post(&messages[1]), [] as [Vec<u8>; 0]);
    assert_eq!(bed.post(&messages[2]), created(1, 0x10, 0));
    bed.dropped(&messages[2], |c| c.dropped_unknown_gpadl);
    let list = bed.server.gpadls.get(1, 0x10).unwrap();
    assert_eq!(list.ring_pages().unwrap(), pfns);
}

#[test]
fn lists_may_interleave() {
    let mut bed = Bed::connected(Version::V5_3, 2);
    let first = gpadl_messages(1, 0x10, &[4; 40]);
    let second = gpadl_messages(2, 0x20, &[5; 40]);
    bed.post(&first[0]);
    bed.post(&second[0]);
    assert_eq!(bed.post(&first[1]), created(1, 0x10, 0));
    assert_eq!(bed.post(&second[1]), created(2, 0x20, 0));
}

#[test]
fn a_guest_that_always_sends_the_longest_message_is_understood() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let pad = |mut bytes: Vec<u8>| {
        bytes.resize(240, 0xee);
        bytes
    };
    let short = pad(gpadl_messages(1, 0x10, &[4, 5]).remove(0));
    assert_eq!(bed.post(&short), created(1, 0x10, 0));
    let long: Vec<_> = gpadl_messages(1, 0x11, &[4; 40])
        .into_iter()
        .map(pad)
        .collect();
    bed.post(&long[0]);
    assert_eq!(bed.post(&long[1]), created(1, 0x11, 0));
    let list = bed.server.gpadls.get(1, 0x11).unwrap();
    assert_eq!(list.ring_pages().unwrap(), [4; 40]);
}

#[test]
fn malformed_lists_are_refused() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let good = range(4096, 0, &[4]);
    let cases = [
        ("no range", header(1, 1, 16, 0, &good)),
        ("no bytes", header(1, 1, 0, 1, &[])),
        ("length not of words", header(1, 1, 12, 1, &good)),
        (
            "no byte in the range",
            header(1, 1, 16, 1, &range(0, 0, &[4])),
        ),
        (
            "offset of a page",
            header(1, 1, 24, 1, &range(4096, 4096, &[4, 5])),
        ),
        (
            "wrapping range",
            header(1, 1, 16, 1, &range(u32::MAX, 1, &[4])),
        ),
        ("too few pages", header(1, 1, 16, 1, &range(4097, 0, &[4]))),
        (
            "too few pages with offset",
            header(1, 1, 16, 1, &range(4096, 1, &[4])),
        ),
        ("a range too many", header(1, 1, 16, 2, &good)),
        ("half a range", header(1, 1, 8, 1, &good)),
        (
            "a page that is no RAM",
            header(1, 1, 16, 1, &range(4096, 0, &[PAGES])),
        ),
        (
            "a page out of this world",
            header(1, 1, 16, 1, &range(4096, 0, &[u64::MAX])),
        ),
        ("an unknown channel", header(2, 1, 16, 1, &good)),
        ("a channel out of range", header(0x1_0001, 1, 16, 1, &good)),
    ];
    for (what, bytes) in &cases {
        let sent = bed.post(bytes);
        let relid = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        assert_eq!(sent, created(relid, 1, wire::STATUS_FAILURE), "{what}");
    }
    assert_eq!(bed.server.counters().gpadls_refused, cases.len() as u64);
    assert_eq!(bed.post(&header(1, 1, 16, 1, &good)), created(1, 1, 0));
    let two = [range(4000, 96, &[4]), range(2, 4095, &[5, 6])].concat();
    assert_eq!(bed.post(&header(1, 2, 40, 2, &two)), created(1, 2, 0));
}

#[test]
fn ids_are_unique_per_channel_when_complete_and_at_all_in_progress() {
    let mut bed = Bed::connected(Version::V5_3, 2);
    let failed = wire::STATUS_FAILURE;
    let short = |relid| gpadl_messages(relid, 0x10, &[4]).remove(0);
    let long = |relid| gpadl_messages(relid, 0x10, &[4; 40]).remove(0);
    bed.post(&long(1));
    assert_eq!(bed.post(&long(2)), created(2, 0x10, failed));
    assert_eq!(bed.post(&short(2)), created(2, 0x10, failed));
    let bodies = gpadl_messages(1, 0x10, &[4; 40]);
    assert_eq!(bed.post(&bodies[1]), created(1, 0x10, 0));
    assert_eq!(bed.post(&short(1)), created(1, 0x10, failed));
    assert_eq!(bed.post(&short(2)), created(2, 0x10, 0));
}

#[test]
fn a_teardown_of_what_is_not_there_is_ignored() {
    let mut bed = Bed::connected(Version::V5_3, 2);
    bed.post(&gpadl_messages(1, 0x10, &[4])[0]);
    bed.post(&gpadl_messages(1, 0x11, &[4; 40])[0]);
    for (relid, gpadl) in [(1, 0x12), (2, 0x10), (1, 0x11)] {
        bed.dropped(&words(t::GPADL_TEARDOWN, &[relid, gpadl]), |c| {
            c.dropped_unknown_gpadl
        });
    }
    let torn = bed.post(&words(t::GPADL_TEARDOWN, &[1, 0x10]));
    assert_eq!(torn, [words(t::GPADL_TORNDOWN, &[0x10])]);
}

#[test]
fn the_limit_on_lists_holds_and_a_teardown_makes_room() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let one = |gpadl| gpadl_messages(1, gpadl, &[4]).remove(0);
    for gpadl in 0..8 {
        assert_eq!(bed.post(&one(gpadl)), created(1, gpadl, 0));
    }
    assert_eq!(bed.post(&one(8)), created(1, 8, wire::STATUS_FAILURE));
    bed.post(&words(t::GPADL_TEARDOWN, &[1, 3]));
    assert_eq!(bed.post(&one(8)), created(1, 8, 0));
}

#[test]
fn the_limit_on_lists_in_progress_holds() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let long = |gpadl| gpadl_messages(1, gpadl, &[4; 40]);
    for gpadl in 0..3 {
        bed.post(&long(gpadl)[0]);
    }
    assert_eq!(bed.post(&long(3)[0]), created(1, 3, wire::STATUS_FAILURE));
    assert_eq!(bed.post(&long(1)[1]), created(1, 1, 0));
    assert_eq!(bed.post(&long(3)[0]), [] as [Vec<u8>; 0]);
}

#[test]
fn the_limit_on_bytes_counts_what_is_announced_and_returns_at_failure() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    // 2048 bytes: 255 pages and the head of the range.
    let good: Vec<_> = gpadl_messages(1, 1, &[4; 255]);
    let failed = wire::STATUS_FAILURE;
    assert_eq!(
        bed.post(&gpadl_messages(1, 2, &[4; 256])[0]),
        created(1, 2, failed)
    );
    let mut bad = good.clone();
    *bad.last_mut().unwrap().last_mut().unwrap() = 0xff;
    for messages in [&bad, &good] {
        for bytes in &messages[..messages.len() - 1] {
            assert_eq!(bed.post(bytes), [] as [Vec<u8>; 0]);
        }
        let status = if messages == &good { 0 } else { failed };
        assert_eq!(bed.post(messages.last().unwrap()), created(1, 1, status));
    }
    assert_eq!(
        bed.post(&gpadl_messages(1, 3, &[4])[0]),
        created(1, 3, failed)
    );
}

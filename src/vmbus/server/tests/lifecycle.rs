//! Open, close, modify, rescind: docs/spec/vmbus.md#vmbus-5-1.
#![forbid(unsafe_code)]

use super::*;

const ALL: [Version; 7] = connection::VERSIONS;

fn opened(status: u32) -> Vec<Vec<u8>> {
    vec![words(t::OPEN_CHANNEL_RESULT, &[1, 0x10, status])]
}

#[test]
fn a_guest_connects_opens_closes_and_unloads_at_every_version() {
    for version in ALL {
        let mut bed = Bed::open(version);
        assert!(matches!(bed.phase(1), Phase::Open(_)));
        assert_eq!(bed.post(&words(t::CLOSE_CHANNEL, &[1])), [] as [Vec<u8>; 0]);
        let torn = bed.post(&words(t::GPADL_TEARDOWN, &[1, 0x10]));
        assert_eq!(torn, [words(t::GPADL_TORNDOWN, &[0x10])]);
        assert_eq!(bed.phase(1), Phase::Offered);
        let sent = bed.post(&words(t::UNLOAD, &[]));
        assert_eq!(sent, [words(t::UNLOAD_RESPONSE, &[])]);
    }
}

#[test]
fn open_hands_over_both_rings_and_the_target() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let pfns = [4, 5, 6, 7, 8, 9, 10];
    bed.post(&gpadl_messages(1, 0x10, &pfns)[0]);
    bed.server
        .handle(MessagePort::Message, &open_message(1, 0x10, 0x10, 1, 3));
    let id = bed.id(1);
    let pages = bed.server.ring_pages(id).unwrap();
    assert_eq!(
        pages,
        RingPages {
            relid: 1,
            sint: 2,
            target_vp: Some(1),
            to_host: pfns[..3].to_vec(),
            to_guest: pfns[3..].to_vec(),
        }
    );
    assert_eq!(
        bed.server.next_message(),
        None,
        "no answer before the device"
    );
    assert_eq!(bed.server.next_action(), Some(Action::Open(id)));
    bed.server.opened(id, false);
    assert_eq!(bed.settle(), opened(wire::STATUS_FAILURE));
    assert_eq!(bed.phase(1), Phase::Offered);
    bed.server.handle(
        MessagePort::Message,
        &open_message(1, 0x10, 0x10, VP_NONE, 3),
    );
    assert_eq!(bed.server.ring_pages(id).unwrap().target_vp, None);
    assert_eq!(bed.settle(), opened(0));
}

#[test]
fn impossible_rings_and_targets_are_refused() {
    let mut bed = Bed::connected(Version::V5_3, 2);
    bed.post(&gpadl_messages(1, 0x10, &[4, 5, 6, 7, 8])[0]);
    bed.post(&gpadl_messages(2, 0x20, &[4, 5, 6, 7, 8])[0]);
    let (good_vp, refused) = (0, opened(wire::STATUS_FAILURE));
    for (gpadl, vp, downstream) in [
        (0x11, good_vp, 2),
        (0x20, good_vp, 2),
        (0x10, VPS, 2),
        (0x10, VP_NONE - 1, 2),
        (0x10, good_vp, 0),
        (0x10, good_vp, 1),
        (0x10, good_vp, 4),
        (0x10, good_vp, 5),
        (0x10, good_vp, u32::MAX),
    ] {
        assert_eq!(
            bed.post(&open_message(1, 0x10, gpadl, vp, downstream)),
            refused
        );
    }
    assert_eq!(bed.server.counters().opens_refused, 9);
    assert_eq!(
        bed.post(&open_message(1, 0x10, 0x10, good_vp, 3)),
        opened(0)
    );
}

#[test]
fn the_ring_gpadl_must_be_whole_pages_from_the_first_byte() {
    for (count, offset) in [(4096 * 4 - 8, 0), (4096 * 3, 8), (4096 * 4 - 8, 8)] {
        let mut bed = Bed::connected(Version::V5_3, 1);
        let mut bytes = gpadl_messages(1, 0x10, &[4, 5, 6, 7]).remove(0);
        bytes[20..28].copy_from_slice([count, offset].as_bytes());
        assert_eq!(types(&bed.post(&bytes)), [t::GPADL_CREATED]);
        let sent = bed.post(&open_message(1, 0x10, 0x10, 0, 2));
        assert_eq!(sent, opened(wire::STATUS_FAILURE));
    }
}

#[test]
fn a_closed_channel_opens_again_with_another_gpadl() {
    let mut bed = Bed::open(Version::V5_3);
    bed.post(&words(t::CLOSE_CHANNEL, &[1]));
    bed.post(&words(t::GPADL_TEARDOWN, &[1, 0x10]));
    bed.post(&gpadl_messages(1, 0x10, &[20, 21, 22, 23])[0]);
    assert_eq!(bed.post(&open_message(1, 0x10, 0x10, 0, 2)), opened(0));
}

#[test]
fn a_teardown_waits_for_the_device_to_let_go() {
    let mut bed = Bed::open(Version::V5_3);
    bed.server
        .handle(MessagePort::Message, &words(t::CLOSE_CHANNEL, &[1]));
    bed.server
        .handle(MessagePort::Message, &words(t::GPADL_TEARDOWN, &[1, 0x10]));
    let id = bed.id(1);
    assert_eq!(bed.server.next_action(), Some(Action::Close(id)));
    assert_eq!(bed.server.next_message(), None);
    bed.server.closed(id);
    assert_eq!(bed.settle(), [words(t::GPADL_TORNDOWN, &[0x10])]);
}

#[test]
fn a_teardown_under_an_open_channel_waits_for_its_close() {
    let mut bed = Bed::open(Version::V5_3);
    let teardown = words(t::GPADL_TEARDOWN, &[1, 0x10]);
    assert_eq!(bed.post(&teardown), [] as [Vec<u8>; 0]);
    bed.dropped(&teardown, |c| c.dropped_unknown_gpadl);
    let torn = bed.post(&words(t::CLOSE_CHANNEL, &[1]));
    assert_eq!(torn, [words(t::GPADL_TORNDOWN, &[0x10])]);
}

#[test]
fn an_open_during_the_close_follows_it() {
    let mut bed = Bed::open(Version::V5_3);
    bed.post(&gpadl_messages(1, 0x11, &[20, 21, 22, 23])[0]);
    let id = bed.id(1);
    for bytes in [
        words(t::CLOSE_CHANNEL, &[1]),
        words(t::GPADL_TEARDOWN, &[1, 0x10]),
        open_message(1, 0x77, 0x11, 0, 2),
    ] {
        bed.server.handle(MessagePort::Message, &bytes);
    }
    bed.server
        .handle(MessagePort::Message, &open_message(1, 0x78, 0x11, 0, 2));
    assert_eq!(bed.server.counters().dropped_wrong_state, 1);
    assert_eq!(
        bed.settle(),
        [
            words(t::GPADL_TORNDOWN, &[0x10]),
            words(t::OPEN_CHANNEL_RESULT, &[1, 0x77, 0]),
        ]
    );
    assert_eq!(bed.actions, [Action::Close(id), Action::Open(id)]);
}

#[test]
fn a_reopen_whose_gpadl_is_taken_back_fails() {
    let mut bed = Bed::open(Version::V5_3);
    bed.post(&gpadl_messages(1, 0x11, &[20, 21, 22, 23])[0]);
    for bytes in [
        words(t::CLOSE_CHANNEL, &[1]),
        open_message(1, 0x77, 0x11, 0, 2),
        words(t::GPADL_TEARDOWN, &[1, 0x11]),
    ] {
        bed.server.handle(MessagePort::Message, &bytes);
    }
    assert_eq!(
        bed.settle(),
        [
            words(t::GPADL_TORNDOWN, &[0x11]),
            words(t::OPEN_CHANNEL_RESULT, &[1, 0x77, wire::STATUS_FAILURE]),
        ]
    );
}

#[test]
fn messages_that_do_not_fit_the_state_are_dropped() {
    let mut bed = Bed::open(Version::V5_3);
    let wrong: fn(&VmBusCounters) -> u64 = |c| c.dropped_wrong_state;
    bed.dropped(&open_message(1, 0x12, 0x10, 0, 5), wrong);
    bed.dropped(&words(t::RELID_RELEASED, &[1]), wrong);
    bed.dropped(&words(t::CLOSE_CHANNEL, &[2]), wrong);
    let unknown: fn(&VmBusCounters) -> u64 = |c| c.dropped_unknown_channel;
    for relid in [0, 3, 2048, 0x1_0001, u32::MAX] {
        bed.dropped(&open_message(relid, 1, 0x10, 0, 5), unknown);
        bed.dropped(&words(t::CLOSE_CHANNEL, &[relid]), unknown);
        bed.dropped(&words(t::RELID_RELEASED, &[relid]), unknown);
        bed.dropped(&words(t::GPADL_TEARDOWN, &[relid, 0x10]), unknown);
    }
    assert!(matches!(bed.phase(1), Phase::Open(_)));
}

#[test]
fn modify_is_answered_from_5_3_on_and_moves_the_interrupt_first() {
    for version in ALL {
        let mut bed = Bed::open(version);
        let id = bed.id(1);
        bed.server
            .handle(MessagePort::Message, &words(t::MODIFY_CHANNEL, &[1, 1]));
        let moved = version >= Version::V4_1;
        assert!(bed.server.next_message().is_none());
        let sent = bed.settle();
        let answer = words(t::MODIFY_CHANNEL_RESPONSE, &[1, 0]);
        let answers = usize::from(version >= Version::V5_3);
        assert_eq!(sent, vec![answer; answers]);
        assert_eq!(bed.actions == [Action::Retarget(id, 1)], moved);
    }
}

#[test]
fn a_modify_that_cannot_be_is_answered_with_failure() {
    let mut bed = Bed::open(Version::V5_3);
    for (relid, vp) in [(1, VPS), (1, VP_NONE), (2, 0), (3, 0), (u32::MAX, 0)] {
        let sent = bed.post(&words(t::MODIFY_CHANNEL, &[relid, vp]));
        let answer = words(t::MODIFY_CHANNEL_RESPONSE, &[relid, wire::STATUS_FAILURE]);
        assert_eq!(sent, [answer]);
    }
    assert_eq!(bed.actions, []);
    assert_eq!(bed.server.counters().modifies_refused, 5);
}

#[test]
fn a_revoked_open_channel_is_closed_before_it_is_rescinded() {
    let mut bed = Bed::open(Version::V5_3);
    let id = bed.id(1);
    let long = gpadl_messages(1, 0x20, &[4; 40]);
    bed.post(&long[0]);
    bed.server
        .handle(MessagePort::Message, &words(t::GPADL_TEARDOWN, &[1, 0x10]));
    bed.server.revoke(id);
    bed.server.revoke(id);
    assert_eq!(bed.server.next_message(), None);
    assert_eq!(
        bed.settle(),
        [
            words(t::GPADL_TORNDOWN, &[0x10]),
            words(t::GPADL_CREATED, &[1, 0x20, wire::STATUS_FAILURE]),
            words(t::RESCIND_CHANNEL_OFFER, &[1]),
        ]
    );
    assert_eq!(bed.actions, [Action::Close(id)]);
    bed.actions.clear();

    // What a guest may still send.
    let rescinded: fn(&VmBusCounters) -> u64 = |c| c.dropped_rescinded;
    bed.dropped(&open_message(1, 1, 0x10, 0, 5), rescinded);
    bed.dropped(&words(t::CLOSE_CHANNEL, &[1]), rescinded);
    bed.dropped(&long[1], |c| c.dropped_unknown_gpadl);
    let created = bed.post(&gpadl_messages(1, 0x30, &[u64::MAX])[0]);
    assert_eq!(created, [words(t::GPADL_CREATED, &[1, 0x30, 0])]);
    let torn = bed.post(&words(t::GPADL_TEARDOWN, &[1, 0x30]));
    assert_eq!(torn, [words(t::GPADL_TORNDOWN, &[0x30])]);
    let refused = words(t::MODIFY_CHANNEL_RESPONSE, &[1, wire::STATUS_FAILURE]);
    assert_eq!(bed.post(&words(t::MODIFY_CHANNEL, &[1, 0])), [refused]);

    // The instance and the relid stay taken until the guest lets go.
    assert!(bed.server.offer(identity(1)).is_err());
    bed.server.offer(identity(9)).unwrap();
    assert_eq!(bed.settle()[0][184], 3);
    assert_eq!(
        bed.post(&words(t::RELID_RELEASED, &[1])),
        [] as [Vec<u8>; 0]
    );
    assert_eq!(bed.actions, [Action::Released(id)]);
    assert_eq!(bed.server.channel(id), None);
    bed.server.offer(identity(1)).unwrap();
    assert_eq!(bed.settle()[0][184], 1);
}

#[test]
fn a_channel_revoked_while_opening_fails_the_open_and_is_rescinded() {
    for device_ok in [true, false] {
        let mut bed = Bed::connected(Version::V5_3, 1);
        bed.post(&gpadl_messages(1, 0x10, &[4, 5, 6, 7])[0]);
        bed.server
            .handle(MessagePort::Message, &open_message(1, 0x10, 0x10, 0, 2));
        let id = bed.id(1);
        assert_eq!(bed.server.next_action(), Some(Action::Open(id)));
        bed.server.revoke(id);
        bed.server.opened(id, device_ok);
        let mut expected = opened(wire::STATUS_FAILURE);
        expected.push(words(t::RESCIND_CHANNEL_OFFER, &[1]));
        assert_eq!(bed.settle(), expected);
        assert_eq!(bed.actions.contains(&Action::Close(id)), device_ok);
    }
}

#[test]
fn revoking_what_the_guest_never_saw_needs_no_message() {
    let mut bed = Bed::new(1);
    let id = bed.id(1);
    bed.server.revoke(id);
    assert_eq!(bed.settle(), [] as [Vec<u8>; 0]);
    assert_eq!(bed.actions, [Action::Released(id)]);
    bed.server.revoke(id);
    assert_eq!(bed.server.next_action(), None);
}

#[test]
fn revoking_a_closed_channel_rescinds_it_at_once() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let id = bed.id(1);
    bed.server.revoke(id);
    assert_eq!(bed.settle(), [words(t::RESCIND_CHANNEL_OFFER, &[1])]);
    // The end of the connection releases it too.
    bed.post(&words(t::UNLOAD, &[]));
    assert_eq!(
        bed.actions,
        [Action::Released(id), Action::DiscardMessages(2)]
    );
}

#[test]
fn a_guest_may_give_an_offered_channel_back() {
    let mut bed = Bed::connected(Version::V5_3, 2);
    assert_eq!(
        bed.post(&words(t::RELID_RELEASED, &[1])),
        [] as [Vec<u8>; 0]
    );
    assert_eq!(bed.phase(1), Phase::Withheld);
    assert_eq!(bed.actions, []);
    bed.server.offer(identity(3)).unwrap();
    assert_eq!(bed.settle()[0][184], 1, "the relid is free again");
}

#[test]
fn a_release_ahead_of_the_rescind_takes_it_back() {
    let mut bed = Bed::connected(Version::V5_3, 2);
    let id = bed.id(1);
    bed.server.revoke(id);
    bed.server
        .handle(MessagePort::Message, &words(t::RELID_RELEASED, &[1]));
    bed.server.offer(identity(3)).unwrap();
    let messages = bed.settle();
    assert_eq!(messages.len(), 1, "the new offer alone: {messages:?}");
    assert_eq!(messages[0][184], 1, "under the relid that is free again");
    // Nor is anything offered that was given back before.
    let newest = bed.id(3);
    bed.server.revoke(newest);
    bed.settle();
    bed.post(&words(t::RELID_RELEASED, &[1]));
    bed.server.offer(identity(4)).unwrap();
    bed.server
        .handle(MessagePort::Message, &words(t::RELID_RELEASED, &[1]));
    assert_eq!(bed.settle(), [] as [Vec<u8>; 0]);
}

#[test]
fn a_release_during_the_close_follows_it() {
    let mut bed = Bed::open(Version::V5_3);
    bed.server
        .handle(MessagePort::Message, &words(t::CLOSE_CHANNEL, &[1]));
    bed.server
        .handle(MessagePort::Message, &words(t::RELID_RELEASED, &[1]));
    assert_eq!(bed.settle(), [] as [Vec<u8>; 0]);
    assert_eq!(bed.phase(1), Phase::Withheld);
}

#[test]
fn an_unload_during_the_open_finishes_it_first() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    bed.post(&gpadl_messages(1, 0x10, &[4, 5, 6, 7])[0]);
    bed.server
        .handle(MessagePort::Message, &open_message(1, 0x10, 0x10, 0, 2));
    let id = bed.id(1);
    assert_eq!(bed.server.next_action(), Some(Action::Open(id)));
    bed.server
        .handle(MessagePort::Message, &words(t::UNLOAD, &[]));
    assert_eq!(bed.server.next_message(), None);
    bed.server.opened(id, true);
    assert_eq!(bed.server.next_message(), None);
    assert_eq!(bed.settle(), [words(t::UNLOAD_RESPONSE, &[])]);
    assert_eq!(bed.actions, [Action::Close(id), Action::DiscardMessages(2)]);
}

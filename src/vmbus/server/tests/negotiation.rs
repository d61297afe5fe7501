//! Contact, offers, unload.
#![forbid(unsafe_code)]

use super::*;

const REFUSED: [u32; 2] = [0, 0];

#[test]
fn linux_ends_at_the_first_version_it_asks_for() {
    let mut bed = Bed::new(0);
    let sent = bed.post(&contact_message(Version::V6_0, 1));
    assert_eq!(sent, [words(t::VERSION_RESPONSE, &[1, 1, 0])]);
    assert!(matches!(
        bed.server.connection(),
        Connection::Connected(Contact { vp: 1, version, .. }) if version == Version::V6_0
    ));
}

#[test]
fn each_version_gets_its_own_answer() {
    for (major, minor, selected) in [
        (4, 0, 0x4_0000),
        (4, 1, 0x4_0001),
        (5, 0, 1),
        (5, 1, 1),
        (5, 2, 1),
        (5, 3, 1),
    ] {
        let mut bed = Bed::new(0);
        let sent = bed.post(&contact_message(Version(major << 16 | minor), 0));
        assert_eq!(sent, [words(t::VERSION_RESPONSE, &[1, selected])]);
    }
}

#[test]
fn unknown_versions_are_refused_with_sixteen_bytes() {
    for (major, minor) in [
        (0, 13),
        (1, 1),
        (2, 4),
        (3, 0),
        (4, 2),
        (5, 4),
        (6, 1),
        (0xffff, 0xffff),
    ] {
        let mut bed = Bed::new(0);
        let sent = bed.post(&contact_message(Version(major << 16 | minor), 0));
        assert_eq!(sent, [words(t::VERSION_RESPONSE, &REFUSED)]);
        assert_eq!(bed.server.connection(), Connection::Disconnected);
        assert_eq!(bed.server.counters().contacts_refused, 1);
    }
}

#[test]
fn the_answer_goes_to_the_vp_of_the_request() {
    let mut bed = Bed::new(0);
    bed.server
        .handle(MessagePort::Message, &contact_message(Version::V5_3, 1));
    assert_eq!(bed.server.next_message().unwrap().vp, 1);
    // Before 3.0 there is no such field.
    let mut bed = Bed::new(0);
    bed.server.handle(
        MessagePort::Message,
        &contact_message(Version(0x2_0004), 77),
    );
    assert_eq!(bed.server.next_message().unwrap().vp, 0);
}

#[test]
fn a_contact_for_a_vp_that_does_not_exist_is_dropped() {
    let mut bed = Bed::new(0);
    for vp in [VPS, u32::MAX] {
        bed.dropped(&contact_message(Version::V5_3, vp), |c| {
            c.dropped_bad_target
        });
    }
}

fn contact_with(version: Version, change: impl FnOnce(&mut guest::InitiateContact)) -> Vec<u8> {
    let bytes = contact_message(version, 0);
    let GuestMessage::InitiateContact(mut contact) = GuestMessage::decode(&bytes).unwrap() else {
        panic!("not a contact");
    };
    change(&mut contact);
    message(t::INITIATE_CONTACT, contact.as_bytes())
}

#[test]
fn another_sint_is_refused_there_and_leaves_the_connection_alone() {
    let mut bed = Bed::connected(Version::V5_3, 1);
    let bytes = contact_with(Version::V5_3, |contact| contact.sint = 5);
    bed.server.handle(MessagePort::Contact, &bytes);
    let outgoing = bed.server.next_message().unwrap().clone();
    assert_eq!(outgoing.sint, 5);
    let refusal = words(t::VERSION_RESPONSE, &REFUSED);
    assert_eq!(outgoing.message.encode().as_slice(), refusal);
    bed.server.message_sent();
    assert_eq!(bed.phase(1), Phase::Offered);
    for sint in [0, 16, 255] {
        let bytes = contact_with(Version::V5_3, |contact| contact.sint = sint);
        bed.dropped(&bytes, |c| c.dropped_bad_target);
    }
}

#[test]
fn another_vtl_is_not_for_this_server() {
    let mut bed = Bed::new(0);
    let bytes = contact_with(Version::V5_1, |contact| contact.vtl = 2);
    bed.dropped(&bytes, |c| c.dropped_bad_target);
    let bytes = contact_with(Version::V5_0, |contact| contact.vtl = 2);
    assert_eq!(bed.post(&bytes), [words(t::VERSION_RESPONSE, &[1, 1])]);
}

#[test]
fn sint_and_vtl_count_only_on_the_contact_connection_and_from_5_0_on() {
    for (port, version) in [
        (MessagePort::Message, Version::V5_3),
        (MessagePort::Contact, Version::V4_1),
    ] {
        let mut bed = Bed::new(0);
        let bytes = contact_with(version, |contact| (contact.sint, contact.vtl) = (7, 2));
        bed.server.handle(port, &bytes);
        assert_eq!(bed.server.next_message().unwrap().sint, 2);
        assert!(matches!(bed.server.connection(), Connection::Connected(_)));
    }
}

#[test]
fn one_monitor_page_alone_is_refused() {
    let mut bed = Bed::new(0);
    let bytes = contact_with(Version::V5_3, |contact| contact.monitor_to_host = 0);
    assert_eq!(bed.post(&bytes), [words(t::VERSION_RESPONSE, &REFUSED)]);
    let bytes = contact_with(Version::V5_3, |contact| {
        (contact.monitor_to_guest, contact.monitor_to_host) = (0, 0);
    });
    assert_eq!(bed.post(&bytes), [words(t::VERSION_RESPONSE, &[1, 1])]);
}

#[test]
fn no_feature_is_granted() {
    let mut bed = Bed::new(0);
    let bytes = contact_with(Version::V6_0, |contact| contact.features = u32::MAX);
    assert_eq!(bed.post(&bytes), [words(t::VERSION_RESPONSE, &[1, 1, 0])]);
}

#[test]
fn offers_come_in_identity_order_and_then_their_end() {
    let mut bed = Bed::new(0);
    for n in [3, 1, 2] {
        bed.server.offer(identity(n)).unwrap();
    }
    bed.post(&contact_message(Version::V5_3, 0));
    let sent = bed.post(&words(t::REQUEST_OFFERS, &[]));
    assert_eq!(types(&sent), [1, 1, 1, 4]);
    for (n, offer) in sent[..3].iter().enumerate() {
        let relid = n as u32 + 1;
        assert_eq!(offer.len(), 196);
        let instance = identity(u128::from(relid)).instance.to_bytes_le();
        assert_eq!(offer[24..40], instance);
        assert_eq!(offer[56..58], [1, 0]);
        assert_eq!(offer[184..188], relid.to_le_bytes());
        assert_eq!(offer[188..192], [0xff, 0, 1, 0]);
        assert_eq!(offer[192..], (0x2000 | relid).to_le_bytes());
    }
    bed.dropped(&words(t::REQUEST_OFFERS, &[]), |c| c.dropped_wrong_state);
}

#[test]
fn no_channels_still_means_an_end_of_offers() {
    let mut bed = Bed::new(0);
    bed.post(&contact_message(Version::V5_3, 0));
    let sent = bed.post(&words(t::REQUEST_OFFERS, &[]));
    assert_eq!(sent, [words(t::ALL_OFFERS_DELIVERED, &[])]);
}

#[test]
fn a_channel_added_later_is_offered_at_once() {
    let mut bed = Bed::new(0);
    bed.post(&contact_message(Version::V5_3, 0));
    bed.server.offer(identity(1)).unwrap();
    assert_eq!(
        bed.settle(),
        [] as [Vec<u8>; 0],
        "offers are not asked for yet"
    );
    assert_eq!(types(&bed.post(&words(t::REQUEST_OFFERS, &[]))), [1, 4]);
    bed.server.offer(identity(2)).unwrap();
    assert_eq!(types(&bed.settle()), [1]);
}

#[test]
fn an_instance_and_the_channel_limit_are_respected() {
    let mut bed = Bed::new(4);
    let instance = identity(3).instance;
    assert_eq!(
        bed.server.offer(identity(3)),
        Err(OfferError::InstanceInUse { instance })
    );
    assert_eq!(
        bed.server.offer(identity(5)),
        Err(OfferError::TooManyChannels { limit: 4 })
    );
}

#[test]
fn nothing_but_a_contact_is_heard_while_disconnected() {
    let mut bed = Bed::new(1);
    for number in 1..30 {
        if number != t::INITIATE_CONTACT {
            assert_eq!(bed.post(&message(number, &[0; 200])), [] as [Vec<u8>; 0]);
        }
    }
    assert_eq!(bed.server.counters().dropped_not_connected, 10);
    assert_eq!(bed.server.counters().dropped_host_only, 13);
    assert_eq!(bed.server.counters().dropped_not_offered, 5);
}

#[test]
fn unload_closes_everything_and_is_answered_last() {
    let mut bed = Bed::open(Version::V5_3);
    // A message that is still owed must not follow.
    let [header] = &gpadl_messages(2, 0x20, &[20, 21, 22, 23])[..] else {
        panic!("one message");
    };
    bed.server.handle(MessagePort::Message, header);
    bed.server
        .handle(MessagePort::Message, &words(t::UNLOAD, &[]));
    assert_eq!(bed.server.next_message(), None, "the device is still open");
    assert_eq!(bed.settle(), [words(t::UNLOAD_RESPONSE, &[])]);
    let id = bed.id(1);
    assert_eq!(bed.actions, [Action::Close(id), Action::DiscardMessages(2)]);
    assert_eq!(bed.server.connection(), Connection::Disconnected);
    bed.dropped(&words(t::REQUEST_OFFERS, &[]), |c| c.dropped_not_connected);
}

#[test]
fn a_contact_while_connected_starts_over() {
    let mut bed = Bed::open(Version::V5_3);
    let contact = contact_message(Version::V4_1, 0);
    bed.server.handle(MessagePort::Message, &contact);
    assert_eq!(bed.server.next_message(), None, "the device is still open");
    let sent = bed.settle();
    assert_eq!(sent, [words(t::VERSION_RESPONSE, &[1, 0x4_0001])]);
    let id = bed.id(1);
    assert_eq!(bed.actions, [Action::Close(id), Action::DiscardMessages(2)]);
    // The old GPADL is gone, and the offers start at relid 1 again.
    assert_eq!(types(&bed.post(&words(t::REQUEST_OFFERS, &[]))), [1, 1, 4]);
    bed.dropped(&words(t::GPADL_TEARDOWN, &[1, 0x10]), |c| {
        c.dropped_unknown_gpadl
    });
}

#[test]
fn a_second_contact_replaces_one_that_waits_for_the_disconnect() {
    let mut bed = Bed::open(Version::V5_3);
    let first = contact_message(Version::V5_3, 0);
    bed.server.handle(MessagePort::Message, &first);
    let second = contact_message(Version::V5_0, 1);
    bed.server.handle(MessagePort::Message, &second);
    bed.server
        .handle(MessagePort::Message, &words(t::REQUEST_OFFERS, &[]));
    assert_eq!(bed.settle(), [words(t::VERSION_RESPONSE, &[1, 1])]);
    assert!(matches!(
        bed.server.connection(),
        Connection::Connected(Contact {
            vp: 1,
            offers_requested: false,
            ..
        })
    ));
}

#[test]
fn a_refused_contact_also_ends_the_connection() {
    let mut bed = Bed::open(Version::V5_3);
    let sent = bed.post(&contact_message(Version(0x6_0001), 0));
    assert_eq!(sent, [words(t::VERSION_RESPONSE, &REFUSED)]);
    assert_eq!(bed.server.connection(), Connection::Disconnected);
    assert_eq!(bed.phase(1), Phase::Withheld);
}

#[test]
fn reset_closes_everything_and_owes_nothing() {
    let mut bed = Bed::open(Version::V5_3);
    bed.server
        .handle(MessagePort::Message, &words(t::MODIFY_CHANNEL, &[1, 1]));
    bed.server.reset();
    assert_eq!(bed.settle(), [] as [Vec<u8>; 0]);
    assert_eq!(bed.server.connection(), Connection::Disconnected);
    assert_eq!(bed.phase(1), Phase::Withheld);
    let sent = bed.post(&contact_message(Version::V5_3, 0));
    assert_eq!(types(&sent), [t::VERSION_RESPONSE]);
    assert_eq!(types(&bed.post(&words(t::REQUEST_OFFERS, &[]))), [1, 1, 4]);
}

#[test]
fn hvsock_connections_are_refused_by_name() {
    let mut body = [[1u8; 16], [2; 16]].concat();
    let request = message(t::TL_CONNECT_REQUEST, &body);
    body.extend(0xc000_0236u32.to_le_bytes());
    let mut bed = Bed::connected(Version::V4_1, 0);
    assert_eq!(bed.post(&request), [message(t::TL_CONNECT_RESULT, &body)]);
    let mut bed = Bed::connected(Version::V4_0, 0);
    bed.dropped(&request, |c| c.dropped_not_offered);
}

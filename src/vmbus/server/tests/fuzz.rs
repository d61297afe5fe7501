//! Random guests; save and restore at random steps.
#![forbid(unsafe_code)]

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Post(bool, Vec<u8>),
    Offer(u128),
    Revoke(u64),
    Perform(bool),
    Send,
    Reset,
}

fn relid() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0u32..4, 1 => any::<u32>()]
}

fn gpadl() -> impl Strategy<Value = u32> {
    0u32..4
}

fn vp() -> impl Strategy<Value = u32> {
    prop_oneof![6 => 0..VPS, 1 => Just(VP_NONE), 1 => any::<u32>()]
}

fn version() -> impl Strategy<Value = Version> {
    let known = prop::sample::select(connection::VERSIONS.to_vec());
    prop_oneof![8 => known, 1 => any::<u32>().prop_map(Version)]
}

fn lists() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let len = prop::sample::select(vec![2usize, 6, 40]);
    (relid(), gpadl(), len, 0u64..70)
        .prop_map(|(relid, gpadl, len, pfn)| gpadl_messages(relid, gpadl, &vec![pfn; len]))
}

fn well_formed() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        1 => (version(), vp()).prop_map(|(version, vp)| contact_message(version, vp)),
        3 => Just(words(t::REQUEST_OFFERS, &[])),
        6 => lists().prop_map(|mut list| list.remove(0)),
        4 => lists().prop_map(|mut list| list.pop().unwrap()),
        8 => (relid(), gpadl(), vp(), 0u32..5)
            .prop_map(|(relid, gpadl, vp, page)| open_message(relid, 9, gpadl, vp, page)),
        4 => relid().prop_map(|relid| words(t::CLOSE_CHANNEL, &[relid])),
        4 => (relid(), gpadl()).prop_map(|(relid, id)| words(t::GPADL_TEARDOWN, &[relid, id])),
        3 => relid().prop_map(|relid| words(t::RELID_RELEASED, &[relid])),
        3 => (relid(), vp()).prop_map(|(relid, vp)| words(t::MODIFY_CHANNEL, &[relid, vp])),
        1 => Just(words(t::UNLOAD, &[])),
        1 => Just(message(t::TL_CONNECT_REQUEST, &[3; 32])),
    ]
}

/// What a guest sends about the channels and GPADLs of [`start`] when all goes well.
pub(super) fn likely() -> impl Strategy<Value = Vec<u8>> {
    let relid = 1u32..3;
    prop_oneof![
        8 => relid.clone().prop_map(|n| open_message(n, 9, n, 0, 2)),
        6 => relid.clone().prop_map(|n| words(t::CLOSE_CHANNEL, &[n])),
        3 => relid.clone().prop_map(|n| words(t::GPADL_TEARDOWN, &[n, n])),
        3 => relid.clone().prop_map(|n| gpadl_messages(n, n, &[4, 5, 6, 7]).remove(0)),
        2 => relid.clone().prop_map(|n| words(t::MODIFY_CHANNEL, &[n, 1])),
        1 => relid.prop_map(|n| words(t::RELID_RELEASED, &[n])),
    ]
}

fn malformed() -> impl Strategy<Value = Vec<u8>> {
    let noise = (0u32..32, prop::collection::vec(any::<u8>(), 0..232))
        .prop_map(|(number, body)| message(number, &body));
    let cut = (well_formed(), any::<prop::sample::Index>()).prop_map(|(mut bytes, at)| {
        bytes.truncate(at.index(bytes.len()));
        bytes
    });
    let flipped = (well_formed(), any::<prop::sample::Index>(), any::<u8>()).prop_map(
        |(mut bytes, at, value)| {
            let at = at.index(bytes.len());
            bytes[at] = value;
            bytes
        },
    );
    prop_oneof![noise, cut, flipped]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => likely().prop_map(|bytes| Step::Post(false, bytes)),
        5 => (any::<bool>(), well_formed()).prop_map(|(port, bytes)| Step::Post(port, bytes)),
        3 => (any::<bool>(), malformed()).prop_map(|(port, bytes)| Step::Post(port, bytes)),
        2 => (1u128..6).prop_map(Step::Offer),
        1 => (1u64..8).prop_map(Step::Revoke),
        6 => prop::bool::weighted(0.9).prop_map(Step::Perform),
        4 => Just(Step::Send),
        1 => prop::bool::weighted(0.05).prop_map(|reset| if reset { Step::Reset } else { Step::Send }),
    ]
}

/// Applies a step and returns what can be seen of it.
fn apply(server: &mut Server, step: &Step) -> String {
    match step {
        Step::Post(contact, bytes) => {
            let port = if *contact {
                MessagePort::Contact
            } else {
                MessagePort::Message
            };
            server.handle(port, bytes);
            String::new()
        }
        Step::Offer(n) => format!("{:?}", server.offer(identity(*n))),
        Step::Revoke(id) => {
            server.revoke(ChannelId(*id));
            String::new()
        }
        Step::Perform(ok) => {
            let action = server.next_action();
            let mut pages = None;
            match action {
                Some(Action::Open(id)) => {
                    pages = server.ring_pages(id);
                    server.opened(id, *ok && pages.is_some());
                }
                Some(Action::Close(id)) => server.closed(id),
                _ => {}
            }
            format!("{action:?} {pages:?}")
        }
        Step::Send => {
            let sent = server.next_message().cloned();
            if sent.is_some() {
                server.message_sent();
            }
            format!("{sent:?}")
        }
        Step::Reset => {
            server.reset();
            String::new()
        }
    }
}

fn restored(server: &Server) -> Server {
    let state = server.save();
    let restored = Server::restore(limits(), ram(PAGES), VPS, state.clone()).expect("own state");
    assert_eq!(restored.save(), state);
    restored
}

/// Brings a server to rest and checks what must hold then.
fn check_rest(server: &mut Server) {
    loop {
        let busy = server.next_action().is_some_and(|action| {
            match action {
                Action::Open(id) => server.opened(id, true),
                Action::Close(id) => server.closed(id),
                _ => {}
            }
            true
        });
        if !busy && server.next_message().is_none() {
            break;
        }
        if !busy {
            server.message_sent();
        }
    }
    assert!(!matches!(server.connection, Connection::Disconnecting(..)));
    for channel in server.channels.values() {
        let waiting = matches!(channel.phase, Phase::Opening(_) | Phase::Closing(..));
        assert!(!waiting, "{channel:?}");
        if let Some(relid) = channel.relid {
            assert!(server.by_relid.contains_key(&relid));
        }
    }
    let lists = server.gpadls.save();
    let bytes: usize = lists.iter().map(|list| usize::from(list.range_len)).sum();
    assert!(lists.len() <= limits().gpadls && bytes <= limits().gpadl_bytes);
    assert!(lists.is_empty() || !server.by_relid.is_empty());
}

/// A connected guest, so that more of the steps mean something.
pub(super) fn start() -> Server {
    let mut bed = Bed::connected(Version::V5_3, 3);
    for relid in 1..3 {
        let pfns = [4, 5, 6, 7];
        bed.post(&gpadl_messages(relid, relid, &pfns)[0]);
    }
    bed.server
}

proptest! {
    #[test]
    fn a_restored_server_goes_on_as_the_original_would(
        steps in prop::collection::vec((step(), prop::bool::weighted(0.2)), 1..80),
    ) {
        let mut original = start();
        let mut copy = restored(&original);
        for (step, restore) in &steps {
            let seen = apply(&mut original, step);
            prop_assert_eq!(seen, apply(&mut copy, step));
            if *restore {
                copy = restored(&copy);
            }
            prop_assert_eq!(original.save(), copy.save());
        }
        check_rest(&mut original);
    }

    #[test]
    fn bytes_of_any_kind_are_survived(
        messages in prop::collection::vec(prop_oneof![malformed(), well_formed()], 1..60),
    ) {
        let mut bed = Bed { server: start(), actions: Vec::new() };
        for bytes in &messages {
            let sint_free = |server: &mut Server| while server.next_message().is_some() {
                server.message_sent();
            };
            bed.server.handle(MessagePort::Message, bytes);
            sint_free(&mut bed.server);
        }
        check_rest(&mut bed.server);
    }

    #[test]
    fn a_changed_state_is_refused_or_harmless(
        steps in prop::collection::vec(step(), 1..40),
        change in 0usize..9,
        value in any::<u32>(),
    ) {
        let mut server = start();
        for step in &steps {
            apply(&mut server, step);
        }
        let mut state = server.save();
        let small = value % 5;
        match change {
            0 => state.version = value,
            1 => state.connection = Connection::Disconnected,
            2 => state.next_id = u64::from(small),
            3 => state.channels.iter_mut().for_each(|(_, c)| c.relid = Some(value as u16)),
            4 => state.channels.iter_mut().for_each(|(_, c)| c.phase = Phase::Offered),
            5 => state.channels.iter_mut().for_each(|(_, c)| c.revoked ^= true),
            6 => state.gpadls.iter_mut().for_each(|list| list.relid = small as u16),
            7 => state.gpadls.iter_mut().for_each(|list| list.data.truncate(small as usize * 8)),
            _ => state.actions.clear(),
        }
        if let Ok(mut server) = Server::restore(limits(), ram(PAGES), VPS, state) {
            for step in &steps {
                apply(&mut server, step);
            }
            check_rest(&mut server);
        }
    }
}

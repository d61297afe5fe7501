//! The server against a guest that knows the rules, and one that does not.
#![forbid(unsafe_code)]

use uuid::Uuid;
use zerocopy::IntoBytes;

use super::*;
use crate::hv::vmbus::{HEADER_LEN, MessageBytes, VP_NONE, message_type as t};
use crate::vmbus::ring::guest::ram;

mod fuzz;
mod gpadls;
mod lifecycle;
mod negotiation;
mod promises;

/// VPs of the test VM.
const VPS: u32 = 2;
/// Pages of its RAM.
const PAGES: u64 = 64;

fn message(number: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = number.to_le_bytes().to_vec();
    bytes.resize(HEADER_LEN, 0);
    bytes.extend(body);
    bytes
}

fn words(number: u32, words: &[u32]) -> Vec<u8> {
    message(number, words.as_bytes())
}

fn contact_message(version: Version, vp: u32) -> Vec<u8> {
    let contact = guest::InitiateContact {
        version: version.0,
        target_vp: vp,
        sint: 2,
        vtl: 0,
        reserved: 0,
        features: 0,
        monitor_to_guest: 0x1000,
        monitor_to_host: 0x2000,
    };
    message(t::INITIATE_CONTACT, contact.as_bytes())
}

/// Header and bodies of a GPADL of one range over `pfns`, split as Linux splits them.
fn gpadl_messages(relid: u32, gpadl: u32, pfns: &[u64]) -> Vec<Vec<u8>> {
    let mut range = ((pfns.len() * 4096) as u32).to_le_bytes().to_vec();
    range.extend(0u32.to_le_bytes());
    range.extend(pfns.as_bytes());
    let header = guest::GpadlHeader {
        relid,
        gpadl,
        range_len: range.len() as u16,
        range_count: 1,
    };
    let (first, rest) = range.split_at(range.len().min(8 + 26 * 8));
    let mut body = header.as_bytes().to_vec();
    body.extend(first);
    let mut messages = vec![message(t::GPADL_HEADER, &body)];
    for pfns in rest.chunks(28 * 8) {
        let mut body = [0, gpadl].as_bytes().to_vec();
        body.extend(pfns);
        messages.push(message(t::GPADL_BODY, &body));
    }
    messages
}

fn open_message(relid: u32, open_id: u32, gpadl: u32, vp: u32, downstream: u32) -> Vec<u8> {
    let open = guest::OpenChannel {
        relid,
        open_id,
        ring_gpadl: gpadl,
        target_vp: vp,
        downstream_page: downstream,
        user_data: [0; 120],
    };
    message(t::OPEN_CHANNEL, open.as_bytes())
}

fn identity(n: u128) -> ChannelIdentity {
    ChannelIdentity {
        class: Uuid::from_u128(0x44c4_f61d),
        instance: Uuid::from_u128(n),
    }
}

fn limits() -> Limits {
    Limits {
        channels: 4,
        gpadls: 8,
        gpadls_in_progress: 3,
        gpadl_bytes: 2048,
        inbox: 8,
        outbox: 8,
        ..Limits::default()
    }
}

/// A server whose actions are performed at once, and what it sent.
struct Bed {
    server: Server,
    actions: Vec<Action>,
}

impl Bed {
    fn new(channels: u128) -> Self {
        let mut server = Server::new(limits(), ram(PAGES), VPS);
        for n in 1..=channels {
            server.offer(identity(n)).unwrap();
        }
        Self {
            server,
            actions: Vec::new(),
        }
    }

    /// A connected guest that has its offers.
    fn connected(version: Version, channels: u128) -> Self {
        let mut bed = Self::new(channels);
        bed.post(&contact_message(version, 1));
        bed.post(&words(t::REQUEST_OFFERS, &[]));
        bed.actions.clear();
        bed
    }

    /// As before, with channel 1 open on GPADL 0x10 of 10 pages.
    fn open(version: Version) -> Self {
        let mut bed = Self::connected(version, 2);
        let created = bed.post(&gpadl_messages(1, 0x10, &[4, 5, 6, 7, 8, 9, 10, 11, 12, 13])[0]);
        assert_eq!(created, [words(t::GPADL_CREATED, &[1, 0x10, 0])]);
        let opened = bed.post(&open_message(1, 0x10, 0x10, 0, 5));
        assert_eq!(opened, [words(t::OPEN_CHANNEL_RESULT, &[1, 0x10, 0])]);
        bed.actions.clear();
        bed
    }

    /// Posts one message and performs all that follows.
    fn post(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        self.server.handle(MessagePort::Contact, bytes);
        self.settle()
    }

    /// Posts one message that must be dropped for the reason that `counter` counts.
    fn dropped(&mut self, bytes: &[u8], counter: fn(&VmBusCounters) -> u64) {
        let before = counter(&self.server.counters());
        assert_eq!(self.post(bytes), [] as [Vec<u8>; 0]);
        assert_eq!(counter(&self.server.counters()), before + 1);
    }

    /// Performs all actions, then takes all messages.
    fn settle(&mut self) -> Vec<Vec<u8>> {
        while let Some(action) = self.server.next_action() {
            self.actions.push(action);
            match action {
                Action::Open(id) => {
                    let ok = self.server.ring_pages(id).is_some();
                    self.server.opened(id, ok);
                }
                Action::Close(id) => self.server.closed(id),
                _ => {}
            }
        }
        self.sent()
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let mut sent = Vec::new();
        while let Some(outgoing) = self.server.next_message() {
            assert_eq!(outgoing.sint, 2);
            sent.push(outgoing.message.encode().to_vec());
            self.server.message_sent();
        }
        sent
    }

    fn id(&self, n: u128) -> ChannelId {
        let mut channels = self.server.channels.iter();
        let found = channels.find(|(_, channel)| channel.identity == identity(n));
        *found.expect("channel").0
    }

    fn phase(&self, n: u128) -> Phase {
        self.server.channels[&self.id(n)].phase
    }
}

/// Type numbers of messages.
fn types(messages: &[Vec<u8>]) -> Vec<u32> {
    let number = |bytes: &Vec<u8>| guest::peek_type(bytes).unwrap();
    messages.iter().map(number).collect()
}

#[test]
fn messages_fit_what_the_synic_carries() {
    for bytes in gpadl_messages(1, 1, &[0; 100]) {
        assert!(MessageBytes::try_from(&bytes[..]).is_ok());
    }
}

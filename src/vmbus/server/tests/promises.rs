//! What a message to the guest promises must be true when it is sent.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::fuzz::{likely, start};
use super::*;

#[derive(Debug, Clone)]
enum Step {
    Post(Vec<u8>),
    Offer(u128),
    Revoke(u64),
    /// Perform an action; a device refuses to open if false.
    Perform(bool),
    Send,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => likely().prop_map(Step::Post),
        1 => Just(Step::Post(words(t::UNLOAD, &[]))),
        1 => Just(Step::Post(contact_message(Version::V5_3, 0))),
        2 => Just(Step::Post(words(t::REQUEST_OFFERS, &[]))),
        1 => (4u128..6).prop_map(Step::Offer),
        1 => (1u64..8).prop_map(Step::Revoke),
        10 => prop::bool::weighted(0.9).prop_map(Step::Perform),
        10 => Just(Step::Send),
    ]
}

/// The devices, and what the guest may expect.
#[derive(Debug, Default)]
struct Model {
    /// Relids of open devices.
    open: BTreeMap<ChannelId, u16>,
    /// Relids that the guest knows, by instance.
    offered: BTreeMap<u32, Vec<u8>>,
    /// Channels that the guest was told to let go of.
    rescinded: BTreeSet<u32>,
    /// Interrupts moved and not yet answered for, by relid.
    moved: BTreeMap<u32, u32>,
    /// GPADLs that the guest waits to get back.
    tearing: BTreeSet<u32>,
    /// A contact came after the last UNLOAD and waits for its answer.
    contacted: bool,
    /// UNLOAD_RESPONSE was sent and no contact came since: nothing may follow.
    unloaded: bool,
}

impl Model {
    fn is_open(&self, relid: u32) -> bool {
        self.open.values().any(|open| u32::from(*open) == relid)
    }

    fn perform(&mut self, server: &mut Server, action: Action, ok: bool) {
        match action {
            Action::Open(id) => {
                let pages = server.ring_pages(id).filter(|_| ok);
                let opened = pages.is_some();
                if let Some(pages) = pages {
                    assert_eq!(self.open.insert(id, pages.relid), None, "opened twice");
                }
                server.opened(id, opened);
            }
            Action::Close(id) => {
                assert!(self.open.remove(&id).is_some(), "closed, but not open");
                server.closed(id);
            }
            Action::Retarget(id, _) => {
                let relid = self.open[&id].into();
                *self.moved.entry(relid).or_default() += 1;
            }
            Action::Released(id) => assert!(!self.open.contains_key(&id)),
            Action::DiscardMessages(sint) => assert!((1..16).contains(&sint)),
        }
    }

    fn check(&mut self, message: &HostMessage) {
        assert!(!self.unloaded, "{message:?} after the last one");
        match message {
            HostMessage::OfferChannel(offer) => {
                assert!(!self.rescinded.contains(&offer.relid), "relid reused");
                let instance = offer.instance.to_vec();
                let twin = self.offered.values().any(|other| *other == instance);
                assert!(!twin, "instance offered twice");
                let former = self.offered.insert(offer.relid, instance);
                assert_eq!(former, None, "relid offered twice");
            }
            HostMessage::RescindChannelOffer(rescind) => {
                assert!(!self.is_open(rescind.relid));
                // Unless the guest gave the channel back before it read this.
                if self.offered.contains_key(&rescind.relid) {
                    assert!(self.rescinded.insert(rescind.relid), "rescinded twice");
                }
            }
            HostMessage::OpenChannelResult(result) => {
                assert!(!self.rescinded.contains(&result.relid), "too late");
            }
            // In these tests GPADL n belongs to channel n.
            HostMessage::GpadlTorndown(torn) => {
                assert!(!self.is_open(torn.gpadl));
                self.tearing.remove(&torn.gpadl);
            }
            HostMessage::ModifyChannelResponse(response) if response.status == 0 => {
                let moved = self.moved.entry(response.relid).or_default();
                assert!(*moved > 0, "the interrupt has not moved");
                *moved -= 1;
            }
            HostMessage::VersionResponse(_) => {
                assert!(self.open.is_empty());
                *self = Self::default();
            }
            HostMessage::UnloadResponse => {
                assert!(self.open.is_empty());
                self.unloaded = !self.contacted;
            }
            _ => {}
        }
    }

    /// Posts a message. A guest waits for the answer to its contact, and gives back only what it
    /// was offered, and uses no GPADL id again before it is its own.
    fn post(&mut self, server: &mut Server, bytes: &[u8]) {
        let message = GuestMessage::decode(bytes).expect("well-formed");
        let wrong_state = server.counters().dropped_wrong_state;
        match message {
            GuestMessage::InitiateContact(_) => {
                self.contacted = true;
                self.unloaded = false;
            }
            GuestMessage::Unload => self.contacted = false,
            GuestMessage::RelidReleased(released)
                if !self.offered.contains_key(&released.relid) =>
            {
                return;
            }
            _ if self.contacted => return,
            GuestMessage::GpadlHeader(header, _) if self.tearing.contains(&header.gpadl) => return,
            GuestMessage::GpadlTeardown(teardown)
                if server.gpadls.get(1, teardown.gpadl).is_some()
                    || server.gpadls.get(2, teardown.gpadl).is_some() =>
            {
                self.tearing.insert(teardown.gpadl);
            }
            _ => {}
        }
        server.handle(MessagePort::Message, bytes);
        if let GuestMessage::RelidReleased(released) = message
            && server.counters().dropped_wrong_state == wrong_state
        {
            self.offered.remove(&released.relid);
            self.rescinded.remove(&released.relid);
        }
    }
}

proptest! {
    #[test]
    fn no_message_breaks_its_promise(steps in prop::collection::vec(step(), 1..150)) {
        let mut server = start();
        let mut model = Model::default();
        for n in 1..4 {
            model.offered.insert(n, identity(n.into()).instance.to_bytes_le().to_vec());
        }
        for step in &steps {
            match step {
                Step::Post(bytes) => model.post(&mut server, bytes),
                Step::Offer(n) => drop(server.offer(identity(*n))),
                Step::Revoke(id) => server.revoke(ChannelId(*id)),
                Step::Perform(ok) => {
                    if let Some(action) = server.next_action() {
                        model.perform(&mut server, action, *ok);
                    }
                }
                Step::Send => {
                    if let Some(outgoing) = server.next_message().cloned() {
                        model.check(&outgoing.message);
                        server.message_sent();
                    }
                }
            }
        }
    }
}

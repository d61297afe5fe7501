//! The VMBus server as a state machine, free of I/O.
//!
//! In go messages of the guest, offers and revocations of the embedder, and the outcome of
//! actions. Out come actions, which the adapter performs and reports, and messages to the guest.
//! Actions come first: a message may be sent only when no action waits, which is what makes the
//! promises in messages (no interrupt at the old VP, no access to pages) true.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};

use super::channel::ChannelIdentity;
use super::counters::{Drop, VmBusCounters};
use super::gpadl::{GpadlState, Gpadls, Progress};
use super::{Limits, OfferError};
use crate::hv::vmbus as wire;
use crate::hv::vmbus::{GuestMessage, HostMessage, MessageError, Version, guest, host};
use crate::mem::GuestRam;

mod connection;
mod open;
pub mod state;
#[cfg(test)]
mod tests;

pub(super) use connection::supersedes;
pub use state::{ServerState, StateError};

/// A channel of this server; never used again after its offer is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct ChannelId(pub(super) u64);

/// What the adapter has to do, in order. [`Action::Open`] and [`Action::Close`] are answered with
/// [`Server::opened`] and [`Server::closed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Action {
    /// Open the device with [`Server::ring_pages`].
    Open(ChannelId),
    /// Close the device.
    Close(ChannelId),
    /// Deliver the channel's interrupts to this VP from now on, and no more to the former one.
    Retarget(ChannelId, u32),
    /// The offer is gone for good: forget the channel.
    Released(ChannelId),
    /// Drop what is queued at the SynIC for this SINT.
    DiscardMessages(u8),
}

/// A message on its way to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Outgoing {
    /// VP that takes it.
    pub vp: u32,
    /// SINT that takes it.
    pub sint: u8,
    /// The message.
    pub message: HostMessage,
}

/// Parameters of an OPEN_CHANNEL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct OpenParams {
    /// Echoed in the result.
    pub open_id: u32,
    /// GPADL of both rings.
    pub gpadl: u32,
    /// VP for interrupts, or [`wire::VP_NONE`].
    pub target_vp: u32,
    /// First page of the host-to-guest ring.
    pub downstream_page: u32,
}

/// State of a channel (docs/spec/vmbus.md#vmbus-5-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Phase {
    /// The guest does not know of it: it has not asked for offers, or gave the id back.
    Withheld,
    /// Offered and closed.
    Offered,
    /// [`Action::Open`] is under way.
    Opening(OpenParams),
    /// Open.
    Open(OpenParams),
    /// [`Action::Close`] is under way for rings that still use the GPADL of the first parameters.
    Closing(OpenParams, AfterClose),
    /// Rescinded; waits for the guest to give the id back.
    Rescinded,
}

/// What follows a close that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum AfterClose {
    /// The channel stays offered.
    Offer,
    /// The guest has opened it again.
    Reopen(OpenParams),
    /// The guest has given the id back.
    Release,
}

/// A channel. Plain data; part of a saved state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Channel {
    /// GUIDs of the offer.
    pub identity: ChannelIdentity,
    /// Id towards the guest; none exactly while withheld.
    pub relid: Option<u16>,
    /// The embedder took the offer back.
    pub revoked: bool,
    /// State.
    pub phase: Phase,
}

impl Channel {
    /// The GPADL that a ring uses.
    fn ring_gpadl(&self) -> Option<u32> {
        match self.phase {
            Phase::Opening(params) | Phase::Open(params) | Phase::Closing(params, _) => {
                Some(params.gpadl)
            }
            Phase::Withheld | Phase::Offered | Phase::Rescinded => None,
        }
    }
}

/// An established connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Contact {
    /// Version agreed on.
    pub version: Version,
    /// VP that takes messages.
    pub vp: u32,
    /// SINT that takes messages.
    pub sint: u8,
    /// REQUEST_OFFERS came.
    pub offers_requested: bool,
}

/// A valid INITIATE_CONTACT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct ContactRequest {
    /// Version asked for.
    pub version: Version,
    /// VP that takes the answer.
    pub vp: u32,
    /// SINT that takes the answer.
    pub sint: u8,
    /// The request is consistent; otherwise the answer is no.
    pub consistent: bool,
}

/// State of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Connection {
    /// Only INITIATE_CONTACT means anything.
    Disconnected,
    /// The guest is connected.
    Connected(Contact),
    /// Devices are being closed before what comes next.
    Disconnecting(Contact, AfterDisconnect),
}

/// What follows a disconnect that is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum AfterDisconnect {
    /// Nothing: the VM is being reset.
    Reset,
    /// UNLOAD_RESPONSE.
    Unload,
    /// The answer to a new INITIATE_CONTACT.
    Contact(ContactRequest),
}

/// Rings of a channel that is to be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingPages {
    /// Channel id towards the guest, which is also the event flag.
    pub relid: u16,
    /// SINT of the event flag.
    pub sint: u8,
    /// VP for interrupts, if they are on.
    pub target_vp: Option<u32>,
    /// Pages of the guest-to-host ring.
    pub to_host: Vec<u64>,
    /// Pages of the host-to-guest ring.
    pub to_guest: Vec<u64>,
}

/// Where a control message came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum MessagePort {
    /// [`wire::CONNECTION_MESSAGE`].
    Message,
    /// [`wire::CONNECTION_CONTACT`]: SINT and VTL of a contact count.
    Contact,
}

/// The server.
#[derive(Debug)]
pub struct Server {
    limits: Limits,
    ram: GuestRam,
    vp_count: u32,
    connection: Connection,
    channels: BTreeMap<ChannelId, Channel>,
    by_relid: BTreeMap<u16, ChannelId>,
    next_id: u64,
    gpadls: Gpadls,
    actions: VecDeque<Action>,
    outbox: VecDeque<Outgoing>,
    /// Bit n: a contact was refused on SINT n, which is not this server's, since the last
    /// [`Action::DiscardMessages`] of it.
    refused_sints: u16,
    /// Refusals since those that wait at the SynIC were last dropped.
    refusals: u32,
    counters: VmBusCounters,
}

impl Server {
    /// A server with no offers and no connection. `ram` serves to tell RAM from holes; pages are
    /// never read or written here.
    pub fn new(limits: Limits, ram: GuestRam, vp_count: u32) -> Self {
        Self {
            limits,
            ram,
            vp_count,
            connection: Connection::Disconnected,
            channels: BTreeMap::new(),
            by_relid: BTreeMap::new(),
            next_id: 1,
            gpadls: Gpadls::default(),
            actions: VecDeque::new(),
            outbox: VecDeque::new(),
            refused_sints: 0,
            refusals: 0,
            counters: VmBusCounters::default(),
        }
    }

    /// Takes the next action. It must be performed before the next message is sent.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The oldest message to the guest, if no action waits.
    pub fn next_message(&self) -> Option<&Outgoing> {
        self.outbox.front().filter(|_| self.actions.is_empty())
    }

    /// The oldest message is on its way.
    pub fn message_sent(&mut self) {
        self.outbox.pop_front();
    }

    /// Number of messages to the guest that wait.
    pub fn outbox_len(&self) -> usize {
        self.outbox.len()
    }

    /// Drops all messages to the guest, which does not take them, and returns their number.
    pub fn drop_outbox(&mut self) -> usize {
        self.outbox.drain(..).count()
    }

    /// Counts so far.
    pub fn counters(&self) -> VmBusCounters {
        self.counters
    }

    /// State of the connection.
    pub fn connection(&self) -> Connection {
        self.connection
    }

    /// A channel, until it is released.
    pub fn channel(&self, id: ChannelId) -> Option<&Channel> {
        self.channels.get(&id)
    }

    /// Whether a channel can be added now.
    ///
    /// # Errors
    ///
    /// [`OfferError`]: what stands in the way.
    pub fn check_offer(&self, identity: &ChannelIdentity) -> Result<(), OfferError> {
        let taken = |channel: &Channel| channel.identity.instance == identity.instance;
        if self.channels.values().any(taken) {
            return Err(OfferError::InstanceInUse {
                instance: identity.instance,
            });
        }
        if self.channels.len() >= self.limits.channels.min(wire::MAX_RELID.into()) {
            return Err(OfferError::TooManyChannels {
                limit: self.limits.channels,
            });
        }
        Ok(())
    }

    /// Adds a channel, and offers it if the guest has asked for offers.
    ///
    /// # Errors
    ///
    /// [`OfferError`]; nothing changed then.
    pub fn offer(&mut self, identity: ChannelIdentity) -> Result<ChannelId, OfferError> {
        self.check_offer(&identity)?;
        let id = ChannelId(self.next_id);
        self.next_id += 1;
        let channel = Channel {
            identity,
            relid: None,
            revoked: false,
            phase: Phase::Withheld,
        };
        self.channels.insert(id, channel);
        if let Connection::Connected(Contact {
            offers_requested: true,
            ..
        }) = self.connection
        {
            self.send_offer(id);
        }
        Ok(id)
    }

    /// Takes an offer back. [`Action::Released`] tells when it is gone.
    pub fn revoke(&mut self, id: ChannelId) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        if std::mem::replace(&mut channel.revoked, true) {
            return;
        }
        match channel.phase {
            Phase::Withheld => self.withdraw(id),
            Phase::Offered if mutant!("removal-not-rescinded") => {}
            Phase::Offered => self.rescind(id),
            Phase::Open(params) => self.start_close(id, params),
            Phase::Opening(_) | Phase::Closing(..) | Phase::Rescinded => {}
        }
    }

    /// The VM is reset: closes everything, owes the guest nothing. Offers stay.
    pub fn reset(&mut self) {
        match self.connection {
            Connection::Disconnected => {
                self.outbox.clear();
                self.discard_messages();
            }
            Connection::Connected(contact) => self.disconnect(contact, AfterDisconnect::Reset),
            Connection::Disconnecting(contact, _) => {
                self.connection = Connection::Disconnecting(contact, AfterDisconnect::Reset);
            }
        }
    }

    /// Handles one message of the guest, given with its header.
    pub fn handle(&mut self, port: MessagePort, bytes: &[u8]) {
        self.counters.messages += 1;
        let result = GuestMessage::decode(bytes)
            .map_err(|error| match error {
                MessageError::Short { .. } => Drop::Short,
                MessageError::HostOnly(_) => Drop::HostOnly,
                MessageError::NotOffered(_) => Drop::NotOffered,
                MessageError::Unknown(_) => Drop::Unknown,
            })
            .and_then(|message| self.dispatch(port, message));
        if let Err(reason) = result {
            self.counters.count_drop(reason);
        }
    }

    fn dispatch(&mut self, port: MessagePort, message: GuestMessage<'_>) -> Result<(), Drop> {
        if let GuestMessage::InitiateContact(request) = message {
            return self.initiate_contact(port, &request);
        }
        let contact = match self.connection {
            Connection::Connected(contact) => contact,
            Connection::Disconnecting(contact, _) if matches!(message, GuestMessage::Unload) => {
                self.connection = Connection::Disconnecting(contact, AfterDisconnect::Unload);
                return Ok(());
            }
            _ => return Err(Drop::NotConnected),
        };
        match message {
            GuestMessage::InitiateContact(_) => Ok(()),
            GuestMessage::RequestOffers => self.request_offers(contact),
            GuestMessage::OpenChannel(request) => self.open_channel(&request),
            GuestMessage::CloseChannel(request) => self.close_channel(request.relid),
            GuestMessage::GpadlHeader(header, data) => self.gpadl_header(&header, data),
            GuestMessage::GpadlBody(body, data) => self.gpadl_body(body.gpadl, data),
            GuestMessage::GpadlTeardown(request) => self.gpadl_teardown(request),
            GuestMessage::RelidReleased(request) => self.relid_released(request.relid),
            GuestMessage::Unload => {
                self.disconnect(contact, AfterDisconnect::Unload);
                Ok(())
            }
            GuestMessage::TlConnectRequest(request) => self.refuse_hvsock(contact, &request),
            GuestMessage::ModifyChannel(request) => self.modify_channel(contact, request),
        }
    }

    /// Finds a channel that is offered to the guest.
    fn find(&self, relid: u32) -> Result<(ChannelId, u16, Channel), Drop> {
        let relid = u16::try_from(relid).map_err(|_| Drop::UnknownChannel)?;
        let id = *self.by_relid.get(&relid).ok_or(Drop::UnknownChannel)?;
        let channel = self.channels.get(&id).ok_or(Drop::UnknownChannel)?;
        Ok((id, relid, *channel))
    }

    /// True for what a channel's interrupts can be sent to.
    fn is_target(&self, vp: u32) -> bool {
        vp == wire::VP_NONE || vp < self.vp_count
    }

    fn set_phase(&mut self, id: ChannelId, phase: Phase) {
        if let Some(channel) = self.channels.get_mut(&id) {
            channel.phase = phase;
        }
    }

    /// Queues a message for the connected guest.
    fn send(&mut self, message: HostMessage) {
        if let Connection::Connected(Contact { vp, sint, .. }) = self.connection {
            self.outbox.push_back(Outgoing { vp, sint, message });
        }
    }

    /// The guest knows nothing of the channel any more.
    fn withdraw(&mut self, id: ChannelId) {
        let Some(channel) = self.channels.get_mut(&id) else {
            return;
        };
        channel.phase = Phase::Withheld;
        if let Some(relid) = channel.relid.take() {
            self.by_relid.remove(&relid);
            self.gpadls.forget_channel(relid);
            // What the guest did not wait for would be about whoever has the relid next.
            self.outbox.retain(|waiting| match &waiting.message {
                HostMessage::OfferChannel(offer) => offer.relid != u32::from(relid),
                HostMessage::RescindChannelOffer(rescind) => rescind.relid != u32::from(relid),
                _ => true,
            });
        }
        if channel.revoked {
            self.channels.remove(&id);
            self.actions.push_back(Action::Released(id));
        }
    }

    fn gpadl_header(&mut self, header: &guest::GpadlHeader, data: &[u8]) -> Result<(), Drop> {
        let result = match self.find(header.relid) {
            // Rescinded: the guest waits no more, but gets its answer.
            Ok((_, _, channel)) if channel.phase == Phase::Rescinded => Ok(Progress::Complete),
            Ok((_, relid, _)) => {
                let result = self
                    .gpadls
                    .begin(relid, header, data, &self.limits, &self.ram);
                result.map_err(|_| ())
            }
            Err(_) => Err(()),
        };
        self.gpadl_answer(header.relid, header.gpadl, result);
        Ok(())
    }

    fn gpadl_body(&mut self, gpadl: u32, data: &[u8]) -> Result<(), Drop> {
        let (relid, result) = self
            .gpadls
            .append(gpadl, data, &self.ram)
            .ok_or(Drop::UnknownGpadl)?;
        self.gpadl_answer(relid.into(), gpadl, result.map_err(|_| ()));
        Ok(())
    }

    fn gpadl_answer(&mut self, relid: u32, gpadl: u32, result: Result<Progress, ()>) {
        let status = match result {
            Ok(Progress::More) => return,
            Ok(Progress::Complete) => wire::STATUS_SUCCESS,
            Err(()) => {
                self.counters.gpadls_refused += 1;
                wire::STATUS_FAILURE
            }
        };
        let created = host::GpadlCreated {
            relid,
            gpadl,
            status,
        };
        self.send(HostMessage::GpadlCreated(created));
    }

    fn gpadl_teardown(&mut self, request: guest::GpadlTeardown) -> Result<(), Drop> {
        let (_, relid, channel) = self.find(request.relid)?;
        let gpadl = request.gpadl;
        if channel.phase == Phase::Rescinded {
            self.gpadls.remove(relid, gpadl);
            self.send(HostMessage::GpadlTorndown(host::GpadlTorndown { gpadl }));
            return Ok(());
        }
        if !self.gpadls.mark_teardown(relid, gpadl) {
            return Err(Drop::UnknownGpadl);
        }
        let in_use = channel
            .ring_gpadl()
            .filter(|_| !mutant!("torn-down-while-open"));
        self.settle_teardowns(relid, in_use);
        Ok(())
    }

    /// Gives back the GPADLs that the guest has asked for, but for the one a ring uses.
    fn settle_teardowns(&mut self, relid: u16, in_use: Option<u32>) {
        for gpadl in self.gpadls.take_torn(relid, in_use.as_slice()) {
            self.send(HostMessage::GpadlTorndown(host::GpadlTorndown { gpadl }));
        }
    }
}

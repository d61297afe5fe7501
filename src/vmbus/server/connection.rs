//! Contact, offers, disconnect (docs/spec/vmbus.md#vmbus-2,
//! docs/spec/vmbus.md#vmbus-3).
#![forbid(unsafe_code)]

use super::*;

/// Versions that the server speaks.
pub(super) const VERSIONS: [Version; 7] = [
    Version::V4_0,
    Version::V4_1,
    Version::V5_0,
    Version::V5_1,
    Version::V5_2,
    Version::V5_3,
    Version::V6_0,
];

/// After so many refusals of contacts those that still wait at the SynIC are dropped: they go to any
/// VP, each of which has a queue.
const MAX_REFUSALS: u32 = 64;

/// Number of SINTs; SINT 0 belongs to the hypervisor.
pub(super) const SINT_COUNT: u8 = 16;

impl ContactRequest {
    /// What an INITIATE_CONTACT asks of a server with `vp_count` VPs.
    fn new(
        port: MessagePort,
        request: &guest::InitiateContact,
        vp_count: u32,
    ) -> Result<Self, Drop> {
        let version = Version(request.version);
        let vp = if version >= Version::V3_0 {
            request.target_vp
        } else {
            0
        };
        if vp >= vp_count {
            return Err(Drop::BadTarget);
        }
        let fields = port == MessagePort::Contact;
        if fields && version >= Version::V5_1 && request.vtl != 0 {
            return Err(Drop::BadTarget);
        }
        let sint = if fields && version >= Version::V5_0 {
            request.sint
        } else {
            wire::SINT
        };
        if sint == 0 || sint >= SINT_COUNT {
            return Err(Drop::BadTarget);
        }
        let monitors = [request.monitor_to_guest, request.monitor_to_host];
        let consistent = (monitors[0] == 0) == (monitors[1] == 0);
        Ok(Self {
            version,
            vp,
            sint,
            consistent,
        })
    }

    /// The request is for another server: it does not end our connection.
    fn is_foreign(&self) -> bool {
        self.sint != wire::SINT
    }
}

/// True for a message that ends the connection of a server with `vp_count` VPs, so that what came
/// before it no longer matters.
pub(crate) fn supersedes(port: MessagePort, bytes: &[u8], vp_count: u32) -> bool {
    match GuestMessage::decode(bytes) {
        Ok(GuestMessage::Unload) => true,
        Ok(GuestMessage::InitiateContact(request)) => {
            let request = ContactRequest::new(port, &request, vp_count);
            request.is_ok_and(|request| !request.is_foreign())
        }
        _ => false,
    }
}

impl Server {
    pub(super) fn initiate_contact(
        &mut self,
        port: MessagePort,
        request: &guest::InitiateContact,
    ) -> Result<(), Drop> {
        let request = ContactRequest::new(port, request, self.vp_count)?;
        if request.is_foreign() {
            self.refuse(request);
            return Ok(());
        }
        match self.connection {
            Connection::Disconnected => {
                self.discard_refusals();
                self.connect(request);
            }
            Connection::Connected(_) if mutant!("contact-keeps-channels") => self.connect(request),
            Connection::Connected(contact) => {
                self.disconnect(contact, AfterDisconnect::Contact(request));
            }
            Connection::Disconnecting(contact, _) => {
                let after = AfterDisconnect::Contact(request);
                self.connection = Connection::Disconnecting(contact, after);
            }
        }
        Ok(())
    }

    /// Answers a contact while disconnected.
    fn connect(&mut self, request: ContactRequest) {
        let ContactRequest {
            version, vp, sint, ..
        } = request;
        if !request.consistent || (!VERSIONS.contains(&version) && !mutant!("contact-any-version"))
        {
            self.refuse(request);
            return;
        }
        let common = host::VersionResponse {
            supported: 1,
            state: 0,
            reserved: 0,
            selected: if version >= Version::V5_0 {
                wire::CONNECTION_MESSAGE
            } else {
                version.0
            },
        };
        self.counters.connections += 1;
        self.connection = Connection::Connected(Contact {
            version,
            vp,
            sint,
            offers_requested: false,
        });
        self.send(if version >= Version::V6_0 {
            HostMessage::VersionResponse6(host::VersionResponse6 {
                common,
                features: 0,
            })
        } else {
            HostMessage::VersionResponse(common)
        });
    }

    /// Answers a contact with no. Linux looks at `supported` only.
    fn refuse(&mut self, request: ContactRequest) {
        self.counters.contacts_refused += 1;
        if self.refusals >= MAX_REFUSALS {
            // Nobody takes them. A connection has none on its own SINT, but other messages.
            match self.connection {
                Connection::Disconnected => self.discard_messages(),
                _ => self.discard_refusals(),
            }
            self.refusals = 0;
        }
        self.refusals += 1;
        if request.is_foreign() {
            self.refused_sints |= 1u16 << request.sint;
        }
        let response = host::VersionResponse {
            supported: 0,
            state: 0,
            reserved: 0,
            selected: 0,
        };
        self.outbox.push_back(Outgoing {
            vp: request.vp,
            sint: request.sint,
            message: HostMessage::VersionResponse(response),
        });
    }

    /// Ends the connection: closes what is open, forgets what the guest owns.
    pub(super) fn disconnect(&mut self, contact: Contact, after: AfterDisconnect) {
        self.connection = Connection::Disconnecting(contact, after);
        self.outbox.clear();
        self.gpadls.clear();
        let ids: Vec<ChannelId> = self.channels.keys().copied().collect();
        for id in ids {
            match self.channels[&id].phase {
                Phase::Offered | Phase::Rescinded => self.withdraw(id),
                Phase::Open(params) => self.start_close(id, params),
                Phase::Withheld | Phase::Opening(_) | Phase::Closing(..) => {}
            }
        }
        self.finish_disconnect();
    }

    /// Goes on when the last device is closed. Whatever is still owed to the guest is dropped
    /// before the answer is queued, so that the answer is the last message.
    pub(super) fn finish_disconnect(&mut self) {
        let Connection::Disconnecting(contact, after) = self.connection else {
            return;
        };
        if self
            .channels
            .values()
            .any(|channel| channel.relid.is_some())
        {
            return;
        }
        self.connection = Connection::Disconnected;
        self.discard_messages();
        match after {
            AfterDisconnect::Reset => self.outbox.clear(),
            AfterDisconnect::Unload if mutant!("unload-unanswered") => {}
            AfterDisconnect::Unload => self.outbox.push_back(Outgoing {
                vp: contact.vp,
                sint: contact.sint,
                message: HostMessage::UnloadResponse,
            }),
            AfterDisconnect::Contact(request) => self.connect(request),
        }
    }

    /// Has dropped what waits at the SynIC.
    pub(super) fn discard_messages(&mut self) {
        self.refusals = 0;
        self.actions.push_back(Action::DiscardMessages(wire::SINT));
        self.discard_refusals();
    }

    /// Has dropped refusals that wait on other SINTs: they would hold up what comes after them.
    fn discard_refusals(&mut self) {
        let refused = std::mem::take(&mut self.refused_sints);
        let sints = (1..SINT_COUNT).filter(|sint| refused & 1 << sint != 0);
        self.actions.extend(sints.map(Action::DiscardMessages));
    }

    pub(super) fn request_offers(&mut self, contact: Contact) -> Result<(), Drop> {
        if contact.offers_requested && !mutant!("offers-twice") {
            return Err(Drop::WrongState);
        }
        self.connection = Connection::Connected(Contact {
            offers_requested: true,
            ..contact
        });
        // The same order at each boot gives the same relids, which some guests expect after
        // hibernation.
        let mut ids: Vec<(ChannelIdentity, ChannelId)> = self
            .channels
            .iter()
            .map(|(id, channel)| (channel.identity, *id))
            .collect();
        ids.sort();
        for (_, id) in ids {
            self.send_offer(id);
        }
        self.send(HostMessage::AllOffersDelivered);
        Ok(())
    }

    /// Gives the channel the lowest free relid and offers it.
    pub(super) fn send_offer(&mut self, id: ChannelId) {
        let free = (1..=wire::MAX_RELID).find(|relid| !self.by_relid.contains_key(relid));
        let (Some(relid), Some(channel)) = (free, self.channels.get_mut(&id)) else {
            return;
        };
        channel.relid = Some(relid);
        channel.phase = Phase::Offered;
        let identity = channel.identity;
        self.by_relid.insert(relid, id);
        self.send(HostMessage::OfferChannel(host::OfferChannel {
            class: identity.class.to_bytes_le(),
            instance: identity.instance.to_bytes_le(),
            reserved: [0; 16],
            flags: host::OFFER_ENUMERATE_DEVICE_INTERFACE,
            mmio_megabytes: 0,
            user_data: [0; 120],
            subchannel: 0,
            mmio_megabytes_optional: 0,
            relid: relid.into(),
            monitor_id: host::NO_MONITOR,
            monitor_allocated: 0,
            dedicated: mutant!("offer-not-dedicated", 0, host::DEDICATED_INTERRUPT),
            connection_id: wire::CONNECTION_CHANNEL | u32::from(relid),
        }));
    }

    /// Tells the guest that a closed channel is gone.
    pub(super) fn rescind(&mut self, id: ChannelId) {
        let Some(relid) = self.channels.get(&id).and_then(|channel| channel.relid) else {
            return;
        };
        self.settle_teardowns(relid, None);
        for gpadl in self.gpadls.take_building(relid) {
            let created = host::GpadlCreated {
                relid: relid.into(),
                gpadl,
                status: wire::STATUS_FAILURE,
            };
            self.send(HostMessage::GpadlCreated(created));
        }
        self.set_phase(id, Phase::Rescinded);
        let relid = relid.into();
        let rescind = host::RescindChannelOffer { relid };
        self.send(HostMessage::RescindChannelOffer(rescind));
    }

    pub(super) fn relid_released(&mut self, relid: u32) -> Result<(), Drop> {
        let (id, _, channel) = self.find(relid)?;
        match channel.phase {
            Phase::Offered | Phase::Rescinded => self.withdraw(id),
            Phase::Closing(params, AfterClose::Offer) => {
                self.set_phase(id, Phase::Closing(params, AfterClose::Release));
            }
            _ => return Err(Drop::WrongState),
        }
        Ok(())
    }

    pub(super) fn refuse_hvsock(
        &mut self,
        contact: Contact,
        request: &guest::TlConnectRequest,
    ) -> Result<(), Drop> {
        if contact.version < Version::V4_1 {
            return Err(Drop::NotOffered);
        }
        self.send(HostMessage::TlConnectResult(host::TlConnectResult {
            endpoint: request.endpoint,
            service: request.service,
            status: wire::STATUS_CONNECTION_REFUSED,
        }));
        Ok(())
    }
}

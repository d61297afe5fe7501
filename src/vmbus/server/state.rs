//! The server as plain data, and back.
#![forbid(unsafe_code)]

use super::connection::VERSIONS;
use super::*;

/// A [`Server`] as plain data. Limits, offers' devices and counters are not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct ServerState {
    /// [`ServerState::VERSION`].
    pub version: u32,
    /// State of the connection.
    pub connection: Connection,
    /// Channels in the order of their ids.
    pub channels: Vec<(ChannelId, Channel)>,
    /// Id of the next channel.
    pub next_id: u64,
    /// GPADLs.
    pub gpadls: Vec<GpadlState>,
    /// Actions not performed yet, or not answered yet.
    pub actions: Vec<Action>,
    /// Messages not sent yet.
    pub outbox: Vec<Outgoing>,
    /// Bit n: a refusal of a contact may wait on SINT n. Not for the SINT of this server.
    pub refused_sints: u16,
}

impl ServerState {
    /// Layout version.
    pub const VERSION: u32 = 1;

    /// The most actions and messages that wait in a server whose adapter performs all actions before it
    /// gives it a message of the guest, and gives it none while `limits.outbox` messages wait.
    ///
    /// Actions: what one message leads to, and taking all offers back. Two for each channel, which is
    /// retargeted and then closed or released, and one for each SINT. Messages: those below the limit,
    /// what one message leads to, and what needs none. For each channel its offer, the end of a GPADL
    /// that its ring used, an answer to an open and one to an open that came during the close before it,
    /// and its rescind; for each GPADL in progress its failure; and two more, an answer to a contact and
    /// the end of the offers.
    pub(crate) fn most_waiting(limits: &Limits) -> (usize, usize) {
        let channels = limits.channels.min(wire::MAX_RELID.into());
        let actions = 2 * channels + usize::from(connection::SINT_COUNT);
        let led_to = 5 * channels + 2;
        let outbox = limits.outbox.saturating_add(limits.gpadls_in_progress);
        (actions, outbox.saturating_add(led_to))
    }

    /// Checks that no more waits than can: what waits is worked off later, step by step.
    ///
    /// # Errors
    ///
    /// [`StateError::Actions`], [`StateError::Outbox`].
    pub(crate) fn check_waiting(&self, limits: &Limits) -> Result<(), StateError> {
        let (actions, outbox) = Self::most_waiting(limits);
        if self.actions.len() > actions {
            return Err(StateError::Actions);
        }
        if self.outbox.len() > outbox {
            return Err(StateError::Outbox);
        }
        Ok(())
    }
}

/// Why a state was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A layout that this version of the library does not know.
    #[error("state version {0} is not known")]
    Version(u32),
    /// The connection could not have come about.
    #[error("inconsistent connection")]
    Connection,
    /// A channel could not have come about.
    #[error("inconsistent channel {0:?}")]
    Channel(ChannelId),
    /// No channel ever had the id before that of the next one.
    #[error("impossible id of the next channel")]
    NextId,
    /// There are more channels than the limits allow.
    #[error("too many channels")]
    TooManyChannels,
    /// The GPADLs could not have come about, or exceed the limits.
    #[error("inconsistent GPADLs")]
    Gpadls,
    /// The actions do not fit the channels, or are more than can wait.
    #[error("inconsistent actions")]
    Actions,
    /// A message to a VP or SINT that does not exist, or more messages than can wait.
    #[error("inconsistent outgoing messages")]
    Outbox,
}

impl Server {
    /// The server as plain data. An action that was taken but not answered counts as not taken.
    pub fn save(&self) -> ServerState {
        let mut actions: Vec<Action> = self.actions.iter().copied().collect();
        for (id, channel) in &self.channels {
            if let Some(action) = owed_action(*id, channel)
                && !actions.contains(&action)
            {
                actions.push(action);
            }
        }
        ServerState {
            version: ServerState::VERSION,
            connection: self.connection,
            channels: self.channels.iter().map(|(id, c)| (*id, *c)).collect(),
            next_id: self.next_id,
            gpadls: self.gpadls.save(),
            actions,
            outbox: self.outbox.iter().cloned().collect(),
            refused_sints: self.refused_sints,
        }
    }

    /// A server that goes on where [`save`](Self::save) was called. Nothing in `state` is trusted.
    /// How much may wait is up to the adapter, which knows when it gives the server a message.
    ///
    /// # Errors
    ///
    /// [`StateError`].
    pub fn restore(
        limits: Limits,
        ram: GuestRam,
        vp_count: u32,
        state: ServerState,
    ) -> Result<Self, StateError> {
        if state.version != ServerState::VERSION {
            return Err(StateError::Version(state.version));
        }
        // Ids are counted up from 1 and not used twice: half of them outlast any VM.
        if !(1..=u64::MAX / 2).contains(&state.next_id) {
            return Err(StateError::NextId);
        }
        let mut server = Self::new(limits, ram, vp_count);
        server.connection = state.connection;
        server.next_id = state.next_id;
        server.restore_channels(&state.channels)?;
        server.check_connection()?;
        server.gpadls =
            Gpadls::restore(state.gpadls, &server.limits, &server.ram).ok_or(StateError::Gpadls)?;
        server.check_gpadls()?;
        server.check_actions(&state.actions)?;
        server.actions = state.actions.into();
        let deliverable = |message: &Outgoing| {
            message.vp < vp_count && (1..connection::SINT_COUNT).contains(&message.sint)
        };
        if !state.outbox.iter().all(deliverable) {
            return Err(StateError::Outbox);
        }
        server.outbox = state.outbox.into();
        // Bit 0 is the hypervisor's SINT.
        if state.refused_sints & (1 | 1 << wire::SINT) != 0 {
            return Err(StateError::Outbox);
        }
        server.refused_sints = state.refused_sints;
        Ok(server)
    }

    fn restore_channels(&mut self, channels: &[(ChannelId, Channel)]) -> Result<(), StateError> {
        if channels.len() > self.limits.channels.min(wire::MAX_RELID.into()) {
            return Err(StateError::TooManyChannels);
        }
        for (id, channel) in channels {
            let error = StateError::Channel(*id);
            let revocable = match channel.phase {
                Phase::Withheld | Phase::Offered | Phase::Open(_) => !channel.revoked,
                Phase::Rescinded => channel.revoked,
                Phase::Opening(_) | Phase::Closing(..) => true,
            };
            let vps: &[u32] = match &channel.phase {
                Phase::Opening(params) | Phase::Open(params) => &[params.target_vp],
                _ => &[],
            };
            let withheld = channel.phase == Phase::Withheld;
            let twin = |other: &Channel| other.identity.instance == channel.identity.instance;
            if id.0 == 0
                || id.0 >= self.next_id
                || !revocable
                || withheld != channel.relid.is_none()
                || !vps.iter().all(|vp| self.is_target(*vp))
                || self.channels.values().any(twin)
            {
                return Err(error);
            }
            if let Some(relid) = channel.relid {
                let in_range = (1..=wire::MAX_RELID).contains(&relid);
                if !in_range || self.by_relid.insert(relid, *id).is_some() {
                    return Err(error);
                }
            }
            if self.channels.insert(*id, *channel).is_some() {
                return Err(error);
            }
        }
        Ok(())
    }

    fn check_connection(&self) -> Result<(), StateError> {
        let contact_ok = |contact: &Contact| {
            VERSIONS.contains(&contact.version)
                && contact.vp < self.vp_count
                && contact.sint == wire::SINT
        };
        let ok = match &self.connection {
            Connection::Disconnected => self.by_relid.is_empty(),
            Connection::Connected(contact) => {
                contact_ok(contact) && (contact.offers_requested || self.by_relid.is_empty())
            }
            Connection::Disconnecting(contact, after) => {
                let after_ok = match after {
                    AfterDisconnect::Contact(request) => {
                        request.vp < self.vp_count && request.sint == wire::SINT
                    }
                    AfterDisconnect::Reset | AfterDisconnect::Unload => true,
                };
                let closing = |channel: &Channel| {
                    use Phase::{Closing, Opening, Withheld};
                    matches!(channel.phase, Withheld | Opening(_) | Closing(..))
                };
                contact_ok(contact)
                    && after_ok
                    && !self.by_relid.is_empty()
                    && self.channels.values().all(closing)
            }
        };
        if ok {
            Ok(())
        } else {
            Err(StateError::Connection)
        }
    }

    fn check_gpadls(&self) -> Result<(), StateError> {
        let connected = matches!(self.connection, Connection::Connected(_));
        for list in self.gpadls.save() {
            let channel = self.find(list.relid.into()).map(|(_, _, channel)| channel);
            let in_use = channel.map(|channel| channel.ring_gpadl());
            let owed_wrongly = list.teardown_pending && in_use != Ok(Some(list.gpadl));
            if !connected || in_use.is_err() || owed_wrongly {
                return Err(StateError::Gpadls);
            }
        }
        // An open channel has its rings.
        for (id, channel) in &self.channels {
            if let Phase::Open(params) = channel.phase
                && self.rings_of(*id, &params).is_none()
            {
                return Err(StateError::Channel(*id));
            }
        }
        Ok(())
    }

    /// Each channel has the action that it waits for, once; no other is about a wrong channel.
    fn check_actions(&self, actions: &[Action]) -> Result<(), StateError> {
        for (id, channel) in &self.channels {
            let count = |action| actions.iter().filter(|other| **other == action).count();
            let owed = owed_action(*id, channel);
            for action in [Action::Open(*id), Action::Close(*id)] {
                if count(action) != usize::from(owed == Some(action)) {
                    return Err(StateError::Actions);
                }
            }
        }
        let possible = |action: &Action| match action {
            Action::Open(id) | Action::Close(id) => self.channels.contains_key(id),
            Action::Released(id) => !self.channels.contains_key(id) && id.0 < self.next_id,
            Action::Retarget(id, vp) => id.0 < self.next_id && *vp < self.vp_count,
            Action::DiscardMessages(sint) => (1..connection::SINT_COUNT).contains(sint),
        };
        if actions.iter().all(possible) {
            Ok(())
        } else {
            Err(StateError::Actions)
        }
    }
}

/// The action whose answer a channel waits for.
fn owed_action(id: ChannelId, channel: &Channel) -> Option<Action> {
    match channel.phase {
        Phase::Opening(_) => Some(Action::Open(id)),
        Phase::Closing(..) => Some(Action::Close(id)),
        Phase::Withheld | Phase::Offered | Phase::Open(_) | Phase::Rescinded => None,
    }
}

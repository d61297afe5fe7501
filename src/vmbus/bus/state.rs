//! The bus as plain data, and back.
#![forbid(unsafe_code)]

use super::*;
use crate::vmbus::ring::{RingReaderState, RingWriterState};
use crate::vmbus::server::{ServerState, StateError};
use crate::vmbus::{ChannelIdentity, OpenError};

/// A [`VmBus`] as plain data. Devices, their rings and counters are not part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct VmBusState {
    /// [`VmBusState::VERSION`].
    pub version: u32,
    /// Connection, channels and GPADLs.
    pub server: ServerState,
    /// Messages of the guest that were not handled yet: where each came in, and its bytes.
    pub inbox: Vec<(MessagePort, Vec<u8>)>,
}

impl VmBusState {
    /// Layout version.
    pub const VERSION: u32 = 1;
}

/// Rings of an open channel as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct RingsState {
    /// Guest-to-host ring.
    pub reader: RingReaderState,
    /// Host-to-guest ring.
    pub writer: RingWriterState,
}

/// Why a saved bus was refused. The bus is then as after a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VmBusStateError {
    /// A layout that this version of the library does not know.
    #[error("VMBus state version {0} is not known")]
    Version(u32),
    /// Connection, channels or GPADLs could not have come about.
    #[error(transparent)]
    Server(#[from] StateError),
    /// More messages than the limits allow, or a longer one than a guest can send.
    #[error("impossible messages of the guest")]
    Inbox,
    /// A channel without its device, or a device without its channel.
    #[error("the state is that of other devices")]
    Devices,
    /// A channel is being closed: a saved one is closed or open.
    #[error("channel {0:?} is half closed")]
    Closing(ChannelId),
    /// An open channel without its rings.
    #[error("channel {0:?} has no rings")]
    NoRings(ChannelId),
    /// Rings that could not have come about.
    #[error("channel {id:?}: {source}")]
    Rings {
        /// The channel.
        id: ChannelId,
        /// What is impossible.
        source: RingError,
    },
    /// A device does not open its channel again.
    #[error("channel {id:?}: {source}")]
    Open {
        /// The channel.
        id: ChannelId,
        /// Why not.
        source: OpenError,
    },
}

/// A channel to open again.
type Reopen = (ChannelId, OpenEntry, OpenedChannel);

impl VmBus {
    /// The bus as plain data. The VPs and the devices' workers do not run. Opens and closes that
    /// the guest has asked for are carried out first.
    pub fn save(&self) -> VmBusState {
        let _step = lock(&self.step);
        while self.perform_action() {}
        let inbox = lock(&self.inbox);
        VmBusState {
            version: VmBusState::VERSION,
            server: lock(&self.server).save(),
            inbox: inbox
                .iter()
                .map(|message| (message.port, message.bytes.to_vec()))
                .collect(),
        }
    }

    /// Takes over a saved bus, with the devices that are offered here: the same as there, by their
    /// identities. Each open channel is opened again with the rings that `rings` has for it. The
    /// VPs do not run; guest RAM is restored already.
    ///
    /// # Errors
    ///
    /// [`VmBusStateError`]; the bus is then as after a reset.
    pub fn restore(
        &self,
        state: &VmBusState,
        rings: impl Fn(&ChannelIdentity) -> Option<RingsState>,
    ) -> Result<(), VmBusStateError> {
        self.reset();
        let result = self.adopt(state, rings);
        if result.is_err() {
            self.reset();
        }
        self.wake();
        result
    }

    fn adopt(
        &self,
        state: &VmBusState,
        rings: impl Fn(&ChannelIdentity) -> Option<RingsState>,
    ) -> Result<(), VmBusStateError> {
        if state.version != VmBusState::VERSION {
            return Err(VmBusStateError::Version(state.version));
        }
        state.server.check_waiting(&self.limits)?;
        let _step = lock(&self.step);
        let (ram, vps) = (self.ram.clone(), self.synic.vp_count());
        let server = Server::restore(self.limits, ram, vps, state.server.clone())?;
        let inbox = self.checked_inbox(&state.inbox)?;
        let reopen = self.reopenings(&server, &state.server, rings)?;
        self.adopt_devices(&state.server)?;
        *lock(&self.server) = server;
        *lock(&self.inbox) = inbox;
        for (id, entry, channel) in reopen {
            self.reopen(id, entry, channel)
                .map_err(|source| VmBusStateError::Open { id, source })?;
        }
        Ok(())
    }

    fn checked_inbox(
        &self,
        saved: &[(MessagePort, Vec<u8>)],
    ) -> Result<VecDeque<Inbound>, VmBusStateError> {
        if saved.len() > self.limits.inbox {
            return Err(VmBusStateError::Inbox);
        }
        let message = |(port, bytes): &(MessagePort, Vec<u8>)| {
            let bytes = MessageBytes::try_from(&bytes[..]).ok()?;
            Some(Inbound { port: *port, bytes })
        };
        let inbox = saved.iter().map(message).collect::<Option<_>>();
        inbox.ok_or(VmBusStateError::Inbox)
    }

    /// Makes the rings and signals of all open channels, without touching a device.
    fn reopenings(
        &self,
        server: &Server,
        state: &ServerState,
        rings: impl Fn(&ChannelIdentity) -> Option<RingsState>,
    ) -> Result<Vec<Reopen>, VmBusStateError> {
        let mut reopen = Vec::new();
        for (id, channel) in &state.channels {
            let id = *id;
            match channel.phase {
                Phase::Closing(..) => return Err(VmBusStateError::Closing(id)),
                Phase::Open(_) => {}
                Phase::Withheld | Phase::Offered | Phase::Opening(_) | Phase::Rescinded => continue,
            }
            let error = VmBusStateError::NoRings(id);
            let pages = server.open_rings(id).ok_or(error)?;
            let saved = rings(&channel.identity).ok_or(error)?;
            let relid = pages.relid;
            let signal = ChannelSignal::new(self.synic.clone(), pages.sint, relid, pages.target_vp);
            let failed = |source| VmBusStateError::Rings { id, source };
            let channel = OpenedChannel {
                reader: RingReader::restore(self.ram.clone(), &pages.to_host, saved.reader)
                    .map_err(failed)?,
                writer: RingWriter::restore(self.ram.clone(), &pages.to_guest, saved.writer)
                    .map_err(failed)?,
                signal: signal.clone(),
            };
            reopen.push((id, OpenEntry { relid, signal }, channel));
        }
        Ok(reopen)
    }

    /// The channel that a device with this identity is behind.
    pub(crate) fn channel_of(&self, identity: &ChannelIdentity) -> Option<ChannelId> {
        let devices = lock(&self.devices);
        let mut entries = devices.iter();
        let found = entries.find(|(_, entry)| entry.device.identity() == *identity);
        found.map(|(id, _)| *id)
    }

    /// Files the devices under the ids of the saved channels. A channel that was revoked, and that
    /// the guest has not let go of yet, has no device any more.
    fn adopt_devices(&self, state: &ServerState) -> Result<(), VmBusStateError> {
        let mut devices = lock(&self.devices);
        let mut found = HashMap::new();
        for (id, channel) in &state.channels {
            let mut entries = devices.values();
            match entries.find(|entry| entry.device.identity() == channel.identity) {
                // It would not be offered when the guest has let go of the channel.
                Some(_) if channel.revoked => return Err(VmBusStateError::Devices),
                Some(Entry { device, .. }) => {
                    let device = device.clone();
                    found.insert(*id, Entry { device, open: None });
                }
                None if channel.revoked => {}
                None => return Err(VmBusStateError::Devices),
            }
        }
        if found.len() != devices.len() {
            return Err(VmBusStateError::Devices);
        }
        *devices = found;
        Ok(())
    }

    fn reopen(
        &self,
        id: ChannelId,
        entry: OpenEntry,
        channel: OpenedChannel,
    ) -> Result<(), OpenError> {
        let relid = entry.relid;
        let mut devices = lock(&self.devices);
        let Some(known) = devices.get_mut(&id) else {
            return Err(OpenError::NotReady);
        };
        known.open = Some(entry);
        let device = known.device.clone();
        drop(devices);
        self.set_open_device(relid, Some(device.clone()));
        let result = device.open(channel);
        if result.is_err() {
            self.forget_open(id);
        }
        result
    }
}

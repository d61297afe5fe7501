//! The server between virtual CPUs, devices and the SynIC.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use arc_swap::ArcSwap;

use super::channel::{ChannelDevice, ChannelIdentity, ChannelSignal, OpenedChannel};
use super::counters::VmBusCounters;
use super::ring::{RingError, RingReader, RingWriter};
use super::server::{
    Action, ChannelId, MessagePort, Outgoing, Phase, RingPages, Server, supersedes,
};
use super::{Limits, OfferError, VmBusConfig};
use crate::hv::HvStatus;
use crate::hv::vmbus::{self as wire, HostMessage, MessageBytes};
use crate::hypercall::{MessageCalls, PostMessage};
use crate::mem::GuestRam;
use crate::synic::{SynicError, SynicPort};
use crate::vmm::{ConnectionEvents, Trigger, Worker, WorkerHost};

mod state;
#[cfg(test)]
mod tests;

pub use state::{RingsState, VmBusState, VmBusStateError};

/// Devices of open channels by relid: what HvSignalEvent looks up.
type OpenDevices = Vec<Option<Arc<dyn ChannelDevice>>>;

/// A VM's VMBus.
#[derive(Debug)]
pub struct VmBus {
    limits: Limits,
    ram: GuestRam,
    synic: Arc<dyn SynicPort>,
    trigger: OnceLock<Arc<dyn Trigger>>,
    open_devices: ArcSwap<OpenDevices>,
    events: OnceLock<Arc<dyn ConnectionEvents>>,
    step: Mutex<()>,
    server: Mutex<Server>,
    /// Without those of channels that are revoked and closed.
    devices: Mutex<HashMap<ChannelId, Entry>>,
    inbox: Mutex<VecDeque<Inbound>>,
    inbox_full: AtomicU64,
    superseded: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    device: Arc<dyn ChannelDevice>,
    /// While open.
    open: Option<OpenEntry>,
}

#[derive(Debug, Clone)]
struct OpenEntry {
    relid: u16,
    signal: ChannelSignal,
}

#[derive(Debug)]
struct Inbound {
    port: MessagePort,
    bytes: MessageBytes,
}

impl Inbound {
    /// The message ends the connection, so that what came before it no longer matters.
    fn supersedes(&self, vp_count: u32) -> bool {
        supersedes(self.port, &self.bytes, vp_count)
    }
}

/// The connection of the guest's signals on a channel.
fn connection_id(relid: u16) -> u32 {
    u32::from(relid) ^ wire::CONNECTION_CHANNEL
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl VmBus {
    /// A VMBus with no channels, its worker adopted by `host`.
    ///
    /// # Errors
    ///
    /// The host's error when it cannot adopt the worker.
    pub fn new(
        config: VmBusConfig,
        ram: GuestRam,
        synic: Arc<dyn SynicPort>,
        host: &dyn WorkerHost,
    ) -> io::Result<Arc<Self>> {
        let server = Server::new(config.limits, ram.clone(), synic.vp_count());
        let bus = Arc::new(Self {
            limits: config.limits,
            ram,
            synic,
            trigger: OnceLock::new(),
            open_devices: ArcSwap::default(),
            events: OnceLock::new(),
            step: Mutex::default(),
            server: Mutex::new(server),
            devices: Mutex::default(),
            inbox: Mutex::default(),
            inbox_full: AtomicU64::new(0),
            superseded: AtomicU64::new(0),
        });
        let worker: Weak<dyn Worker> = Arc::<Self>::downgrade(&bus);
        let trigger = bus.trigger.get_or_init({
            let trigger = host.adopt(worker)?;
            || trigger
        });
        bus.synic.set_drain_trigger(trigger.clone());
        Ok(bus)
    }

    /// Lets the host's kernel pass the signals of open channels on. To be called before the guest
    /// runs; a second call has no effect.
    pub fn set_connection_events(&self, events: Arc<dyn ConnectionEvents>) {
        let _ = self.events.set(events);
    }

    /// HvPostMessage, on a VP's thread: queues the message for the worker
    /// (docs/spec/hyperv-guest-interface.md#hyperv-guest-interface-5-3).
    ///
    /// # Errors
    ///
    /// INVALID_CONNECTION_ID for a connection that takes no messages, INVALID_PARAMETER for a bad
    /// type or size, INSUFFICIENT_BUFFERS when too many messages wait: the guest retries.
    pub fn post_message(
        &self,
        connection_id: u32,
        message_type: u32,
        payload: &[u8],
    ) -> Result<(), HvStatus> {
        let port = match connection_id {
            wire::CONNECTION_MESSAGE => MessagePort::Message,
            wire::CONNECTION_CONTACT => MessagePort::Contact,
            _ => return Err(HvStatus::INVALID_CONNECTION_ID),
        };
        if message_type != wire::SYNIC_MESSAGE_TYPE {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        let bytes = MessageBytes::try_from(payload).map_err(|_| HvStatus::INVALID_PARAMETER)?;
        let message = Inbound { port, bytes };
        let mut inbox = lock(&self.inbox);
        if inbox.len() >= self.limits.inbox {
            if !message.supersedes(self.synic.vp_count()) {
                self.inbox_full.fetch_add(1, Ordering::Relaxed);
                return mutant!(
                    "inbox-full-drops",
                    Ok(()),
                    Err(HvStatus::INSUFFICIENT_BUFFERS)
                );
            }
            // A crash kernel connects over the remains of the kernel before it.
            self.superseded
                .fetch_add(inbox.len() as u64, Ordering::Relaxed);
            inbox.clear();
        }
        inbox.push_back(message);
        drop(inbox);
        self.wake();
        Ok(())
    }

    /// HvSignalEvent, on a VP's thread: tells the device of an open channel. Takes no lock.
    ///
    /// # Errors
    ///
    /// INVALID_CONNECTION_ID if no open channel has this connection, INVALID_PARAMETER if the flag
    /// is not 0.
    pub fn signal_event(&self, connection_id: u32, flag: u16) -> Result<(), HvStatus> {
        let relid = connection_id ^ wire::CONNECTION_CHANNEL;
        let devices = self.open_devices.load();
        let device = devices
            .get(relid as usize)
            .and_then(Option::as_ref)
            .ok_or(HvStatus::INVALID_CONNECTION_ID)?;
        if flag != 0 && !mutant!("signal-any-flag") {
            return Err(HvStatus::INVALID_PARAMETER);
        }
        device.signalled();
        Ok(())
    }

    /// Whether [`offer`](Self::offer) would take a channel now.
    ///
    /// # Errors
    ///
    /// [`OfferError`].
    pub fn check_offer(&self, identity: &ChannelIdentity) -> Result<(), OfferError> {
        lock(&self.server).check_offer(identity)
    }

    /// Offers a channel: at the guest's next connection, or at once if it has asked for offers.
    ///
    /// # Errors
    ///
    /// [`OfferError`]; nothing changed then.
    pub fn offer(&self, device: Arc<dyn ChannelDevice>) -> Result<ChannelId, OfferError> {
        let identity = device.identity();
        let mut server = lock(&self.server);
        let id = server.offer(identity)?;
        lock(&self.devices).insert(id, Entry { device, open: None });
        drop(server);
        self.wake();
        Ok(id)
    }

    /// Takes an offer back. The worker closes the device, drops it, and tells the guest. The name is
    /// free when the guest has let go of the channel, which may never happen.
    pub fn revoke(&self, id: ChannelId) {
        lock(&self.server).revoke(id);
        self.drop_if_closed(id);
        self.wake();
    }

    /// Does what waits to be done to devices, without waiting for the worker. No callback of a
    /// device may call this.
    pub(crate) fn settle(&self) {
        let _step = lock(&self.step);
        while self.perform_action() {}
    }

    /// True from [`offer`](Self::offer) until the channel is revoked and released.
    pub fn is_present(&self, id: ChannelId) -> bool {
        lock(&self.server).channel(id).is_some()
    }

    /// The VM is reset: when this returns, all devices are closed, nothing is owed to the guest,
    /// and nothing here writes to its memory until it connects anew. Offers stay. The VPs must not
    /// run, and no callback of a device may call this.
    pub fn reset(&self) {
        let _step = lock(&self.step);
        lock(&self.inbox).clear();
        lock(&self.server).reset();
        while self.perform_action() {}
    }

    /// Counts since the bus was made.
    pub fn counters(&self) -> VmBusCounters {
        VmBusCounters {
            inbox_full: self.inbox_full.load(Ordering::Relaxed),
            superseded: self.superseded.load(Ordering::Relaxed),
            ..lock(&self.server).counters()
        }
    }

    fn wake(&self) {
        if let Some(trigger) = self.trigger.get() {
            trigger.trigger();
        }
    }

    /// Performs one action of the server. False if there was none.
    fn perform_action(&self) -> bool {
        let Some(action) = lock(&self.server).next_action() else {
            return false;
        };
        match action {
            Action::Open(id) => {
                let pages = lock(&self.server).ring_pages(id);
                let ok = pages.is_some_and(|pages| self.open_device(id, &pages));
                lock(&self.server).opened(id, ok);
                self.drop_if_closed(id);
            }
            Action::Close(id) => {
                self.close_device(id);
                lock(&self.server).closed(id);
                self.drop_if_closed(id);
            }
            Action::Retarget(id, vp) => {
                let devices = lock(&self.devices);
                let open = devices.get(&id).and_then(|entry| entry.open.clone());
                drop(devices);
                if let Some(open) = open {
                    open.signal.set_target(Some(vp));
                }
            }
            Action::Released(id) => self.drop_if_closed(id),
            Action::DiscardMessages(sint) => self.synic.discard_messages(sint),
        }
        true
    }

    /// Lets go of the device of a channel that is revoked and closed: it has what others may want,
    /// and the guest may take for ever to let go of the channel.
    fn drop_if_closed(&self, id: ChannelId) {
        let in_use = match lock(&self.server).channel(id) {
            Some(channel) => !channel.revoked || channel.phase != Phase::Rescinded,
            None => false,
        };
        if !in_use {
            // Dropped without the lock: a device takes locks of its own.
            let entry = lock(&self.devices).remove(&id);
            drop(entry);
        }
    }

    /// Opens a device on its rings; its connection is live before.
    fn open_device(&self, id: ChannelId, pages: &RingPages) -> bool {
        let (relid, sint) = (pages.relid, pages.sint);
        let signal = ChannelSignal::new(self.synic.clone(), sint, relid, pages.target_vp);
        let mut devices = lock(&self.devices);
        let Some(entry) = devices.get_mut(&id) else {
            return false;
        };
        entry.open = Some(OpenEntry {
            relid,
            signal: signal.clone(),
        });
        let device = entry.device.clone();
        drop(devices);
        let rings = || -> Result<_, RingError> {
            Ok(OpenedChannel {
                reader: RingReader::open(self.ram.clone(), &pages.to_host)?,
                writer: RingWriter::open(self.ram.clone(), &pages.to_guest)?,
                signal,
            })
        };
        self.set_open_device(relid, Some(device.clone()));
        let result = match rings() {
            Ok(channel) => device.open(channel),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = &result {
            log::debug!("vmbus: channel {relid} ({:?}): {error}", device.identity());
            self.forget_open(id);
        }
        result.is_ok()
    }

    fn close_device(&self, id: ChannelId) {
        // First the connection, so that no signal of the guest reaches the closed device; last the
        // interrupt, which a device may still use while it closes.
        let devices = lock(&self.devices);
        let Some((device, relid)) = devices.get(&id).and_then(|entry| {
            let open = entry.open.as_ref()?;
            Some((entry.device.clone(), open.relid))
        }) else {
            return;
        };
        drop(devices);
        self.set_open_device(relid, None);
        device.close();
        self.forget_open(id);
    }

    /// Cuts an open channel's connection and interrupt.
    fn forget_open(&self, id: ChannelId) {
        let mut devices = lock(&self.devices);
        let open = devices.get_mut(&id).and_then(|entry| entry.open.take());
        drop(devices);
        if let Some(open) = open {
            self.set_open_device(open.relid, None);
            open.signal.set_target(None);
        }
    }

    /// Changes the look-up table of HvSignalEvent, and the kernel's beside it. Only called under
    /// `step`.
    fn set_open_device(&self, relid: u16, device: Option<Arc<dyn ChannelDevice>>) {
        let mut devices = OpenDevices::clone(&self.open_devices.load());
        let at = usize::from(relid);
        if devices.len() <= at {
            devices.resize(at + 1, None);
        }
        let former = std::mem::replace(&mut devices[at], device.clone());
        if former.is_some() {
            self.disconnect_events(relid);
        }
        self.open_devices.store(Arc::new(devices));
        if let Some(device) = device {
            self.connect_events(relid, &*device);
        }
    }

    fn connect_events(&self, relid: u16, device: &dyn ChannelDevice) {
        let (Some(events), Some(eventfd)) = (self.events.get(), device.eventfd()) else {
            return;
        };
        if let Err(error) = events.add(connection_id(relid), eventfd) {
            log::debug!("vmbus: signals of channel {relid} leave the guest: {error}");
        }
    }

    fn disconnect_events(&self, relid: u16) {
        if let Some(events) = self.events.get()
            && let Err(error) = events.remove(connection_id(relid))
            && error.kind() != io::ErrorKind::NotFound
        {
            log::warn!("vmbus: the kernel keeps the signals of channel {relid}: {error}");
        }
    }

    /// Sends one message to the guest. False if there was none or the SynIC is full.
    fn send_message(&self) -> bool {
        let Some(outgoing) = lock(&self.server).next_message().cloned() else {
            return false;
        };
        let Outgoing { vp, sint, message } = outgoing;
        let bytes = message.encode();
        let result = self
            .synic
            .post_message(vp, sint, wire::SYNIC_MESSAGE_TYPE, &bytes);
        if let Err(SynicError::QueueFull { .. }) = result {
            return false;
        }
        lock(&self.server).message_sent();
        if let HostMessage::OpenChannelResult(result) = &message
            && result.status == wire::STATUS_SUCCESS
        {
            self.signal_once(result.relid);
        }
        true
    }

    /// Some guests ignore a channel's interrupts until they know that it is open, so what came
    /// before is repeated once.
    fn signal_once(&self, relid: u32) {
        let devices = lock(&self.devices);
        let open = devices.values().find_map(|entry| {
            let open = entry.open.as_ref()?;
            (u32::from(open.relid) == relid).then(|| open.signal.clone())
        });
        drop(devices);
        if let Some(signal) = open {
            signal.signal();
        }
    }

    /// Takes the next message of the guest, if it may be handled.
    fn next_inbound(&self) -> Option<Inbound> {
        let blocked = lock(&self.server).outbox_len() >= self.limits.outbox;
        let mut inbox = lock(&self.inbox);
        if !blocked {
            return inbox.pop_front();
        }
        // The guest does not take its messages. Only a new kernel, or the farewell of this one,
        // gets past; what came before is void then.
        let vps = self.synic.vp_count();
        let at = inbox.iter().position(|message| message.supersedes(vps))?;
        inbox.drain(..at);
        let message = inbox.pop_front();
        drop(inbox);
        let owed = lock(&self.server).drop_outbox();
        self.superseded
            .fetch_add((at + owed) as u64, Ordering::Relaxed);
        message
    }
}

impl MessageCalls for VmBus {
    fn post_message(&self, message: &PostMessage<'_>) -> Result<(), HvStatus> {
        Self::post_message(
            self,
            message.connection_id,
            message.message_type,
            message.payload,
        )
    }

    fn signal_event(&self, connection_id: u32, flag: u16) -> Result<(), HvStatus> {
        Self::signal_event(self, connection_id, flag)
    }
}

impl Worker for VmBus {
    fn name(&self) -> String {
        "vmbus".into()
    }

    fn process(&self) -> bool {
        let _step = lock(&self.step);
        if self.perform_action() || self.send_message() {
            return true;
        }
        match self.next_inbound() {
            Some(message) => {
                lock(&self.server).handle(message.port, &message.bytes);
                true
            }
            None => false,
        }
    }
}

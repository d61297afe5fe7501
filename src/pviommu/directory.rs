//! Which domains there are, which devices, and who is where.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::backend::DeviceBackend;
use super::table::{InsertError, Table};
use super::translation::{Attachment, Translation};
use crate::device_id::LogicalDeviceId;

/// A domain that the guest made.
#[derive(Debug)]
pub(super) struct Domain {
    pub(super) number: u32,
    /// `None` until it is configured; it blocks until then.
    pub(super) translation: Option<Translation>,
    /// First of the devices in it, which are a list.
    first: Option<u32>,
    pub(super) members: u32,
}

/// Where a device is when the guest has attached it nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IommuMode {
    /// Not behind the pvIOMMU: I/O virtual addresses are guest physical ones, and calls that name
    /// the function fail.
    #[default]
    Off,
    /// Behind it; the default domain is the identity, so that guests without a driver work.
    On,
    /// Behind it, and blocked until the guest attaches it to a domain.
    BlockedUntilAttached,
}

/// A function, behind the pvIOMMU or not.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) id: LogicalDeviceId,
    pub(super) mode: IommuMode,
    /// Absent for functions that are not behind the pvIOMMU.
    pub(super) backend: Option<Arc<dyn DeviceBackend>>,
    /// Slot of its domain; `None` for the default domain.
    domain: Option<u32>,
    /// Blocked, wherever it is, until its bus is in D0.
    pub(super) held: bool,
    /// No call may name it any more.
    pub(super) removing: bool,
    next: Option<u32>,
    previous: Option<u32>,
}

/// All domains and devices of a VM.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) domains: Table<u32, Domain>,
    pub(super) devices: Table<LogicalDeviceId, Device>,
}

impl Directory {
    pub(super) fn new(max_domains: u32, max_functions: u32) -> Self {
        Self {
            domains: Table::new(max_domains),
            devices: Table::new(max_functions),
        }
    }

    /// Adds a domain that blocks, and returns its slot.
    pub(super) fn create(&mut self, number: u32) -> Result<u32, InsertError> {
        let domain = Domain {
            number,
            translation: None,
            first: None,
            members: 0,
        };
        self.domains.insert(number, domain)
    }

    /// Adds a device in the default domain.
    pub(super) fn add(
        &mut self,
        id: LogicalDeviceId,
        mode: IommuMode,
        backend: Option<Arc<dyn DeviceBackend>>,
    ) -> Result<u32, InsertError> {
        let device = Device {
            id,
            mode,
            backend,
            domain: None,
            held: false,
            removing: false,
            next: None,
            previous: None,
        };
        self.devices.insert(id, device)
    }

    /// Forgets a device.
    pub(super) fn remove(&mut self, id: LogicalDeviceId) {
        if let Some(slot) = self.devices.find(id) {
            self.place(slot, None);
            self.devices.remove(id);
        }
    }

    /// The slot of the domain that a device is in; `None` for the default domain.
    pub(super) fn domain_of(&self, device: u32) -> Option<u32> {
        self.devices.get(device)?.domain
    }

    /// Moves a device to the domain in slot `to`, or to the default domain.
    pub(super) fn place(&mut self, device: u32, to: Option<u32>) {
        self.unlink(device);
        let Some(slot) = to else {
            return;
        };
        let Some(domain) = self.domains.get_mut(slot) else {
            return;
        };
        domain.members += 1;
        let next = domain.first.replace(device);
        if let Some(next) = next.and_then(|next| self.devices.get_mut(next)) {
            next.previous = Some(device);
        }
        if let Some(device) = self.devices.get_mut(device) {
            device.domain = Some(slot);
            device.next = next;
        }
    }

    /// Takes a device out of its domain's list.
    fn unlink(&mut self, slot: u32) {
        let Some(device) = self.devices.get_mut(slot) else {
            return;
        };
        let (next, previous) = (device.next.take(), device.previous.take());
        let Some(domain) = device.domain.take() else {
            return;
        };
        if let Some(next) = next.and_then(|next| self.devices.get_mut(next)) {
            next.previous = previous;
        }
        if let Some(previous) = previous.and_then(|previous| self.devices.get_mut(previous)) {
            previous.next = next;
        }
        if let Some(domain) = self.domains.get_mut(domain) {
            domain.members -= 1;
            if previous.is_none() {
                domain.first = next;
            }
        }
    }

    /// Deletes all domains; their devices fall into the default domain.
    pub(super) fn clear_domains(&mut self) {
        for device in self.devices.values_mut() {
            device.domain = None;
            device.next = None;
            device.previous = None;
        }
        self.domains.clear();
    }

    /// The devices in the domain of a slot.
    pub(super) fn members(&self, domain: u32) -> impl Iterator<Item = &Device> {
        let device = |slot: Option<u32>| self.devices.get(slot?);
        let first = self.domains.get(domain).and_then(|domain| domain.first);
        std::iter::successors(device(first), move |member| device(member.next))
    }

    /// What a device's back end has to do for a domain, given by its slot.
    pub(super) fn attachment(&self, device: &Device, domain: Option<u32>) -> Attachment {
        let mut to = match domain.and_then(|slot| Some((slot, self.domains.get(slot)?))) {
            Some((slot, domain)) => Attachment {
                domain: domain.number,
                fault_slot: slot + 1,
                translation: match domain.translation {
                    None if mutant!("domain-new-is-identity") => Translation::Identity,
                    translation => translation.unwrap_or(Translation::Blocked),
                },
            },
            None => Attachment::DEFAULT,
        };
        let waiting = domain.is_none() && device.mode == IommuMode::BlockedUntilAttached;
        if device.held || (waiting && !mutant!("default-never-blocks")) {
            to.translation = Translation::Blocked;
        }
        to
    }
}

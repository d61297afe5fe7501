//! Interrupts that the host's kernel delivers by itself: those of a passed-through device.
//!
//! The device's events do not come through this process, so there is no guard in which each could be
//! judged. Instead every change of a mask, a message or a handle is turned into the vector's *route*
//! and told to the host, under the same lock that guards the vector of an emulated function. What the
//! host does when it is told is effective when it returns, so the promises are the same.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::handles::{HandleError, Route, Target};
use super::{Entry, Interrupts, MSIX_ENABLED, MSIX_MASKED, MsiRegisters};
use crate::vpci::function::{InterruptMode, VectorRoute};
use crate::vpci::lock;

impl Interrupts {
    /// Maps messages, as [`super::handles::HandleTable::create`].
    pub(crate) fn create(&self, vector: u32, count: u16, vp: u32) -> Result<u32, HandleError> {
        let data = self.handles.create(vector, count, vp)?;
        self.follow(data, count);
        Ok(data)
    }

    /// Unmaps a block of messages; the number of messages it had. When this returns, none of them is
    /// delivered any more.
    pub(crate) fn delete(&self, address: u64, data: u32) -> u16 {
        let count = self.handles.delete(address, data);
        self.follow(data, count);
        count
    }

    /// Moves a message. When this returns, it is not delivered the former way any more.
    pub(crate) fn retarget(&self, address: u64, data: u32, to: Route) -> Result<(), HandleError> {
        if self.host.is_some() && matches!(to.target, Target::All(_)) {
            // The host's kernel sends one message to one place.
            return Err(HandleError::Target);
        }
        self.handles.retarget(address, data, to)?;
        self.follow(data, 1);
        Ok(())
    }

    /// True if the host's kernel delivers the function's interrupts.
    pub(crate) fn are_hosted(&self) -> bool {
        self.host.is_some()
    }

    /// Has the host send `count` messages from `data` on where the handles say now.
    fn follow(&self, data: u32, count: u16) {
        if self.host.is_none() || count == 0 {
            return;
        }
        let moved = data..data.saturating_add(u32::from(count));
        for (vector, entry) in self.entries.iter().enumerate() {
            let entry = lock(entry);
            if moved.contains(&entry.data) {
                self.tell_msix(vector, &entry);
            }
        }
        if let Some(msi) = &self.msi {
            self.tell_msi(&lock(msi));
        }
    }

    /// Tells the host which of the function's interrupts are on.
    pub(super) fn tell_mode(&self, msi: &MsiRegisters) {
        let Some(host) = &self.host else { return };
        let msix = self.msix_control.load(Ordering::Acquire) & MSIX_ENABLED != 0;
        host.set_mode(match (msix, msi.enabled) {
            (true, _) => InterruptMode::Msix,
            (false, true) => InterruptMode::Msi {
                messages: msi.messages.max(1),
            },
            (false, false) => InterruptMode::Off,
        });
    }

    /// Tells the host the route of an MSI-X vector. The caller holds the entry's lock.
    pub(super) fn tell_msix(&self, vector: usize, entry: &Entry) {
        let Some(host) = &self.host else { return };
        let control = self.msix_control.load(Ordering::Acquire);
        if control & MSIX_ENABLED == 0 {
            return;
        }
        let masked = entry.masked || control & MSIX_MASKED != 0;
        host.route(vector as u16, self.route(masked, entry.address, entry.data));
    }

    /// Tells the host the routes of all MSI messages, unless MSI-X is on. The caller holds the lock of
    /// the MSI state.
    pub(super) fn tell_msi(&self, registers: &MsiRegisters) {
        let Some(host) = &self.host else { return };
        let msix = self.msix_control.load(Ordering::Acquire) & MSIX_ENABLED != 0;
        if msix || !registers.enabled {
            return;
        }
        for message in 0..u32::from(registers.messages.max(1)) {
            let masked = registers.mask & 1 << message != 0;
            let data = registers.data_of(message);
            host.route(message as u16, self.route(masked, registers.address, data));
        }
    }

    fn route(&self, masked: bool, address: u64, data: u32) -> VectorRoute {
        if masked {
            return VectorRoute::Held;
        }
        match self.handles.message(address, data) {
            Some(msi) => VectorRoute::To(msi),
            None => VectorRoute::Dropped,
        }
    }

    /// Pending bits of 64 MSI-X vectors from `first` on, as the host keeps them.
    pub(super) fn hosted_pending(&self, first: usize) -> Option<u64> {
        let host = self.host.as_ref()?;
        let vectors = (first..self.entries.len()).take(64);
        let bits = vectors.filter(|vector| host.is_pending(*vector as u16));
        Some(bits.fold(0, |bits, vector| bits | 1 << (vector - first)))
    }

    /// Pending bits of the MSI messages, as the host keeps them.
    pub(super) fn hosted_msi_pending(&self) -> Option<u32> {
        let host = self.host.as_ref()?;
        let messages = lock(self.msi.as_ref()?).messages;
        let pending = (0..u16::from(messages)).filter(|message| host.is_pending(*message));
        Some(pending.fold(0, |bits, message| bits | 1 << message))
    }
}

#[cfg(test)]
#[path = "hosted_tests.rs"]
mod tests;

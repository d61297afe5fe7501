//! Which function a logical device id names.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use uuid::Uuid;

use crate::hv::HvStatus;
use crate::hypercall::{InterruptCalls, RetargetInterrupt};

use super::bus::Bus;
use super::device_id::LogicalDeviceId;

/// Two live functions would share a logical device id (docs/spec/pviommu.md, "Logical device id").
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "function {function} of bus {bus} would have logical device id {id}, which function \
     {other_function} of bus {other_bus} has; give the buses GUIDs that differ in data2"
)]
pub struct DuplicateId {
    /// The id that both would have.
    pub id: LogicalDeviceId,
    /// Bus that was to be plugged in.
    pub bus: Uuid,
    /// Its function.
    pub function: u8,
    /// Bus that has the id.
    pub other_bus: Uuid,
    /// Its function.
    pub other_function: u8,
}

#[derive(Debug, Clone)]
struct Entry {
    id: LogicalDeviceId,
    bus: Arc<Bus>,
}

/// All functions of a partition by logical device id.
///
/// Looked up without a lock; the lock for changes is taken before any other of this module.
#[derive(Debug, Default)]
pub struct DeviceRegistry {
    /// Sorted by id.
    entries: ArcSwap<Vec<Entry>>,
    edit: Mutex<()>,
}

impl DeviceRegistry {
    /// Checks that `functions` of the bus `instance` would get ids of their own.
    ///
    /// # Errors
    ///
    /// [`DuplicateId`], naming the function that has the id.
    pub fn check(&self, instance: &Uuid, functions: &[u8]) -> Result<(), DuplicateId> {
        let entries = self.entries.load();
        for &function in functions {
            let id = LogicalDeviceId::new(instance, function);
            if let Ok(found) = entries.binary_search_by_key(&id, |entry| entry.id) {
                return Err(DuplicateId {
                    id,
                    bus: *instance,
                    function,
                    other_bus: entries[found].bus.config().instance,
                    other_function: id.function(),
                });
            }
        }
        Ok(())
    }

    /// Registers all functions of `bus`, or none.
    ///
    /// # Errors
    ///
    /// As for [`DeviceRegistry::check`].
    pub fn insert(&self, bus: &Arc<Bus>) -> Result<(), DuplicateId> {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let instance = bus.config().instance;
        let ids = bus.ids();
        let functions: Vec<u8> = ids.iter().map(|id| id.function()).collect();
        self.check(&instance, &functions)?;
        let mut entries = Vec::clone(&self.entries.load());
        entries.extend(ids.into_iter().map(|id| Entry {
            id,
            bus: bus.clone(),
        }));
        entries.sort_by_key(|entry| entry.id);
        self.entries.store(Arc::new(entries));
        Ok(())
    }

    /// Forgets one function of `bus`.
    pub fn remove_function(&self, bus: &Arc<Bus>, function: u8) {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::clone(&self.entries.load());
        entries.retain(|entry| !Arc::ptr_eq(&entry.bus, bus) || entry.id.function() != function);
        self.entries.store(Arc::new(entries));
    }

    /// Forgets all functions of `bus`.
    pub fn remove(&self, bus: &Arc<Bus>) {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = Vec::clone(&self.entries.load());
        entries.retain(|entry| !Arc::ptr_eq(&entry.bus, bus) || mutant!("removed-bus-still-known"));
        self.entries.store(Arc::new(entries));
    }
}

impl InterruptCalls for DeviceRegistry {
    fn retarget_device_interrupt(&self, request: &RetargetInterrupt) -> Result<(), HvStatus> {
        let id = LogicalDeviceId::from_retarget(request.device_id);
        let entries = self.entries.load();
        let found = entries
            .binary_search_by_key(&id, |entry| entry.id)
            .map_err(|_| HvStatus::INVALID_DEVICE_ID)?;
        entries[found].bus.retarget(id.function(), request)
    }
}

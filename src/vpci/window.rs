//! The config window: how a guest reaches the configuration spaces of a bus's functions
//! (docs/spec/vpci.md#vpci-6).
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arc_swap::ArcSwap;

use super::mmio::MmioHandler;
use super::slot::FunctionSlot;
use crate::hv::vpci::{CONFIG_PAGE_OFFSET, Slot};

/// Places of a bus by function number.
pub(crate) type Places = [Option<Arc<FunctionSlot>>; 8];

/// The functions of a bus. Looked up without a lock; one may be taken out, none is added.
#[derive(Debug)]
pub(crate) struct Functions(ArcSwap<Places>);

impl Functions {
    /// The functions that there are.
    pub(crate) fn new(places: Places) -> Self {
        Self(ArcSwap::from_pointee(places))
    }

    /// The function of a number.
    pub(crate) fn get(&self, number: u8) -> Option<Arc<FunctionSlot>> {
        self.0.load().get(usize::from(number))?.clone()
    }

    /// The function that a slot names.
    pub(crate) fn find(&self, slot: Slot) -> Option<Arc<FunctionSlot>> {
        match slot.device {
            0 => self.get(slot.function),
            _ => None,
        }
    }

    /// All of them as they are now, by number.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Arc<FunctionSlot>> + use<> {
        let places = self.0.load_full();
        (0..places.len()).filter_map(move |number| places[number].clone())
    }

    /// Takes a function out. The bus's lock is held: nobody else changes them.
    pub(crate) fn take(&self, number: u8) {
        let mut places = Places::clone(&self.0.load());
        if let Some(place) = places.get_mut(usize::from(number)) {
            *place = None;
        }
        self.0.store(Arc::new(places));
    }
}

/// Slot register and config page. Reads take no lock, so that they are answered whatever else goes
/// on.
#[derive(Debug)]
pub(crate) struct ConfigWindow {
    functions: Arc<Functions>,
    /// Slot for the next accesses: one for all VPs, as the guest wrote it.
    slot: AtomicU32,
}

impl ConfigWindow {
    /// A window on `functions` that has slot 0 selected.
    pub(crate) fn new(functions: Arc<Functions>) -> Self {
        Self {
            functions,
            slot: AtomicU32::new(0),
        }
    }

    /// The slot register.
    pub(crate) fn slot(&self) -> u32 {
        self.slot.load(Ordering::Acquire)
    }

    /// Sets the slot register.
    pub(crate) fn select(&self, slot: u32) {
        self.slot.store(slot, Ordering::Release);
    }

    fn selected(&self) -> Option<Arc<FunctionSlot>> {
        self.functions.find(Slot::from_code(self.slot())?)
    }
}

impl MmioHandler for ConfigWindow {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let Some(offset) = offset.checked_sub(CONFIG_PAGE_OFFSET) else {
            return;
        };
        if let Some(function) = self.selected() {
            function.config_read(offset as usize, data);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        match offset.checked_sub(CONFIG_PAGE_OFFSET) {
            Some(offset) => {
                if let Some(function) = self.selected() {
                    function.config_write(offset as usize, data);
                }
            }
            None => {
                if let (0, Ok(bytes)) = (offset, data.try_into()) {
                    self.select(u32::from_le_bytes(bytes));
                }
            }
        }
    }
}

//! The config window: how a guest reaches the configuration spaces of a bus's functions
//! (docs/spec/vpci.md#vpci-6).
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::mmio::MmioHandler;
use super::slot::FunctionSlot;
use crate::hv::vpci::{CONFIG_PAGE_OFFSET, Slot};

/// Functions of a bus by number.
pub(crate) type Functions = [Option<Arc<FunctionSlot>>; 8];

/// The function that a slot names.
pub(crate) fn find(functions: &Functions, slot: Slot) -> Option<&Arc<FunctionSlot>> {
    if slot.device != 0 {
        return None;
    }
    functions.get(usize::from(slot.function))?.as_ref()
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

    fn selected(&self) -> Option<&Arc<FunctionSlot>> {
        find(&self.functions, Slot::from_code(self.slot())?)
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

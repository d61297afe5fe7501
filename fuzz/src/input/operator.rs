//! What the VM's operator does while the guest runs.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arbitrary::Arbitrary;
use vm_vpci::pviommu::IommuMode;

use super::Step;
use crate::guest::Guest;
use crate::machine::instance;

/// Most buses at a time.
const MOST_BUSES: usize = 5;

/// An act of the operator.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Operator {
    /// Plugs in a bus.
    Plug {
        /// Its number.
        number: u8,
        /// Functions that it has besides function 0.
        functions: u8,
        /// Whether they are behind the pvIOMMU.
        iommu: u8,
    },
    /// Asks the guest for a bus, or for a function of it.
    Eject(u8),
    /// Tears out a bus or a function of it.
    Remove(u8),
    /// Resets the VM.
    Reset,
    /// Saves the VM and goes on with what was restored.
    Migrate,
}

/// The function that an act is about, if it is not the whole bus.
fn function_of(number: u8) -> Option<u8> {
    (number & 0x80 != 0).then_some(number >> 2 & 3)
}

impl Step for Operator {
    fn apply(&self, guest: &mut Guest) {
        match *self {
            Self::Plug {
                number,
                functions,
                iommu,
            } => {
                if guest.machine.buses.len() >= MOST_BUSES {
                    return;
                }
                let mode = [
                    IommuMode::On,
                    IommuMode::Off,
                    IommuMode::BlockedUntilAttached,
                ][usize::from(iommu) % 3];
                let all: Vec<_> = (0..=functions % 3).map(|number| (number, mode)).collect();
                // May be there already.
                let _ = guest.machine.plug(1 + u16::from(number % 4), &all);
            }
            Self::Eject(number) => {
                let told = Arc::new(AtomicU32::new(0));
                let count = told.clone();
                let done = Box::new(move || {
                    assert_eq!(count.fetch_add(1, Ordering::SeqCst), 0, "told twice");
                });
                let bus = instance(1 + u16::from(number % 4));
                let partition = &guest.machine.partition;
                let _ = match function_of(number) {
                    None => partition.eject(&bus, done),
                    Some(function) => partition.eject_function(&bus, function, done),
                };
            }
            Self::Remove(number) => {
                let bus = instance(1 + u16::from(number % 4));
                match function_of(number) {
                    None => guest.machine.remove(&bus),
                    Some(function) => guest.machine.remove_function(&bus, function),
                };
            }
            Self::Reset => guest.machine.partition.reset(),
            Self::Migrate => guest.migrate(),
        }
    }
}

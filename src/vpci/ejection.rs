//! Orderly removal: the guest is asked to let go of functions, of all of a bus or of one
//! (docs/spec/vpci.md#vpci-8).
#![forbid(unsafe_code)]

use std::fmt;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use crate::hv::vpci as wire;
use crate::hv::vpci::{MessageType, Slot};
use crate::vmbus::ring::{RingError, RingWriter};

/// What is to happen when the guest has let go. It runs on the bus's worker, or on the thread that
/// closes the channel, or inside the call that asks if the channel is not open, with the bus's lock held
/// and often the partition's: it must not call into the partition.
pub type Ejected = Box<dyn FnOnce() + Send>;

/// Why a bus or a function cannot be asked for or taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EjectError {
    /// No such bus is plugged in.
    #[error("no such bus is plugged in")]
    NoSuchBus,
    /// The bus has no such function.
    #[error("the bus has no function {number}")]
    NoSuchFunction {
        /// Function number.
        number: u8,
    },
    /// A guest that looks at the bus anew finds no function of it without function 0.
    #[error("function 0 goes with its bus: no guest finds the others without it")]
    Function0,
    /// The guest has already been asked, for functions of this bus, and has not answered yet.
    #[error("the guest has already been asked to let go of this bus, or of a function of it")]
    Busy,
}

/// An ejection under way: function numbers as bits.
pub(super) struct Ejection {
    /// Asked for, but the EJECT is not in the ring yet.
    unsent: u8,
    /// Not let go of.
    held: u8,
    done: Ejected,
}

impl fmt::Debug for Ejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ejection")
            .field("unsent", &self.unsent)
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

impl Ejection {
    /// Of these functions, as bits.
    pub(super) fn new(functions: u8, done: Ejected) -> Self {
        Self {
            unsent: functions,
            held: functions,
            done,
        }
    }

    /// True while EJECTs wait for room in the ring.
    pub(super) fn to_send(&self) -> bool {
        self.unsent != 0
    }

    /// Sends what there is room for; true if the guest is to be signalled.
    pub(super) fn send(&mut self, writer: &mut RingWriter) -> Result<bool, RingError> {
        let mut signal = false;
        if mutant!("eject-never-sent") {
            self.unsent = 0;
        }
        while self.unsent != 0 {
            let Some(room) = writer.reserve(size_of::<wire::SlotMessage>())? else {
                break;
            };
            let number = self.unsent.trailing_zeros() as u8;
            let slot = Slot {
                device: 0,
                function: number,
            };
            let message = wire::SlotMessage {
                message_type: U32::new(MessageType::Eject.code()),
                slot: U32::new(slot.code()),
            };
            signal |= writer.send(room, message.as_bytes())?;
            self.unsent &= self.unsent - 1;
        }
        Ok(signal)
    }

    /// The guest has let go of functions; an answer to an EJECT that was not sent yet is none.
    pub(super) fn released(&mut self, functions: u8) {
        self.held &= !functions | self.unsent;
        if mutant!("ejected-at-first") && functions & !self.unsent != 0 {
            self.held = 0;
        }
    }

    /// A function was taken away: there is nothing to let go of any more.
    pub(super) fn gone(&mut self, function: u8) {
        self.unsent &= !(1 << function);
        self.held &= !(1 << function);
    }

    /// True when the guest has let go of all functions.
    pub(super) fn is_complete(&self) -> bool {
        self.held == 0
    }

    /// Tells the one who asked.
    pub(super) fn finish(self) {
        if !mutant!("ejected-never-told") {
            (self.done)();
        }
    }
}

#[cfg(test)]
#[path = "ejection_tests.rs"]
mod tests;

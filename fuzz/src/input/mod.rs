//! What a hostile guest does, and what the VM's operator does meanwhile.
//!
//! A step of any kind applies to a [`Guest`] in any state.
#![forbid(unsafe_code)]

mod access;
mod hypercall;
mod message;
mod msr;
mod operator;
mod packet;
mod ring;
mod table;
mod virtqueue;

use arbitrary::Arbitrary;

use crate::guest::Guest;
use crate::values::{Blob, Gpa};

pub use access::Access;
pub use hypercall::{Device, Domain, Hypercall, Made};
pub use message::Message;
pub use msr::MsrAccess;
pub use operator::Operator;
pub use packet::Request;
pub use ring::RingChange;
pub use table::{Job, TableChange};
pub use virtqueue::VirtioStep;

/// A step that can be done to a guest.
pub trait Step {
    /// Does it.
    fn apply(&self, guest: &mut Guest);
}

/// Workers run: none, one, or until they rest.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Work {
    /// One step, beginning the search with this worker.
    One(u8),
    /// All there is to do.
    All,
}

impl Step for Work {
    fn apply(&self, guest: &mut Guest) {
        match self {
            Self::One(first) => {
                guest.machine.workers.step((*first).into());
            }
            Self::All => guest.machine.workers.settle(),
        }
    }
}

/// The guest takes what the host sent.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Take {
    /// The message of a VP.
    Message(u8),
    /// All packets of a bus.
    Packets(u8),
}

impl Step for Take {
    fn apply(&self, guest: &mut Guest) {
        match self {
            Self::Message(vp) => {
                guest.take_message((*vp).into());
            }
            Self::Packets(bus) => Guest::rings((*bus).into())[1].drain(guest.ram()),
        }
    }
}

/// The guest writes to its RAM.
#[derive(Debug, Clone, Arbitrary)]
pub struct Store {
    at: Gpa,
    bytes: Blob,
}

impl Step for Store {
    fn apply(&self, guest: &mut Guest) {
        // Where there is no RAM a store of the guest would be an exit.
        let _ = guest.ram().write(self.at.0, &self.bytes.0);
    }
}

/// All that can happen in a VM.
#[derive(Debug, Clone, Arbitrary)]
pub enum Anything {
    /// An access to an MSR.
    Msr(MsrAccess),
    /// A hypercall.
    Call(Hypercall),
    /// A message to VMBus.
    Message(Message),
    /// A request to a bus.
    Request(Request),
    /// A change of a ring.
    Ring(RingChange),
    /// An access to a config window or a BAR.
    Access(Access),
    /// A change of a first-stage table.
    Table(TableChange),
    /// A job for a device.
    Job(Job),
    /// A store to RAM.
    Store(Store),
    /// Workers run.
    Work(Work),
    /// The guest takes what the host sent.
    Take(Take),
    /// The operator acts.
    Operator(Operator),
}

impl Step for Anything {
    fn apply(&self, guest: &mut Guest) {
        let step: &dyn Step = match self {
            Self::Msr(step) => step,
            Self::Call(step) => step,
            Self::Message(step) => step,
            Self::Request(step) => step,
            Self::Ring(step) => step,
            Self::Access(step) => step,
            Self::Table(step) => step,
            Self::Job(step) => step,
            Self::Store(step) => step,
            Self::Work(step) => step,
            Self::Take(step) => step,
            Self::Operator(step) => step,
        };
        step.apply(guest);
    }
}

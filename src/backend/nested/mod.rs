//! First-stage tables that the host's IOMMU walks itself: *nested* translation
//! (docs/spec/pviommu.md#pviommu-8, docs/spec/vfio-rig.md#vfio-rig-6).
//!
//! ```text
//!   device -> first stage: the guest's table -> second stage: the nesting parent, guest RAM at its
//!                                                GPA -> host memory
//! ```
//!
//! What the guest writes into its tables only chooses among its own pages: the second stage holds
//! nothing but guest RAM, and the walk itself goes through it. So nothing of a table is checked here,
//! a map costs nothing, and a flush is one call to the host.
//!
//! [`NestedUnit`] is a state machine without I/O: it says what the host's kernel is to do, one
//! [`Operation`] after another, and takes each answer. The host that carries them out ([`Host`]) is
//! iommufd with a real device (`vfio::nested`), iommufd with the kernel's mock device, or a model in
//! a test.
#![forbid(unsafe_code)]

mod invalidation;
mod unit;

#[cfg(test)]
mod tests;

use std::fmt::{Debug, Display};
use std::io;

pub use invalidation::Invalidation;
pub use unit::{NestedCounters, NestedError, NestedUnit, Place};

use crate::pviommu::PageTable;

/// Number of an object of the host's kernel: an address space or a table that devices can be
/// attached to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId(pub u32);

impl Display for ObjectId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Display::fmt(&self.0, f)
    }
}

/// What a host's hardware can do with first-stage tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NestedCapabilities {
    /// It walks tables of 5 levels.
    pub five_levels: bool,
    /// It takes leaves of 1 GiB.
    pub gigabyte_pages: bool,
    /// Binary logarithm of the most 4 KiB pages of one invalidation. Larger ranges become an
    /// invalidation of everything.
    pub max_shift: u8,
}

/// One call to the host's kernel, for one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Makes a second-stage table of all guest RAM at its GPA that first-stage tables can be nested
    /// on. Answered by [`Answer::Object`].
    AllocateParent,
    /// Makes a first-stage table of the guest's, nested on `parent`. Answered by
    /// [`Answer::Object`].
    AllocateNested {
        /// The second stage.
        parent: ObjectId,
        /// The guest's table.
        table: PageTable,
    },
    /// The device's DMA goes through `to` from now on, and nothing else. If this fails, it goes
    /// where it went before, or nowhere.
    Attach {
        /// A first-stage table, or the address space of the default domain.
        to: ObjectId,
    },
    /// The device's DMA goes nowhere.
    Detach,
    /// Forgets cached translations of a first-stage table, those of its non-leaf entries included.
    /// If this fails, any number of the entries may be done.
    Invalidate {
        /// The first-stage table.
        table: ObjectId,
        /// What is forgotten; in one call. Empty asks only whether the host can.
        entries: Vec<Invalidation>,
    },
    /// Destroys a table that nothing is attached to and nothing is nested on.
    Destroy {
        /// The table.
        object: ObjectId,
    },
}

/// What an operation yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// It made this object.
    Object(ObjectId),
}

/// Carries out operations.
pub trait Host: Debug {
    /// Carries out one.
    ///
    /// # Errors
    ///
    /// The kernel's. What that means for each operation is said with it.
    fn execute(&self, operation: &Operation) -> io::Result<Answer>;
}

//! How a domain of the guest reaches a device of the host.
//!
//! The host's IOMMU gives each *attach unit* (the devices of a type1 container, or those attached to
//! an iommufd IOAS) an [`AddressSpace`]. What is mapped there is all that the unit's devices reach.
//! A domain with page tables of the guest's own is carried by a [`PagedBackend`], which makes an
//! address space follow them.
//!
//! Nothing here talks to the host's kernel: see `vfio` for what does.
#![forbid(unsafe_code)]

mod intervals;
pub mod nested;
pub mod shadow;
mod space;

use std::fmt::Debug;
use std::sync::Arc;

pub use intervals::{IntervalError, Intervals};
pub use space::{AddressSpace, Permissions, SpaceError, SpaceLimits};

use crate::pviommu::{BackendError, FlushRange, PageTable};

/// Makes address spaces follow the guest's page tables.
pub trait PagedBackend: Send + Sync + Debug {
    /// Fills `space` so that it follows `table`, until the result is dropped. The space is empty, and
    /// no device's DMA goes through it yet, or only that of devices that are blocked meanwhile.
    ///
    /// The owner of the space does not touch it while the result lives. After the drop the owner
    /// empties it.
    ///
    /// # Errors
    ///
    /// [`BackendError`], if the table cannot be carried. What `space` holds then does not matter:
    /// the owner empties it.
    fn follow(
        &self,
        table: PageTable,
        space: Arc<dyn AddressSpace>,
    ) -> Result<Arc<dyn PagedDomain>, BackendError>;
}

/// An address space that follows a page table of the guest.
///
/// The promise of both calls: when they return, no DMA that uses an older translation of what they
/// cover is under way or can start (docs/spec/pviommu.md#pviommu-6).
pub trait PagedDomain: Send + Sync + Debug {
    /// Forgets translations of some ranges, and follows the table as it is now.
    fn flush(&self, ranges: &[FlushRange]);

    /// The same for all addresses.
    fn flush_all(&self);

    /// True if nothing is mapped and nothing is followed any more, because the table could not be
    /// carried on: devices that are to go to the table need a domain that follows it anew.
    fn is_blocked(&self) -> bool {
        false
    }
}

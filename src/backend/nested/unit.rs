//! Where a device's DMA goes, and which calls take it from there to where the guest wants it.
#![forbid(unsafe_code)]

use std::io;

use arrayvec::ArrayVec;

use super::invalidation::invalidations;
use super::{Answer, Host, Invalidation, NestedCapabilities, ObjectId, Operation};
use crate::pviommu::{FlushRange, Levels, PageTable, Translation};

/// Tables that the host did not destroy at once. While there are as many, no new one is made.
const MAX_RETIRED: usize = 4;

/// A nested domain was not set up, or a device not moved.
#[derive(Debug, thiserror::Error)]
pub enum NestedError {
    /// The host cannot nest.
    #[error("{what}: {cause}")]
    Unavailable {
        /// What it refused.
        what: &'static str,
        /// The kernel's error.
        cause: io::Error,
        /// Tables that it made and would not destroy again. They go with the iommufd.
        left: ArrayVec<ObjectId, 2>,
    },
    /// The host's IOMMU does not walk 5 levels.
    #[error("the host's IOMMU does not walk first-stage tables of 5 levels")]
    FiveLevels,
    /// The host refused a call of a move. The device is where it was.
    #[error("{what}: {cause}")]
    Refused {
        /// What it refused.
        what: &'static str,
        /// The kernel's error.
        cause: io::Error,
    },
    /// The host refused to move the device, and to bring it back. It is blocked.
    #[error("{what}: {cause}; nor does it go back to where it was")]
    Blocked {
        /// What it refused.
        what: &'static str,
        /// The kernel's error.
        cause: io::Error,
    },
    /// The host does not destroy the tables that the device has left.
    #[error(
        "the host does not destroy {MAX_RETIRED} first-stage tables that are not used any more"
    )]
    Retired,
    /// The host did not block the device. It may reach what it must not reach any more: whoever gets
    /// this must try again, take the device from the guest, or stop the VM.
    #[error("the host did not block the device: {cause}")]
    Stuck {
        /// The kernel's error.
        cause: io::Error,
    },
}

/// Where a device's DMA goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Guest RAM at its GPA.
    Default,
    /// Nowhere.
    Blocked,
    /// Through a first-stage table of the guest.
    Nested {
        /// The host's object for it.
        object: ObjectId,
        /// The guest's table.
        table: PageTable,
    },
}

/// Counts since a unit was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NestedCounters {
    /// Flushes that the host carried out as they were asked for.
    pub invalidations: u64,
    /// Flushes that it carried out only as a flush of everything.
    pub widened: u64,
    /// Flushes upon which the device was blocked, because the host could not carry them out.
    pub blocked: u64,
    /// Tables that the host does not destroy.
    pub retired: u64,
}

/// One attach unit whose first-stage domains are nested: a device, or the devices of an IOMMU group.
///
/// Promises, whatever calls the host refuses, unless [`NestedError::Stuck`] is returned:
///
/// - The DMA of the unit never reaches more than the domain that was last asked for *and* taken
///   allows. A call that fails leaves it there or blocked.
/// - When a flush returns, no DMA uses an older translation of what it covers: the host has
///   forgotten it, or the unit is blocked.
/// - Every table that the host made is destroyed, or known here and tried again: at most
///   [`MAX_RETIRED`](NestedCounters::retired) of them.
#[derive(Debug)]
pub struct NestedUnit<H: Host> {
    host: H,
    capabilities: NestedCapabilities,
    /// The address space of the default domain.
    default: ObjectId,
    parent: Option<ObjectId>,
    place: Place,
    /// The unit is at `place`. Not so since [`NestedError::Stuck`]: some of its devices may be elsewhere,
    /// so that a move to `place` has something to do.
    sure: bool,
    retired: ArrayVec<ObjectId, MAX_RETIRED>,
    counters: NestedCounters,
}

impl<H: Host> NestedUnit<H> {
    /// Finds out whether the host can nest, and prepares it. The unit is at `place`, which is not a
    /// first-stage table, and stays there. `default` is the address space of the default domain;
    /// `levels` the highest tables that the guest may use.
    ///
    /// # Errors
    ///
    /// [`NestedError::Unavailable`] or [`NestedError::FiveLevels`], and the host for somebody else's
    /// use. Nothing has changed but what the error names.
    pub fn open(
        host: H,
        capabilities: NestedCapabilities,
        default: ObjectId,
        place: Place,
        levels: Levels,
    ) -> Result<Self, (H, NestedError)> {
        if levels == Levels::Five && !capabilities.five_levels {
            return Err((host, NestedError::FiveLevels));
        }
        let mut left = ArrayVec::new();
        match probe(&host, levels, &mut left) {
            Ok(parent) => {
                // Only a trial table may be left.
                let retired: ArrayVec<_, MAX_RETIRED> = left.into_iter().collect();
                let mut unit = Self {
                    host,
                    capabilities,
                    default,
                    parent: Some(parent),
                    place,
                    sure: true,
                    retired,
                    counters: NestedCounters::default(),
                };
                unit.count_retired();
                Ok(unit)
            }
            Err((what, cause)) => Err((host, NestedError::Unavailable { what, cause, left })),
        }
    }

    /// Where the DMA of the unit goes.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Counts.
    pub fn counters(&self) -> NestedCounters {
        self.counters
    }

    /// Objects of the host that this unit has made and not yet destroyed: nested ones first.
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> {
        let current = match self.place {
            Place::Nested { object, .. } => Some(object),
            _ => None,
        };
        let nested = current.into_iter().chain(self.retired.iter().copied());
        nested.chain(self.parent)
    }

    /// The host.
    pub fn host(&self) -> &H {
        &self.host
    }

    /// Moves the unit. When this returns, no DMA goes where the unit was before.
    ///
    /// The same table again only forgets translations: nothing of the device's DMA is refused
    /// meanwhile. A move to another is one call of the kernel; VT-d's driver blocks the device during
    /// it.
    ///
    /// # Errors
    ///
    /// [`NestedError`]: the unit is where it was, or blocked if the host could not go back.
    /// [`Translation::Blocked`] fails with [`NestedError::Stuck`] only.
    pub fn attach(&mut self, to: &Translation) -> Result<(), NestedError> {
        self.sweep();
        match to {
            Translation::Blocked => self.block(),
            Translation::Identity => {
                if self.sure && self.place == Place::Default {
                    return Ok(());
                }
                self.go("attach the default domain", self.default)?;
                self.leave(Place::Default);
                Ok(())
            }
            Translation::Paged(table) => self.nest(*table),
        }
    }

    fn nest(&mut self, table: PageTable) -> Result<(), NestedError> {
        if table.levels == Levels::Five && !self.capabilities.five_levels {
            return Err(NestedError::FiveLevels);
        }
        if self.sure
            && let Place::Nested { object, table: now } = self.place
            && now == table
            && self.invalidate(object, vec![Invalidation::All]).is_ok()
        {
            return Ok(());
        }
        // One place for the table that the unit leaves, one for the new one if it cannot be used.
        if self.retired.remaining_capacity() < 2 {
            return Err(NestedError::Retired);
        }
        let parent = self.parent.ok_or_else(closed)?;
        let allocated = self.allocate(Operation::AllocateNested { parent, table });
        let object = allocated.map_err(refused("make a first-stage table"))?;
        if let Err(error) = self.go("attach a first-stage table", object) {
            self.destroy(object);
            return Err(error);
        }
        self.leave(Place::Nested { object, table });
        Ok(())
    }

    /// Forgets translations of some ranges of the guest's table; of all of it where the host cannot
    /// do less. A unit that is not in a first-stage domain has none.
    ///
    /// # Errors
    ///
    /// [`NestedError::Stuck`] only: where the host cannot even forget everything, the unit is
    /// blocked, until it is attached anew, and the flush has its effect.
    pub fn flush(&mut self, ranges: &[FlushRange]) -> Result<(), NestedError> {
        self.forget(invalidations(ranges, &self.capabilities))
    }

    /// The same for all addresses.
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    pub fn flush_all(&mut self) -> Result<(), NestedError> {
        self.forget(vec![Invalidation::All])
    }

    fn forget(&mut self, entries: Vec<Invalidation>) -> Result<(), NestedError> {
        if !self.sure {
            self.counters.blocked += 1;
            return self.block();
        }
        let Place::Nested { object, .. } = self.place else {
            return Ok(());
        };
        if entries.is_empty() {
            return Ok(());
        }
        let all = entries == [Invalidation::All];
        if self.invalidate(object, entries).is_ok() {
            self.counters.invalidations += 1;
            return Ok(());
        }
        // Some of the entries may be done, and those behind the one that failed are not.
        if !all && self.invalidate(object, vec![Invalidation::All]).is_ok() {
            self.counters.widened += 1;
            return Ok(());
        }
        self.counters.blocked += 1;
        self.block()
    }

    /// Blocks the unit and destroys everything, first-stage tables before their parent. What the
    /// host does not destroy is still named by [`objects`](Self::objects) and tried again by the
    /// next call.
    ///
    /// # Errors
    ///
    /// [`NestedError::Stuck`]; the unit is as it was then.
    pub fn close(&mut self) -> Result<(), NestedError> {
        if !self.sure || matches!(self.place, Place::Nested { .. }) {
            self.block()?;
        }
        self.sweep();
        if self.retired.is_empty()
            && let Some(parent) = self.parent
            && self.run(Operation::Destroy { object: parent }).is_ok()
        {
            self.parent = None;
        }
        Ok(())
    }

    fn block(&mut self) -> Result<(), NestedError> {
        match self.sure && self.place == Place::Blocked {
            true => Ok(()),
            false => self.detach(),
        }
    }

    fn detach(&mut self) -> Result<(), NestedError> {
        let detached = self.run(Operation::Detach);
        self.sure = detached.is_ok();
        detached.map_err(|cause| NestedError::Stuck { cause })?;
        self.leave(Place::Blocked);
        Ok(())
    }

    /// Attaches the unit to `to`. Where it is after a failure nobody knows, so it is brought back to where
    /// it was, or blocked.
    fn go(&mut self, what: &'static str, to: ObjectId) -> Result<(), NestedError> {
        let Err(cause) = self.run(Operation::Attach { to }) else {
            self.sure = true;
            return Ok(());
        };
        let former = match self.place {
            _ if !self.sure => None,
            Place::Default => Some(self.default),
            Place::Nested { object, .. } => Some(object),
            Place::Blocked => None,
        };
        let was_blocked = self.place == Place::Blocked;
        if let Some(former) = former
            && self.run(Operation::Attach { to: former }).is_ok()
        {
            return Err(NestedError::Refused { what, cause });
        }
        self.detach()?;
        Err(match was_blocked {
            true => NestedError::Refused { what, cause },
            false => NestedError::Blocked { what, cause },
        })
    }

    /// The unit has left its place for another.
    fn leave(&mut self, to: Place) {
        let from = std::mem::replace(&mut self.place, to);
        if let Place::Nested { object, .. } = from {
            self.destroy(object);
        }
    }

    /// Destroys a table that the unit does not use.
    fn destroy(&mut self, object: ObjectId) {
        if self.run(Operation::Destroy { object }).is_err() {
            // There is room: `nest` makes a table only with room for it and its predecessor.
            let _ = self.retired.try_push(object);
            self.count_retired();
        }
    }

    /// Tries once more to destroy what could not be destroyed.
    fn sweep(&mut self) {
        let host = &self.host;
        self.retired.retain(|object| {
            let destroyed = host.execute(&Operation::Destroy { object: *object });
            destroyed.is_err()
        });
        self.count_retired();
    }

    fn count_retired(&mut self) {
        self.counters.retired = self.retired.len() as u64;
    }

    fn invalidate(&self, table: ObjectId, entries: Vec<Invalidation>) -> io::Result<()> {
        self.run(Operation::Invalidate { table, entries })
    }

    fn run(&self, operation: Operation) -> io::Result<()> {
        self.host.execute(&operation).map(drop)
    }

    fn allocate(&self, operation: Operation) -> io::Result<ObjectId> {
        allocate(&self.host, operation)
    }
}

/// Makes a parent, and tries whether a first-stage table can be made on it and invalidated. Which
/// root the trial has does not matter: nothing is ever attached to it.
fn probe<H: Host>(
    host: &H,
    levels: Levels,
    left: &mut ArrayVec<ObjectId, 2>,
) -> Result<ObjectId, (&'static str, io::Error)> {
    let mut destroy = |object| {
        if host.execute(&Operation::Destroy { object }).is_err() {
            left.push(object);
        }
    };
    let parent = allocate(host, Operation::AllocateParent);
    let parent = parent.map_err(|cause| ("make a nesting parent of guest RAM", cause))?;
    let table = PageTable { root: 0, levels };
    let trial = match allocate(host, Operation::AllocateNested { parent, table }) {
        Ok(trial) => trial,
        Err(cause) => {
            destroy(parent);
            return Err(("make a first-stage table", cause));
        }
    };
    let entries = Vec::new();
    let invalidated = host.execute(&Operation::Invalidate {
        table: trial,
        entries,
    });
    destroy(trial);
    if let Err(cause) = invalidated {
        destroy(parent);
        return Err(("invalidate a first-stage table", cause));
    }
    Ok(parent)
}

fn allocate<H: Host>(host: &H, operation: Operation) -> io::Result<ObjectId> {
    match host.execute(&operation)? {
        Answer::Object(object) => Ok(object),
        Answer::Done => Err(io::Error::other("the host made no object")),
    }
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> NestedError {
    move |cause| NestedError::Refused { what, cause }
}

fn closed() -> NestedError {
    NestedError::Refused {
        what: "make a first-stage table",
        cause: io::Error::other("the unit is closed"),
    }
}

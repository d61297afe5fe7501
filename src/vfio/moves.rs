//! Moving the devices of an attach unit from one translation to another.
//!
//! No move passes through more access than either side gives, and one that fails leaves the devices
//! where they were. Where that is not possible they are blocked, and the error says so.
#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::{self, Debug};
use std::sync::Arc;

use super::space::{Space, SpaceKernel};
use crate::backend::{AddressSpace, PagedBackend, PagedDomain};
use crate::pviommu::{FlushRange, PageTable, Translation};

/// Where devices are after a move that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// Where they were.
    Unchanged,
    /// Nowhere: all DMA faults.
    Blocked,
    /// The kernel did not take away all that it was asked to. They reach no more than before or, of
    /// where they were to go, a part.
    Unknown,
}

/// A move failed.
#[derive(Debug)]
pub(super) struct MoveError {
    pub(super) cause: Box<dyn Error + Send + Sync>,
    pub(super) left: Left,
}

impl MoveError {
    fn new(cause: impl Into<Box<dyn Error + Send + Sync>>, left: Left) -> Self {
        Self {
            cause: cause.into(),
            left,
        }
    }
}

impl fmt::Display for MoveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.cause)?;
        let mut source = self.cause.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        match self.left {
            Left::Unchanged => Ok(()),
            Left::Blocked => write!(f, "; it is blocked now"),
            Left::Unknown => write!(f, "; the host's kernel did not block it"),
        }
    }
}

impl Error for MoveError {}

/// The function has no back end for tables of the guest.
#[derive(Debug, thiserror::Error)]
#[error("nothing here can carry page tables of the guest (neither nested nor shadowed)")]
pub(super) struct NoPaging;

/// The devices of one attach unit, as far as the kernel is concerned.
pub(super) trait Mover: Send + Sync + Debug {
    /// Moves all devices of the unit. Going where they are already acts as a full flush, unless what
    /// followed their table gave up: then it is followed anew.
    fn go(&mut self, to: Translation) -> Result<(), MoveError>;

    /// As [`PagedDomain::flush`], if the devices follow a table.
    ///
    /// # Errors
    ///
    /// [`MoveError`]: the devices use older translations, and the kernel did not block them.
    fn flush(&mut self, ranges: &[FlushRange]) -> Result<(), MoveError>;

    /// As [`PagedDomain::flush_all`].
    ///
    /// # Errors
    ///
    /// As [`flush`](Self::flush).
    fn flush_all(&mut self) -> Result<(), MoveError>;

    /// A device joins the unit, where the others are.
    fn join(&mut self, member: u32) -> Result<(), MoveError>;

    /// A device leaves; the others stay where they are.
    fn leave(&mut self, member: u32);

    /// Detaches a device that leaves next, where devices of a unit are attached one by one.
    ///
    /// # Errors
    ///
    /// [`MoveError`]: it is still where the others are.
    fn detach(&mut self, member: u32) -> Result<(), MoveError>;
}

impl Mover for Box<dyn Mover> {
    fn go(&mut self, to: Translation) -> Result<(), MoveError> {
        (**self).go(to)
    }

    fn flush(&mut self, ranges: &[FlushRange]) -> Result<(), MoveError> {
        (**self).flush(ranges)
    }

    fn flush_all(&mut self) -> Result<(), MoveError> {
        (**self).flush_all()
    }

    fn join(&mut self, member: u32) -> Result<(), MoveError> {
        (**self).join(member)
    }

    fn leave(&mut self, member: u32) {
        (**self).leave(member);
    }

    fn detach(&mut self, member: u32) -> Result<(), MoveError> {
        (**self).detach(member)
    }
}

/// Where the devices of a unit are.
#[derive(Debug)]
pub(super) enum Now<P> {
    Blocked,
    Identity,
    Paged(P),
    Unknown,
}

/// A unit that is one address space: a container. Whoever moves goes through an empty one.
#[derive(Debug)]
pub(super) struct SpaceMover<K> {
    space: Arc<Space<K>>,
    paging: Option<Arc<dyn PagedBackend>>,
    now: Now<(PageTable, Arc<dyn PagedDomain>)>,
}

impl<K: SpaceKernel + 'static> SpaceMover<K> {
    /// A unit whose address space is empty.
    pub(super) fn new(space: Arc<Space<K>>, paging: Option<Arc<dyn PagedBackend>>) -> Self {
        Self {
            space,
            paging,
            now: Now::Blocked,
        }
    }

    fn translation(&self) -> Option<Translation> {
        match &self.now {
            Now::Blocked => Some(Translation::Blocked),
            Now::Identity => Some(Translation::Identity),
            Now::Paged((table, _)) => Some(Translation::Paged(*table)),
            Now::Unknown => None,
        }
    }

    /// Empties the space.
    fn block(&mut self) -> Result<(), MoveError> {
        // Dropped first: a domain that still follows a table may map something.
        self.now = Now::Unknown;
        let cleared = self.space.clear();
        cleared.map_err(|error| MoveError::new(error, Left::Unknown))?;
        self.now = Now::Blocked;
        Ok(())
    }

    /// Fills the space, which is empty.
    fn fill(&mut self, to: Translation) -> Result<(), Box<dyn Error + Send + Sync>> {
        self.now = match to {
            Translation::Blocked => return Ok(()),
            Translation::Identity => {
                self.space.map_all()?;
                Now::Identity
            }
            Translation::Paged(table) => {
                let paging = self.paging.as_ref().ok_or(NoPaging)?;
                let domain = paging.follow(table, self.space.clone());
                Now::Paged((table, domain.map_err(|error| error.0)?))
            }
        };
        Ok(())
    }
}

impl<K: SpaceKernel + 'static> Mover for SpaceMover<K> {
    fn go(&mut self, to: Translation) -> Result<(), MoveError> {
        let mut former = self.translation();
        if matches!(&self.now, Now::Paged((_, domain)) if domain.is_blocked()) {
            // Of no use any more; emptied below, whatever the way, because the host may have failed to.
            former = Some(Translation::Blocked);
        } else if former == Some(to) {
            return self.flush_all();
        }
        if matches!(to, Translation::Paged(_)) && self.paging.is_none() {
            return Err(MoveError::new(NoPaging, Left::Unchanged));
        }
        self.block()?;
        let Err(cause) = self.fill(to) else {
            return Ok(());
        };
        let failed = |left| MoveError { cause, left };
        if self.block().is_err() {
            return Err(failed(Left::Unknown));
        }
        match former {
            Some(Translation::Blocked) => Err(failed(Left::Unchanged)),
            Some(former) if self.fill(former).is_ok() => Err(failed(Left::Unchanged)),
            _ if self.block().is_ok() => Err(failed(Left::Blocked)),
            _ => Err(failed(Left::Unknown)),
        }
    }

    fn flush(&mut self, ranges: &[FlushRange]) -> Result<(), MoveError> {
        if let Now::Paged((_, domain)) = &self.now {
            domain.flush(ranges);
        }
        Ok(())
    }

    fn flush_all(&mut self) -> Result<(), MoveError> {
        if let Now::Paged((_, domain)) = &self.now {
            domain.flush_all();
        }
        Ok(())
    }

    fn join(&mut self, _member: u32) -> Result<(), MoveError> {
        Ok(())
    }

    fn leave(&mut self, _member: u32) {}

    fn detach(&mut self, _member: u32) -> Result<(), MoveError> {
        Ok(())
    }
}

/// The kernel's side of a unit of iommufd: devices of one group, and what they are attached to.
pub(super) trait AttachKernel: Send + Sync + Debug {
    /// Attaches a device, or moves it in one step if it is attached. In a group the first device
    /// that moves takes the others along.
    fn attach(&self, member: u32, pt: u32) -> std::io::Result<()>;

    /// Detaches a device.
    fn detach(&self, member: u32) -> std::io::Result<()>;

    /// The address space of all guest RAM.
    fn identity(&self) -> u32;

    /// A new, empty address space, and its number.
    fn new_space(&self) -> std::io::Result<(u32, Arc<dyn AddressSpace>)>;

    /// Destroys an address space to which nothing is attached.
    fn destroy(&self, pt: u32) -> std::io::Result<()>;
}

/// A table that is followed, in an address space of its own.
#[derive(Debug)]
pub(super) struct Followed {
    table: PageTable,
    pt: u32,
    space: Arc<dyn AddressSpace>,
    domain: Arc<dyn PagedDomain>,
}

/// A unit of iommufd. A move is one step, into an address space that is complete by then.
#[derive(Debug)]
pub(super) struct AttachMover<K: AttachKernel> {
    kernel: K,
    members: Vec<u32>,
    paging: Option<Arc<dyn PagedBackend>>,
    now: Now<Followed>,
}

impl<K: AttachKernel> AttachMover<K> {
    /// A unit without devices, hence blocked.
    pub(super) fn new(kernel: K, paging: Option<Arc<dyn PagedBackend>>) -> Self {
        Self {
            kernel,
            members: Vec::new(),
            paging,
            now: Now::Blocked,
        }
    }

    fn is_at(&self, to: &Translation) -> bool {
        match (&self.now, to) {
            (Now::Blocked, Translation::Blocked) => true,
            (Now::Identity, Translation::Identity) => true,
            // What gave up is followed anew.
            (Now::Paged(followed), Translation::Paged(table)) => {
                followed.table == *table && !followed.domain.is_blocked()
            }
            _ => false,
        }
    }

    /// What the devices are attached to.
    fn pt(&self) -> Option<u32> {
        match &self.now {
            Now::Identity => Some(self.kernel.identity()),
            Now::Paged(followed) => Some(followed.pt),
            Now::Blocked | Now::Unknown => None,
        }
    }

    fn follow(&self, table: PageTable) -> Result<Followed, MoveError> {
        let unchanged = |cause: Box<dyn Error + Send + Sync>| MoveError {
            cause,
            left: Left::Unchanged,
        };
        let paging = self.paging.as_ref();
        let paging = paging.ok_or_else(|| unchanged(NoPaging.into()))?;
        let (pt, space) = self.kernel.new_space().map_err(|e| unchanged(e.into()))?;
        match paging.follow(table, space.clone()) {
            Ok(domain) => Ok(Followed {
                table,
                pt,
                space,
                domain,
            }),
            Err(error) => {
                self.destroy(pt);
                Err(unchanged(error.0))
            }
        }
    }

    /// Ends a domain: nothing follows the table any more, and then nothing is mapped. That is so even
    /// if a device could not be detached.
    fn end(&self, followed: Followed) {
        let Followed {
            pt, space, domain, ..
        } = followed;
        drop(domain);
        if let Err(error) = space.clear() {
            log::warn!("address space {pt} of iommufd is not empty: {error}");
        }
        self.destroy(pt);
    }

    fn destroy(&self, pt: u32) {
        if let Err(error) = self.kernel.destroy(pt) {
            log::warn!("address space {pt} of iommufd stays: {error}");
        }
    }

    /// Attaches all devices to `pt`, or brings them back.
    fn attach_all(&mut self, pt: u32) -> Result<(), MoveError> {
        for (done, member) in self.members.iter().enumerate() {
            let Err(error) = self.kernel.attach(*member, pt) else {
                continue;
            };
            if done == 0 {
                // A device that cannot be moved is where it was.
                return Err(MoveError::new(error, Left::Unchanged));
            }
            return Err(self.bring_back(error));
        }
        Ok(())
    }

    fn bring_back(&mut self, cause: std::io::Error) -> MoveError {
        if let Some(former) = self.pt() {
            let attach = |member: &u32| self.kernel.attach(*member, former).is_ok();
            if self.members.iter().all(attach) {
                return MoveError::new(cause, Left::Unchanged);
            }
        }
        let was_blocked = matches!(self.now, Now::Blocked);
        match self.detach_all() {
            Ok(()) if was_blocked => MoveError::new(cause, Left::Unchanged),
            Ok(()) => MoveError::new(cause, Left::Blocked),
            Err(_) => MoveError::new(cause, Left::Unknown),
        }
    }

    /// Detaches all devices, as many as the kernel lets go, and leaves where they were.
    fn detach_all(&mut self) -> std::io::Result<()> {
        let mut result = Ok(());
        for member in &self.members {
            let detached = self.kernel.detach(*member);
            result = result.and(detached);
        }
        let now = match result {
            Ok(()) => Now::Blocked,
            Err(_) => Now::Unknown,
        };
        self.arrive(now);
        result
    }

    /// The devices are elsewhere now: what they left is not needed any more.
    fn arrive(&mut self, now: Now<Followed>) {
        let former = std::mem::replace(&mut self.now, now);
        if let Now::Paged(followed) = former {
            self.end(followed);
        }
    }
}

impl<K: AttachKernel> Mover for AttachMover<K> {
    fn go(&mut self, to: Translation) -> Result<(), MoveError> {
        if self.is_at(&to) {
            return self.flush_all();
        }
        match to {
            Translation::Blocked => self
                .detach_all()
                .map_err(|error| MoveError::new(error, Left::Unknown)),
            Translation::Identity => {
                self.attach_all(self.kernel.identity())?;
                self.arrive(Now::Identity);
                Ok(())
            }
            Translation::Paged(table) => {
                let followed = self.follow(table)?;
                if let Err(error) = self.attach_all(followed.pt) {
                    self.end(followed);
                    return Err(error);
                }
                self.arrive(Now::Paged(followed));
                Ok(())
            }
        }
    }

    fn flush(&mut self, ranges: &[FlushRange]) -> Result<(), MoveError> {
        if let Now::Paged(followed) = &self.now {
            followed.domain.flush(ranges);
        }
        Ok(())
    }

    fn flush_all(&mut self) -> Result<(), MoveError> {
        if let Now::Paged(followed) = &self.now {
            followed.domain.flush_all();
        }
        Ok(())
    }

    fn join(&mut self, member: u32) -> Result<(), MoveError> {
        if let Some(pt) = self.pt() {
            let attached = self.kernel.attach(member, pt);
            attached.map_err(|error| MoveError::new(error, Left::Unchanged))?;
        }
        self.members.push(member);
        Ok(())
    }

    fn leave(&mut self, member: u32) {
        let Some(at) = self.members.iter().position(|other| *other == member) else {
            return;
        };
        if let Err(error) = self.kernel.detach(member) {
            log::warn!("device {member} of iommufd stays attached until it is closed: {error}");
        }
        self.members.remove(at);
        if self.members.is_empty() {
            self.arrive(Now::Blocked);
        }
    }

    fn detach(&mut self, member: u32) -> Result<(), MoveError> {
        let detached = self.kernel.detach(member);
        detached.map_err(|error| MoveError::new(error, Left::Unknown))
    }
}

impl<K: AttachKernel> Drop for AttachMover<K> {
    fn drop(&mut self) {
        if let Err(error) = self.detach_all() {
            log::warn!("devices of iommufd stay attached until they are closed: {error}");
        }
    }
}

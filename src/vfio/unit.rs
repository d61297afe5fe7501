//! Attach units: the devices of one IOMMU group, which are always in the same domain.
//!
//! The guest moves functions one by one and knows nothing of the host's groups. So:
//!
//! - A function may only go where the others of its group that are not blocked are: to their domain,
//!   or to one that does the same.
//! - As long as one of them is blocked, all are: what a device of a group reaches, each of its group
//!   does.
//! - A domain that is configured anew takes all its functions along with the first.
//! - A device that was put out cannot do DMA, and nobody heeds it.
#![forbid(unsafe_code)]

use super::error::VfioError;
use super::moves::{Left, MoveError, Mover};
use crate::pviommu::{Attachment, FlushRange, Translation};

/// A device of a unit.
#[derive(Debug)]
struct Member {
    /// Unique in the unit, and what the mover calls it.
    id: u32,
    address: String,
    /// Where the guest wants it.
    wanted: Attachment,
    /// Its function was removed: it is blocked, and the others are not for its sake.
    out: bool,
}

/// The devices of a group that the VM has.
#[derive(Debug)]
pub(super) struct Unit<M> {
    group: u32,
    members: Vec<Member>,
    mover: M,
    /// A move failed and the devices are not where they are wanted, or use translations that were to be
    /// forgotten. Whatever comes next tries again,
    /// so that what the kernel did not take away does not stay reachable until somebody moves.
    astray: bool,
}

/// Why a device was not moved.
#[derive(Debug, thiserror::Error)]
pub(super) enum UnitError {
    /// Another device of its group is in another domain.
    #[error(transparent)]
    OtherDomain(#[from] VfioError),
    /// The kernel, or what follows a table, refused.
    #[error("{address}: {error}")]
    Refused {
        /// Its address.
        address: String,
        /// Why.
        error: MoveError,
    },
}

impl<M: Mover> Unit<M> {
    /// The unit of a group, without devices, blocked.
    pub(super) fn new(group: u32, mover: M) -> Self {
        Self {
            group,
            members: Vec::new(),
            mover,
            astray: false,
        }
    }

    /// A device joins, in the default domain. `id` must be new.
    pub(super) fn join(&mut self, id: u32, address: &str) -> Result<(), UnitError> {
        self.members.push(Member {
            id,
            address: address.to_owned(),
            wanted: Attachment {
                translation: Translation::Blocked,
                ..Attachment::DEFAULT
            },
            out: false,
        });
        let joined = self.enter(id, address);
        if joined.is_err() {
            self.leave(id);
        }
        joined
    }

    fn enter(&mut self, id: u32, address: &str) -> Result<(), UnitError> {
        // Before it is where the others are.
        self.check_others(id, &Attachment::DEFAULT)?;
        self.mover.join(id).map_err(|error| UnitError::Refused {
            address: address.to_owned(),
            error,
        })?;
        self.attach(id, &Attachment::DEFAULT)
    }

    /// A device leaves. The last one leaves a unit that is blocked. If it alone was blocked, the others
    /// need not be any more.
    pub(super) fn leave(&mut self, id: u32) {
        let at = self.members.iter().position(|member| member.id == id);
        match at.map(|at| self.members.remove(at)) {
            // The mover has let go of it already.
            Some(member) if member.out => self.settle(),
            _ => self.depart(id),
        }
    }

    /// The others go on as if a device had left, until it is attached again.
    ///
    /// It must be unable to do DMA, and nobody may be able to change that before it is attached again:
    /// what the others reach is in its reach too where the interface has one address space for the
    /// group.
    pub(super) fn put_out(&mut self, id: u32) {
        let at = self.members.iter().position(|member| member.id == id);
        let Some(at) = at.filter(|at| !self.members[*at].out) else {
            return;
        };
        self.members[at].wanted.translation = Translation::Blocked;
        // While one of a group is attached by iommufd, what the others are detached from stays in reach
        // of all: one that the kernel does not detach goes on to count.
        if let Err(error) = self.mover.detach(id) {
            let address = &self.members[at].address;
            log::error!("group {}: {address}: {error}", self.group);
            self.settle();
            return;
        }
        self.members[at].out = true;
        self.depart(id);
    }

    /// True if no other device counts.
    pub(super) fn is_alone(&self, id: u32) -> bool {
        self.members
            .iter()
            .all(|member| member.id == id || member.out)
    }

    /// True if a device was put out.
    #[cfg(test)]
    pub(super) fn is_out(&self, id: u32) -> bool {
        self.members
            .iter()
            .any(|member| member.id == id && member.out)
    }

    /// The mover lets go of a device that is not one of those that count any more.
    fn depart(&mut self, id: u32) {
        if self.members.iter().all(|member| member.out) {
            self.settle();
            self.mover.leave(id);
        } else {
            self.mover.leave(id);
            self.settle();
        }
    }

    /// The device `at` that was put out counts again, and goes to `to`.
    fn come_back(&mut self, at: usize, to: &Attachment) -> Result<(), UnitError> {
        let Member { id, address, .. } = &self.members[at];
        let (id, address) = (*id, address.clone());
        let refused = |error| UnitError::Refused { address, error };
        if to.translation == Translation::Blocked {
            self.members[at].out = false;
            // Before it is among the others, who are where it must not be.
            let moved = self.go();
            let joined = self.mover.join(id);
            return moved.and(joined).map_err(refused);
        }
        // Before it is where the others are.
        self.check_others(id, to)?;
        self.mover.join(id).map_err(refused)?;
        self.members[at].out = false;
        let attached = self.attach(id, to);
        if attached.is_err() {
            self.put_out(id);
        }
        attached
    }

    fn settle(&mut self) {
        if let Err(error) = self.go() {
            log::error!("group {}: {error}", self.group);
        }
    }

    /// Moves the devices where all can be.
    fn go(&mut self) -> Result<(), MoveError> {
        let result = self.mover.go(self.common());
        // What failed and changed nothing leaves astray what was so.
        self.astray = match &result {
            Ok(()) => false,
            Err(error) => self.astray || error.left != Left::Unchanged,
        };
        result
    }

    /// True if no device is left.
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Moves a device.
    pub(super) fn attach(&mut self, id: u32, to: &Attachment) -> Result<(), UnitError> {
        let Some(at) = self.members.iter().position(|member| member.id == id) else {
            return Ok(());
        };
        if self.astray {
            self.settle();
        }
        if self.members[at].out {
            return self.come_back(at, to);
        }
        let blocks = to.translation == Translation::Blocked;
        if !blocks {
            self.check_others(id, to)?;
        }
        let former: Vec<Attachment> = self.members.iter().map(|member| member.wanted).collect();
        for (other, member) in self.members.iter_mut().enumerate() {
            if other == at {
                member.wanted = *to;
            } else if !blocks && !member.is_blocked() && member.wanted.domain == to.domain {
                member.wanted.translation = to.translation;
            }
        }
        self.go().map_err(|error| {
            for (member, former) in self.members.iter_mut().zip(former) {
                member.wanted = former;
            }
            if blocks {
                // It stays wanted so, and nobody of the group gets more until it is.
                self.members[at].wanted = *to;
            }
            UnitError::Refused {
                address: self.members[at].address.clone(),
                error,
            }
        })
    }

    /// What all devices that count can have: blocked if one of them is.
    fn common(&self) -> Translation {
        let counting = self.members.iter().filter(|member| !member.out);
        let mut wanted = counting.map(|member| member.wanted.translation);
        let first = wanted.next().unwrap_or(Translation::Blocked);
        match wanted.all(|other| other == first) {
            true => first,
            false => Translation::Blocked,
        }
    }

    fn check_others(&self, id: u32, to: &Attachment) -> Result<(), VfioError> {
        let differs = |member: &&Member| {
            let wanted = &member.wanted;
            let agrees = wanted.domain == to.domain || wanted.translation == to.translation;
            member.id != id && !member.is_blocked() && !agrees
        };
        let others: Vec<_> = self.members.iter().filter(differs).collect();
        if others.is_empty() {
            return Ok(());
        }
        let own = self.members.iter().find(|member| member.id == id);
        Err(VfioError::OtherDomain {
            address: own.map(|member| member.address.clone()).unwrap_or_default(),
            group: self.group,
            members: others.iter().map(|member| member.address.clone()).collect(),
        })
    }

    /// Forgets translations of some ranges. Devices that are astray are moved first: the mover may know
    /// of nothing to flush, and they reach something.
    pub(super) fn flush(&mut self, ranges: &[FlushRange]) {
        if self.astray {
            self.settle();
        }
        let flushed = self.mover.flush(ranges);
        self.flushed(flushed);
    }

    /// Forgets all translations, as [`flush`](Self::flush).
    pub(super) fn flush_all(&mut self) {
        if self.astray {
            self.settle();
        }
        let flushed = self.mover.flush_all();
        self.flushed(flushed);
    }

    fn flushed(&mut self, result: Result<(), MoveError>) {
        if let Err(error) = result {
            log::error!("group {}: {error}", self.group);
            self.astray = true;
        }
    }
}

impl Member {
    fn is_blocked(&self) -> bool {
        self.wanted.translation == Translation::Blocked
    }
}

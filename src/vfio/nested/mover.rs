//! The devices of an IOMMU group whose first-stage domains are nested.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Attachable, Driver, IommufdHost};
use crate::backend::nested::{Host, NestedError, NestedUnit, ObjectId, Place};
use crate::pviommu::{FlushRange, Translation};
use crate::vfio::moves::{AttachKernel, Left, MoveError, Mover};

/// The devices of a group, which are attached and detached together.
#[derive(Debug)]
pub(in crate::vfio) struct Devices<K> {
    kernel: K,
    /// For which tables are made while no device has joined.
    first: u32,
    members: Mutex<Vec<u32>>,
}

impl<K: AttachKernel> Devices<K> {
    /// No devices yet; `first`, which is bound to the iommufd, will join.
    pub(in crate::vfio) fn new(kernel: K, first: u32) -> Self {
        Self {
            kernel,
            first,
            members: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u32>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn detach_all(&self, members: &[u32]) -> io::Result<()> {
        let mut result = Ok(());
        for member in members {
            // One that stays must not keep the others attached.
            let detached = self.kernel.detach(*member);
            result = result.and(detached);
        }
        result
    }
}

impl<K: AttachKernel> Attachable for Devices<K> {
    fn id(&self) -> u32 {
        self.lock().first().copied().unwrap_or(self.first)
    }

    /// The kernel moves a group as a whole. Should it refuse another of its devices nevertheless, all
    /// are detached.
    fn attach(&self, to: ObjectId) -> io::Result<()> {
        let members = self.lock();
        for (done, member) in members.iter().enumerate() {
            let Err(error) = self.kernel.attach(*member, to.0) else {
                continue;
            };
            if done == 0 {
                return Err(error);
            }
            return match self.detach_all(&members) {
                Ok(()) => Err(error),
                Err(stuck) => Err(io::Error::other(format!(
                    "{error}; and the devices of the group were not detached: {stuck}"
                ))),
            };
        }
        Ok(())
    }

    fn detach(&self) -> io::Result<()> {
        self.detach_all(&self.lock())
    }
}

/// A host of several devices.
pub(in crate::vfio) trait Members: Host + Send + Sync {
    /// A device joins; `at` is where the others are, `None` if they are detached.
    fn join(&self, member: u32, at: Option<ObjectId>) -> io::Result<()>;

    /// Detaches a device, which leaves next.
    fn detach(&self, member: u32) -> io::Result<()>;

    /// A device leaves, detached.
    fn leave(&self, member: u32) -> io::Result<()>;
}

impl<K: AttachKernel, D: Driver> Members for IommufdHost<Devices<K>, D> {
    fn join(&self, member: u32, at: Option<ObjectId>) -> io::Result<()> {
        let devices = self.device();
        if let Some(at) = at {
            devices.kernel.attach(member, at.0)?;
        }
        devices.lock().push(member);
        Ok(())
    }

    fn detach(&self, member: u32) -> io::Result<()> {
        self.device().kernel.detach(member)
    }

    fn leave(&self, member: u32) -> io::Result<()> {
        let devices = self.device();
        devices.lock().retain(|other| *other != member);
        devices.kernel.detach(member)
    }
}

/// Moves them.
#[derive(Debug)]
pub(in crate::vfio) struct NestedMover<H: Members> {
    unit: NestedUnit<H>,
    /// The address space of the default domain.
    identity: ObjectId,
}

impl<H: Members> NestedMover<H> {
    /// Moves the devices of `unit`, whose default domain is `identity`.
    pub(in crate::vfio) fn new(unit: NestedUnit<H>, identity: ObjectId) -> Self {
        Self { unit, identity }
    }

    fn flushed(
        &self,
        result: Result<(), NestedError>,
        blocked_before: u64,
    ) -> Result<(), MoveError> {
        let blocked = self.unit.counters().blocked;
        if result.is_ok() && blocked != blocked_before && blocked.is_power_of_two() {
            log::error!(
                "devices were blocked because the host does not flush their table ({blocked} times)"
            );
        }
        Ok(result?)
    }
}

impl From<NestedError> for MoveError {
    fn from(error: NestedError) -> Self {
        let left = match error {
            NestedError::Stuck { .. } => Left::Unknown,
            NestedError::Blocked { .. } => Left::Blocked,
            _ => Left::Unchanged,
        };
        Self {
            cause: Box::new(error),
            left,
        }
    }
}

impl<H: Members> Mover for NestedMover<H> {
    fn go(&mut self, to: Translation) -> Result<(), MoveError> {
        Ok(self.unit.attach(&to)?)
    }

    fn flush(&mut self, ranges: &[FlushRange]) -> Result<(), MoveError> {
        let blocked = self.unit.counters().blocked;
        let result = self.unit.flush(ranges);
        self.flushed(result, blocked)
    }

    fn flush_all(&mut self) -> Result<(), MoveError> {
        let blocked = self.unit.counters().blocked;
        let result = self.unit.flush_all();
        self.flushed(result, blocked)
    }

    fn join(&mut self, member: u32) -> Result<(), MoveError> {
        let at = match self.unit.place() {
            Place::Blocked => None,
            Place::Default => Some(self.identity),
            Place::Nested { object, .. } => Some(object),
        };
        let joined = self.unit.host().join(member, at);
        joined.map_err(|error| MoveError {
            cause: error.into(),
            left: Left::Unchanged,
        })
    }

    fn leave(&mut self, member: u32) {
        if let Err(error) = self.unit.host().leave(member) {
            log::warn!("device {member} of iommufd stays attached until it is closed: {error}");
        }
    }

    fn detach(&mut self, member: u32) -> Result<(), MoveError> {
        let detached = self.unit.host().detach(member);
        detached.map_err(|error| MoveError {
            cause: error.into(),
            left: Left::Unknown,
        })
    }
}

impl<H: Members> Drop for NestedMover<H> {
    fn drop(&mut self) {
        if let Err(error) = self.unit.close() {
            log::warn!("{error}; its first-stage table stays until it is closed");
        }
        for object in self.unit.objects() {
            log::warn!("table {object} of iommufd stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use crate::backend::AddressSpace;
    use crate::backend::nested::{Answer, NestedCapabilities, Operation};
    use crate::pviommu::{Attachment, Levels, PageTable};
    use crate::vfio::unit::Unit;

    /// A kernel that refuses some devices, and notes what it was asked.
    #[derive(Debug, Default)]
    struct Kernel {
        refuses: Mutex<Vec<u32>>,
        /// Neither forgets translations nor lets a device go.
        stuck: AtomicBool,
        /// Where each device is, by number.
        at: Mutex<std::collections::BTreeMap<u32, u32>>,
    }

    impl Kernel {
        fn check(&self) -> io::Result<()> {
            match self.stuck.load(Ordering::Relaxed) {
                true => Err(io::Error::from_raw_os_error(5)),
                false => Ok(()),
            }
        }

        fn at(&self) -> Vec<(u32, u32)> {
            let at = self.at.lock().unwrap();
            at.iter().map(|(member, pt)| (*member, *pt)).collect()
        }
    }

    impl AttachKernel for Arc<Kernel> {
        fn attach(&self, member: u32, pt: u32) -> io::Result<()> {
            if self.refuses.lock().unwrap().contains(&member) {
                return Err(io::Error::from_raw_os_error(22));
            }
            self.at.lock().unwrap().insert(member, pt);
            Ok(())
        }

        fn detach(&self, member: u32) -> io::Result<()> {
            self.check()?;
            self.at.lock().unwrap().remove(&member);
            Ok(())
        }

        fn identity(&self) -> u32 {
            1
        }

        fn new_space(&self) -> io::Result<(u32, Arc<dyn AddressSpace>)> {
            Err(io::Error::other("not here"))
        }

        fn destroy(&self, _pt: u32) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_group_moves_as_a_whole_or_is_nowhere() {
        let kernel = Arc::new(Kernel::default());
        let devices = Devices::new(kernel.clone(), 7);
        assert_eq!(devices.id(), 7);
        devices.lock().extend([8, 9]);
        assert_eq!(devices.id(), 8);
        devices.attach(ObjectId(3)).unwrap();
        let at = || kernel.at();
        assert_eq!(at(), [(8, 3), (9, 3)]);
        // The first is refused: nothing has changed.
        *kernel.refuses.lock().unwrap() = vec![8];
        assert!(devices.attach(ObjectId(4)).is_err());
        assert_eq!(at(), [(8, 3), (9, 3)]);
        *kernel.refuses.lock().unwrap() = vec![9];
        assert!(devices.attach(ObjectId(4)).is_err());
        assert_eq!(at(), []);
    }

    /// Makes tables for the devices of a [`Kernel`].
    #[derive(Debug)]
    struct Tables {
        devices: Devices<Arc<Kernel>>,
        next: AtomicU32,
    }

    impl Host for Tables {
        fn execute(&self, operation: &Operation) -> io::Result<Answer> {
            match operation {
                Operation::AllocateParent | Operation::AllocateNested { .. } => {
                    let next = self.next.fetch_add(1, Ordering::Relaxed);
                    return Ok(Answer::Object(ObjectId(next)));
                }
                Operation::Attach { to } => self.devices.attach(*to)?,
                Operation::Detach => self.devices.detach()?,
                Operation::Invalidate { .. } => self.devices.kernel.check()?,
                Operation::Destroy { .. } => {}
            }
            Ok(Answer::Done)
        }
    }

    impl Members for Tables {
        fn join(&self, member: u32, at: Option<ObjectId>) -> io::Result<()> {
            if let Some(at) = at {
                self.devices.kernel.attach(member, at.0)?;
            }
            self.devices.lock().push(member);
            Ok(())
        }

        fn detach(&self, member: u32) -> io::Result<()> {
            self.devices.kernel.detach(member)
        }

        fn leave(&self, member: u32) -> io::Result<()> {
            self.devices.lock().retain(|other| *other != member);
            self.devices.kernel.detach(member)
        }
    }

    /// Two devices in the default domain, 1.
    fn pair(kernel: &Arc<Kernel>) -> NestedMover<Tables> {
        let tables = Tables {
            devices: Devices::new(kernel.clone(), 8),
            next: AtomicU32::new(100),
        };
        let capabilities = NestedCapabilities {
            five_levels: false,
            gigabyte_pages: false,
            max_shift: 18,
        };
        let identity = ObjectId(1);
        let blocked = Place::Blocked;
        let unit = NestedUnit::open(tables, capabilities, identity, blocked, Levels::Four);
        let mut mover = NestedMover::new(unit.map_err(|(_, error)| error).unwrap(), identity);
        mover.join(8).unwrap();
        mover.join(9).unwrap();
        mover.go(Translation::Identity).unwrap();
        assert_eq!(kernel.at(), [(8, 1), (9, 1)]);
        mover
    }

    fn paged(root: u64) -> Translation {
        let levels = Levels::Four;
        Translation::Paged(PageTable { root, levels })
    }

    #[test]
    fn a_group_that_is_nowhere_after_a_move_is_attached_by_the_next() {
        let kernel = Arc::new(Kernel::default());
        let mut mover = pair(&kernel);
        *kernel.refuses.lock().unwrap() = vec![9];
        let error = mover.go(paged(0x1000)).unwrap_err();
        assert_eq!(kernel.at(), []);
        assert_eq!(error.left, Left::Blocked);
        kernel.refuses.lock().unwrap().clear();
        mover.go(Translation::Identity).unwrap();
        assert_eq!(kernel.at(), [(8, 1), (9, 1)]);
        // The same from a table of the guest.
        mover.go(paged(0x1000)).unwrap();
        *kernel.refuses.lock().unwrap() = vec![9];
        assert!(mover.go(paged(0x2000)).is_err());
        kernel.refuses.lock().unwrap().clear();
        mover.go(paged(0x1000)).unwrap();
        assert_eq!(kernel.at().len(), 2);
    }

    #[test]
    fn devices_that_were_neither_flushed_nor_blocked_are_so_by_the_next_call() {
        for all in [false, true] {
            let kernel = Arc::new(Kernel::default());
            let mut unit = Unit::new(5, {
                let mut mover = pair(&kernel);
                mover.go(Translation::Blocked).unwrap();
                mover.leave(8);
                mover.leave(9);
                mover
            });
            let to = Attachment {
                domain: 5,
                translation: paged(0x1000),
                ..Attachment::DEFAULT
            };
            unit.join(8, "a").unwrap();
            unit.attach(8, &to).unwrap();
            let stale = kernel.at();
            kernel.stuck.store(true, Ordering::Relaxed);
            match all {
                true => unit.flush_all(),
                false => unit.flush(&[FlushRange { first: 0, shift: 0 }]),
            }
            kernel.stuck.store(false, Ordering::Relaxed);
            // A flush of nothing would leave them as they are.
            unit.flush(&[]);
            assert_ne!(
                kernel.at(),
                stale,
                "another table, without cached translations"
            );
            assert_eq!(kernel.at().len(), 1);
        }
    }
}

//! The kernel of the tests.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use vm_memory::GuestAddress;

use crate::backend::{
    AddressSpace, PagedBackend, PagedDomain, Permissions, SpaceError, SpaceLimits,
};
use crate::mem::{GuestRam, PAGE_SIZE, RamMap, RamPiece};
use crate::pviommu::{BackendError, FlushRange, Levels, PageTable};
use crate::vfio::moves::AttachKernel;
use crate::vfio::space::{Space, SpaceKernel};

/// What devices reach: by page of I/O virtual addresses, the guest physical address and the
/// permissions.
pub(super) type Reach = BTreeMap<u64, (u64, Permissions)>;

/// Two regions that adjoin, and one apart.
pub(super) fn ram() -> GuestRam {
    let range = |start, pages| (GuestAddress(start), pages * PAGE_SIZE as usize);
    let ranges = [range(0, 2), range(0x2000, 1), range(0x10000, 2)];
    GuestRam::new(&RamMap::from_ranges(&ranges).expect("test RAM"))
}

/// All of it.
pub(super) fn all_ram() -> Reach {
    let pages = [0, 0x1000, 0x2000, 0x10000, 0x11000];
    let all = Permissions::READ | Permissions::WRITE;
    pages.map(|page| (page, (page, all))).into()
}

pub(super) fn limits() -> SpaceLimits {
    SpaceLimits {
        ranges: vec![0..=0xf_ffff, 0x20_0000..=0x2f_ffff],
        granule: PAGE_SIZE,
        max_mappings: Some(8),
    }
}

/// Which interface an address space is of: they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flavour {
    Type1,
    Iommufd,
}

#[derive(Debug)]
struct Mapping {
    gpa: u64,
    len: u64,
    access: Permissions,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// Mappings by address space and first address.
    spaces: BTreeMap<u32, BTreeMap<u64, Mapping>>,
    next_space: u32,
    /// To what the group is attached.
    attached_to: Option<u32>,
    attached: BTreeSet<u32>,
    /// Calls until one fails, and how many fail then.
    healthy: Option<usize>,
    failing: usize,
    /// Calls so far.
    pub(super) calls: usize,
    /// What the devices reached after each call.
    pub(super) history: Vec<Reach>,
    /// Domains that follow a table.
    pub(super) domains: usize,
    pub(super) flushes: usize,
}

impl State {
    fn reach(&self) -> Reach {
        let mut reach = Reach::new();
        let space = self.attached_to.and_then(|pt| self.spaces.get(&pt));
        for (iova, mapping) in space.into_iter().flatten() {
            for offset in (0..mapping.len).step_by(PAGE_SIZE as usize) {
                reach.insert(iova + offset, (mapping.gpa + offset, mapping.access));
            }
        }
        reach
    }

    /// A call: fails if it is its turn.
    fn call(&mut self) -> io::Result<()> {
        self.calls += 1;
        match &mut self.healthy {
            Some(0) if self.failing > 0 => {
                self.failing -= 1;
                Err(errno(libc::EIO))
            }
            Some(0) | None => Ok(()),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

pub(super) fn errno(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}

/// The kernel.
#[derive(Debug, Clone, Default)]
pub(super) struct Fake(Arc<Mutex<State>>);

impl Fake {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(super) fn reach(&self) -> Reach {
        self.state().reach()
    }

    /// Lets `healthy` calls pass and the `failing` after those fail.
    pub(super) fn break_after(&self, healthy: usize, failing: usize) {
        let mut state = self.state();
        state.healthy = Some(healthy);
        state.failing = failing;
    }

    /// All calls succeed again.
    pub(super) fn repair(&self) {
        self.state().healthy = None;
    }

    /// The file of a device is closed, which never fails.
    pub(super) fn close(&self, member: u32) {
        let mut state = self.state();
        if state.attached.remove(&member) && state.attached.is_empty() {
            state.attached_to = None;
        }
    }

    /// Number of address spaces.
    pub(super) fn spaces(&self) -> usize {
        self.state().spaces.len()
    }

    /// Mappings of an address space: first address and length.
    pub(super) fn mappings(&self, space: u32) -> Vec<(u64, u64)> {
        let state = self.state();
        let mappings = state.spaces[&space].iter();
        mappings
            .map(|(iova, mapping)| (*iova, mapping.len))
            .collect()
    }

    /// A new address space with books.
    pub(super) fn space(&self, flavour: Flavour) -> (u32, Space<FakeSpace>) {
        let mut state = self.state();
        let id = state.next_space;
        state.next_space += 1;
        state.spaces.insert(id, BTreeMap::new());
        let kernel = FakeSpace {
            fake: self.clone(),
            id,
            flavour,
        };
        (id, Space::new(ram(), limits(), kernel))
    }

    /// A container: its devices are always attached.
    pub(super) fn container(&self) -> Arc<Space<FakeSpace>> {
        let (id, space) = self.space(Flavour::Type1);
        self.state().attached_to = Some(id);
        Arc::new(space)
    }

    /// An iommufd with an address space of all RAM.
    pub(super) fn iommufd(&self) -> FakeIommufd {
        let (id, space) = self.space(Flavour::Iommufd);
        space.map_all().unwrap();
        FakeIommufd {
            fake: self.clone(),
            identity: id,
            space,
        }
    }
}

/// An address space as the kernel sees it.
#[derive(Debug)]
pub(super) struct FakeSpace {
    fake: Fake,
    id: u32,
    flavour: Flavour,
}

impl SpaceKernel for FakeSpace {
    fn map(&self, iova: u64, ram: &RamPiece, access: Permissions) -> io::Result<()> {
        let mut state = self.fake.state();
        state.call()?;
        let (gpa, len) = (ram.gpa(), ram.len());
        if access.is_empty()
            || !(iova | len).is_multiple_of(PAGE_SIZE)
            || !limits().allow(iova, len)
        {
            return Err(errno(libc::EINVAL));
        }
        let space = state.spaces.get_mut(&self.id).ok_or(errno(libc::ENOENT))?;
        let mut others = space.iter();
        if others.any(|(other, mapping)| *other < iova + len && iova < other + mapping.len) {
            return Err(errno(libc::EEXIST));
        }
        if self.flavour == Flavour::Type1 && space.len() >= limits().max_mappings.unwrap() {
            return Err(errno(libc::ENOSPC));
        }
        space.insert(iova, Mapping { gpa, len, access });
        let reach = state.reach();
        state.history.push(reach);
        Ok(())
    }

    fn unmap(&self, range: Option<(u64, u64)>) -> io::Result<u64> {
        let mut state = self.fake.state();
        state.call()?;
        let (start, end) = range.map_or((0, u64::MAX), |(iova, len)| (iova, iova + len));
        let space = state.spaces.get_mut(&self.id).ok_or(errno(libc::ENOENT))?;
        let touched = |(iova, mapping): (&u64, &Mapping)| {
            (*iova < end && start < iova + mapping.len).then_some((*iova, iova + mapping.len))
        };
        let touched: Vec<_> = space.iter().filter_map(touched).collect();
        let cut = |(first, last): &(u64, u64)| *first < start || *last > end;
        let mut gone = 0;
        for mapping in &touched {
            match self.flavour {
                // Looked at before anything is done.
                Flavour::Type1 if touched.iter().any(cut) => return Err(errno(libc::EINVAL)),
                // Found out on the way.
                Flavour::Iommufd if cut(mapping) => return Err(errno(libc::ENOENT)),
                _ => {}
            }
            space.remove(&mapping.0);
            gone += mapping.1 - mapping.0;
        }
        if gone == 0 && self.flavour == Flavour::Iommufd && range.is_some() {
            return Err(errno(libc::ENOENT));
        }
        let reach = state.reach();
        state.history.push(reach);
        Ok(gone)
    }
}

/// An iommufd and the devices of one group.
#[derive(Debug)]
pub(super) struct FakeIommufd {
    fake: Fake,
    identity: u32,
    space: Space<FakeSpace>,
}

impl AttachKernel for FakeIommufd {
    fn attach(&self, member: u32, pt: u32) -> io::Result<()> {
        let mut state = self.fake.state();
        state.call()?;
        if !state.spaces.contains_key(&pt) {
            return Err(errno(libc::ENOENT));
        }
        let moves = state.attached.contains(&member);
        if !moves && state.attached_to.is_some_and(|at| at != pt) {
            return Err(errno(libc::EINVAL));
        }
        state.attached.insert(member);
        state.attached_to = Some(pt);
        let reach = state.reach();
        state.history.push(reach);
        Ok(())
    }

    fn detach(&self, member: u32) -> io::Result<()> {
        let mut state = self.fake.state();
        state.call()?;
        state.attached.remove(&member);
        if state.attached.is_empty() {
            state.attached_to = None;
        }
        let reach = state.reach();
        state.history.push(reach);
        Ok(())
    }

    fn identity(&self) -> u32 {
        self.identity
    }

    fn new_space(&self) -> io::Result<(u32, Arc<dyn AddressSpace>)> {
        self.fake.state().call()?;
        let (id, space) = self.fake.space(Flavour::Iommufd);
        Ok((id, Arc::new(space)))
    }

    fn destroy(&self, pt: u32) -> io::Result<()> {
        let mut state = self.fake.state();
        state.call()?;
        if state.attached_to == Some(pt) || pt == self.identity {
            return Err(errno(libc::EBUSY));
        }
        state.spaces.remove(&pt).ok_or(errno(libc::ENOENT))?;
        Ok(())
    }
}

impl Drop for FakeIommufd {
    fn drop(&mut self) {
        let _ = self.space.clear();
    }
}

/// The table whose number is `n`.
pub(super) fn table(n: u64) -> PageTable {
    PageTable {
        root: n * PAGE_SIZE,
        levels: Levels::Four,
    }
}

/// What devices reach by it: a page that they may write, and two that they may read.
pub(super) fn reach_by(table: PageTable) -> Reach {
    let write = Permissions::READ | Permissions::WRITE;
    let first = 0x40_000 + table.root;
    [
        (first, (0x1000, write)),
        (0x20_0000 + table.root * 2, (0x10000, Permissions::READ)),
        (0x20_1000 + table.root * 2, (0x11000, Permissions::READ)),
    ]
    .into()
}

/// Follows tables by mapping what [`reach_by`] says, piece by piece.
#[derive(Debug)]
pub(super) struct Paging(pub(super) Fake);

impl PagedBackend for Paging {
    fn follow(
        &self,
        table: PageTable,
        space: Arc<dyn AddressSpace>,
    ) -> Result<Arc<dyn PagedDomain>, BackendError> {
        let map = |iova, gpa, len, access| {
            let mapped: Result<(), SpaceError> = space.map(iova, gpa, len, access);
            mapped.map_err(|error| BackendError(Box::new(error)))
        };
        let write = Permissions::READ | Permissions::WRITE;
        map(0x40_000 + table.root, 0x1000, PAGE_SIZE, write)?;
        let second = 0x20_0000 + table.root * 2;
        map(second, 0x10000, 2 * PAGE_SIZE, Permissions::READ)?;
        self.0.state().domains += 1;
        Ok(Arc::new(Domain(self.0.clone())))
    }
}

#[derive(Debug)]
struct Domain(Fake);

impl PagedDomain for Domain {
    fn flush(&self, _ranges: &[FlushRange]) {
        self.0.state().flushes += 1;
    }

    fn flush_all(&self) {
        self.0.state().flushes += 1;
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.0.state().domains -= 1;
    }
}

//! The IOMMU groups of the devices that a VM has opened, and the kernel's side of their address
//! spaces.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::carry::{Carrier, Carry};
use super::check::Interface;
use super::container::Container;
use super::iommufd::{self, IommuFd};
use super::moves::{AttachKernel, AttachMover, Mover, SpaceMover};
use super::nested::{self, CannotNest, Devices, IommufdHost, NestedMover, Vtd};
use super::space::{Space, SpaceKernel};
use super::unit::Unit;
use crate::backend::nested::{NestedCapabilities, NestedError, NestedUnit, ObjectId, Place};
use crate::backend::{AddressSpace, Permissions, SpaceError, SpaceLimits};
use crate::mem::{GuestRam, RamPiece};
use crate::pviommu::{IommuConfig, Levels};

/// Bytes of the longest answer to IOMMU_GET_HW_INFO that is looked at: VT-d's has 24.
const HW_INFO_LEN: usize = 64;

/// How many times guest RAM is counted as locked, as long as it lives.
pub(super) type LockedRam = Arc<u64>;

/// A unit of either interface.
#[derive(Debug)]
pub(super) struct AnyUnit {
    pub(super) unit: Unit<Box<dyn Mover>>,
    /// What carries its first-stage domains.
    pub(super) carrier: Carrier,
    pub(super) _locked: LockedRam,
}

impl SpaceKernel for Container {
    fn map(&self, iova: u64, ram: &RamPiece, access: Permissions) -> io::Result<()> {
        self.map(iova, ram, access)
    }

    fn unmap(&self, range: Option<(u64, u64)>) -> io::Result<u64> {
        self.unmap(range)
    }
}

/// An address space of iommufd. Who made it destroys it.
#[derive(Debug)]
pub(super) struct Ioas {
    fd: Arc<IommuFd>,
    id: u32,
}

impl SpaceKernel for Ioas {
    fn map(&self, iova: u64, ram: &RamPiece, access: Permissions) -> io::Result<()> {
        self.fd.map(self.id, iova, ram, access)
    }

    fn unmap(&self, range: Option<(u64, u64)>) -> io::Result<u64> {
        self.fd.unmap(self.id, range)
    }
}

/// The iommufd of a VM, with the address space of all guest RAM that its devices share.
#[derive(Debug)]
pub(super) struct VmIommufd {
    fd: Arc<IommuFd>,
    ram: GuestRam,
    identity: Space<Ioas>,
    /// Guest RAM is mapped in it.
    filled: Mutex<bool>,
    _locked: LockedRam,
}

impl VmIommufd {
    pub(super) fn new(fd: IommuFd, ram: GuestRam, locked: LockedRam) -> io::Result<Arc<Self>> {
        let fd = Arc::new(fd);
        let id = fd.alloc_ioas()?;
        let limits = fd.limits(id)?;
        let ioas = Ioas { fd: fd.clone(), id };
        Ok(Arc::new(Self {
            fd,
            identity: Space::new(ram.clone(), limits, ioas),
            ram,
            filled: Mutex::default(),
            _locked: locked,
        }))
    }

    pub(super) fn fd(&self) -> &IommuFd {
        &self.fd
    }

    /// Maps guest RAM, once.
    fn fill(&self) -> Result<(), SpaceError> {
        let mut filled = lock(&self.filled);
        if !*filled {
            self.identity.map_all()?;
            *filled = true;
        }
        Ok(())
    }
}

/// Devices of a group that are bound to an iommufd.
#[derive(Debug, Clone)]
struct Attacher {
    vm: Arc<VmIommufd>,
    devices: Arc<Mutex<BTreeMap<u32, File>>>,
    limits: SpaceLimits,
}

impl Attacher {
    fn with<T>(&self, member: u32, f: impl FnOnce(&File) -> io::Result<T>) -> io::Result<T> {
        let devices = lock(&self.devices);
        let device = devices.get(&member);
        f(device.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?)
    }
}

impl AttachKernel for Attacher {
    fn attach(&self, member: u32, pt: u32) -> io::Result<()> {
        self.with(member, |device| iommufd::attach(device.as_fd(), pt))
    }

    fn detach(&self, member: u32) -> io::Result<()> {
        self.with(member, |device| iommufd::detach(device.as_fd()))
    }

    fn identity(&self) -> u32 {
        self.vm.identity.kernel().id
    }

    fn new_space(&self) -> io::Result<(u32, Arc<dyn AddressSpace>)> {
        let fd = self.vm.fd.clone();
        let id = fd.alloc_ioas()?;
        let ioas = Ioas { fd, id };
        let space = Space::new(self.vm.ram.clone(), self.limits.clone(), ioas);
        Ok((id, Arc::new(space)))
    }

    fn destroy(&self, pt: u32) -> io::Result<()> {
        self.vm.fd.destroy(pt)
    }
}

/// The kernel's side of a group.
#[derive(Debug)]
enum Kernel {
    Type1(Arc<Space<Container>>),
    Iommufd {
        vm: Arc<VmIommufd>,
        devices: Arc<Mutex<BTreeMap<u32, File>>>,
    },
}

/// A group of which the VM has opened a device.
#[derive(Debug)]
pub(super) struct Group {
    id: u32,
    kernel: Kernel,
    /// Made by the first device whose DMA is set up, gone with the last.
    unit: Mutex<Option<AnyUnit>>,
}

impl Group {
    /// The group of a container.
    pub(super) fn of_container(id: u32, container: Container, ram: GuestRam) -> io::Result<Self> {
        let limits = container.limits()?;
        Ok(Self {
            id,
            kernel: Kernel::Type1(Arc::new(Space::new(ram, limits, container))),
            unit: Mutex::default(),
        })
    }

    /// A group whose devices are bound to an iommufd.
    pub(super) fn of_iommufd(id: u32, vm: Arc<VmIommufd>) -> Self {
        let devices = Arc::default();
        Self {
            id,
            kernel: Kernel::Iommufd { vm, devices },
            unit: Mutex::default(),
        }
    }

    pub(super) fn id(&self) -> u32 {
        self.id
    }

    pub(super) fn interface(&self) -> Interface {
        match self.kernel {
            Kernel::Type1(_) => Interface::Type1,
            Kernel::Iommufd { .. } => Interface::Iommufd,
        }
    }

    /// The container, if that is its interface.
    pub(super) fn container(&self) -> Option<&Container> {
        match &self.kernel {
            Kernel::Type1(space) => Some(space.kernel()),
            Kernel::Iommufd { .. } => None,
        }
    }

    /// The unit. Flushes and moves of its devices take turns.
    pub(super) fn unit(&self) -> MutexGuard<'_, Option<AnyUnit>> {
        lock(&self.unit)
    }

    /// From now on a device may be attached.
    pub(super) fn admit(&self, member: u32, device: &File) -> io::Result<()> {
        if let Kernel::Iommufd { devices, .. } = &self.kernel {
            lock(devices).insert(member, device.try_clone()?);
        }
        Ok(())
    }

    /// What devices of the group can have mapped; none of them is attached to anything yet.
    pub(super) fn limits(&self, device: &File) -> io::Result<SpaceLimits> {
        let vm = match &self.kernel {
            Kernel::Type1(space) => return Ok(space.limits().clone()),
            Kernel::Iommufd { vm, .. } => vm,
        };
        // The kernel tells only for an address space with a device in it.
        let probe = vm.fd.alloc_ioas()?;
        let limits = iommufd::attach(device.as_fd(), probe).and_then(|()| {
            let limits = vm.fd.limits(probe);
            iommufd::detach(device.as_fd()).and(limits)
        });
        vm.fd.destroy(probe).and(limits)
    }

    /// What the IOMMU of a device of the group can do with first-stage tables.
    pub(super) fn nested_capabilities(
        &self,
        member: u32,
    ) -> Result<NestedCapabilities, CannotNest> {
        let Kernel::Iommufd { vm, .. } = &self.kernel else {
            return Err(CannotNest::NoIommufd);
        };
        let mut data = [0; HW_INFO_LEN];
        let info = vm.fd.hw_info(member, &mut data);
        let info = info.map_err(|error| CannotNest::Refused {
            what: "tell what the IOMMU can do",
            error: error.to_string(),
        })?;
        let len = data.len().min(info.len as usize);
        nested::capabilities(info.kind, &data[..len])
    }

    /// A mover for the group, blocked, and what carries its first-stage domains. `member` joins next.
    pub(super) fn mover(
        &self,
        member: u32,
        limits: SpaceLimits,
        carry: &Carry,
        nestable: Result<NestedCapabilities, CannotNest>,
    ) -> Result<(Box<dyn Mover>, Carrier), SpaceError> {
        let shadow = carry.shadow.clone();
        let otherwise = |why| match shadow {
            Some(_) => Carrier::Shadow(why),
            None => Carrier::Nothing(why),
        };
        match &self.kernel {
            Kernel::Type1(space) => {
                space.clear()?;
                let mover = SpaceMover::new(space.clone(), carry.shadow.clone());
                let why = nestable.err().unwrap_or(CannotNest::NoIommufd);
                Ok((Box::new(mover), otherwise(why)))
            }
            Kernel::Iommufd { vm, devices } => {
                vm.fill()?;
                let attacher = Attacher {
                    vm: vm.clone(),
                    devices: devices.clone(),
                    limits,
                };
                let nested = nestable
                    .and_then(|found| nest(vm, attacher.clone(), member, found, &carry.guest));
                Ok(match nested {
                    Ok(mover) => (mover, Carrier::Nested),
                    Err(why) => {
                        let mover = AttachMover::new(attacher, carry.shadow.clone());
                        (Box::new(mover), otherwise(why))
                    }
                })
            }
        }
    }

    /// A device is not to be attached any more.
    pub(super) fn forget(&self, member: u32) {
        if let Kernel::Iommufd { devices, .. } = &self.kernel {
            lock(devices).remove(&member);
        }
    }
}

/// A mover that nests tables, if the kernel makes any.
fn nest(
    vm: &VmIommufd,
    attacher: Attacher,
    member: u32,
    capabilities: NestedCapabilities,
    guest: &IommuConfig,
) -> Result<Box<dyn Mover>, CannotNest> {
    let identity = ObjectId(attacher.identity());
    let devices = Devices::new(attacher, member);
    let host = IommufdHost::new(vm.fd.clone(), devices, Vtd, identity);
    let levels = match guest.five_levels {
        true => Levels::Five,
        false => Levels::Four,
    };
    match NestedUnit::open(host, capabilities, identity, Place::Blocked, levels) {
        Ok(unit) => Ok(Box::new(NestedMover::new(unit, identity))),
        Err((_, NestedError::Unavailable { what, cause, left })) => {
            for object in left {
                log::warn!("table {object} of iommufd stays");
            }
            let error = cause.to_string();
            Err(CannotNest::Refused { what, error })
        }
        Err((_, error)) => Err(CannotNest::Refused {
            what: "nest tables",
            error: error.to_string(),
        }),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

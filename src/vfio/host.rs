//! The devices of the host that a VM has.
#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::check::{self, HostFacts, Interface};
use super::container::Container;
use super::device::VfioDevice;
use super::error::VfioError;
use super::group::{Group, LockedRam, VmIommufd};
use super::iommufd::IommuFd;
use super::known::KnownFile;
use crate::backend::SpaceLimits;
use crate::mem::GuestRam;
use crate::vmm::HostFiles;

/// What a VM has of the host: its iommufd, its groups and devices. One for each VM.
#[derive(Debug)]
pub struct VfioHost {
    root: PathBuf,
    ram: GuestRam,
    files: Option<Arc<dyn HostFiles>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    iommufd: Weak<VmIommufd>,
    groups: Vec<Weak<Group>>,
    devices: Vec<Weak<VfioDevice>>,
    /// Names members of units of containers.
    members: u32,
    /// Who locks guest RAM, and how many times.
    locked: Vec<Weak<u64>>,
}

impl VfioHost {
    /// For a VM with this RAM, whose KVM does not know what devices it has: it takes their DMA for
    /// coherent with the CPU's caches, and pays no heed to what a guest does because it is not.
    pub fn new(ram: GuestRam) -> Arc<Self> {
        Self::build(ram, None)
    }

    /// For a VM with this RAM. `files` is told of each file by which it has a device.
    pub fn with_files(ram: GuestRam, files: Arc<dyn HostFiles>) -> Arc<Self> {
        Self::build(ram, Some(files))
    }

    fn build(ram: GuestRam, files: Option<Arc<dyn HostFiles>>) -> Arc<Self> {
        Arc::new(Self {
            root: "/".into(),
            ram,
            files,
            state: Mutex::default(),
        })
    }

    /// Opens a device.
    ///
    /// # Errors
    ///
    /// [`VfioError`], saying what to do.
    pub fn open(&self, address: &str, wanted: Interface) -> Result<Arc<VfioDevice>, VfioError> {
        let mut state = self.lock();
        state.devices.retain(|device| device.strong_count() > 0);
        let mut devices = state.devices.iter().filter_map(Weak::upgrade);
        if devices.any(|device| device.address() == address) {
            return Err(VfioError::Twice {
                address: address.into(),
            });
        }
        let facts = check::examine(&self.root, address, wanted)?;
        self.check_reserved(&facts)?;
        let device = match facts.interface {
            Interface::Iommufd => self.open_by_iommufd(&mut state, &facts)?,
            Interface::Type1 | Interface::Auto => self.open_by_group(&mut state, &facts)?,
        };
        let device = Arc::new(device);
        state.devices.push(Arc::downgrade(&device));
        Ok(device)
    }

    fn open_by_iommufd(
        &self,
        state: &mut State,
        facts: &HostFacts,
    ) -> Result<VfioDevice, VfioError> {
        let address = &*facts.device.address;
        let vm = match state.iommufd.upgrade() {
            Some(vm) => vm,
            None => {
                let locked = self.reserve(state, 1)?;
                let fd = IommuFd::open(&self.root, address)?;
                let vm = VmIommufd::new(fd, self.ram.clone(), locked);
                vm.map_err(|error| failed(address, "IOMMU_IOAS_ALLOC", error))?
            }
        };
        let name = facts.device.cdev.as_deref().unwrap_or_default();
        let files = self.files.as_ref();
        let (file, member) = vm.fd().open_device(&self.root, address, name, files)?;
        state.iommufd = Arc::downgrade(&vm);
        let group = self.group(state, facts, || Ok(Group::of_iommufd(facts.group.id, vm)))?;
        describe(address, group, member, file)
    }

    fn open_by_group(&self, state: &mut State, facts: &HostFacts) -> Result<VfioDevice, VfioError> {
        let address = &*facts.device.address;
        let id = facts.group.id;
        let group = self.group(state, facts, || {
            let container = Container::open(&self.root, address, id, self.files.as_ref())?;
            let group = Group::of_container(id, container, self.ram.clone());
            group.map_err(|error| failed(address, "VFIO_IOMMU_GET_INFO", error))
        })?;
        let Some(container) = group.container() else {
            // A device of it is bound to an iommufd, so the group cannot be used.
            return Err(VfioError::InUse {
                address: address.into(),
                node: Path::new("/").join(super::node::group(id)),
            });
        };
        let file = container.open_device(address)?;
        state.members += 1;
        describe(address, group.clone(), state.members, file)
    }

    /// The group of a device: the one that the VM has already, or a new one.
    fn group(
        &self,
        state: &mut State,
        facts: &HostFacts,
        new: impl FnOnce() -> Result<Group, VfioError>,
    ) -> Result<Arc<Group>, VfioError> {
        state.groups.retain(|group| group.strong_count() > 0);
        let mut known = state.groups.iter().filter_map(Weak::upgrade);
        if let Some(group) = known.find(|group| group.id() == facts.group.id) {
            return Ok(group);
        }
        let group = Arc::new(new()?);
        state.groups.push(Arc::downgrade(&group));
        Ok(group)
    }

    /// Checks that no guest RAM is where the devices of a group cannot have any.
    fn check_reserved(&self, facts: &HostFacts) -> Result<(), VfioError> {
        let pieces = self.ram.pin().all_pieces();
        for range in &facts.group.reserved {
            let overlaps = |piece: &&crate::mem::RamPiece| {
                piece.gpa() <= *range.end() && *range.start() < piece.gpa() + piece.len()
            };
            if let Some(piece) = pieces.iter().find(overlaps) {
                return Err(VfioError::Unreachable {
                    address: facts.device.address.clone(),
                    start: piece.gpa(),
                    end: piece.gpa() + piece.len(),
                });
            }
        }
        Ok(())
    }

    /// Checks that all guest RAM can be mapped.
    pub(super) fn check_reach(&self, address: &str, limits: &SpaceLimits) -> Result<(), VfioError> {
        let pieces = self.ram.pin().all_pieces();
        let beyond = pieces
            .iter()
            .find(|piece| !limits.allow(piece.gpa(), piece.len()));
        match beyond {
            None => Ok(()),
            Some(piece) => Err(VfioError::Unreachable {
                address: address.into(),
                start: piece.gpa(),
                end: piece.gpa() + piece.len(),
            }),
        }
    }

    /// Checks that guest RAM may be locked `copies` times more, and counts it as long as the result
    /// lives.
    pub(super) fn lock_ram(&self, copies: u64) -> Result<LockedRam, VfioError> {
        self.reserve(&mut self.lock(), copies)
    }

    fn reserve(&self, state: &mut State, copies: u64) -> Result<LockedRam, VfioError> {
        state.locked.retain(|locked| locked.strong_count() > 0);
        let locked = state.locked.iter().filter_map(Weak::upgrade);
        let locked: u64 = locked.map(|copies| *copies).sum();
        let ram = self.ram.pin().all_pieces();
        let ram = ram.iter().map(|piece| piece.len()).sum();
        check::check_memlock(&self.root, ram, locked + copies)?;
        let copies = Arc::new(copies);
        state.locked.push(Arc::downgrade(&copies));
        Ok(copies)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed(address: &str, what: &'static str, error: io::Error) -> VfioError {
    VfioError::Host {
        address: address.into(),
        what,
        error,
    }
}

fn describe(
    address: &str,
    group: Arc<Group>,
    member: u32,
    file: KnownFile,
) -> Result<VfioDevice, VfioError> {
    let device = VfioDevice::new(address, group, member, file);
    device.map_err(|error| failed(address, "VFIO_DEVICE_GET_INFO", error))
}

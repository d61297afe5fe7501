//! VFIO's newer interface: devices by their own nodes, bound to an iommufd.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;

use super::error::VfioError;
use super::ioctl::{self, HwInfo};
use super::known::{KnownFile, TELL};
use super::nested::InvalidationData;
use super::node;
use crate::backend::{Permissions, SpaceLimits};
use crate::mem::{PAGE_SIZE, RamPiece};
use crate::vmm::HostFiles;

/// An open iommufd: objects by number, all of which go when it is dropped and no device is bound to it
/// any more.
#[derive(Debug)]
pub struct IommuFd {
    file: File,
}

impl IommuFd {
    /// An iommufd that is open already.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    /// Opens `/dev/iommu` for the device at `address`.
    pub(super) fn open(root: &Path, address: &str) -> Result<Self, VfioError> {
        let file = node::open(root, address, node::IOMMUFD)?;
        Ok(Self { file })
    }

    /// Opens the device at `address` by its node `/dev/vfio/devices/NAME`, tells `files` of it, and binds
    /// it. Its file is ready for use, its DMA is blocked.
    pub(super) fn open_device(
        &self,
        root: &Path,
        address: &str,
        name: &str,
        files: Option<&Arc<dyn HostFiles>>,
    ) -> Result<(KnownFile, u32), VfioError> {
        let node = node::device(name);
        let file = node::open(root, address, &node)?;
        let host = |what| {
            move |error| VfioError::Host {
                address: address.into(),
                what,
                error,
            }
        };
        // Binding opens the device for the VM that its file belongs to then.
        let file = KnownFile::tell(file, files).map_err(host(TELL))?;
        match ioctl::bind_iommufd(file.as_fd(), self.file.as_fd()) {
            Ok(id) => Ok((file, id)),
            Err(error) => Err(match error.raw_os_error() {
                Some(libc::EBUSY | libc::EINVAL) => VfioError::InUse {
                    address: address.into(),
                    node: Path::new("/").join(node),
                },
                Some(libc::EPERM) => VfioError::NoRemapping {
                    address: address.into(),
                    module: "iommufd",
                    parameter: "allow_unsafe_interrupts",
                },
                _ => host("VFIO_DEVICE_BIND_IOMMUFD")(error),
            }),
        }
    }

    /// Makes an empty address space and returns its number.
    ///
    /// # Errors
    ///
    /// What the kernel says, as for all calls here.
    pub fn alloc_ioas(&self) -> io::Result<u32> {
        let mut alloc = Default::default();
        ioctl::ioas_alloc(self.file.as_fd(), &mut alloc)?;
        Ok(alloc.out_ioas_id)
    }

    /// What can be mapped in an address space: for one without devices, everything.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn limits(&self, ioas: u32) -> io::Result<SpaceLimits> {
        let (ranges, alignment) = ioctl::ioas_ranges(self.file.as_fd(), ioas)?;
        Ok(SpaceLimits {
            ranges,
            granule: alignment.max(PAGE_SIZE),
            max_mappings: None,
        })
    }

    pub(super) fn map(
        &self,
        ioas: u32,
        iova: u64,
        ram: &RamPiece,
        access: Permissions,
    ) -> io::Result<()> {
        ioctl::ioas_map(self.file.as_fd(), ioas, iova, ram, access)
    }

    /// Unmaps the mappings in a range, or all, and returns their bytes.
    pub(super) fn unmap(&self, ioas: u32, range: Option<(u64, u64)>) -> io::Result<u64> {
        let (iova, length) = range.unwrap_or((0, u64::MAX));
        let mut unmap = iommufd_bindings::iommu_ioas_unmap {
            ioas_id: ioas,
            iova,
            length,
            ..Default::default()
        };
        ioctl::ioas_unmap(self.file.as_fd(), &mut unmap)?;
        Ok(unmap.length)
    }

    /// Makes a page table object for a bound device below `parent`, which is an address space or, for
    /// a nested one, a page table object. `data` is what `data_type` (`IOMMU_HWPT_DATA_*`) takes.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn alloc_hwpt(
        &self,
        device: u32,
        parent: u32,
        flags: u32,
        data_type: u32,
        data: &[u8],
    ) -> io::Result<u32> {
        ioctl::hwpt_alloc(self.file.as_fd(), device, parent, flags, data_type, data)
    }

    /// Asks about the IOMMU of a bound device. `data` takes what is special to its type.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn hw_info(&self, device: u32, data: &mut [u8]) -> io::Result<HwInfo> {
        ioctl::hw_info(self.file.as_fd(), device, data)
    }

    /// Has the kernel forget translations of a nested page table object, in one call. Yields how many
    /// entries it has done, whether it has done all of them or failed at the next.
    pub fn invalidate(&self, hwpt: u32, entries: &InvalidationData) -> (u32, io::Result<()>) {
        ioctl::hwpt_invalidate(self.file.as_fd(), hwpt, entries)
    }

    /// Destroys an object.
    ///
    /// # Errors
    ///
    /// What the kernel says: `EBUSY` while a device is attached to it or another object needs it.
    pub fn destroy(&self, id: u32) -> io::Result<()> {
        let mut destroy = iommufd_bindings::iommu_destroy {
            id,
            ..Default::default()
        };
        ioctl::destroy(self.file.as_fd(), &mut destroy)
    }
}

impl AsFd for IommuFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Attaches a bound device to an address space or page table object; if it is attached already, it is
/// moved there in one call. VT-d's driver blocks its DMA meanwhile (`intel_iommu_attach_device`).
pub(super) fn attach(device: BorrowedFd<'_>, pt: u32) -> io::Result<()> {
    let mut attach = vfio::vfio_device_attach_iommufd_pt {
        pt_id: pt,
        ..Default::default()
    };
    ioctl::attach(device, &mut attach)
}

/// Detaches a bound device. Its DMA is blocked, unless another device of its group is attached.
pub(super) fn detach(device: BorrowedFd<'_>) -> io::Result<()> {
    ioctl::detach(device, &mut Default::default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfio::known::tests::{List, Told};

    #[test]
    fn a_vmm_hears_of_a_device_before_it_is_bound_and_of_its_end() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("dev/vfio/devices");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("vfio0"), "").unwrap();
        let list = Arc::new(List::default());
        let files: Arc<dyn HostFiles> = list.clone();
        let fd = IommuFd::new(tempfile::tempfile().unwrap());
        // The file is none of VFIO's, so that it cannot be bound.
        let error = fd.open_device(root.path(), "0000:00:05.0", "vfio0", Some(&files));
        assert!(error.unwrap_err().to_string().contains("BIND_IOMMUFD"));
        let told = list.told();
        let [Told::Added(added), Told::Removed(removed)] = told[..] else {
            panic!("{told:?}");
        };
        assert_eq!(added, removed);
    }
}

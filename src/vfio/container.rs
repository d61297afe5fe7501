//! VFIO's older interface: a group of devices in a container, with an IOMMU of type 1.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;

use super::error::VfioError;
use super::info::Type1Info;
use super::ioctl;
use super::known::{KnownFile, TELL};
use super::node;
use crate::backend::{Permissions, SpaceLimits};
use crate::mem::{PAGE_SIZE, RamPiece};
use crate::vmm::HostFiles;

/// A container with one group: the address space of that group's devices.
#[derive(Debug)]
pub(super) struct Container {
    /// Before the container, so that it leaves it.
    group: KnownFile,
    container: File,
    number: u32,
}

impl Container {
    /// Opens group `group` of the device at `address` and gives it a container of its own, in which
    /// nothing is mapped. `files` is told of the group.
    pub(super) fn open(
        root: &Path,
        address: &str,
        group: u32,
        files: Option<&Arc<dyn HostFiles>>,
    ) -> Result<Self, VfioError> {
        let host = |what| {
            move |error| VfioError::Host {
                address: address.into(),
                what,
                error,
            }
        };
        let unsupported = |what| VfioError::Unsupported {
            address: address.into(),
            node: Path::new("/").join(node::CONTAINER),
            what,
        };
        let container = node::open(root, address, node::CONTAINER)?;
        let version = ioctl::call_with_value(container.as_fd(), ioctl::GET_API_VERSION, 0)
            .map_err(host("VFIO_GET_API_VERSION"))?;
        if version != vfio::VFIO_API_VERSION as i32 {
            return Err(unsupported("speaks another version of the interface"));
        }
        for extension in [vfio::VFIO_TYPE1v2_IOMMU, vfio::VFIO_UNMAP_ALL] {
            let call = ioctl::CHECK_EXTENSION;
            let has = ioctl::call_with_value(container.as_fd(), call, extension.into())
                .map_err(host("VFIO_CHECK_EXTENSION"))?;
            if has == 0 {
                return Err(unsupported("lacks TYPE1v2 or UNMAP_ALL (vfio_iommu_type1)"));
            }
        }
        let group_file = node::open(root, address, &node::group(group))?;
        let mut status = vfio::vfio_group_status::default();
        ioctl::group_status(group_file.as_fd(), &mut status)
            .map_err(host("VFIO_GROUP_GET_STATUS"))?;
        if status.flags & vfio::VFIO_GROUP_FLAGS_VIABLE == 0 {
            return Err(VfioError::NotViable {
                address: address.into(),
                group,
                users: vec!["see /sys/kernel/iommu_groups".into()],
            });
        }
        ioctl::set_container(group_file.as_fd(), container.as_fd())
            .map_err(host("VFIO_GROUP_SET_CONTAINER"))?;
        let set = ioctl::call_with_value(
            container.as_fd(),
            ioctl::SET_IOMMU,
            vfio::VFIO_TYPE1v2_IOMMU.into(),
        );
        match set {
            Ok(_) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(VfioError::NoRemapping {
                    address: address.into(),
                    module: "vfio_iommu_type1",
                    parameter: "allow_unsafe_interrupts",
                });
            }
            Err(error) => return Err(host("VFIO_SET_IOMMU")(error)),
        }
        // Before the first device of it is opened.
        let group_file = KnownFile::tell(group_file, files).map_err(host(TELL))?;
        Ok(Self {
            group: group_file,
            container,
            number: group,
        })
    }

    /// Opens a device of the group. Its file is ready for use.
    pub(super) fn open_device(&self, address: &str) -> Result<KnownFile, VfioError> {
        let name = CString::new(address).map_err(|_| VfioError::BadAddress {
            address: address.into(),
        })?;
        match ioctl::device_of_group(self.group.as_fd(), &name) {
            Ok(fd) => Ok(KnownFile::untold(fd.into())),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Err(VfioError::InUse {
                address: address.into(),
                node: Path::new("/").join(node::group(self.number)),
            }),
            Err(error) => Err(VfioError::Host {
                address: address.into(),
                what: "VFIO_GROUP_GET_DEVICE_FD",
                error,
            }),
        }
    }

    /// What the IOMMU can do.
    pub(super) fn info(&self) -> io::Result<Type1Info> {
        let bytes = ioctl::query(self.container(), ioctl::IOMMU_GET_INFO, &[0; 6])?;
        Type1Info::parse(&bytes)
            .ok_or_else(|| io::Error::other("the kernel's description of the IOMMU is cut off"))
    }

    /// The same as limits.
    pub(super) fn limits(&self) -> io::Result<SpaceLimits> {
        let info = self.info()?;
        let least = 1u64.checked_shl(info.page_sizes.trailing_zeros());
        Ok(SpaceLimits {
            ranges: info.ranges,
            granule: least.unwrap_or(PAGE_SIZE).max(PAGE_SIZE),
            max_mappings: info.available.map(|count| count as usize),
        })
    }

    pub(super) fn map(&self, iova: u64, ram: &RamPiece, access: Permissions) -> io::Result<()> {
        ioctl::map_dma(self.container(), iova, ram, access)
    }

    /// Unmaps the mappings in a range, or all, and returns their bytes.
    pub(super) fn unmap(&self, range: Option<(u64, u64)>) -> io::Result<u64> {
        ioctl::unmap_dma(self.container(), range)
    }

    fn container(&self) -> BorrowedFd<'_> {
        self.container.as_fd()
    }
}

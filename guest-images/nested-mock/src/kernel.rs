//! The kernel's mock device: an iommufd with `CONFIG_IOMMUFD_TEST` has devices and an IOMMU that exist
//! in software only, and tells what is in their tables and caches
//! (`drivers/iommu/iommufd/iommufd_test.h`, IOMMU_TEST_CMD).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::raw::c_ulong;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use iommufd_bindings::{
    IOMMUFD_CMD_IOAS_MAP, iommu_ioas_map, iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
    iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
};
use vm_memory::MmapRegion;
use vm_vpci::backend::nested::{Invalidation, ObjectId};
use vm_vpci::pviommu::PageTable;
use vm_vpci::vfio::IommuFd;
use vm_vpci::vfio::nested::{Attachable, Driver, InvalidationData, TableData};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// First address of the mock IOMMU's aperture.
pub(crate) const APERTURE: u64 = 1 << 24;
/// Entries of the cache of a nested table.
pub(crate) const IOTLB_ENTRIES: u32 = 4;
/// What IOMMU_GET_HW_INFO calls the mock IOMMU.
pub(crate) const HW_INFO_TYPE: u32 = 0xfeed_beef;

const HWPT_DATA: u32 = 0xdead;
const INVALIDATE_DATA: u32 = 0xdead_beef;
const INVALIDATE_ALL: u32 = 1;

const fn number(nr: u32) -> c_ulong {
    (b';' as c_ulong) << 8 | nr as c_ulong
}

/// `_IO(IOMMUFD_TYPE, IOMMUFD_CMD_BASE + 32)`.
const TEST_CMD: c_ulong = number(0x80 + 32);
const OP_MOCK_DOMAIN: u32 = 2;
const OP_MD_CHECK_MAP: u32 = 3;
const OP_MOCK_DOMAIN_REPLACE: u32 = 10;
const OP_MD_CHECK_IOTLB: u32 = 14;
const OP_PASID_CHECK_HWPT: u32 = 21;
/// DMA without a PASID counts as that of PASID 0.
const NO_PASID: u32 = 0;

/// `struct iommu_test_cmd`.
#[repr(C)]
#[derive(Debug, Default)]
struct TestCmd {
    size: u32,
    op: u32,
    id: u32,
    reserved: u32,
    /// The union; its longest member has 48 bytes.
    arguments: [u64; 6],
    last: u32,
}

/// Two 32-bit members of the union, one behind the other.
fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

fn test(iommufd: BorrowedFd<'_>, op: u32, id: u32, arguments: [u64; 6]) -> io::Result<[u64; 6]> {
    let mut command = TestCmd {
        size: size_of::<TestCmd>() as u32,
        op,
        id,
        arguments,
        ..TestCmd::default()
    };
    // SAFETY: the structure is that of the ioctl, and says its size. The one address that a command
    // of ours holds is that of a region which the kernel does not access, but asks the page of.
    let result = unsafe { ioctl_with_mut_ref(&iommufd.as_raw_fd(), TEST_CMD, &mut command) };
    match result {
        0 => Ok(command.arguments),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A mock device, bound to an iommufd.
#[derive(Debug)]
pub(crate) struct MockDevice {
    /// The iommufd once more.
    iommufd: File,
    /// Its number as a test object, and as a device.
    test: u32,
    device: u32,
    /// An address space in which nothing is mapped: there is no test command that detaches.
    nothing: ObjectId,
    /// The table that the kernel named when it was moved last: that of an address space is the
    /// kernel's own.
    last: AtomicU32,
}

impl MockDevice {
    /// Makes a device that is attached to `ram`.
    pub(crate) fn new(iommufd: &IommuFd, ram: ObjectId, nothing: ObjectId) -> io::Result<Self> {
        let answer = test(iommufd.as_fd(), OP_MOCK_DOMAIN, ram.0, [0; 6])?;
        Ok(Self {
            iommufd: iommufd.as_fd().try_clone_to_owned()?.into(),
            test: answer[0] as u32,
            device: answer[1] as u32,
            nothing,
            last: AtomicU32::new((answer[0] >> 32) as u32),
        })
    }

    /// The table that the device has been moved to last, if it is still attached to that.
    pub(crate) fn reaches(&self) -> Option<ObjectId> {
        let table = self.last.load(Ordering::Relaxed);
        let arguments = [pair(NO_PASID, table), 0, 0, 0, 0, 0];
        let attached = test(
            self.iommufd.as_fd(),
            OP_PASID_CHECK_HWPT,
            self.test,
            arguments,
        );
        attached.ok().map(|_| ObjectId(table))
    }

    fn replace(&self, to: ObjectId) -> io::Result<()> {
        let arguments = [to.0.into(), 0, 0, 0, 0, 0];
        let answer = test(
            self.iommufd.as_fd(),
            OP_MOCK_DOMAIN_REPLACE,
            self.test,
            arguments,
        )?;
        self.last.store(answer[0] as u32, Ordering::Relaxed);
        Ok(())
    }
}

impl Attachable for MockDevice {
    fn id(&self) -> u32 {
        self.device
    }

    fn attach(&self, to: ObjectId) -> io::Result<()> {
        self.replace(to)
    }

    fn detach(&self) -> io::Result<()> {
        self.replace(self.nothing)
    }
}

/// True if `table` maps `ram` from `iova` on.
pub(crate) fn maps(iommufd: &IommuFd, table: ObjectId, iova: u64, ram: &MmapRegion) -> bool {
    let arguments = [iova, ram.size() as u64, ram.as_ptr() as u64, 0, 0, 0];
    test(iommufd.as_fd(), OP_MD_CHECK_MAP, table.0, arguments).is_ok()
}

/// Checks that entry `entry` of the cache of a nested table holds `value`.
pub(crate) fn check_iotlb(
    iommufd: &IommuFd,
    table: ObjectId,
    entry: u32,
    value: u32,
) -> io::Result<()> {
    let arguments = [pair(entry, value), 0, 0, 0, 0, 0];
    test(iommufd.as_fd(), OP_MD_CHECK_IOTLB, table.0, arguments).map(drop)
}

/// Maps `ram` at `iova`, for reading and writing. It stays mapped until the iommufd is closed.
pub(crate) fn map(
    iommufd: &IommuFd,
    space: ObjectId,
    iova: u64,
    ram: &MmapRegion,
) -> io::Result<()> {
    let mut map = iommu_ioas_map {
        size: size_of::<iommu_ioas_map>() as u32,
        flags: iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
            | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
            | iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
        ioas_id: space.0,
        user_va: ram.as_ptr() as u64,
        length: ram.size() as u64,
        iova,
        ..Default::default()
    };
    let ioctl = number(IOMMUFD_CMD_IOAS_MAP);
    // SAFETY: the structure is that of the ioctl, and says its size. The kernel pins the pages, which
    // belong to the region; no device accesses them, since the mock device does no DMA.
    match unsafe { ioctl_with_mut_ref(&iommufd.as_fd().as_raw_fd(), ioctl, &mut map) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The mock IOMMU's driver. Each entry of a nested table's cache begins as what the table was made
/// with: the page number of its root here. An invalidation of a page clears the entry of its number,
/// of which there are [`IOTLB_ENTRIES`].
#[derive(Debug)]
pub(crate) struct MockDriver {
    /// Ask for invalidations that the kernel refuses.
    pub(crate) broken: AtomicBool,
}

impl Driver for MockDriver {
    fn table(&self, table: &PageTable) -> TableData {
        // `struct iommu_hwpt_selftest`: iotlb, pagetable_type.
        let words = [(table.root >> 12) as u32, 0];
        TableData {
            data_type: HWPT_DATA,
            data: words.iter().flat_map(|word| word.to_ne_bytes()).collect(),
        }
    }

    fn invalidations(&self, entries: &[Invalidation]) -> InvalidationData {
        let broken = self.broken.load(Ordering::Relaxed);
        // `struct iommu_hwpt_invalidate_selftest`: flags, iotlb_id.
        let encode = |entry: &Invalidation| match *entry {
            _ if broken => [!0, 0],
            Invalidation::All => [INVALIDATE_ALL, 0],
            Invalidation::Pages { first, .. } => [0, first as u32],
        };
        let words = entries.iter().flat_map(encode);
        InvalidationData {
            data_type: INVALIDATE_DATA,
            entry_len: 8,
            count: entries.len() as u32,
            data: words.flat_map(u32::to_ne_bytes).collect(),
        }
    }
}

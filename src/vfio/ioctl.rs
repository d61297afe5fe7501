//! The ioctls of VFIO and iommufd: numbers, structures, and the one way to call them.
//!
//! Structures come from `vfio-bindings` and `iommufd-bindings`; a test holds their sizes and the
//! numbers to `include/uapi/linux/vfio.h` and `iommufd.h`.
#![allow(unsafe_code)]

use std::io;
use std::ops::RangeInclusive;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::raw::{c_int, c_ulong};

use super::nested::InvalidationData;
use iommufd_bindings as iommufd;
use vfio_bindings::bindings::vfio;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_val};

use crate::backend::Permissions;
use crate::mem::RamPiece;

/// `_IO(';', nr)`: every ioctl of both interfaces encodes neither direction nor size.
const fn number(nr: u32) -> c_ulong {
    (vfio::VFIO_TYPE as c_ulong) << 8 | nr as c_ulong
}

const fn vfio_number(nr: u32) -> c_ulong {
    number(vfio::VFIO_BASE + nr)
}

/// An ioctl whose argument is a structure `T` that the kernel may change. `T` begins with its size.
#[derive(Debug)]
pub(super) struct Call<T> {
    number: c_ulong,
    /// Only calls that this module lists exist, each with the structure of its header.
    shape: std::marker::PhantomData<fn(T)>,
}

/// A structure of C that an ioctl takes: plain numbers, for which any bytes are valid, and whose first
/// field says how long it is.
pub(super) trait Sized32: Sized {
    /// Stores the length.
    fn set_size(&mut self, size: u32);
}

macro_rules! sized {
    ($($field:ident: $($type:path),+;)+) => {
        $($(impl Sized32 for $type {
            fn set_size(&mut self, size: u32) {
                self.$field = size;
            }
        })+)+
    };
}

sized! {
    argsz: vfio::vfio_group_status, vfio::vfio_device_info, vfio::vfio_irq_info,
        vfio::vfio_device_bind_iommufd, vfio::vfio_device_attach_iommufd_pt,
        vfio::vfio_device_detach_iommufd_pt, vfio::vfio_iommu_type1_dma_map,
        vfio::vfio_iommu_type1_dma_unmap;
    size: iommufd::iommu_destroy, iommufd::iommu_ioas_alloc, iommufd::iommu_ioas_iova_ranges,
        iommufd::iommu_ioas_map, iommufd::iommu_ioas_unmap, iommufd::iommu_hwpt_alloc,
        iommufd::iommu_hw_info, iommufd::iommu_hwpt_invalidate;
}

const fn call<T>(number: c_ulong) -> Call<T> {
    Call {
        number,
        shape: std::marker::PhantomData,
    }
}

/// Of a group or container.
pub(super) const GET_API_VERSION: c_ulong = vfio_number(0);
/// Of a container.
pub(super) const CHECK_EXTENSION: c_ulong = vfio_number(1);
/// Of a container.
pub(super) const SET_IOMMU: c_ulong = vfio_number(2);
/// Of a group.
pub(super) const GROUP_GET_STATUS: Call<vfio::vfio_group_status> = call(vfio_number(3));
/// Of a group.
const GROUP_SET_CONTAINER: c_ulong = vfio_number(4);
/// Of a group.
const GROUP_GET_DEVICE_FD: c_ulong = vfio_number(6);
/// Of a device.
pub(super) const DEVICE_GET_INFO: Call<vfio::vfio_device_info> = call(vfio_number(7));
/// Of a device; its answer has capabilities.
pub(super) const DEVICE_GET_REGION_INFO: c_ulong = vfio_number(8);
/// Of a device.
pub(super) const DEVICE_GET_IRQ_INFO: Call<vfio::vfio_irq_info> = call(vfio_number(9));
/// Of a device.
const DEVICE_SET_IRQS: c_ulong = vfio_number(10);
/// Of a device.
pub(super) const DEVICE_RESET: c_ulong = vfio_number(11);
/// Of a container with an IOMMU; its answer has capabilities.
pub(super) const IOMMU_GET_INFO: c_ulong = vfio_number(12);
/// Of a container with an IOMMU.
pub(super) const IOMMU_MAP_DMA: Call<vfio::vfio_iommu_type1_dma_map> = call(vfio_number(13));
/// Of a container with an IOMMU.
pub(super) const IOMMU_UNMAP_DMA: Call<vfio::vfio_iommu_type1_dma_unmap> = call(vfio_number(14));
/// Of a device that was opened by its own node.
pub(super) const DEVICE_BIND_IOMMUFD: Call<vfio::vfio_device_bind_iommufd> = call(vfio_number(18));
/// Of a bound device.
pub(super) const DEVICE_ATTACH_IOMMUFD_PT: Call<vfio::vfio_device_attach_iommufd_pt> =
    call(vfio_number(19));
/// Of a bound device.
pub(super) const DEVICE_DETACH_IOMMUFD_PT: Call<vfio::vfio_device_detach_iommufd_pt> =
    call(vfio_number(20));

/// Of iommufd, as all that follow.
pub(super) const DESTROY: Call<iommufd::iommu_destroy> = call(number(iommufd::IOMMUFD_CMD_DESTROY));
pub(super) const IOAS_ALLOC: Call<iommufd::iommu_ioas_alloc> =
    call(number(iommufd::IOMMUFD_CMD_IOAS_ALLOC));
pub(super) const IOAS_IOVA_RANGES: Call<iommufd::iommu_ioas_iova_ranges> =
    call(number(iommufd::IOMMUFD_CMD_IOAS_IOVA_RANGES));
pub(super) const IOAS_MAP: Call<iommufd::iommu_ioas_map> =
    call(number(iommufd::IOMMUFD_CMD_IOAS_MAP));
pub(super) const IOAS_UNMAP: Call<iommufd::iommu_ioas_unmap> =
    call(number(iommufd::IOMMUFD_CMD_IOAS_UNMAP));
pub(super) const HWPT_ALLOC: Call<iommufd::iommu_hwpt_alloc> =
    call(number(iommufd::IOMMUFD_CMD_HWPT_ALLOC));
pub(super) const HWPT_INVALIDATE: Call<iommufd::iommu_hwpt_invalidate> =
    call(number(iommufd::IOMMUFD_CMD_HWPT_INVALIDATE));
pub(super) const GET_HW_INFO: Call<iommufd::iommu_hw_info> =
    call(number(iommufd::IOMMUFD_CMD_GET_HW_INFO));

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Calls `call` with `argument`, whose size is filled in. The addresses in `argument`, if it has any,
/// are the caller's promise.
///
/// # Safety
///
/// Each field that the kernel takes as an address of this process points at memory of the length that
/// another field gives, which lives until this returns and which the kernel may access as the call
/// says; memory of which devices get hold stays theirs to access (it is guest RAM).
pub(super) unsafe fn call_with<T: Sized32>(
    file: BorrowedFd<'_>,
    call: &Call<T>,
    argument: &mut T,
) -> io::Result<c_int> {
    argument.set_size(size_of::<T>() as u32);
    // SAFETY: the number and the structure belong together, as the type of `call` says, and the
    // kernel takes the size from its first field. The addresses are the caller's promise.
    check(unsafe { ioctl_with_mut_ref(&file, call.number, argument) })
}

/// Calls an ioctl whose argument is a number or nothing.
pub(super) fn call_with_value(
    file: BorrowedFd<'_>,
    number: c_ulong,
    value: c_ulong,
) -> io::Result<c_int> {
    debug_assert!([GET_API_VERSION, CHECK_EXTENSION, SET_IOMMU, DEVICE_RESET].contains(&number));
    // SAFETY: these ioctls take no address.
    check(unsafe { ioctl_with_val(&file, number, value) })
}

/// Puts a group into a container.
pub(super) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> io::Result<()> {
    let container: c_int = container.as_raw_fd();
    // SAFETY: the ioctl reads an `int`.
    check(unsafe { ioctl_with_ptr(&group, GROUP_SET_CONTAINER, &raw const container) })?;
    Ok(())
}

/// Opens a device of a group by its address.
pub(super) fn device_of_group(group: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    // SAFETY: the ioctl reads a string that ends in a zero byte.
    let fd = check(unsafe { ioctl_with_ptr(&group, GROUP_GET_DEVICE_FD, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A call whose structure holds no address.
macro_rules! plain {
    ($(#[$doc:meta] $name:ident: $call:ident, $type:path;)+) => {
        $(#[$doc]
        pub(super) fn $name(file: BorrowedFd<'_>, argument: &mut $type) -> io::Result<()> {
            // SAFETY: the structure has no field that the kernel takes as an address.
            unsafe { call_with(file, &$call, argument) }.map(drop)
        })+
    };
}

plain! {
    /// Status of a group.
    group_status: GROUP_GET_STATUS, vfio::vfio_group_status;
    /// What a device is.
    device_info: DEVICE_GET_INFO, vfio::vfio_device_info;
    /// What interrupts it has.
    irq_info: DEVICE_GET_IRQ_INFO, vfio::vfio_irq_info;
    /// Attaches a bound device, or replaces what it is attached to.
    attach: DEVICE_ATTACH_IOMMUFD_PT, vfio::vfio_device_attach_iommufd_pt;
    /// Detaches a bound device.
    detach: DEVICE_DETACH_IOMMUFD_PT, vfio::vfio_device_detach_iommufd_pt;
    /// Destroys an object of iommufd.
    destroy: DESTROY, iommufd::iommu_destroy;
    /// Makes an address space of iommufd.
    ioas_alloc: IOAS_ALLOC, iommufd::iommu_ioas_alloc;
    /// Unmaps from it.
    ioas_unmap: IOAS_UNMAP, iommufd::iommu_ioas_unmap;
}

/// Binds a device to an iommufd. Its token, if it needs one, is none.
pub(super) fn bind_iommufd(device: BorrowedFd<'_>, iommufd: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bind = vfio::vfio_device_bind_iommufd {
        iommufd: iommufd.as_raw_fd(),
        ..Default::default()
    };
    // SAFETY: the only address of the structure is that of the token, which no flag announces.
    unsafe { call_with(device, &DEVICE_BIND_IOMMUFD, &mut bind) }?;
    Ok(bind.out_devid)
}

/// Maps guest RAM into a container. The caller keeps `memory` until it is unmapped or the container is
/// closed.
pub(super) fn map_dma(
    container: BorrowedFd<'_>,
    iova: u64,
    memory: &RamPiece,
    access: Permissions,
) -> io::Result<()> {
    let flag = |permission, flag| if access.contains(permission) { flag } else { 0 };
    let mut map = vfio::vfio_iommu_type1_dma_map {
        flags: flag(Permissions::READ, vfio::VFIO_DMA_MAP_FLAG_READ)
            | flag(Permissions::WRITE, vfio::VFIO_DMA_MAP_FLAG_WRITE),
        vaddr: memory.host_address(),
        iova,
        size: memory.len(),
        ..Default::default()
    };
    // SAFETY: `memory` is mapped guest RAM of that length, which is never accessed but by copies and
    // atomics, so a device may read and write it at any time.
    unsafe { call_with(container, &IOMMU_MAP_DMA, &mut map) }.map(drop)
}

/// Unmaps a range, or everything for `None`, and returns the bytes that were mapped.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, range: Option<(u64, u64)>) -> io::Result<u64> {
    let (iova, size) = range.unwrap_or_default();
    let flags = match range {
        Some(_) => 0,
        None => vfio::VFIO_DMA_UNMAP_FLAG_ALL,
    };
    let mut unmap = vfio::vfio_iommu_type1_dma_unmap {
        flags,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the structure has an address only if the flag for the dirty bitmap is set.
    unsafe { call_with(container, &IOMMU_UNMAP_DMA, &mut unmap) }?;
    Ok(unmap.size)
}

/// Maps guest RAM into an address space of iommufd. The caller keeps `memory` until it is unmapped or
/// the address space destroyed: the kernel may look the memory up as late as when a device is
/// attached.
pub(super) fn ioas_map(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
    iova: u64,
    memory: &RamPiece,
    access: Permissions,
) -> io::Result<()> {
    let flag = |permission, flag| if access.contains(permission) { flag } else { 0 };
    let mut map = iommufd::iommu_ioas_map {
        flags: iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
            | flag(
                Permissions::READ,
                iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE,
            )
            | flag(
                Permissions::WRITE,
                iommufd::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
            ),
        ioas_id: ioas,
        user_va: memory.host_address(),
        length: memory.len(),
        iova,
        ..Default::default()
    };
    // SAFETY: as for `map_dma`.
    unsafe { call_with(iommufd, &IOAS_MAP, &mut map) }.map(drop)
}

/// Most ranges of addresses that an IOMMU may have.
const MAX_RANGES: usize = 4096;

/// The ranges of addresses that an address space of iommufd can map, and the alignment it demands.
pub(super) fn ioas_ranges(
    iommufd: BorrowedFd<'_>,
    ioas: u32,
) -> io::Result<(Vec<RangeInclusive<u64>>, u64)> {
    let mut list = vec![iommufd::iommu_iova_range::default(); 16];
    loop {
        let mut ask = iommufd::iommu_ioas_iova_ranges {
            ioas_id: ioas,
            num_iovas: list.len() as u32,
            allowed_iovas: list.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the kernel writes at most `num_iovas` ranges, for which `list` has room.
        let result = unsafe { call_with(iommufd, &IOAS_IOVA_RANGES, &mut ask) };
        let count = ask.num_iovas as usize;
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) && count <= MAX_RANGES => {
                list.resize(count.max(list.len() + 1), Default::default());
            }
            Err(error) => return Err(error),
            Ok(_) => {
                list.truncate(count);
                let ranges = list.iter().map(|range| range.start..=range.last);
                return Ok((ranges.collect(), ask.out_iova_alignment));
            }
        }
    }
}

/// Makes a page table object of iommufd for a device; `data` is what its type takes.
pub(super) fn hwpt_alloc(
    iommufd: BorrowedFd<'_>,
    device: u32,
    parent: u32,
    flags: u32,
    data_type: u32,
    data: &[u8],
) -> io::Result<u32> {
    let mut alloc = iommufd::iommu_hwpt_alloc {
        flags,
        dev_id: device,
        pt_id: parent,
        data_type,
        data_len: data.len() as u32,
        data_uptr: if data.is_empty() {
            0
        } else {
            data.as_ptr() as u64
        },
        ..Default::default()
    };
    // SAFETY: the kernel reads `data_len` bytes of `data`. Addresses in them are guest physical.
    unsafe { call_with(iommufd, &HWPT_ALLOC, &mut alloc) }?;
    Ok(alloc.out_hwpt_id)
}

/// Invalidates entries of a nested table; how many are done, and whether all.
pub(super) fn hwpt_invalidate(
    iommufd: BorrowedFd<'_>,
    hwpt: u32,
    entries: &InvalidationData,
) -> (u32, io::Result<()>) {
    let data = &entries.data;
    if data.len() as u64 != u64::from(entries.entry_len) * u64::from(entries.count) {
        return (0, Err(io::Error::from_raw_os_error(libc::EINVAL)));
    }
    let mut invalidate = iommufd::iommu_hwpt_invalidate {
        hwpt_id: hwpt,
        data_uptr: if data.is_empty() {
            0
        } else {
            data.as_ptr() as u64
        },
        data_type: entries.data_type,
        entry_len: entries.entry_len,
        entry_num: entries.count,
        ..Default::default()
    };
    // SAFETY: the kernel reads `entry_num` entries of `entry_len` bytes, which are all of `data`. It
    // stores how many it has done, on failure too.
    let result = unsafe { call_with(iommufd, &HWPT_INVALIDATE, &mut invalidate) };
    let done = match &result {
        // Of a call that did not get as far, nothing was stored.
        Err(_) if invalidate.entry_num == entries.count => 0,
        _ => invalidate.entry_num,
    };
    (done, result.map(drop))
}

/// What iommufd tells about the IOMMU of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HwInfo {
    /// Its type: `IOMMU_HW_INFO_TYPE_*`.
    pub kind: u32,
    /// `IOMMU_HW_CAP_*`.
    pub capabilities: u64,
    /// Bytes that the kernel has for the type; at most as many as there was room for are filled.
    pub len: u32,
}

/// Asks about the IOMMU of a device; `data` takes what is special to its type.
pub(super) fn hw_info(iommufd: BorrowedFd<'_>, device: u32, data: &mut [u8]) -> io::Result<HwInfo> {
    let mut info = iommufd::iommu_hw_info {
        dev_id: device,
        data_len: data.len() as u32,
        data_uptr: data.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the kernel writes at most `data_len` bytes, for which `data` has room.
    unsafe { call_with(iommufd, &GET_HW_INFO, &mut info) }?;
    // SAFETY: both fields of the union are the same number.
    let kind = unsafe { info.__bindgen_anon_1.out_data_type };
    Ok(HwInfo {
        kind,
        capabilities: info.out_capabilities,
        len: info.data_len,
    })
}

/// Longest answer of [`query`], in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// Asks one of the ioctls whose answers have capabilities. `head` is the argument without them, size
/// included, which is filled in; the answer is as long as the kernel needs.
pub(super) fn query(file: BorrowedFd<'_>, number: c_ulong, head: &[u32]) -> io::Result<Vec<u8>> {
    debug_assert!([DEVICE_GET_REGION_INFO, IOMMU_GET_INFO].contains(&number));
    let mut len = size_of_val(head);
    loop {
        // Words of 8 bytes, so that the structure is aligned.
        let mut words = vec![0u64; len.div_ceil(8)];
        for (i, word) in head.iter().enumerate() {
            let value = if i == 0 { len as u32 } else { *word };
            let shift = if cfg!(target_endian = "big") != (i % 2 == 1) {
                32
            } else {
                0
            };
            words[i / 2] |= u64::from(value) << shift;
        }
        // SAFETY: the buffer is as long as its first word says, or longer, and the kernel writes no
        // more than that.
        check(unsafe { ioctl_with_mut_ptr(&file, number, words.as_mut_ptr()) })?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let needed = super::info::u32_at(&bytes, 0).unwrap_or(0) as usize;
        if needed <= len {
            return Ok(bytes);
        }
        if needed > MAX_ANSWER {
            return Err(io::Error::other(format!(
                "the kernel's answer has {needed} bytes"
            )));
        }
        len = needed;
    }
}

/// Sets a device's interrupts: see [`super::VfioDevice::set_irqs`].
pub(super) fn set_irqs(device: BorrowedFd<'_>, words: &[u32]) -> io::Result<()> {
    let size = size_of_val(words) as u32;
    let fits = words.len() >= 5 && words[0] == size;
    if !fits {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: the kernel reads as many bytes as the first word says, which are those of `words`; the
    // descriptors in them are only looked up.
    let result = check(unsafe { ioctl_with_ptr(&device, DEVICE_SET_IRQS, words.as_ptr()) })?;
    all_vectors(result, words[3].saturating_add(words[4]))
}

/// Judges what VFIO_DEVICE_SET_IRQS answers that has not failed. A positive number is how many
/// vectors the host has for the device, fewer than were `asked` for, and none is enabled
/// (vfio_msi_enable, drivers/vfio/pci/vfio_pci_intrs.c).
pub(super) fn all_vectors(result: c_int, asked: u32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::other(format!(
            "the host has {result} interrupt vectors for the device, not {asked}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against the kernel's headers: `_IO(';', 100 + n)` and `_IO(';', 0x80 + n)`.
    #[test]
    fn numbers_are_those_of_the_headers() {
        assert_eq!(GET_API_VERSION, 0x3b64);
        assert_eq!(CHECK_EXTENSION, 0x3b65);
        assert_eq!(SET_IOMMU, 0x3b66);
        assert_eq!(GROUP_GET_STATUS.number, 0x3b67);
        assert_eq!(GROUP_SET_CONTAINER, 0x3b68);
        assert_eq!(GROUP_GET_DEVICE_FD, 0x3b6a);
        assert_eq!(DEVICE_GET_INFO.number, 0x3b6b);
        assert_eq!(DEVICE_GET_REGION_INFO, 0x3b6c);
        assert_eq!(DEVICE_GET_IRQ_INFO.number, 0x3b6d);
        assert_eq!(DEVICE_SET_IRQS, 0x3b6e);
        assert_eq!(DEVICE_RESET, 0x3b6f);
        assert_eq!(IOMMU_GET_INFO, 0x3b70);
        assert_eq!(IOMMU_MAP_DMA.number, 0x3b71);
        assert_eq!(IOMMU_UNMAP_DMA.number, 0x3b72);
        assert_eq!(DEVICE_BIND_IOMMUFD.number, 0x3b76);
        assert_eq!(DEVICE_ATTACH_IOMMUFD_PT.number, 0x3b77);
        assert_eq!(DEVICE_DETACH_IOMMUFD_PT.number, 0x3b78);
        assert_eq!(DESTROY.number, 0x3b80);
        assert_eq!(IOAS_ALLOC.number, 0x3b81);
        assert_eq!(IOAS_IOVA_RANGES.number, 0x3b84);
        assert_eq!(IOAS_MAP.number, 0x3b85);
        assert_eq!(IOAS_UNMAP.number, 0x3b86);
        assert_eq!(HWPT_ALLOC.number, 0x3b89);
        assert_eq!(GET_HW_INFO.number, 0x3b8a);
        assert_eq!(HWPT_INVALIDATE.number, 0x3b8d);
    }

    #[test]
    fn structures_have_the_sizes_of_the_headers() {
        assert_eq!(size_of::<vfio::vfio_group_status>(), 8);
        assert_eq!(size_of::<vfio::vfio_device_info>(), 24);
        assert_eq!(size_of::<vfio::vfio_region_info>(), 32);
        assert_eq!(size_of::<vfio::vfio_irq_info>(), 16);
        assert_eq!(size_of::<vfio::vfio_irq_set>(), 20);
        assert_eq!(size_of::<vfio::vfio_device_bind_iommufd>(), 24);
        assert_eq!(size_of::<vfio::vfio_device_attach_iommufd_pt>(), 16);
        assert_eq!(size_of::<vfio::vfio_device_detach_iommufd_pt>(), 12);
        assert_eq!(size_of::<vfio::vfio_iommu_type1_info>(), 24);
        assert_eq!(size_of::<vfio::vfio_iommu_type1_dma_map>(), 32);
        assert_eq!(size_of::<vfio::vfio_iommu_type1_dma_unmap>(), 24);
        assert_eq!(size_of::<iommufd::iommu_destroy>(), 8);
        assert_eq!(size_of::<iommufd::iommu_ioas_alloc>(), 12);
        assert_eq!(size_of::<iommufd::iommu_ioas_iova_ranges>(), 32);
        assert_eq!(size_of::<iommufd::iommu_ioas_map>(), 40);
        assert_eq!(size_of::<iommufd::iommu_ioas_unmap>(), 24);
        assert_eq!(size_of::<iommufd::iommu_hwpt_alloc>(), 48);
        assert_eq!(size_of::<iommufd::iommu_hw_info>(), 40);
        assert_eq!(size_of::<iommufd::iommu_hwpt_invalidate>(), 32);
    }

    #[test]
    fn the_size_goes_into_the_first_word() {
        let mut map = vfio::vfio_iommu_type1_dma_map::default();
        map.set_size(32);
        assert_eq!((map.argsz, map.flags), (32, 0));
        let mut destroy = iommufd::iommu_destroy::default();
        destroy.set_size(8);
        assert_eq!((destroy.size, destroy.id), (8, 0));
    }

    #[test]
    fn fewer_vectors_than_asked_for_are_a_refusal_that_tells_how_many() {
        all_vectors(0, 8).unwrap();
        let error = all_vectors(3, 8).unwrap_err().to_string();
        assert!(
            error.contains("has 3") && error.contains("not 8"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_no_device_refuses() {
        use std::os::fd::AsFd;
        let file = tempfile::tempfile().unwrap();
        let refused = |result: io::Result<()>| {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        };
        refused(call_with_value(file.as_fd(), DEVICE_RESET, 0).map(drop));
        refused(query(file.as_fd(), IOMMU_GET_INFO, &[0; 6]).map(drop));
        refused(set_irqs(file.as_fd(), &[20, 0, 0, 0, 0]));
        assert!(set_irqs(file.as_fd(), &[24, 0, 0, 0, 0]).is_err());
    }
}

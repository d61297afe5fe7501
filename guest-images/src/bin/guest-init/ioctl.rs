//! The ioctls that no crate here has a safe function for: those of VFIO's type 1 interface
//! (`include/uapi/linux/vfio.h`) and of the kernel's benchmark of DMA mappings
//! (`include/uapi/linux/map_benchmark.h`).
#![allow(unsafe_code)]

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::{CString, c_void};
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU64;

/// Page size of the guest.
pub(crate) const PAGE: usize = 4096;

const fn vfio(number: u8) -> Opcode {
    opcode::none(b';', 100 + number)
}

const GROUP_VIABLE: u32 = 1 << 0;
const MAP_READ: u32 = 1 << 0;
const MAP_WRITE: u32 = 1 << 1;
/// Eventfds, to be signalled by an interrupt.
const TRIGGER_EVENTFD: u32 = 1 << 2 | 1 << 5;

/// What stands between a container's devices and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Iommu {
    /// An IOMMU, behind the type 1 interface, version 2.
    Type1 = 3,
    /// Nothing.
    None = 8,
}

/// Kinds of message signalled interrupts of a PCI device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Interrupt {
    Msi = 1,
    Msix = 2,
}

/// Memory that a device may write at any time, for the rest of the program: it is never freed,
/// because a device that still has its address could then write into something else.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct DmaPage(pub(crate) [AtomicU64; PAGE / 8]);

impl DmaPage {
    /// A page full of `word`.
    pub(crate) fn leak(word: u64) -> &'static Self {
        Box::leak(Box::new(
            Self([const { AtomicU64::new(0) }; PAGE / 8]).filled(word),
        ))
    }

    fn filled(self, word: u64) -> Self {
        self.fill(word);
        self
    }

    pub(crate) fn fill(&self, word: u64) {
        for place in &self.0 {
            place.store(word, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Puts a word of its own into each place.
    pub(crate) fn fill_with(&self, word: impl Fn(u64) -> u64) {
        for (place, index) in self.0.iter().zip(0..) {
            place.store(word(index), std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Whether the page is full of `word`.
    pub(crate) fn holds(&self, word: u64) -> bool {
        self.holds_what(|_| word)
    }

    /// Whether each place holds its word.
    pub(crate) fn holds_what(&self, word: impl Fn(u64) -> u64) -> bool {
        let mut places = self.0.iter().zip(0..);
        places.all(|(place, index)| place.load(std::sync::atomic::Ordering::Relaxed) == word(index))
    }
}

#[repr(C)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: i32,
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// What the kernel's benchmark does and what comes of it.
#[derive(Clone, Debug)]
#[repr(C)]
pub(crate) struct MapBenchmark {
    /// Average time of a map in units of 100 ns; an output like the next three.
    pub(crate) map_100ns: u64,
    pub(crate) map_deviation: u64,
    pub(crate) unmap_100ns: u64,
    pub(crate) unmap_deviation: u64,
    pub(crate) threads: u32,
    pub(crate) seconds: u32,
    /// NUMA node; -1 for any.
    pub(crate) node: i32,
    /// Width of the device's addresses.
    pub(crate) bits: u32,
    /// 0 both ways, 1 to the device, 2 from it.
    pub(crate) direction: u32,
    /// Time that a mapping stays.
    pub(crate) hold_ns: u32,
    /// Pages of a mapping.
    pub(crate) pages: u32,
    /// 0 one buffer, 1 a scatter list.
    pub(crate) mode: u8,
    pub(crate) reserved: [u8; 75],
}

/// An argument passed by its address.
struct ByAddress<'a, T> {
    opcode: Opcode,
    value: &'a mut T,
}

// SAFETY: the pointer is to a live T, and the output is the return value alone.
unsafe impl<T> Ioctl for ByAddress<'_, T> {
    type Output = i32;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::from_mut(self.value).cast()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// An argument passed as it is.
struct ByValue {
    opcode: Opcode,
    value: usize,
}

// SAFETY: the pointer is a number to the kernel, and the output is the return value alone.
unsafe impl Ioctl for ByValue {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::without_provenance_mut(self.value)
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}

/// Size of an argument as it tells it itself.
const fn argsz<T>() -> u32 {
    size_of::<T>() as u32
}

/// # Safety
///
/// `opcode` takes a `T`, and what `value` says about addresses and sizes is so.
unsafe fn by_address<T>(fd: impl AsFd, opcode: Opcode, value: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's.
    Ok(unsafe { ioctl(fd, ByAddress { opcode, value }) }?)
}

/// # Safety
///
/// `opcode` takes a number, or nothing.
unsafe fn by_value(fd: impl AsFd, opcode: Opcode, value: usize) -> io::Result<i32> {
    // SAFETY: the caller's.
    Ok(unsafe { ioctl(fd, ByValue { opcode, value }) }?)
}

/// Whether all devices of the group are VFIO's or nobody's.
pub(crate) fn is_viable(group: &File) -> io::Result<bool> {
    let mut status = GroupStatus {
        argsz: argsz::<GroupStatus>(),
        flags: 0,
    };
    // SAFETY: VFIO_GROUP_GET_STATUS fills a vfio_group_status.
    unsafe { by_address(group, vfio(3), &mut status) }?;
    Ok(status.flags & GROUP_VIABLE != 0)
}

/// Puts the group into the container and gives that its address space, if it knows that kind.
pub(crate) fn set_container(group: &File, container: &File, iommu: Iommu) -> io::Result<()> {
    // SAFETY: VFIO_GET_API_VERSION takes nothing.
    let version = unsafe { by_value(container, vfio(0), 0) }?;
    // SAFETY: VFIO_CHECK_EXTENSION takes a number.
    let extension = unsafe { by_value(container, vfio(1), iommu as usize) }?;
    if version != 0 || extension != 1 {
        return Err(io::Error::other(format!("VFIO has no {iommu:?}")));
    }
    let mut fd = container.as_raw_fd();
    // SAFETY: VFIO_GROUP_SET_CONTAINER reads a file descriptor.
    unsafe { by_address(group, vfio(4), &mut fd) }?;
    // SAFETY: VFIO_SET_IOMMU takes a number.
    unsafe { by_value(container, vfio(2), iommu as usize) }?;
    Ok(())
}

/// Opens the device `name` of the group.
pub(crate) fn open_device(group: &File, name: &str) -> io::Result<File> {
    let name = CString::new(name).map_err(|_| ErrorKind::InvalidInput)?;
    // SAFETY: VFIO_GROUP_GET_DEVICE_FD reads a string, which ends in a zero.
    let fd = unsafe { by_value(group, vfio(6), name.as_ptr().expose_provenance()) }?;
    // SAFETY: a new file descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Where in its file a region of the device begins.
pub(crate) fn region(device: &File, index: u32) -> io::Result<u64> {
    let mut info = RegionInfo {
        argsz: argsz::<RegionInfo>(),
        flags: 0,
        index,
        cap_offset: 0,
        size: 0,
        offset: 0,
    };
    // SAFETY: VFIO_DEVICE_GET_REGION_INFO fills a vfio_region_info, and no more than `argsz`.
    unsafe { by_address(device, vfio(8), &mut info) }?;
    Ok(info.offset)
}

/// Has the first vector of a kind, and that alone, signal `eventfd`.
pub(crate) fn set_interrupt(device: &File, kind: Interrupt, eventfd: &OwnedFd) -> io::Result<()> {
    let mut set = IrqSet {
        argsz: argsz::<IrqSet>(),
        flags: TRIGGER_EVENTFD,
        index: kind as u32,
        start: 0,
        count: 1,
        eventfd: eventfd.as_raw_fd(),
    };
    // SAFETY: VFIO_DEVICE_SET_IRQS reads a vfio_irq_set and `count` file descriptors behind it.
    unsafe { by_address(device, vfio(10), &mut set) }?;
    Ok(())
}

/// Lets the devices of a container read a page at `iova`, and write it if `write` is set.
pub(crate) fn map(
    container: &File,
    iova: u64,
    page: &'static DmaPage,
    write: bool,
) -> io::Result<()> {
    let mut map = DmaMap {
        argsz: argsz::<DmaMap>(),
        flags: MAP_READ | if write { MAP_WRITE } else { 0 },
        vaddr: ptr::from_ref(page).expose_provenance() as u64,
        iova,
        size: PAGE as u64,
    };
    // SAFETY: VFIO_IOMMU_MAP_DMA reads a vfio_iommu_type1_dma_map; the memory is never freed, and
    // is of a type that may change at any time.
    unsafe { by_address(container, vfio(13), &mut map) }?;
    Ok(())
}

/// Ends the mapping of the page at `iova`.
pub(crate) fn unmap(container: &File, iova: u64) -> io::Result<()> {
    let mut unmap = DmaUnmap {
        argsz: argsz::<DmaUnmap>(),
        flags: 0,
        iova,
        size: PAGE as u64,
    };
    // SAFETY: VFIO_IOMMU_UNMAP_DMA changes a vfio_iommu_type1_dma_unmap.
    unsafe { by_address(container, vfio(14), &mut unmap) }?;
    if unmap.size != PAGE as u64 {
        return Err(io::Error::other(format!("{} bytes unmapped", unmap.size)));
    }
    Ok(())
}

/// Runs the benchmark and fills in its results.
pub(crate) fn run_benchmark(file: &File, benchmark: &mut MapBenchmark) -> io::Result<()> {
    const RUN: Opcode = opcode::read_write::<MapBenchmark>(b'd', 1);
    // SAFETY: DMA_MAP_BENCHMARK changes a struct map_benchmark.
    unsafe { by_address(file, RUN, benchmark) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn arguments_have_the_kernel_s_layout() {
        assert_eq!(size_of::<RegionInfo>(), 32);
        assert_eq!(offset_of!(RegionInfo, size), 16);
        assert_eq!(size_of::<IrqSet>(), 24);
        assert_eq!(offset_of!(IrqSet, eventfd), 20);
        assert_eq!(size_of::<DmaMap>(), 32);
        assert_eq!(offset_of!(DmaMap, vaddr), 8);
        assert_eq!(size_of::<DmaUnmap>(), 24);
        assert_eq!(size_of::<MapBenchmark>(), 136);
        assert_eq!(offset_of!(MapBenchmark, mode), 60);
    }

    #[test]
    fn a_page_is_aligned_and_knows_what_it_holds() {
        let page = DmaPage::leak(7);
        assert_eq!(ptr::from_ref(page).addr() % PAGE, 0);
        assert!(page.holds(7));
        page.0[511].store(8, std::sync::atomic::Ordering::Relaxed);
        assert!(!page.holds(7));
    }

    #[test]
    fn a_file_that_knows_no_ioctl_gives_an_error() {
        let file = File::open("/proc/self/status").unwrap();
        assert!(set_container(&file, &file, Iommu::Type1).is_err());
        assert!(is_viable(&file).is_err());
        assert!(region(&file, 0).is_err());
        assert!(open_device(&file, "0000:00:00.0").is_err());
        assert!(open_device(&file, "a\0b").is_err());
        assert!(unmap(&file, 0).is_err());
    }
}

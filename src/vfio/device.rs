//! A device of the host that this process has opened.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio;

use super::check::Interface;
use super::group::Group;
use super::info::Region;
use super::ioctl;
use super::known::KnownFile;
use super::nested::CannotNest;
use crate::backend::nested::NestedCapabilities;
use crate::mem::DeviceMemory;

/// Number of the regions that a PCI device has.
pub const REGIONS: usize = vfio::VFIO_PCI_NUM_REGIONS as usize;
/// The region that is the configuration space. Regions 0 to 5 are the BARs, 6 is the ROM.
pub const CONFIG_REGION: usize = vfio::VFIO_PCI_CONFIG_REGION_INDEX as usize;
/// The interrupts of MSI, as an index.
pub const MSI_IRQ: u32 = vfio::VFIO_PCI_MSI_IRQ_INDEX;
/// The interrupts of MSI-X.
pub const MSIX_IRQ: u32 = vfio::VFIO_PCI_MSIX_IRQ_INDEX;
/// The error interrupt: the host has seen an error of the device that cannot be corrected.
pub const ERROR_IRQ: u32 = vfio::VFIO_PCI_ERR_IRQ_INDEX;
/// The request interrupt: the host wants the device back.
pub const REQUEST_IRQ: u32 = vfio::VFIO_PCI_REQ_IRQ_INDEX;

/// The command register of the configuration space.
pub(super) const COMMAND: u64 = 4;
/// It may do DMA and raise messages.
pub(super) const COMMAND_MASTER: u16 = 1 << 2;

/// Interrupts that share an index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// Their number; 0 if the device has none.
    pub count: u32,
    /// They can be enabled one by one. Otherwise enabling one that was not among the first enabled
    /// needs all to be disabled first.
    pub dynamic: bool,
}

/// An opened PCI device. Closing it (dropping the last handle) resets it where it can be reset, and
/// stops its DMA and interrupts.
#[derive(Debug)]
pub struct VfioDevice {
    address: String,
    /// Before the group: a container goes after its devices.
    file: KnownFile,
    /// What its attach unit calls it.
    member: u32,
    group: Arc<Group>,
    regions: [Region; REGIONS],
    irqs: u32,
    can_reset: bool,
}

impl VfioDevice {
    /// The device at `address`, behind an open file of VFIO that is ready for use: bound to iommufd, or
    /// from a group with a container.
    pub(super) fn new(
        address: &str,
        group: Arc<Group>,
        member: u32,
        file: KnownFile,
    ) -> io::Result<Self> {
        let mut info = vfio::vfio_device_info::default();
        ioctl::device_info(file.as_fd(), &mut info)?;
        if info.flags & vfio::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(io::Error::other("it is no PCI device"));
        }
        let mut regions: [Region; REGIONS] = Default::default();
        let count = REGIONS.min(info.num_regions as usize);
        for (index, region) in regions.iter_mut().enumerate().take(count) {
            *region = read_region(file.as_fd(), index as u32)?;
        }
        Ok(Self {
            address: address.to_owned(),
            file,
            member,
            group,
            regions,
            irqs: info.num_irqs,
            can_reset: info.flags & vfio::VFIO_DEVICE_FLAGS_RESET != 0,
        })
    }

    /// Its address, such as `0000:00:05.0`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Number of its IOMMU group.
    pub fn group(&self) -> u32 {
        self.group.id()
    }

    /// Its group.
    pub(super) fn group_handle(&self) -> &Arc<Group> {
        &self.group
    }

    /// Its open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// What its attach unit calls it: with iommufd, the kernel's number of it.
    pub(super) fn member(&self) -> u32 {
        self.member
    }

    /// The interface by which it is opened: [`Interface::Type1`] or [`Interface::Iommufd`].
    pub fn interface(&self) -> Interface {
        self.group.interface()
    }

    /// What its IOMMU can do with first-stage tables of a guest.
    ///
    /// # Errors
    ///
    /// [`CannotNest`]. That the kernel refuses to make a table may only show later.
    pub fn nested_capabilities(&self) -> Result<NestedCapabilities, CannotNest> {
        self.group.nested_capabilities(self.member)
    }

    /// Its regions: six BARs, ROM, configuration space, VGA.
    pub fn regions(&self) -> &[Region; REGIONS] {
        &self.regions
    }

    /// Reads from a region.
    ///
    /// # Errors
    ///
    /// What the kernel says; `EINVAL` for a place that is not in the region.
    pub fn region_read(&self, index: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let place = self.place(index, offset, buf.len() as u64)?;
        self.file.read_exact_at(buf, place)
    }

    /// Writes to a region.
    ///
    /// # Errors
    ///
    /// As [`region_read`](Self::region_read).
    pub fn region_write(&self, index: usize, offset: u64, buf: &[u8]) -> io::Result<()> {
        let place = self.place(index, offset, buf.len() as u64)?;
        self.file.write_all_at(buf, place)
    }

    /// True if it can do DMA or raise messages as far as its command register goes, or if that cannot be
    /// read.
    pub(super) fn may_master(&self) -> bool {
        let mut bytes = [0; 2];
        let read = self.region_read(CONFIG_REGION, COMMAND, &mut bytes);
        masters(read.map(|()| u16::from_le_bytes(bytes)))
    }

    /// Maps a part of a region, which must lie in one of its [mappable](Region::mappable) parts.
    ///
    /// # Errors
    ///
    /// What the kernel says; `EINVAL` for a place that cannot be mapped.
    pub fn map_region(&self, index: usize, offset: u64, len: usize) -> io::Result<DeviceMemory> {
        let place = self.place(index, offset, len as u64)?;
        let mut areas = self.regions[index].mappable.iter();
        let end = offset + len as u64;
        if !areas.any(|area| area.start <= offset && end <= area.end) {
            return Err(invalid());
        }
        DeviceMemory::map(self.file.as_fd(), place, len)
    }

    /// Where a part of a region is in the file.
    fn place(&self, index: usize, offset: u64, len: u64) -> io::Result<u64> {
        let region = self.regions.get(index).ok_or_else(invalid)?;
        let end = offset.checked_add(len).ok_or_else(invalid)?;
        if end > region.size {
            return Err(invalid());
        }
        Ok(region.offset + offset)
    }

    /// The interrupts with an index: [`MSI_IRQ`], [`MSIX_IRQ`], ...
    ///
    /// # Errors
    ///
    /// What the kernel says, other than that it does not know the index.
    pub fn irq_info(&self, index: u32) -> io::Result<IrqInfo> {
        if index >= self.irqs {
            return Ok(IrqInfo::default());
        }
        let mut info = vfio::vfio_irq_info {
            index,
            ..Default::default()
        };
        match ioctl::irq_info(self.file.as_fd(), &mut info) {
            // So the kernel answers for the error interrupt of a device that has none.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                return Ok(IrqInfo::default());
            }
            result => result?,
        };
        let events = info.flags & vfio::VFIO_IRQ_INFO_EVENTFD != 0;
        Ok(IrqInfo {
            count: if events { info.count } else { 0 },
            dynamic: info.flags & vfio::VFIO_IRQ_INFO_NORESIZE == 0,
        })
    }

    /// Has interrupts `start..start + fds.len()` of an index signal eventfds from now on; `None` takes
    /// one away. The kernel keeps its own reference. If none of the index was enabled, this enables
    /// them. Empty `fds` changes nothing.
    ///
    /// # Errors
    ///
    /// What the kernel says; interrupts that were enabled before may be disabled then. Where the host
    /// has fewer vectors than are asked for, the error says how many, and none is enabled.
    pub fn set_irqs(
        &self,
        index: u32,
        start: u32,
        fds: &[Option<BorrowedFd<'_>>],
    ) -> io::Result<()> {
        if fds.is_empty() {
            return Ok(());
        }
        let words = fds
            .iter()
            .map(|fd| fd.map_or(-1, |fd| fd.as_raw_fd()) as u32);
        self.irqs(vfio::VFIO_IRQ_SET_DATA_EVENTFD, index, start, words)
    }

    /// Disables all interrupts of an index.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn disable_irqs(&self, index: u32) -> io::Result<()> {
        self.irqs(vfio::VFIO_IRQ_SET_DATA_NONE, index, 0, [].into_iter())
    }

    fn irqs(
        &self,
        data: u32,
        index: u32,
        start: u32,
        values: impl ExactSizeIterator<Item = u32>,
    ) -> io::Result<()> {
        let count = u32::try_from(values.len()).map_err(|_| invalid())?;
        let size = size_of::<vfio::vfio_irq_set>() as u32 + 4 * count;
        let flags = data | vfio::VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut words = vec![size, flags, index, start, count];
        words.extend(values);
        ioctl::set_irqs(self.file.as_fd(), &words)
    }

    /// True if the device can be reset by itself.
    pub fn can_reset(&self) -> bool {
        self.can_reset
    }

    /// Resets it: configuration space and device are as after power-on, DMA is over.
    ///
    /// # Errors
    ///
    /// What the kernel says; `EINVAL` for a device that cannot be reset.
    pub fn reset(&self) -> io::Result<()> {
        ioctl::call_with_value(self.file.as_fd(), ioctl::DEVICE_RESET, 0).map(drop)
    }
}

impl AsFd for VfioDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A device that is gone reads all ones: it counts as one that masters the bus.
fn masters(command: io::Result<u16>) -> bool {
    command.map_or(true, |command| command & COMMAND_MASTER != 0)
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

fn read_region(file: BorrowedFd<'_>, index: u32) -> io::Result<Region> {
    let head = [0, 0, index, 0, 0, 0, 0, 0];
    let bytes = match ioctl::query(file, ioctl::DEVICE_GET_REGION_INFO, &head) {
        // The kernel does not list the VGA region of a device that is no VGA controller.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Region::default()),
        result => result?,
    };
    Region::parse(&bytes).ok_or_else(|| {
        io::Error::other(format!(
            "the kernel's description of region {index} is cut off"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_device_that_says_so_does_not_master_the_bus() {
        assert!(!masters(Ok(0x0402)));
        assert!(masters(Ok(0x0406)));
        assert!(masters(Ok(0xffff)), "it is gone");
        assert!(masters(Err(invalid())));
    }
}

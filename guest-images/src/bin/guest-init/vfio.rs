//! A PCI function in the hands of this program, by VFIO.

use crate::bounded::bounded;
use crate::ioctl::{self, DmaPage};
use crate::pci::Found;
use crate::system::{say, write_text};
use anyhow::{Context, Result, bail};
use guest_images::scenario::PciAddress;
use rustix::event::{EventfdFlags, eventfd};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

pub(crate) use crate::ioctl::{Interrupt, Iommu};

const DRIVERS: &str = "/sys/bus/pci";
/// Limit of a change of drivers.
const BIND_LIMIT: Duration = Duration::from_secs(60);
/// Pause between looks for an interrupt.
const POLL: Duration = Duration::from_millis(1);

/// Regions of a VFIO device.
const BAR0: u32 = 0;
const CONFIG: u32 = 7;
/// PCI command register, with its bits for memory and bus mastering.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 1 << 1 | 1 << 2;

/// Switches of VFIO's modules.
const UNSAFE_INTERRUPTS: &str = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
const UNSAFE_NO_IOMMU: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// Takes a function from its driver and gives it to another.
pub(crate) fn bind(address: PciAddress, driver: &str) -> Result<()> {
    let name = address.to_string();
    let folder = Path::new(DRIVERS).join("devices").join(&name);
    let driver = driver.to_owned();
    bounded(&format!("{driver} for {name}"), BIND_LIMIT, move || {
        write_text(folder.join("driver_override"), &driver)?;
        if folder.join("driver").exists() {
            write_text(folder.join("driver/unbind"), &name)?;
        }
        write_text(Path::new(DRIVERS).join("drivers_probe"), &name)?;
        let bound = std::fs::read_link(folder.join("driver")).context("no driver")?;
        if bound.file_name().is_none_or(|bound| *bound != *driver) {
            bail!("{name} is bound to {}", bound.display());
        }
        Ok(())
    })
}

/// Takes a function from a driver, which may keep whoever does so waiting until its user lets go of it:
/// in a thread, whose end the result tells.
pub(crate) fn begin_unbind(address: PciAddress, driver: &str) -> Receiver<Result<()>> {
    let (done, end) = channel();
    let path = Path::new(DRIVERS)
        .join("drivers")
        .join(driver)
        .join("unbind");
    std::thread::spawn(move || {
        let result = write_text(path, &address.to_string());
        if let Err(error) = &result {
            // Who waits for the end waits for something else first.
            say(&format!("vpci: {error:#}"));
        }
        // Nobody may listen any more: then the run has failed already.
        let _ = done.send(result);
    });
    end
}

/// Takes a function from its driver for this program, and gives the file of its group and what
/// stands between it and memory.
pub(crate) fn take(function: &Found) -> Result<(std::path::PathBuf, Iommu)> {
    let iommu = match function.domain() {
        // MSIs of Hyper-V's bus are remapped by the host, which Linux cannot know: VFIO would
        // refuse.
        Some(_) => {
            write_text(UNSAFE_INTERRUPTS, "1")?;
            Iommu::Type1
        }
        None => {
            write_text(UNSAFE_NO_IOMMU, "1")?;
            Iommu::None
        }
    };
    bind(function.address, "vfio-pci")?;
    let group = function.iommu_group().context("IOMMU group")?;
    let file = match iommu {
        Iommu::Type1 => group,
        Iommu::None => format!("noiommu-{group}"),
    };
    Ok((Path::new("/dev/vfio").join(file), iommu))
}

/// Gives a function back to nobody.
pub(crate) fn release(address: PciAddress) -> Result<()> {
    let name = address.to_string();
    bounded(&format!("release of {name}"), BIND_LIMIT, move || {
        write_text(Path::new(DRIVERS).join("drivers/vfio-pci/unbind"), &name)?;
        let folder = Path::new(DRIVERS).join("devices").join(&name);
        write_text(folder.join("driver_override"), "\n")
    })
}

/// The function as this program has it.
#[derive(Debug)]
pub(crate) struct User {
    // In the order in which they are closed.
    device: File,
    interrupt: OwnedFd,
    _group: File,
    container: File,
    /// Where in the device's file BAR 0 begins.
    bar: u64,
}

impl User {
    /// Opens the function with its DMA and its first interrupt enabled.
    pub(crate) fn open(
        group: &Path,
        iommu: Iommu,
        address: PciAddress,
        kind: Interrupt,
    ) -> Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).open(path);
            file.with_context(|| path.display().to_string())
        };
        let container = open(Path::new("/dev/vfio/vfio"))?;
        let group = open(group)?;
        if !ioctl::is_viable(&group).context("VFIO group")? {
            bail!("the VFIO group is not viable");
        }
        ioctl::set_container(&group, &container, iommu).context("VFIO container")?;
        let device = ioctl::open_device(&group, &address.to_string()).context("VFIO device")?;
        let bar = ioctl::region(&device, BAR0).context("BAR 0")?;
        let config = ioctl::region(&device, CONFIG).context("configuration space")?;
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let user = Self {
            container,
            device,
            bar,
            interrupt: eventfd(0, flags)?,
            _group: group,
        };
        let at = config + COMMAND;
        let mut command = [0; 2];
        user.device.read_exact_at(&mut command, at)?;
        let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
        user.device.write_all_at(&command.to_le_bytes(), at)?;
        ioctl::set_interrupt(&user.device, kind, &user.interrupt).context("interrupt")?;
        Ok(user)
    }

    /// Lets the function read a page at `iova`, and write it if `write` is set.
    pub(crate) fn map(&self, iova: u64, page: &'static DmaPage, write: bool) -> Result<()> {
        ioctl::map(&self.container, iova, page, write).context("VFIO_IOMMU_MAP_DMA")
    }

    /// Ends the mapping of the page at `iova`.
    pub(crate) fn unmap(&self, iova: u64) -> Result<()> {
        ioctl::unmap(&self.container, iova).context("VFIO_IOMMU_UNMAP_DMA")
    }

    /// Interrupts since the last look.
    pub(crate) fn interrupts(&self) -> Result<u64> {
        let mut count = [0; 8];
        match rustix::io::read(&self.interrupt, &mut count) {
            Ok(_) => Ok(u64::from_ne_bytes(count)),
            Err(rustix::io::Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for interrupts and gives their number.
    pub(crate) fn wait(&self, what: &str, limit: Duration) -> Result<u64> {
        let start = Instant::now();
        loop {
            let count = self.interrupts()?;
            if count > 0 {
                return Ok(count);
            }
            if start.elapsed() >= limit {
                bail!("{what}: no interrupt in {} s", limit.as_secs());
            }
            std::thread::sleep(POLL);
        }
    }

    /// Loads a register of BAR 0.
    pub(crate) fn load32(&self, at: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.device.read_exact_at(&mut bytes, self.bar + at)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Loads a register by two accesses.
    pub(crate) fn load64(&self, at: u64) -> io::Result<u64> {
        let (low, high) = (self.load32(at)?, self.load32(at + 4)?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    /// Stores to a register of BAR 0.
    pub(crate) fn store32(&self, at: u64, value: u32) -> io::Result<()> {
        let bytes = value.to_le_bytes();
        self.device.write_all_at(&bytes, self.bar + at)
    }

    /// Stores to a register by two accesses.
    pub(crate) fn store64(&self, at: u64, value: u64) -> io::Result<()> {
        self.store32(at, value as u32)?;
        self.store32(at + 4, (value >> 32) as u32)
    }

    /// Stores to a register by one access of 64 bits, and checks that it arrived whole.
    pub(crate) fn store_whole64(&self, at: u64, value: u64) -> Result<()> {
        self.device
            .write_all_at(&value.to_le_bytes(), self.bar + at)?;
        let mut bytes = [0; 8];
        self.device.read_exact_at(&mut bytes, self.bar + at)?;
        let seen = u64::from_le_bytes(bytes);
        if seen != value {
            bail!("register {at:#x} is {seen:#x} after a store of {value:#x}");
        }
        Ok(())
    }
}

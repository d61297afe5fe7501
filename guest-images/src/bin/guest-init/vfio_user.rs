//! The test device in the hands of this program, by VFIO's type 1 interface, and back in its
//! driver's.

use crate::bounded::bounded;
use crate::ioctl::{self, DmaPage, PAGE};
use crate::pci::{self, Found};
use crate::system::{step, wait_for, write_text};
use anyhow::{Context, Result, bail};
use guest_images::report::{DmaOwner, DmaReport, DmaResult, DmaTest};
use guest_images::scenario::{Expected, PciAddress};
use rustix::event::{EventfdFlags, eventfd};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

const DRIVERS: &str = "/sys/bus/pci";
const LIMIT: Duration = Duration::from_secs(60);

/// Regions of a VFIO device.
const BAR0: u32 = 0;
const CONFIG: u32 = 7;
/// PCI command register, with its bits for memory and bus mastering.
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 1 << 1 | 1 << 2;

/// Registers of the test device (`src/devices/testdev.rs`).
mod register {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const SOURCE: u64 = 0x10;
    pub(super) const DESTINATION: u64 = 0x18;
    pub(super) const LENGTH: u64 = 0x20;
    pub(super) const VECTOR: u64 = 0x24;
    pub(super) const PATTERN: u64 = 0x28;
    pub(super) const COMMAND: u64 = 0x30;
    pub(super) const STATUS: u64 = 0x34;
    pub(super) const ERROR: u64 = 0x38;
    pub(super) const FAULT: u64 = 0x40;
    pub(super) const MOVED: u64 = 0x48;
}
const MAGIC: u32 = 0x5654_5044;
const COPY: u32 = 1;
const FILL: u32 = 2;
const CHECKSUM: u32 = 3;
/// All bits of `STATUS` that a store clears.
const STATUS_ALL: u32 = 0xe;

/// What pages hold before a job, and what jobs write.
const CANARY: u64 = 0xa5a5_a5a5_a5a5_a5a5;
const FILLER: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// Where pages are mapped: far from one another and from where the driver's mappings begin.
const SOURCE_IOVA: u64 = 0x1_0000_0000;
const DESTINATION_IOVA: u64 = 0x7f_ffff_f000;
const READ_ONLY_IOVA: u64 = 0x20_0000;
const NEVER_IOVA: u64 = 0x30_0000;

/// Every test from user space, with the device taken from its driver for the time.
pub(crate) fn run(device: &Found) -> Result<Vec<DmaReport>> {
    let address = device.address;
    // MSIs of Hyper-V's bus are remapped by the host, which Linux cannot know: VFIO would refuse.
    let allow = "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts";
    write_text(allow, "1")?;
    let group = device.iommu_group().context("IOMMU group")?;
    step(format!("vfio: take {address}"));
    bind(address, "vfio-pci")?;
    let work = move || {
        let user = User::open(&Path::new("/dev/vfio").join(group), address)?;
        user.tests()
    };
    let results = bounded("vfio: tests", LIMIT, work)?;
    step(format!("vfio: give {address} back"));
    bind(address, "vpci-testdev")?;
    let expected = Expected {
        address,
        kind: device.kind,
    };
    pci::wait_expected(&[expected], LIMIT)?;
    let report = |(test, result)| DmaReport {
        address,
        owner: DmaOwner::User,
        test,
        result,
    };
    Ok(results.into_iter().map(report).collect())
}

/// Takes a function from its driver and gives it to another.
pub(crate) fn bind(address: PciAddress, driver: &str) -> Result<()> {
    let name = address.to_string();
    let folder = Path::new(DRIVERS).join("devices").join(&name);
    let driver = driver.to_owned();
    bounded(&format!("{driver} for {name}"), LIMIT, move || {
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

/// The device as this program has it.
struct User {
    // In the order in which they are closed.
    device: File,
    interrupt: OwnedFd,
    _group: File,
    container: File,
    /// Where in the device's file BAR 0 begins.
    bar: u64,
}

impl User {
    fn open(group: &Path, address: PciAddress) -> Result<Self> {
        let open = |path: &Path| {
            let file = OpenOptions::new().read(true).write(true).open(path);
            file.with_context(|| path.display().to_string())
        };
        let container = open(Path::new("/dev/vfio/vfio"))?;
        if !ioctl::has_type1(&container).context("VFIO")? {
            bail!("VFIO has no type 1 interface");
        }
        let group = open(group)?;
        if !ioctl::is_viable(&group).context("VFIO group")? {
            bail!("the VFIO group is not viable");
        }
        ioctl::set_container(&group, &container).context("VFIO container")?;
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
        if user.load32(register::MAGIC)? != MAGIC {
            bail!("the device is another");
        }
        ioctl::set_msix(&user.device, &user.interrupt).context("MSI-X")?;
        Ok(user)
    }

    fn tests(&self) -> Result<Vec<(DmaTest, DmaResult)>> {
        let source = DmaPage::leak(FILLER);
        let destination = DmaPage::leak(CANARY);
        let map = |iova, page, write| {
            ioctl::map(&self.container, iova, page, write).context("VFIO_IOMMU_MAP_DMA")
        };
        let unmap = |iova| ioctl::unmap(&self.container, iova).context("VFIO_IOMMU_UNMAP_DMA");
        let mut results = Vec::new();

        map(SOURCE_IOVA, source, false)?;
        map(DESTINATION_IOVA, destination, true)?;
        let mut result = self.job(COPY, SOURCE_IOVA, DESTINATION_IOVA)?;
        result.intact = destination.holds(FILLER) && source.holds(FILLER);
        results.push((DmaTest::Copy, result));

        destination.fill(CANARY);
        unmap(DESTINATION_IOVA)?;
        let mut result = self.job(FILL, 0, DESTINATION_IOVA)?;
        result.intact = destination.holds(CANARY);
        results.push((DmaTest::Stale, result));

        let page = DmaPage::leak(CANARY);
        map(READ_ONLY_IOVA, page, false)?;
        let mut result = self.job(FILL, 0, READ_ONLY_IOVA)?;
        result.intact = page.holds(CANARY);
        results.push((DmaTest::ReadOnly, result));

        for (test, command) in [(DmaTest::StrayWrite, FILL), (DmaTest::StrayRead, CHECKSUM)] {
            let mut result = self.job(command, NEVER_IOVA, NEVER_IOVA)?;
            result.intact = page.holds(CANARY) && source.holds(FILLER);
            results.push((test, result));
        }
        unmap(READ_ONLY_IOVA)?;
        unmap(SOURCE_IOVA)?;
        Ok(results)
    }

    /// Runs one job of a page, and waits for its interrupt.
    fn job(&self, command: u32, source: u64, destination: u64) -> Result<DmaResult> {
        step(format!(
            "vfio: job {command} from {source:#x} to {destination:#x}"
        ));
        self.store32(register::STATUS, STATUS_ALL)?;
        self.store64(register::SOURCE, source)?;
        self.store64(register::DESTINATION, destination)?;
        self.store32(register::LENGTH, PAGE as u32)?;
        self.store32(register::VECTOR, 0)?;
        self.store64(register::PATTERN, FILLER)?;
        self.store32(register::COMMAND, command)?;
        wait_for("the interrupt of a job", LIMIT / 2, || {
            let mut count = [0; 8];
            match rustix::io::read(&self.interrupt, &mut count) {
                Ok(_) => Ok(Some(())),
                Err(rustix::io::Errno::AGAIN) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })?;
        Ok(DmaResult {
            error: self.load32(register::ERROR)?,
            moved: self.load64(register::MOVED)?,
            fault: self.load64(register::FAULT)?,
            iova: if command == CHECKSUM {
                source
            } else {
                destination
            },
            intact: false,
        })
    }

    fn load32(&self, at: u64) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.device.read_exact_at(&mut bytes, self.bar + at)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn load64(&self, at: u64) -> io::Result<u64> {
        let (low, high) = (self.load32(at)?, self.load32(at + 4)?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn store32(&self, at: u64, value: u32) -> io::Result<()> {
        let bytes = value.to_le_bytes();
        self.device.write_all_at(&bytes, self.bar + at)
    }

    fn store64(&self, at: u64, value: u64) -> io::Result<()> {
        self.store32(at, value as u32)?;
        self.store32(at + 4, (value >> 32) as u32)
    }
}

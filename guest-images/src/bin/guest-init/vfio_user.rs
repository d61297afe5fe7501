//! The test device in the hands of this program, by VFIO's type 1 interface, and back in its
//! driver's.

use crate::bounded::bounded;
use crate::ioctl::{DmaPage, PAGE};
use crate::pci::{self, Found};
use crate::system::step;
use crate::vfio::{self, Interrupt, Iommu, User, bind};
use anyhow::{Result, bail};
use guest_images::report::{DmaOwner, DmaReport, DmaResult, DmaTest};
use guest_images::scenario::{Expected, PciAddress};
use std::path::Path;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

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
    step(format!("vfio: take {address}"));
    let (group, iommu) = vfio::take(device)?;
    let work = move || Device::open(&group, iommu, address)?.tests();
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

/// The device as this program has it.
struct Device(User);

impl Device {
    fn open(group: &Path, iommu: Iommu, address: PciAddress) -> Result<Self> {
        let user = User::open(group, iommu, address, Interrupt::Msix)?;
        if user.load32(register::MAGIC)? != MAGIC {
            bail!("the device is another");
        }
        Ok(Self(user))
    }

    fn tests(&self) -> Result<Vec<(DmaTest, DmaResult)>> {
        let source = DmaPage::leak(FILLER);
        let destination = DmaPage::leak(CANARY);
        let map = |iova, page, write| self.0.map(iova, page, write);
        let unmap = |iova| self.0.unmap(iova);
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
        self.0.store32(register::STATUS, STATUS_ALL)?;
        self.0.store64(register::SOURCE, source)?;
        self.0.store64(register::DESTINATION, destination)?;
        self.0.store32(register::LENGTH, PAGE as u32)?;
        self.0.store32(register::VECTOR, 0)?;
        self.0.store64(register::PATTERN, FILLER)?;
        self.0.store32(register::COMMAND, command)?;
        self.0.wait("job", LIMIT / 2)?;
        Ok(DmaResult {
            error: self.0.load32(register::ERROR)?,
            moved: self.0.load64(register::MOVED)?,
            fault: self.0.load64(register::FAULT)?,
            iova: if command == CHECKSUM {
                source
            } else {
                destination
            },
            intact: false,
        })
    }
}

//! DMA of the test device, ordered through its driver's file in debugfs.

use crate::bounded::bounded;
use crate::pci::Found;
use crate::system::{self, read_text, step, write_text};
use anyhow::{Context, Result};
use guest_images::report::{DmaOwner, DmaReport, DmaTest};
use guest_images::scenario::Domain;
use rustix::mount::MountFlags;
use std::path::Path;
use std::time::Duration;

const DEBUGFS: &str = "/sys/kernel/debug";
/// Directory of the driver below it (`guest-images/linux/testdev.c`).
const FOLDER: &str = "vpci-testdev";
/// Limit of one test.
const LIMIT: Duration = Duration::from_secs(60);
/// Milliseconds after which a lazy unmap has been flushed: many times the kernel's own limit
/// (`drivers/iommu/dma-iommu.c`, IOVA_DEFAULT_FQ_TIMEOUT).
const LAZY_MS: u32 = 1000;

/// Runs tests on a device.
pub(crate) fn run(device: &Found, tests: &[DmaTest]) -> Result<Vec<DmaReport>> {
    system::mount_at("debugfs", "debugfs", DEBUGFS, MountFlags::empty(), None)?;
    let wait_ms = match device.domain() {
        Some(domain) if domain == Domain::Strict.as_str() => 0,
        _ => LAZY_MS,
    };
    tests
        .iter()
        .map(|test| one(device, *test, wait_ms))
        .collect()
}

fn one(device: &Found, test: DmaTest, wait_ms: u32) -> Result<DmaReport> {
    let what = format!("dma {} of {}", test.as_str(), device.address);
    step(what.clone());
    let command = match test {
        DmaTest::Stale => format!("{} {wait_ms}", test.as_str()),
        _ => test.as_str().to_owned(),
    };
    let file = Path::new(DEBUGFS)
        .join(FOLDER)
        .join(device.address.to_string());
    let line = bounded(&what, LIMIT, move || {
        write_text(&file, &command)?;
        read_text(&file)
    });
    let line = line.context(what)?;
    Ok(DmaReport {
        address: device.address,
        owner: DmaOwner::Driver,
        test,
        result: line.parse().map_err(anyhow::Error::msg)?,
    })
}

//! Devices of L1 that the rig hands to vfio-pci before anything else runs.

use crate::pci;
use crate::system::{step, wait_for};
use crate::vfio::bind;
use anyhow::{Context, Result, bail};
use guest_images::scenario::HostDevice;
use std::time::Duration;

/// How long a device may take to appear after the modules are loaded.
const LIMIT: Duration = Duration::from_secs(20);

/// Binds each device to vfio-pci; the error names the one that could not be.
pub(crate) fn take(devices: &[HostDevice]) -> Result<()> {
    for device in devices {
        let (address, kind) = (device.address, device.kind);
        let what = format!("host device {address} ({})", kind.as_str());
        step(match device.left {
            true => format!("leave {what} to its driver"),
            false => format!("bind {what} to vfio-pci"),
        });
        let there = || Ok(pci::exists(address).then_some(()));
        wait_for(&what, LIMIT, there)?;
        let found = pci::find(address)?;
        if found.kind != kind {
            bail!("{what}: is {}", found.kind.as_str());
        }
        if found.iommu_group().is_none() {
            bail!("{what}: in no IOMMU group");
        }
        if !device.left {
            bind(address, "vfio-pci").with_context(|| what)?;
        }
    }
    Ok(())
}

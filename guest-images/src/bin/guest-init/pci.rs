//! PCI functions, as sysfs shows them.

use crate::system::{read_text, wait_for};
use anyhow::{Context, Result};
use guest_images::report::PciFunctionReport;
use guest_images::scenario::{Expected, Kind, PciAddress};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

/// Directory of all PCI functions.
const DEVICES: &str = "/sys/bus/pci/devices";
/// Vendor id of virtio functions.
const VIRTIO_VENDOR: u16 = 0x1af4;
/// Vendor and device ids of what is not virtio.
const OTHERS: [((u32, u32), Kind); 4] = [
    ((0x1234, 0x5650), Kind::Testdev),
    ((0x1234, 0x11e8), Kind::Edu),
    ((0x1b36, 0x0010), Kind::Nvme),
    ((0x8086, 0x10d3), Kind::E1000e),
];

/// A PCI function and what hangs below it.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) address: PciAddress,
    pub(crate) kind: Kind,
    path: PathBuf,
}

impl Found {
    fn open(address: PciAddress) -> Result<Self> {
        let path = Path::new(DEVICES).join(address.to_string());
        let kind = kind_of(hex(&path.join("vendor"))?, hex(&path.join("device"))?);
        Ok(Self {
            address,
            kind,
            path,
        })
    }

    /// Directory of the virtio device, once its transport driver has made one.
    pub(crate) fn virtio(&self) -> Option<PathBuf> {
        child_starting(&self.path, "virtio")
    }

    /// Name of the block device below, once there is one.
    pub(crate) fn block(&self) -> Option<String> {
        let block = match self.kind {
            Kind::Nvme => {
                let controller = child_starting(&self.path.join("nvme"), "nvme")?;
                let name = controller.file_name()?.to_str()?;
                // With multiple paths the one to use is `nvme0n1`, not `nvme0c0n1`.
                child_starting(&controller, &format!("{name}n"))?
            }
            _ => child_starting(&self.virtio()?.join("block"), "vd")?,
        };
        Some(block.file_name()?.to_str()?.to_owned())
    }

    /// Name of the network interface below, once there is one.
    pub(crate) fn interface(&self) -> Option<String> {
        names(&self.path.join("net")).ok()?.into_iter().next()
    }

    /// Linux interrupt numbers of the function's MSI or MSI-X vectors; none before its driver has
    /// enabled them.
    pub(crate) fn msi_irqs(&self) -> Result<Vec<u32>> {
        let directory = self.path.join("msi_irqs");
        if !directory.exists() {
            return Ok(Vec::new());
        }
        names(&directory)?
            .iter()
            .map(|name| {
                name.parse()
                    .with_context(|| format!("{}/{name}", directory.display()))
            })
            .collect()
    }

    /// The VMBus device that the function's root bus belongs to.
    pub(crate) fn vmbus_device(&self) -> Option<String> {
        let path = fs::canonicalize(&self.path).ok()?;
        path.components()
            .filter_map(|part| part.as_os_str().to_str())
            .find(|part| Uuid::parse_str(part).is_ok())
            .map(str::to_owned)
    }

    /// Whether its drivers are bound and what they make is there.
    fn ready(&self) -> bool {
        let bound = self
            .virtio()
            .is_some_and(|virtio| virtio.join("driver").exists());
        match self.kind {
            // The last that the kernel makes of a disk (block/genhd.c, add_disk_fwnode).
            Kind::Blk => {
                let size = |name| Path::new("/sys/block").join(name).join("size");
                bound && self.block().is_some_and(|name| size(name).exists())
            }
            Kind::Rng => bound,
            Kind::Nvme => self.block().is_some(),
            Kind::E1000e => self.interface().is_some(),
            Kind::Testdev => driver(&self.path).is_some(),
            // No driver knows these.
            Kind::Edu | Kind::Vfio | Kind::Other => true,
        }
    }

    pub(crate) fn report(&self) -> Result<PciFunctionReport> {
        Ok(PciFunctionReport {
            address: self.address,
            vendor: hex(&self.path.join("vendor"))? as u16,
            device_id: hex(&self.path.join("device"))? as u16,
            class: hex(&self.path.join("class"))?,
            kind: self.kind,
            driver: driver(&self.path),
            virtio_driver: self.virtio().as_deref().and_then(driver),
            msix_vectors: self.msi_irqs()?.len() as u32,
            vmbus_device: self.vmbus_device(),
            domain: self.domain(),
        })
    }

    /// Number of its IOMMU group, if it is in one.
    pub(crate) fn iommu_group(&self) -> Option<String> {
        let group = fs::read_link(self.path.join("iommu_group")).ok()?;
        Some(group.file_name()?.to_str()?.to_owned())
    }

    /// Type of the default domain of its IOMMU group, if it has one.
    pub(crate) fn domain(&self) -> Option<String> {
        read_text(self.path.join("iommu_group/type")).ok()
    }
}

fn kind_of(vendor: u32, device: u32) -> Kind {
    if let Some((_, kind)) = OTHERS.iter().find(|(ids, _)| *ids == (vendor, device)) {
        return *kind;
    }
    if vendor != u32::from(VIRTIO_VENDOR) {
        return Kind::Other;
    }
    match device {
        0x1001 | 0x1042 => Kind::Blk,
        0x1005 | 0x1044 => Kind::Rng,
        _ => Kind::Other,
    }
}

/// Every PCI function, by address.
pub(crate) fn list() -> Result<Vec<Found>> {
    let mut addresses: Vec<PciAddress> = names(Path::new(DEVICES))?
        .iter()
        .map(|name| name.parse().map_err(anyhow::Error::msg))
        .collect::<Result<_>>()?;
    addresses.sort();
    addresses.into_iter().map(Found::open).collect()
}

/// The function at `address`.
pub(crate) fn find(address: PciAddress) -> Result<Found> {
    Found::open(address)
}

/// Whether a function exists at `address`.
pub(crate) fn exists(address: PciAddress) -> bool {
    Path::new(DEVICES).join(address.to_string()).exists()
}

/// Waits until every expected function is there with its drivers bound.
pub(crate) fn wait_expected(expected: &[Expected], limit: Duration) -> Result<Vec<Found>> {
    let mut missing = String::new();
    let found = wait_for("PCI functions", limit, || {
        let mut found = Vec::new();
        missing.clear();
        for item in expected {
            // A function can vanish between the two looks: that is "not there yet".
            match exists(item.address).then(|| Found::open(item.address)) {
                Some(Ok(function)) if function.kind == item.kind && function.ready() => {
                    found.push(function);
                }
                _ => missing.push_str(&format!(" {}={}", item.address, item.kind.as_str())),
            }
        }
        Ok(missing.is_empty().then_some(found))
    });
    found.with_context(|| format!("missing or without driver:{missing}; present:{}", present()))
}

fn present() -> String {
    let all = list().unwrap_or_default();
    all.iter()
        .map(|function| {
            let driver = driver(&function.path).unwrap_or_else(|| "no driver".into());
            format!(
                " {}={} ({driver})",
                function.address,
                function.kind.as_str()
            )
        })
        .collect()
}

fn driver(device: &Path) -> Option<String> {
    let target = fs::read_link(device.join("driver")).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

fn hex(path: &Path) -> Result<u32> {
    let text = read_text(path)?;
    u32::from_str_radix(text.trim_start_matches("0x"), 16)
        .with_context(|| format!("{}: {text:?}", path.display()))
}

/// Sorted names in a directory.
pub(crate) fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn child_starting(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let names = names(directory).ok()?;
    let name = names.iter().find(|name| name.starts_with(prefix))?;
    Some(directory.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_give_the_kind() {
        assert_eq!(kind_of(0x1234, 0x5650), Kind::Testdev);
        assert_eq!(kind_of(0x1234, 0x11e8), Kind::Edu);
        assert_eq!(kind_of(0x1b36, 0x0010), Kind::Nvme);
        assert_eq!(kind_of(0x8086, 0x10d3), Kind::E1000e);
        assert_eq!(kind_of(0x1b36, 0x0005), Kind::Other);
        assert_eq!(kind_of(0x1af4, 0x1001), Kind::Blk);
        assert_eq!(kind_of(0x1af4, 0x1042), Kind::Blk);
        assert_eq!(kind_of(0x1af4, 0x1044), Kind::Rng);
        assert_eq!(kind_of(0x1af4, 0x1041), Kind::Other);
        assert_eq!(kind_of(0x8086, 0x1042), Kind::Other);
    }
}

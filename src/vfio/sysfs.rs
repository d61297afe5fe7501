//! What the host's files tell about devices, groups and IOMMUs.
#![forbid(unsafe_code)]

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// VT-d extended capability: nested translation.
const ECAP_NEST: u64 = 1 << 26;
/// VT-d extended capability: scalable mode, which Linux nests in only.
const ECAP_SMTS: u64 = 1 << 43;
/// PCI base class of bridges, which stay with the host in any group.
const CLASS_BRIDGE: u32 = 0x06;
/// Drivers of the host that do not keep a group from being used.
const HARMLESS_DRIVERS: [&str; 2] = ["pci-stub", "pcieport"];
/// Bit of CAP_IPC_LOCK in a set of capabilities.
const CAP_IPC_LOCK: u64 = 1 << 14;

/// Files of the host below a root, which tests choose.
#[derive(Debug, Clone)]
struct Root(PathBuf);

impl Root {
    fn text(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.0.join(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn has(&self, path: &str) -> bool {
        self.0.join(path).exists()
    }

    /// Names in a directory, in order; numbers by value.
    fn names(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.0.join(path)).into_iter().flatten();
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let mut names: Vec<String> = names.collect();
        names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        names
    }

    /// Last part of where a symbolic link leads.
    fn link(&self, path: &str) -> Option<String> {
        let target = fs::read_link(self.0.join(path)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }
}

/// One IOMMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Iommu {
    /// Name of the kernel, such as `dmar0`.
    pub name: String,
    /// `intel`, `amd` or `other`.
    pub kind: &'static str,
    /// It and its driver can translate by a guest's own tables.
    pub nested: bool,
}

/// A PCI device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciDevice {
    /// Its address, such as `0000:00:02.0`.
    pub address: String,
    /// Vendor and device id, such as `1af4:1044`.
    pub id: String,
    /// Class, subclass and programming interface in hex, such as `010802`.
    pub class: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// Name of its node in `/dev/vfio/devices`, such as `vfio0`.
    pub cdev: Option<String>,
}

impl PciDevice {
    fn read(root: &Root, base: &str, address: String) -> Self {
        let hex = |file: &str| {
            let text = root.text(&format!("{base}/{file}")).unwrap_or_default();
            text.trim_start_matches("0x").to_owned()
        };
        Self {
            id: format!("{}:{}", hex("vendor"), hex("device")),
            class: hex("class"),
            driver: root.link(&format!("{base}/driver")),
            cdev: root.names(&format!("{base}/vfio-dev")).into_iter().next(),
            address,
        }
    }

    /// True for bridges.
    pub fn is_bridge(&self) -> bool {
        u32::from_str_radix(&self.class, 16).is_ok_and(|class| class >> 16 == CLASS_BRIDGE)
    }

    /// True for a device of vfio-pci or of a variant driver of a vendor.
    pub fn is_with_vfio(&self) -> bool {
        self.driver.as_ref().is_some_and(|driver| {
            driver == "vfio-pci" || driver.ends_with("_vfio_pci") || driver.ends_with("-vfio-pci")
        })
    }

    /// True if the host's kernel uses it, so that its group cannot be used by anyone else.
    pub fn is_with_host(&self) -> bool {
        let Some(driver) = &self.driver else {
            return false;
        };
        !self.is_bridge() && !self.is_with_vfio() && !HARMLESS_DRIVERS.contains(&driver.as_str())
    }
}

/// An IOMMU group: devices that can only be passed through together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its number.
    pub id: u32,
    /// VFIO has it without an IOMMU.
    pub without_iommu: bool,
    /// Its devices, by address.
    pub devices: Vec<PciDevice>,
    /// I/O virtual addresses that its devices cannot have mapped.
    pub reserved: Vec<RangeInclusive<u64>>,
}

impl Group {
    fn read(root: &Root, id: u32) -> Self {
        let base = format!("sys/kernel/iommu_groups/{id}");
        let devices = root.names(&format!("{base}/devices")).into_iter();
        let devices = devices.map(|address| {
            let device = format!("{base}/devices/{address}");
            PciDevice::read(root, &device, address)
        });
        let name = root.text(&format!("{base}/name"));
        let reserved = root.text(&format!("{base}/reserved_regions"));
        Self {
            id,
            without_iommu: name.is_some_and(|name| name == "vfio-noiommu"),
            devices: devices.collect(),
            reserved: reserved.as_deref().map(reserved_ranges).unwrap_or_default(),
        }
    }

    /// True if no device of it is the host's, and at least one is VFIO's.
    pub fn is_viable(&self) -> bool {
        let mut devices = self.devices.iter();
        devices.clone().any(PciDevice::is_with_vfio) && !devices.any(PciDevice::is_with_host)
    }
}

/// The ranges of a `reserved_regions` file that cannot be mapped: lines of first address, last
/// address and type.
fn reserved_ranges(text: &str) -> Vec<RangeInclusive<u64>> {
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let range = |line: &str| {
        let mut words = line.split_whitespace();
        let (first, last) = (hex(words.next()?)?, hex(words.next()?)?);
        (words.next()? != "direct-relaxable").then_some(first..=last)
    };
    text.lines().filter_map(range).collect()
}

/// What the host has for passing devices through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Survey {
    /// IOMMUs.
    pub iommus: Vec<Iommu>,
    /// Interrupts go through an IOMMU's remapping table.
    pub interrupt_remapping: bool,
    /// Modules that let devices in although interrupts are not remapped.
    pub unsafe_interrupts: Vec<&'static str>,
    /// Names of the nodes in `/dev/vfio/devices`.
    pub cdevs: Vec<String>,
    /// Groups, by number.
    pub groups: Vec<Group>,
}

/// Looks at the files below `root`, which is `/` for the host itself.
pub fn survey(root: &Path) -> Survey {
    let root = Root(root.to_owned());
    let groups = root.names("sys/kernel/iommu_groups").into_iter();
    let groups = groups.filter_map(|id| id.parse().ok());
    Survey {
        iommus: root
            .names("sys/class/iommu")
            .into_iter()
            .map(|name| iommu(&root, name))
            .collect(),
        interrupt_remapping: remaps_interrupts(&root),
        unsafe_interrupts: ["vfio_iommu_type1", "iommufd"]
            .into_iter()
            .filter(|module| allows_unsafe_interrupts(&root, module))
            .collect(),
        cdevs: root.names("dev/vfio/devices"),
        groups: groups.map(|id| Group::read(&root, id)).collect(),
    }
}

fn iommu(root: &Root, name: String) -> Iommu {
    let base = format!("sys/class/iommu/{name}");
    let ecap = root
        .text(&format!("{base}/intel-iommu/ecap"))
        .and_then(|text| u64::from_str_radix(&text, 16).ok());
    let kind = match ecap {
        Some(_) => "intel",
        None if root.has(&format!("{base}/amd-iommu")) => "amd",
        None => "other",
    };
    // The AMD driver does not nest for user space as of Linux 7.3 (docs/spec/vfio-rig.md,
    // section 6), whatever the hardware can do.
    let nested = ecap.is_some_and(|ecap| ecap & ECAP_NEST != 0 && ecap & ECAP_SMTS != 0);
    Iommu { name, kind, nested }
}

fn remaps_interrupts(root: &Root) -> bool {
    let text = root.text("proc/interrupts");
    text.is_some_and(|text| text.contains(" IR-"))
}

fn allows_unsafe_interrupts(root: &Root, module: &str) -> bool {
    let parameter = format!("sys/module/{module}/parameters/allow_unsafe_interrupts");
    root.text(&parameter)
        .is_some_and(|text| text == "Y" || text == "1")
}

/// What the host's files tell about one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DeviceFacts {
    /// The device itself.
    pub(super) device: PciDevice,
    /// Its group; `None` if it has no IOMMU.
    pub(super) group: Option<Group>,
}

/// Looks at the device at `address`; `None` if there is none.
pub(super) fn device(root: &Path, address: &str) -> Option<DeviceFacts> {
    let root = Root(root.to_owned());
    let base = format!("sys/bus/pci/devices/{address}");
    if !root.has(&base) {
        return None;
    }
    let group = root.link(&format!("{base}/iommu_group"));
    let group = group.and_then(|id| id.parse().ok());
    Some(DeviceFacts {
        device: PciDevice::read(&root, &base, address.to_owned()),
        group: group.map(|id| Group::read(&root, id)),
    })
}

/// True if the host remaps interrupts, or the module lets devices in although it does not.
pub(super) fn confines_interrupts(root: &Path, module: &str) -> bool {
    let root = Root(root.to_owned());
    remaps_interrupts(&root) || allows_unsafe_interrupts(&root, module)
}

/// Bytes that this process may lock in memory, as the files below `root` say (`/` for the host itself);
/// `None` if there is no limit, or it is not known.
pub fn memlock_limit(root: &Path) -> Option<u64> {
    let root = Root(root.to_owned());
    let status = root.text("proc/self/status").unwrap_or_default();
    let capabilities = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let capabilities = capabilities.and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
    if capabilities.is_some_and(|set| set & CAP_IPC_LOCK != 0) {
        return None;
    }
    let limits = root.text("proc/self/limits")?;
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// True for `DDDD:BB:DD.F` in hex, as sysfs spells it.
pub(super) fn is_address(text: &str) -> bool {
    let is_hex = |part: &str, len: usize| {
        part.len() == len
            && part
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let parts: Vec<_> = text.split([':', '.']).collect();
    let [domain, bus, device, function] = parts[..] else {
        return false;
    };
    let separators: String = text.chars().filter(|c| [':', '.'].contains(c)).collect();
    separators == "::."
        && (4..=8).contains(&domain.len())
        && is_hex(domain, domain.len())
        && is_hex(bus, 2)
        && is_hex(device, 2)
        && is_hex(function, 1)
}

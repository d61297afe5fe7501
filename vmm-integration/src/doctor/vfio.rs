//! Devices that could be passed through: IOMMUs, VFIO groups and device nodes, iommufd.
#![forbid(unsafe_code)]

use std::io;

use serde::Serialize;
use vm_vpci::vfio::{self, Interface};

use super::finding::{Finding, Status, Topic};
use super::root::Root;

/// A device node, and what it is for.
struct Node {
    /// Below the root.
    path: &'static str,
    /// What follows if it can be opened.
    with: &'static str,
    /// What follows if it cannot.
    without: &'static str,
    /// What to do where it is not there.
    advice: &'static str,
}

const NODES: [Node; 2] = [
    Node {
        path: "dev/vfio/vfio",
        with: "groups can be used through type1",
        without: "no group can be used through type1",
        advice: "modprobe vfio-pci (CONFIG_VFIO_CONTAINER, CONFIG_VFIO_PCI)",
    },
    Node {
        path: "dev/iommu",
        with: "devices can be used through iommufd",
        without: "no device can be used through iommufd",
        advice: "modprobe iommufd (CONFIG_IOMMUFD)",
    },
];

/// One IOMMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Iommu {
    /// Name of the kernel, such as `dmar0`.
    pub(crate) name: String,
    /// `intel`, `amd` or `other`.
    pub(crate) kind: &'static str,
    /// It and its driver can translate by a guest's own tables.
    pub(crate) nested: bool,
}

/// A PCI function of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Device {
    /// Its address, such as `0000:00:02.0`.
    pub(crate) address: String,
    /// Vendor and device id, such as `1af4:1044`.
    pub(crate) id: String,
    /// Class, subclass and programming interface in hex, such as `010802`.
    pub(crate) class: String,
    /// The driver that has it.
    pub(crate) driver: Option<String>,
    /// Its VFIO character device, such as `vfio0`.
    pub(crate) cdev: Option<String>,
}

/// An IOMMU group: devices that can only be passed through together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Group {
    /// Number of the group.
    pub(crate) id: String,
    /// No device of it is the host's, and at least one is VFIO's.
    pub(crate) viable: bool,
    /// Its devices.
    pub(crate) devices: Vec<Device>,
}

impl From<&vfio::Iommu> for Iommu {
    fn from(iommu: &vfio::Iommu) -> Self {
        Self {
            name: iommu.name.clone(),
            kind: iommu.kind,
            nested: iommu.nested,
        }
    }
}

impl From<&vfio::PciDevice> for Device {
    fn from(device: &vfio::PciDevice) -> Self {
        let device = device.clone();
        Self {
            address: device.address,
            id: device.id,
            class: device.class,
            driver: device.driver,
            cdev: device.cdev,
        }
    }
}

impl From<&vfio::IommuGroup> for Group {
    fn from(group: &vfio::IommuGroup) -> Self {
        Self {
            id: group.id.to_string(),
            viable: group.is_viable(),
            devices: group.devices.iter().map(Device::from).collect(),
        }
    }
}

/// What the host has for passing devices through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(crate) struct VfioFacts {
    /// IOMMUs.
    pub(crate) iommus: Vec<Iommu>,
    /// Interrupts go through an IOMMU's remapping table.
    pub(crate) interrupt_remapping: bool,
    /// `/dev/vfio/vfio` can be opened.
    pub(crate) container: bool,
    /// `/dev/iommu` can be opened.
    pub(crate) iommufd: bool,
    /// Names of the nodes in `/dev/vfio/devices`.
    pub(crate) cdevs: Vec<String>,
    /// Groups of PCI functions.
    pub(crate) groups: Vec<Group>,
}

impl VfioFacts {
    /// True if a device is ready to be passed through.
    pub(super) fn has_viable_group(&self) -> bool {
        self.groups.iter().any(|group| group.viable)
    }

    /// True if the host can nest a guest's tables for devices.
    pub(super) fn nests(&self) -> bool {
        self.iommufd && !self.cdevs.is_empty() && self.iommus.iter().any(|iommu| iommu.nested)
    }
}

/// Looks at everything that passing devices through needs.
pub(super) fn examine(root: &Root, findings: &mut Vec<Finding>) -> VfioFacts {
    let survey = vfio::survey(&root.path(""));
    let facts = VfioFacts {
        iommus: survey.iommus.iter().map(Iommu::from).collect(),
        interrupt_remapping: survey.interrupt_remapping,
        container: root.open("dev/vfio/vfio").is_ok(),
        iommufd: root.open("dev/iommu").is_ok(),
        groups: survey.groups.iter().map(Group::from).collect(),
        cdevs: survey.cdevs.clone(),
    };
    findings.push(iommu_finding(root, &facts.iommus));
    findings.push(nesting_finding(&facts.iommus));
    findings.push(remapping_finding(&survey));
    findings.extend(NODES.iter().map(|node| node_finding(root, node)));
    findings.push(cdev_finding(&facts.cdevs));
    for group in &survey.groups {
        findings.push(group_finding(group));
        let ours = group.devices.iter().filter(|device| device.is_with_vfio());
        findings.extend(ours.map(|device| device_finding(root, &device.address)));
    }
    if facts.groups.is_empty() {
        let none = Finding::new(Topic::PassThrough, "IOMMU groups", Status::Missing);
        findings.push(
            none.found("none")
                .follows("no device can be passed through"),
        );
    }
    facts
}

fn iommu_finding(root: &Root, iommus: &[Iommu]) -> Finding {
    let finding = Finding::new(Topic::PassThrough, "IOMMU", Status::Ok);
    if iommus.is_empty() {
        let advice = if root.has_cpu_flag("hypervisor") {
            "give this VM a virtual IOMMU, and the device to it"
        } else {
            "switch VT-d or AMD-Vi on in the firmware; on Intel boot with intel_iommu=on"
        };
        return finding
            .status(Status::Missing)
            .found("none in use")
            .follows("emulated functions only")
            .advise(advice);
    }
    let names: Vec<_> = iommus
        .iter()
        .map(|iommu| format!("{} ({})", iommu.name, iommu.kind))
        .collect();
    finding
        .found(names.join(", "))
        .follows("DMA of passed-through devices is confined")
}

fn nesting_finding(iommus: &[Iommu]) -> Finding {
    let finding = Finding::new(Topic::PassThrough, "nested translation", Status::Note);
    if iommus.iter().any(|iommu| iommu.nested) {
        // Its calls have run on the kernel's mock IOMMU (docs/passthrough.md).
        return finding
            .status(Status::Ok)
            .found("announced")
            .follows(
                "the IOMMU walks a guest's own tables, in scalable mode (intel_iommu=sm_on); this has \
                 not run on hardware yet",
            )
            .advise("dma=shadow for a device, should nesting make trouble");
    }
    if iommus.iter().any(|iommu| iommu.kind == "amd") {
        return finding
            .found("not by Linux on AMD IOMMUs")
            .follows("a guest's tables are shadowed, which costs exits");
    }
    let follows = "a guest's tables are shadowed, which costs exits";
    let finding = finding.found("none").follows(follows);
    if iommus.iter().any(|iommu| iommu.kind == "intel") {
        return finding.advise("boot with intel_iommu=on,sm_on; older hardware cannot");
    }
    finding
}

fn remapping_finding(survey: &vfio::Survey) -> Finding {
    let finding = Finding::new(Topic::PassThrough, "interrupt remapping", Status::Ok);
    if survey.interrupt_remapping {
        let follows = "a device's interrupts are confined, too";
        return finding.found("in use").follows(follows);
    }
    if !survey.unsafe_interrupts.is_empty() {
        let modules = survey.unsafe_interrupts.join(" and ");
        return finding
            .status(Status::Limited)
            .found(format!("not in use, and allowed to be by {modules}"))
            .follows("a passed-through device can send any interrupt to this host")
            .advise("switch interrupt remapping on in the firmware");
    }
    let finding = finding.status(Status::Missing).found("not in use");
    if survey.iommus.is_empty() {
        return finding.follows("it comes with an IOMMU");
    }
    finding
        .follows("VFIO refuses devices (EPERM)")
        .advise(
            "switch it on in the firmware, or set allow_unsafe_interrupts of vfio_iommu_type1 or iommufd",
        )
}

fn node_finding(root: &Root, node: &Node) -> Finding {
    let finding = Finding::new(Topic::PassThrough, &format!("/{}", node.path), Status::Ok);
    let error = match root.open(node.path) {
        Ok(()) => return finding.found("can be opened").follows(node.with),
        Err(error) => error,
    };
    let (found, advice) = match error.kind() {
        io::ErrorKind::PermissionDenied => (
            "no access".into(),
            "give this user access to it, or be root",
        ),
        io::ErrorKind::NotFound => ("not there".into(), node.advice),
        _ => (error.to_string(), node.advice),
    };
    finding
        .status(Status::Missing)
        .found(found)
        .follows(node.without)
        .advise(advice)
}

fn cdev_finding(cdevs: &[String]) -> Finding {
    let finding = Finding::new(Topic::PassThrough, "/dev/vfio/devices", Status::Ok);
    if cdevs.is_empty() {
        return finding
            .status(Status::Note)
            .found("empty or not there")
            .follows("no device can be used through iommufd")
            .advise("bind a device to vfio-pci (CONFIG_VFIO_DEVICE_CDEV)");
    }
    finding
        .found(cdevs.join(", "))
        .follows("these devices can be used through iommufd")
}

fn group_finding(group: &vfio::IommuGroup) -> Finding {
    let devices: Vec<_> = group
        .devices
        .iter()
        .map(|device| {
            let driver = device.driver.as_deref().unwrap_or("no driver");
            format!("{} {} ({driver})", device.address, device.id)
        })
        .collect();
    let name = format!("group {}", group.id);
    let finding = Finding::new(Topic::PassThrough, &name, Status::Ok).found(devices.join(", "));
    if group.is_viable() {
        return finding.follows("ready to be passed through");
    }
    let with_host: Vec<_> = group
        .devices
        .iter()
        .filter(|device| device.is_with_host())
        .map(|device| device.address.as_str())
        .collect();
    if group.devices.iter().any(vfio::PciDevice::is_with_vfio) {
        return finding
            .status(Status::Limited)
            .follows("VFIO refuses the group while the host uses a part of it")
            .advise(format!("unbind {}", with_host.join(", ")));
    }
    let finding = finding.status(Status::Note);
    if group.devices.iter().all(vfio::PciDevice::is_bridge) {
        return finding.follows("a bridge, which stays with the host");
    }
    finding
        .follows("the host's own")
        .advise("driver_override vfio-pci for each device, if it is to be passed through")
}

/// Whether a device that is bound to vfio-pci could be given to a guest now.
fn device_finding(root: &Root, address: &str) -> Finding {
    let name = format!("device {address}");
    let finding = Finding::new(Topic::PassThrough, &name, Status::Ok);
    match vfio::check(&root.path(""), address, Interface::Auto) {
        Ok(facts) => {
            let found = match facts.interface {
                Interface::Iommufd => "can be opened by iommufd",
                _ => "can be opened by its group (type1)",
            };
            finding
                .found(found)
                .follows(format!("--vpci vfio,host={address}"))
        }
        Err(error) => {
            // It begins with the address.
            let text = error.to_string();
            let text = text.strip_prefix(address).unwrap_or(&text);
            let text = text.trim_start_matches(": ");
            let (found, advice) = text.split_once("; ").unwrap_or((text, ""));
            let finding = finding.status(Status::Limited).found(found);
            let finding = finding.follows("it cannot be passed through as it is");
            if advice.is_empty() {
                return finding;
            }
            finding.advise(advice)
        }
    }
}

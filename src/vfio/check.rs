//! Whether a device of the host can be passed through, before anything is opened for good.
#![forbid(unsafe_code)]

use std::path::Path;

use super::error::VfioError;
use super::node;
use super::sysfs::{self, Group, PciDevice};

const MIB: u64 = 1 << 20;

/// By which of the kernel's interfaces devices are opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Interface {
    /// By iommufd if the device has a node of its own and both nodes can be opened, else by its
    /// group.
    #[default]
    Auto,
    /// By its group and a type1 container.
    Type1,
    /// By its own node and iommufd.
    Iommufd,
}

/// What is known of a device that can be passed through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// The device.
    pub device: PciDevice,
    /// Its group.
    pub group: Group,
    /// The interface to open it by: never [`Interface::Auto`].
    pub interface: Interface,
}

/// Looks at the host's files below `root` (`/` for the host itself): can the device at `address` be
/// passed through, and by which interface? Nodes are opened and closed again.
///
/// # Errors
///
/// [`VfioError`], saying what to do.
pub fn check(root: &Path, address: &str, wanted: Interface) -> Result<HostFacts, VfioError> {
    let facts = examine(root, address, wanted)?;
    let iommufd = facts.interface == Interface::Iommufd;
    let module = if iommufd {
        "iommufd"
    } else {
        "vfio_iommu_type1"
    };
    if !sysfs::confines_interrupts(root, module) {
        return Err(VfioError::NoRemapping {
            address: address.into(),
            module,
            parameter: "allow_unsafe_interrupts",
        });
    }
    if !iommufd {
        let nodes = [node::CONTAINER.to_owned(), node::group(facts.group.id)];
        for node in nodes {
            node::open(root, address, &node)?;
        }
    }
    Ok(facts)
}

/// The same, but for what the kernel says when the device is opened.
pub(super) fn examine(
    root: &Path,
    address: &str,
    wanted: Interface,
) -> Result<HostFacts, VfioError> {
    let owned = || address.to_owned();
    if !sysfs::is_address(address) {
        return Err(VfioError::BadAddress { address: owned() });
    }
    let facts = sysfs::device(root, address);
    let facts = facts.ok_or_else(|| VfioError::NoDevice { address: owned() })?;
    let (device, group) = (facts.device, facts.group);
    let group = group.ok_or_else(|| VfioError::NoIommu { address: owned() })?;
    if group.without_iommu {
        return Err(VfioError::NoIommuMode { address: owned() });
    }
    if !device.is_with_vfio() {
        return Err(VfioError::NotBound {
            address: owned(),
            driver: device.driver,
        });
    }
    if !group.is_viable() {
        let users = group.devices.iter().filter(|device| device.is_with_host());
        let name = |device: &PciDevice| {
            let driver = device.driver.as_deref().unwrap_or("no driver");
            format!("{} ({driver})", device.address)
        };
        return Err(VfioError::NotViable {
            address: owned(),
            group: group.id,
            users: users.map(name).collect(),
        });
    }
    Ok(HostFacts {
        interface: choose(root, &device, wanted)?,
        device,
        group,
    })
}

fn choose(root: &Path, device: &PciDevice, wanted: Interface) -> Result<Interface, VfioError> {
    if wanted == Interface::Type1 {
        return Ok(Interface::Type1);
    }
    let result = iommufd_nodes(root, device);
    match result {
        Ok(()) => Ok(Interface::Iommufd),
        // Somebody has it already: the group would only say less about it.
        Err(error @ VfioError::InUse { .. }) => Err(error),
        Err(error) if wanted == Interface::Iommufd => Err(error),
        Err(_) => Ok(Interface::Type1),
    }
}

fn iommufd_nodes(root: &Path, device: &PciDevice) -> Result<(), VfioError> {
    let name = device.cdev.as_deref().unwrap_or("vfioN");
    for node in [node::device(name), node::IOMMUFD.to_owned()] {
        node::open(root, &device.address, &node)?;
    }
    Ok(())
}

/// Checks that this process may lock `ram` bytes of guest RAM `copies` times: each type1 container
/// and each iommufd address space locks what is mapped in it.
///
/// # Errors
///
/// [`VfioError::Memlock`].
pub fn check_memlock(root: &Path, ram: u64, copies: u64) -> Result<(), VfioError> {
    let Some(limit) = sysfs::memlock_limit(root) else {
        return Ok(());
    };
    let need = ram.saturating_mul(copies);
    if need <= limit {
        return Ok(());
    }
    Err(VfioError::Memlock {
        limit: limit / MIB,
        need: need.div_ceil(MIB),
        copies,
    })
}

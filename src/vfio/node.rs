//! Nodes of `/dev`.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use super::error::VfioError;

/// The node that makes containers, below the root.
pub(super) const CONTAINER: &str = "dev/vfio/vfio";
/// The node of iommufd.
pub(super) const IOMMUFD: &str = "dev/iommu";

/// The node of a group.
pub(super) fn group(id: u32) -> String {
    format!("dev/vfio/{id}")
}

/// The node of a device.
pub(super) fn device(name: &str) -> String {
    format!("dev/vfio/devices/{name}")
}

fn advice(node: &str) -> &'static str {
    match node {
        CONTAINER => "modprobe vfio-pci (CONFIG_VFIO_CONTAINER, CONFIG_VFIO_PCI)",
        IOMMUFD => "modprobe iommufd (CONFIG_IOMMUFD)",
        _ if node.starts_with("dev/vfio/devices/") => {
            "the host's kernel needs CONFIG_VFIO_DEVICE_CDEV, and the device to be bound to vfio-pci"
        }
        _ => "the host's kernel needs CONFIG_VFIO_GROUP, and the device to be bound to vfio-pci",
    }
}

/// Opens a node for the device at `address`.
pub(super) fn open(root: &Path, address: &str, node: &str) -> Result<File, VfioError> {
    let path = root.join(node);
    let address = || address.to_owned();
    let error = match File::options().read(true).write(true).open(&path) {
        Ok(file) => return Ok(file),
        Err(error) => error,
    };
    let node = Path::new("/").join(node);
    Err(match (error.kind(), error.raw_os_error()) {
        (_, Some(libc::EBUSY)) => VfioError::InUse {
            address: address(),
            node,
        },
        (io::ErrorKind::PermissionDenied, _) => VfioError::NoPermission {
            address: address(),
            node,
        },
        (io::ErrorKind::NotFound, _) | (_, Some(libc::ENODEV | libc::ENXIO)) => VfioError::NoNode {
            address: address(),
            advice: advice(
                node.strip_prefix("/")
                    .unwrap_or(&node)
                    .to_str()
                    .unwrap_or(""),
            ),
            node,
        },
        _ => VfioError::Host {
            address: address(),
            what: "opening its node",
            error,
        },
    })
}

//! Why a device of the host cannot be passed through: one line each, with what to do.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::backend::SpaceError;

/// A device cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The address is malformed.
    #[error("{address:?} is no PCI address: it looks like 0000:00:05.0")]
    BadAddress {
        /// What was given.
        address: String,
    },
    /// There is no such device.
    #[error("{address}: the host has no such PCI device; lspci -D lists those that it has")]
    NoDevice {
        /// Its address.
        address: String,
    },
    /// It is behind no IOMMU.
    #[error(
        "{address}: the host has no IOMMU in use for it; switch VT-d or AMD-Vi on in the firmware, and \
         on Intel boot with intel_iommu=on"
    )]
    NoIommu {
        /// Its address.
        address: String,
    },
    /// VFIO has it without an IOMMU, which confines nothing.
    #[error(
        "{address}: VFIO has it in no-IOMMU mode, in which its DMA reaches all of the host; switch the \
         IOMMU on and bind the device again"
    )]
    NoIommuMode {
        /// Its address.
        address: String,
    },
    /// It is not bound to vfio-pci.
    #[error(
        "{address}: {}; write vfio-pci to /sys/bus/pci/devices/{address}/driver_override, {}{address} \
         to /sys/bus/pci/drivers_probe",
        match driver { Some(name) => format!("it is bound to {name}, not to vfio-pci"),
            None => "it is not bound to vfio-pci".into() },
        match driver { Some(name) => format!("{address} to /sys/bus/pci/drivers/{name}/unbind, and "),
            None => "and ".into() },
    )]
    NotBound {
        /// Its address.
        address: String,
        /// The driver that has it.
        driver: Option<String>,
    },
    /// A driver of the host has another device of its group.
    #[error(
        "{address}: its IOMMU group {group} has devices that the host uses: {}; unbind each from its \
         driver, or bind it to vfio-pci",
        users.join(", ")
    )]
    NotViable {
        /// Its address.
        address: String,
        /// Number of the group.
        group: u32,
        /// The devices, each with its driver.
        users: Vec<String>,
    },
    /// A node of `/dev` is not there.
    #[error("{address}: {} is not there; {advice}", node.display())]
    NoNode {
        /// Address of the device.
        address: String,
        /// The node.
        node: PathBuf,
        /// What makes it appear.
        advice: &'static str,
    },
    /// A node of `/dev` may not be opened.
    #[error(
        "{address}: no access to {}; give this user read and write access to it, or be root",
        node.display()
    )]
    NoPermission {
        /// Address of the device.
        address: String,
        /// The node.
        node: PathBuf,
    },
    /// Another program, or another function of this VM, has it.
    #[error("{address}: {} is in use; end the program that has it open", node.display())]
    InUse {
        /// Its address.
        address: String,
        /// The node.
        node: PathBuf,
    },
    /// The VM has the device already.
    #[error("{address}: this VM has it already")]
    Twice {
        /// Its address.
        address: String,
    },
    /// Nothing confines its interrupts.
    #[error(
        "{address}: the host does not remap interrupts, so VFIO refuses it; switch interrupt remapping \
         on in the firmware, or, if you trust the guest, write Y to \
         /sys/module/{module}/parameters/{parameter}"
    )]
    NoRemapping {
        /// Its address.
        address: String,
        /// The kernel module that refuses.
        module: &'static str,
        /// Its parameter.
        parameter: &'static str,
    },
    /// Guest RAM does not fit under the limit on locked memory.
    #[error(
        "the limit on locked memory is {limit} MiB, and passed-through devices need {need} MiB (guest \
         RAM, {copies} times); raise it (ulimit -l, LimitMEMLOCK=, limits.conf), or give CAP_IPC_LOCK"
    )]
    Memlock {
        /// The limit in MiB.
        limit: u64,
        /// What is needed in MiB.
        need: u64,
        /// How often guest RAM is locked.
        copies: u64,
    },
    /// The IOMMU does not reach all of guest RAM.
    #[error(
        "{address}: its IOMMU cannot map guest RAM {start:#x} to {end:#x}; give the guest less memory, \
         or move what lies there"
    )]
    Unreachable {
        /// Address of the device.
        address: String,
        /// First guest physical address of the region.
        start: u64,
        /// The one behind its last.
        end: u64,
    },
    /// The kernel's interface is not what it should be.
    #[error("{address}: {} {what}; Linux 6.2 or later is needed", node.display())]
    Unsupported {
        /// Address of the device.
        address: String,
        /// The node.
        node: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Other members of the device's group are in another domain.
    #[error(
        "{address}: its IOMMU group {group} is in another domain, with {}; devices of one group share \
         a domain",
        members.join(", ")
    )]
    OtherDomain {
        /// Its address.
        address: String,
        /// Number of the group.
        group: u32,
        /// The other members that the VM has.
        members: Vec<String>,
    },
    /// Mapping guest RAM failed.
    #[error("{address}: guest RAM could not be mapped for it: {error}")]
    Space {
        /// Address of the device.
        address: String,
        /// Why.
        #[source]
        error: SpaceError,
    },
    /// The device could not be put into the default domain.
    #[error("{address}: it could not be put into its default domain: {error}")]
    Move {
        /// Its address.
        address: String,
        /// Why.
        error: String,
    },
    /// Its domains were to be nested, and cannot be.
    #[error("{address}: its tables cannot be nested: {why}; use dma=auto or dma=shadow")]
    CannotNest {
        /// Address of the device.
        address: String,
        /// Why.
        why: super::nested::CannotNest,
    },
    /// The kernel failed otherwise.
    #[error("{address}: {what} failed: {error}")]
    Host {
        /// Its address.
        address: String,
        /// What was tried.
        what: &'static str,
        /// The kernel's error.
        #[source]
        error: io::Error,
    },
}

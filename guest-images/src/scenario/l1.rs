//! What scenarios choose about L1: its kernel, and devices for pass-through.

#![forbid(unsafe_code)]

use super::{Kind, PciAddress};
use serde::{Deserialize, Serialize};

/// What is special about L1. Nothing is by default: the rig's usual kernel, no IOMMU, no devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct L1 {
    /// Kernel family; `None` is the rig's usual one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Devices that the rig binds to vfio-pci before anything else runs, unless they are left to
    /// their drivers. With any, L1's computer has an IOMMU in front of its devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<HostDevice>,
    /// Whether what KVM does is recorded, and the last of it shown if a run fails.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub trace: bool,
}

/// A device of L1 for pass-through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostDevice {
    /// Where it is in L1. On bus 1 it is behind a bridge to conventional PCI, and shares its IOMMU
    /// group with the bridge and all else behind it.
    pub address: PciAddress,
    /// What it is: [`Kind::Edu`], [`Kind::Nvme`], [`Kind::Rng`] or [`Kind::E1000e`].
    pub kind: Kind,
    /// Size of an NVMe namespace in MiB; 0 for anything else.
    #[serde(default)]
    pub size_mib: u32,
    /// Whether a guest has it reach for memory that is not the guest's. The IOMMU must then refuse
    /// it at least once; and never otherwise.
    #[serde(default)]
    pub strays: bool,
    /// Whether it stays with the driver that L1's kernel has for it.
    #[serde(default)]
    pub left: bool,
}

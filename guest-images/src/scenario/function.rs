//! The PCI functions that a guest gets.

#![forbid(unsafe_code)]

use super::PciAddress;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A PCI function of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Function {
    /// A virtio-blk disk.
    Blk {
        /// Instance GUID of the vPCI bus; its Data2 is the PCI domain the guest shall use.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Size of the disk in MiB.
        size_mib: u32,
        /// Number of request queues.
        queues: u16,
        /// Whether the disk is read-only.
        #[serde(default)]
        readonly: bool,
        /// MiB by which the disk grows when the guest is ready for it; 0 keeps its size.
        #[serde(default)]
        grow_mib: u32,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
    /// A virtio-rng entropy source.
    Rng {
        /// Instance GUID of the vPCI bus.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
    /// The DMA test device.
    Testdev {
        /// Instance GUID of the vPCI bus.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
    /// A device of L1, passed through.
    Vfio {
        /// Instance GUID of the vPCI bus.
        bus: Uuid,
        /// PCI function number on that bus, 0 to 7.
        #[serde(default)]
        function: u8,
        /// Address of the device in L1; one of [`super::L1::devices`].
        host: PciAddress,
        /// What the guest must find.
        guest: Kind,
        /// Size of an NVMe namespace in MiB; 0 for anything else.
        #[serde(default)]
        size_mib: u32,
        /// Whether it is behind the pvIOMMU.
        #[serde(default)]
        iommu: bool,
    },
}

impl Function {
    /// Instance GUID of the vPCI bus the function sits on.
    pub fn bus(&self) -> Uuid {
        match self {
            Function::Blk { bus, .. }
            | Function::Rng { bus, .. }
            | Function::Testdev { bus, .. }
            | Function::Vfio { bus, .. } => *bus,
        }
    }

    /// PCI function number on the bus.
    pub fn number(&self) -> u8 {
        match self {
            Function::Blk { function, .. }
            | Function::Rng { function, .. }
            | Function::Testdev { function, .. }
            | Function::Vfio { function, .. } => *function,
        }
    }

    /// Whether it is behind the pvIOMMU.
    pub fn iommu(&self) -> bool {
        match self {
            Function::Blk { iommu, .. }
            | Function::Rng { iommu, .. }
            | Function::Testdev { iommu, .. }
            | Function::Vfio { iommu, .. } => *iommu,
        }
    }

    /// PCI domain that the bus GUID asks for: Data2 (`docs/spec/vpci.md#1-identity`).
    pub fn domain(&self) -> u16 {
        self.bus().as_fields().1
    }

    /// The kind that the guest must find.
    pub fn kind(&self) -> Kind {
        match self {
            Function::Vfio { guest, .. } => *guest,
            _ => self.host_kind(),
        }
    }

    /// The kind as the VMM's report names it.
    pub fn host_kind(&self) -> Kind {
        match self {
            Function::Blk { .. } => Kind::Blk,
            Function::Rng { .. } => Kind::Rng,
            Function::Testdev { .. } => Kind::Testdev,
            Function::Vfio { .. } => Kind::Vfio,
        }
    }

    /// Address the function must have in the guest.
    pub fn address(&self) -> PciAddress {
        PciAddress {
            domain: u32::from(self.domain()),
            bus: 0,
            device: 0,
            function: self.number(),
        }
    }
}

/// Kind of a PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// virtio-blk.
    Blk,
    /// virtio-rng.
    Rng,
    /// The DMA test device.
    Testdev,
    /// An NVMe controller.
    Nvme,
    /// Intel's 82574L network controller.
    E1000e,
    /// QEMU's educational device.
    Edu,
    /// A device of L1, as the VMM's report names it: what it is to a guest is the guest's to say.
    Vfio,
    /// Anything else.
    Other,
}

impl Kind {
    /// The kinds that a guest can be told to expect.
    pub const EXPECTED: [Kind; 6] = [
        Kind::Blk,
        Kind::Rng,
        Kind::Testdev,
        Kind::Nvme,
        Kind::E1000e,
        Kind::Edu,
    ];

    /// The word used on command lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Blk => "blk",
            Kind::Rng => "rng",
            Kind::Testdev => "testdev",
            Kind::Nvme => "nvme",
            Kind::E1000e => "e1000e",
            Kind::Edu => "edu",
            Kind::Vfio => "vfio",
            Kind::Other => "other",
        }
    }
}

//! What a device implements to sit on a vPCI bus.
#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::dma::Dma;
use crate::mem::DeviceMemory;
use crate::pviommu::{DeviceBackend, IommuMode};
use crate::vmm::Msi;

/// Number of base address registers in a type 0 header.
pub const BAR_COUNT: usize = 6;

/// Identity of a function: the read-only part of the type 0 header (PCI Local Bus 3.0, 6.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PciIdentity {
    /// Vendor id. 0xFFFF is not a function.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Programming interface.
    pub prog_if: u8,
    /// Sub-class code.
    pub subclass: u8,
    /// Base class code.
    pub base_class: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
    /// Serial number that the bus relations carry; 0 when the device has none.
    pub serial: u32,
}

/// Shape of one base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BarSpec {
    /// Not implemented, or the upper half of the 64-bit BAR before it.
    #[default]
    None,
    /// 32-bit memory BAR, not prefetchable.
    Memory32 {
        /// Size in bytes: a power of two, at least 4096.
        size: u32,
    },
    /// 64-bit memory BAR; it takes the next register too, which must be [`BarSpec::None`].
    Memory64 {
        /// Size in bytes: a power of two, at least 4096.
        size: u64,
        /// Prefetchable bit.
        prefetchable: bool,
    },
}

/// One capability of the function, besides MSI and MSI-X, which the bus makes itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability {
    /// Capability id (PCI Code and ID Assignment, such as 0x09 for vendor specific).
    pub id: u8,
    /// Bytes behind the id and the next pointer.
    pub body: Vec<u8>,
    /// Bits of `body` that the guest may write; same length as `body`. All zero for a read-only
    /// capability.
    pub writable: Vec<u8>,
}

/// Where the MSI-X structures lie (PCI Local Bus 3.0, 6.8.2). The bus answers accesses to them;
/// they must not share a page with registers of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixSpec {
    /// Number of vectors, 1 to 2048; at most 494 of them can be live at once.
    pub vectors: u16,
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in its BAR, a multiple of 8.
    pub table_offset: u32,
    /// BAR of the pending bit array.
    pub pba_bar: u8,
    /// Offset of the pending bit array in its BAR, a multiple of 8.
    pub pba_offset: u32,
}

/// The MSI capability of a function (PCI Local Bus 3.0, 6.8.1): 64-bit, with per-vector masking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiSpec {
    /// Messages the function can ask for: 1, 2, 4, 8, 16 or 32.
    pub messages: u8,
}

/// Everything about a function that never changes while it is plugged in.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FunctionLayout {
    /// Short name for logs and reports, such as `blk`.
    pub kind: &'static str,
    /// Identity registers.
    pub identity: PciIdentity,
    /// Base address registers.
    pub bars: [BarSpec; BAR_COUNT],
    /// Capabilities in list order, before MSI-X and MSI.
    pub capabilities: Vec<Capability>,
    /// MSI-X, if the function has it.
    pub msix: Option<MsixSpec>,
    /// MSI, if the function has it.
    pub msi: Option<MsiSpec>,
}

/// Raises a function's interrupts. Implemented by the bus.
pub trait InterruptLines: Send + Sync + Debug {
    /// Signals vector `vector` (MSI-X table index, or MSI message number). Delivered, kept pending
    /// while masked, or dropped when the guest has programmed no live handle, as a real device
    /// would. Never blocks for longer than a vector's guard; callable from any thread.
    fn raise(&self, vector: u16);
}

/// Which interrupts of a function the guest has switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InterruptMode {
    /// None.
    #[default]
    Off,
    /// MSI.
    Msi {
        /// Messages enabled: a power of two, at most those of the layout.
        messages: u8,
    },
    /// MSI-X.
    Msix,
}

/// Where the events of a vector go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorRoute {
    /// Into the guest, as this message.
    To(Msi),
    /// Nowhere for now: the guest masks the vector. One is kept, and sent when the route is `To`.
    Held,
    /// Nowhere: the guest has programmed no live message.
    Dropped,
}

/// Interrupts of a device that the host's kernel delivers by itself. Implemented by the device; the bus
/// says what the guest wants.
///
/// Calls come with the guard of a vector, or of the MSI capability, held: they must not call back.
/// When one returns, nothing is delivered that the former setting allowed and the new one does not.
pub trait HostVectors: Send + Sync + Debug {
    /// Switches the interrupts; all routes are [`VectorRoute::Dropped`] afterwards unless the mode is
    /// what it was. A guest that changes the number of messages while they are on loses what was kept.
    fn set_mode(&self, mode: InterruptMode);

    /// Sends the events of a vector (MSI-X table index, or MSI message number) somewhere else. Comes
    /// only while that kind of interrupts is on.
    fn route(&self, vector: u16, to: VectorRoute);

    /// True if an event of the vector is kept.
    fn is_pending(&self, vector: u16) -> bool;
}

/// A piece of a BAR that the guest reaches without an exit.
#[derive(Debug, Clone)]
pub struct BarArea {
    /// Offset of the piece in its BAR, a multiple of the page size.
    pub offset: u64,
    /// What is there: whole pages.
    pub memory: Arc<DeviceMemory>,
}

/// A function's register in a BAR whose store may ring an eventfd in the kernel.
#[derive(Debug)]
pub struct DoorbellRegister {
    /// BAR of the register.
    pub bar: u8,
    /// Offset of the register in its BAR.
    pub offset: u64,
    /// Width of the store in bytes, or 0 for any.
    pub len: u8,
    /// Only this value rings, or any when absent.
    pub data: Option<u64>,
    /// The eventfd to ring.
    pub eventfd: OwnedFd,
}

/// A function to plug in.
#[derive(Debug, Clone)]
pub struct FunctionSpec {
    /// Function number, 0 to 7.
    pub number: u8,
    /// The device.
    pub device: Arc<dyn PciFunction>,
    /// Whether it is behind the VM's pvIOMMU.
    pub iommu: IommuMode,
}

impl FunctionSpec {
    /// `device` as function `number`, not behind a pvIOMMU.
    pub fn new(number: u8, device: Arc<dyn PciFunction>) -> Self {
        Self {
            number,
            device,
            iommu: IommuMode::Off,
        }
    }

    /// The same, plugged in as `iommu` says.
    #[must_use]
    pub fn with_iommu(mut self, iommu: IommuMode) -> Self {
        self.iommu = iommu;
        self
    }
}

/// What the bus gives a function when it is plugged in.
#[derive(Debug, Clone)]
pub struct FunctionResources {
    /// Access to guest memory.
    pub dma: Dma,
    /// The function's interrupts.
    pub interrupts: Arc<dyn InterruptLines>,
}

/// A device on a vPCI bus.
///
/// The bus emulates the configuration header, the capabilities of the layout, BAR placement, and
/// the MSI-X table; the device sees only its registers, its DMA and its interrupts. Methods are
/// called from any virtual CPU thread, possibly several at once, and must return after bounded
/// work, because unmapping a BAR waits for the accesses to it: longer work belongs to the device's
/// own worker. What a device calls, [`Dma`] and [`InterruptLines`], takes no lock that is held
/// while the device is called.
pub trait PciFunction: Send + Sync + Debug {
    /// The constant facts. Called when the function is plugged in.
    fn layout(&self) -> FunctionLayout;

    /// Hands over DMA and interrupts. Called once, before any other access, when nothing can refuse
    /// the bus any more.
    fn connect(&self, resources: FunctionResources);

    /// A guest load from BAR `bar`; `data` is 1, 2, 4 or 8 bytes, naturally aligned, inside the
    /// BAR. Unimplemented registers read as zero.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// A guest store to BAR `bar`; same rules.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// A guest load from capability `capability` of the layout, `offset` bytes into its body; `data`
    /// holds what the bus has stored there, and `body` the whole body. For registers that the bus
    /// cannot keep for the device, such as virtio's window on its BARs (virtio 1.2, 4.1.4.9).
    fn capability_read(&self, capability: usize, offset: usize, body: &[u8], data: &mut [u8]) {
        let _ = (capability, offset, body, data);
    }

    /// A guest store of `len` bytes to a capability, after the writable bits were stored in `body`.
    fn capability_write(&self, capability: usize, offset: usize, body: &[u8], len: usize) {
        let _ = (capability, offset, body, len);
    }

    /// Registers whose stores may ring an eventfd. Asked once, when the function is plugged in.
    fn doorbells(&self) -> Vec<DoorbellRegister> {
        Vec::new()
    }

    /// Pieces of BAR `bar` that the guest may reach without an exit, apart from each other. Asked once,
    /// when the function is plugged in. The bus leaves out the pages of the MSI-X structures; accesses
    /// to a piece come to [`PciFunction::bar_read`] and [`PciFunction::bar_write`] all the same where
    /// the VMM cannot map it.
    fn bar_areas(&self, bar: u8) -> Vec<BarArea> {
        let _ = bar;
        Vec::new()
    }

    /// The interrupts, if the host's kernel delivers them and the device does not call
    /// [`InterruptLines::raise`]. Asked once, when the function is plugged in. A partition with such a
    /// function is not saved ([`StateInHardware`](crate::partition::StateInHardware)).
    fn host_vectors(&self) -> Option<Arc<dyn HostVectors>> {
        None
    }

    /// What makes the device's DMA obey its domain, if the device does not use the [`Dma`] that it is
    /// given. Asked once, when the function is plugged in. A partition with such a function is not saved
    /// ([`StateInHardware`](crate::partition::StateInHardware)).
    fn dma_backend(&self) -> Option<Arc<dyn DeviceBackend>> {
        None
    }

    /// The guest switched bus mastering. For a device that does not use [`Dma`], where it is in force
    /// already: when this returns the device starts no DMA while it is off. Called with the placement
    /// lock of the function held: it must not switch bus mastering or write the configuration space.
    fn set_bus_master(&self, on: bool) {
        let _ = on;
    }

    /// Back to the power-on state. When this returns the device starts no DMA and raises no
    /// interrupt for anything that was asked of it before. The bus has already switched off bus
    /// mastering, which drained DMA under way, and unmapped the BARs: no access is under way.
    fn reset(&self);
}

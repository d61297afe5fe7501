//! What a VM is made of, and what a test asks of the host beside the guest: the operator's side.
#![forbid(unsafe_code)]

use std::fmt::{self, Debug};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use uuid::Uuid;
use vm_vpci::cpuid::Features;
use vm_vpci::devices::testdev::TestDevice;
use vm_vpci::partition::PartitionCounters;
use vm_vpci::pviommu::{IommuConfig, IommuMode, IommuReport};
use vm_vpci::vmbus::VmBusConfig;
use vm_vpci::vmm::WorkerHost;
use vm_vpci::vpci::Ejected;
use vm_vpci::vpci::bus::BusReport;
use vm_vpci::vpci::function::PciFunction;

/// Frequency of the guest's TSC in Hz that a bed without a TSC reports.
pub const SIM_TSC_HZ: u64 = 2_000_000_000;
/// Input clock of the local APIC timer in Hz.
pub const APIC_HZ: u64 = 1_000_000_000;

/// What a VM is made of.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Number of VPs, at least 1. VP indices and APIC ids are `0..vps`.
    pub vps: u32,
    /// Guest physical ranges of RAM, page-aligned, ascending. The first starts at 0 and has at
    /// least 8 MiB: a bed may use part of it ([`crate::guest::Guest::free_ram`]).
    pub ram: Vec<Range<u64>>,
    /// Guest physical ranges for vPCI buses: one below 4 GiB, one above.
    pub mmio: Vec<Range<u64>>,
    /// Optional parts of the interface.
    pub features: Features,
    /// Limits of the VMBus server.
    pub vmbus: VmBusConfig,
    /// The pvIOMMU, if there is one.
    pub iommu: Option<IommuConfig>,
    /// Buses that are plugged in before the guest starts.
    pub buses: Vec<BusSetup>,
}

/// Start of the low MMIO range of [`Setup::default`].
pub const LOW_MMIO: u64 = 0xf000_0000;
/// Start of the high MMIO range of [`Setup::default`].
pub const HIGH_MMIO: u64 = 0x10_0000_0000;

impl Default for Setup {
    /// Two VPs, 16 MiB of RAM and one bus with one `testdev`; no pvIOMMU.
    fn default() -> Self {
        Self {
            vps: 2,
            ram: vec![Range {
                start: 0,
                end: 16 << 20,
            }],
            mmio: vec![
                LOW_MMIO..LOW_MMIO + (16 << 20),
                HIGH_MMIO..HIGH_MMIO + (4 << 30),
            ],
            features: Features::default(),
            vmbus: VmBusConfig::default(),
            iommu: None,
            buses: vec![BusSetup::testdev(1)],
        }
    }
}

/// A bus with its functions.
#[derive(Debug, Clone)]
pub struct BusSetup {
    /// Instance GUID of the bus.
    pub instance: Uuid,
    /// Functions, whose numbers are 0 to 7.
    pub functions: Vec<FunctionSetup>,
}

impl BusSetup {
    /// The instance GUID of the bus `number` (1 to 0x7FFF), which becomes its PCI domain.
    pub fn instance(number: u16) -> Uuid {
        let tail = [0x80, 0, 0, 0, 0, 0, 0, 1];
        Uuid::from_fields(number.into(), number, 0xab78, &tail)
    }

    /// A bus with one `testdev` as function 0.
    pub fn testdev(number: u16) -> Self {
        Self {
            instance: Self::instance(number),
            functions: vec![FunctionSetup::testdev(0)],
        }
    }
}

type Make = dyn Fn(&dyn WorkerHost) -> io::Result<Arc<dyn PciFunction>> + Send + Sync;

/// A function of a bus.
#[derive(Clone)]
pub struct FunctionSetup {
    /// Function number, 0 to 7.
    pub number: u8,
    /// Whether it is behind the VM's pvIOMMU.
    pub iommu: IommuMode,
    make: Arc<Make>,
}

impl FunctionSetup {
    /// A function that `make` makes for each VM, not behind a pvIOMMU.
    pub fn new(
        number: u8,
        make: impl Fn(&dyn WorkerHost) -> io::Result<Arc<dyn PciFunction>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            number,
            iommu: IommuMode::Off,
            make: Arc::new(make),
        }
    }

    /// The same, plugged in as `iommu` says.
    #[must_use]
    pub fn with_iommu(mut self, iommu: IommuMode) -> Self {
        self.iommu = iommu;
        self
    }

    /// A `testdev` whose serial number is its function number.
    pub fn testdev(number: u8) -> Self {
        Self::new(number, move |workers| {
            Ok(TestDevice::new(number.into(), workers)?)
        })
    }

    /// Makes the function for a VM.
    ///
    /// # Errors
    ///
    /// The worker loop's error.
    pub fn make(&self, workers: &dyn WorkerHost) -> io::Result<Arc<dyn PciFunction>> {
        (self.make)(workers)
    }
}

impl Debug for FunctionSetup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FunctionSetup")
            .field("number", &self.number)
            .field("iommu", &self.iommu)
            .finish_non_exhaustive()
    }
}

/// Why the host did not do what its operator asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// This bed, or this host, cannot do that at all.
    #[error("not possible here: {0}")]
    Unsupported(&'static str),
    /// The host refused.
    #[error("refused: {0}")]
    Refused(String),
}

/// The operator's side of a VM.
pub trait Host: Send + Sync + Debug {
    /// Plugs in a bus while the VM runs.
    ///
    /// # Errors
    ///
    /// [`HostError::Refused`] with the host's reason.
    fn plug(&self, bus: &BusSetup) -> Result<(), HostError>;

    /// Asks the guest to let go of a bus, as an operator does before he takes it away. `done` runs
    /// once, when the guest has; it must not call into the host.
    ///
    /// # Errors
    ///
    /// [`HostError`]; `done` does not run then.
    fn eject(&self, _instance: Uuid, _done: Ejected) -> Result<(), HostError> {
        Err(HostError::Unsupported("ejecting a bus"))
    }

    /// The same for one function of a bus.
    ///
    /// # Errors
    ///
    /// [`HostError`]; `done` does not run then.
    fn eject_function(
        &self,
        _instance: Uuid,
        _function: u8,
        _done: Ejected,
    ) -> Result<(), HostError> {
        Err(HostError::Unsupported("ejecting a function"))
    }

    /// Takes one function of a bus away, whether the guest agrees or not.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    fn remove_function(&self, _instance: Uuid, _function: u8) -> Result<(), HostError> {
        Err(HostError::Unsupported("removing a function"))
    }

    /// Takes a bus away, whether the guest agrees or not.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    fn remove(&self, _instance: Uuid) -> Result<(), HostError> {
        Err(HostError::Unsupported("removing a bus"))
    }

    /// Resets the VM. Its VPs execute nothing meanwhile.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    fn reset(&self) -> Result<(), HostError>;

    /// Saves the VM, and goes on with what was restored from the saved state.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    fn save_and_restore(&self) -> Result<(), HostError> {
        Err(HostError::Unsupported("saving and restoring"))
    }

    /// Returns once the host has done all that the guest has asked for so far.
    fn settle(&self);

    /// Lets one worker of the host do one bounded step. False if there was nothing to do. Beds
    /// whose workers run by themselves do nothing.
    fn step(&self) -> bool {
        false
    }

    /// The host's counters.
    fn counters(&self) -> PartitionCounters;

    /// What the host says about its buses.
    fn buses(&self) -> Vec<BusReport>;

    /// What the host says about its pvIOMMU; `None` if the VM has none.
    fn iommu(&self) -> Option<IommuReport>;
}

//! The bed on `/dev/kvm`: each instruction of the guest is executed by a vCPU.
//!
//! The VMM here is small and the library's own `kvm` module does the rest: one thread a VP, one
//! for the library's workers. The guest is the puppet of `vpci-puppet`, which has memory of its
//! own outside the guest's RAM.
//!
//! Interrupts of the vectors 16 to 31 would be taken for exceptions, and 32 is the puppet's own:
//! checks use others.

mod guest;
mod vm;
mod vp;
mod workers;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use uuid::Uuid;
use vm_vpci::kvm::{self, KvmDoorbells, KvmMsiSink};
use vm_vpci::mem::GuestRam;
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::partition::PartitionCounters;
use vm_vpci::pviommu::IommuReport;
use vm_vpci::vmm::{Doorbells, MonotonicClock};
use vm_vpci::vpci::Ejected;
use vm_vpci::vpci::bus::BusReport;
use vm_vpci::{BusSpec, FunctionSpec, Partition, PartitionConfig, PartitionHost};
use vpci_puppet::layout::MAX_VPS;

use self::guest::{KvmGuest, Parts};
use self::vm::{KvmHost, PuppetMemory, plug_memory, refused};
use self::vp::VpThread;
use self::workers::Workers;
use crate::bed::{Bed, BedKind, BootError, Machine};
use crate::host::{BusSetup, Host, HostError, Setup};

/// First address of RAM that the model may use; below it lies nothing, but addresses so low hide
/// mistakes.
const FREE_RAM: u64 = 0x10_0000;

/// Most time that one instruction of a VP takes, on the slowest of hosts.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// VMs of this machine's KVM.
#[derive(Debug, Default)]
pub struct KvmBed {
    hybrid: bool,
    host: OnceLock<Result<KvmHost, String>>,
}

impl KvmBed {
    /// VMs in hybrid mode, in which KVM answers the hypercalls that it can.
    pub fn hybrid() -> Self {
        Self {
            hybrid: true,
            ..Self::default()
        }
    }

    fn host(&self) -> Result<&KvmHost, String> {
        let host = self.host.get_or_init(|| KvmHost::open(self.hybrid));
        host.as_ref().map_err(String::clone)
    }
}

impl Bed for KvmBed {
    fn kind(&self) -> BedKind {
        BedKind::Kvm
    }

    fn is_hybrid(&self) -> bool {
        self.hybrid
    }

    fn available(&self) -> Result<(), String> {
        self.host().map(drop)
    }

    fn boot(&self, setup: &Setup) -> Result<Machine, BootError> {
        let host = self.host().map_err(BootError::Unsupported)?;
        let most = MAX_VPS.min(host.max_vcpus() as u32);
        if setup.vps > most {
            let text = format!("{} VPs; this bed has at most {most}", setup.vps);
            return Err(BootError::Unsupported(text));
        }
        let machine = KvmMachine::boot(host, setup, COMMAND_LIMIT).map_err(BootError::Failed)?;
        let machine = Arc::new(machine);
        Ok(Machine {
            guest: machine.guest.clone(),
            host: machine,
        })
    }
}

/// A VM. The fields are dropped in their order: first the VPs stop, memory goes last.
#[derive(Debug)]
struct KvmMachine {
    guest: Arc<KvmGuest>,
    partition: Arc<Partition>,
    workers: Arc<Workers>,
}

impl KvmMachine {
    fn boot(host: &KvmHost, setup: &Setup, command_limit: Duration) -> Result<Self, String> {
        let (vm, vcpus) = host.create(setup.vps)?;
        let ram = plug_memory(&vm, 0, &setup.ram)?;
        let puppet = PuppetMemory::plug(&vm, setup.ram.len() as u32, setup.vps)?;
        let ram = GuestRam::new(&ram);
        let workers = Arc::new(Workers::new().map_err(refused("workers"))?);
        let msi = Arc::new(KvmMsiSink::new(vm.clone()));
        let doorbells: Option<Arc<dyn Doorbells>> = host
            .has_doorbells()
            .then(|| Arc::new(KvmDoorbells::new(vm.clone())) as _);
        let config = PartitionConfig {
            apic_ids: (0..setup.vps).collect(),
            tsc_hz: vcpus.first().map_or(Ok(0), kvm::tsc_hz).map_err(text)?,
            apic_hz: kvm::APIC_TIMER_HZ,
            mmio: setup.mmio.clone(),
            features: setup.features,
            hypercall_port: DEFAULT_HYPERCALL_PORT,
            vmbus: setup.vmbus,
            iommu: setup.iommu,
        };
        let partition_host = PartitionHost {
            ram: ram.clone(),
            msi: msi.clone(),
            workers: workers.clone(),
            clock: Arc::new(MonotonicClock::default()),
            doorbells,
            bars: None,
        };
        let partition = match host.kernel_mode(&vm, &vcpus)? {
            None => Partition::new(config, partition_host),
            Some(kernel) => Partition::with_kernel(config, partition_host, kernel),
        };
        let partition = Arc::new(partition.map_err(text)?);
        for bus in &setup.buses {
            plug(&partition, &workers, bus)?;
        }
        let mut threads = Vec::new();
        for (vp, mut fd) in (0..).zip(vcpus) {
            let place = (vp, setup.vps);
            let initial = host.prepare(&mut fd, place, &partition, setup.features)?;
            threads.push(VpThread::start(fd, vp, initial, partition.clone())?);
        }
        let free_ram = setup.ram.first().map_or(0, |range| range.end);
        let parts = Parts {
            threads,
            puppet,
            ram,
            free_ram: FREE_RAM..free_ram,
            msi,
            hypercall_port: partition.hypercall_port(),
            command_limit,
        };
        let guest = KvmGuest::start(parts, &setup.ram)?;
        Ok(Self {
            guest: Arc::new(guest),
            partition,
            workers,
        })
    }
}

fn text(error: impl std::error::Error) -> String {
    error.to_string()
}

fn plug(partition: &Partition, workers: &Workers, bus: &BusSetup) -> Result<(), String> {
    let functions = bus.functions.iter().map(|function| {
        let device = function.make(workers)?;
        Ok(FunctionSpec::new(function.number, device).with_iommu(function.iommu))
    });
    let functions = functions
        .collect::<std::io::Result<_>>()
        .map_err(refused("a device"))?;
    let spec = BusSpec {
        instance: bus.instance,
        functions,
    };
    partition.plug(spec).map_err(text)
}

impl Host for KvmMachine {
    fn plug(&self, bus: &BusSetup) -> Result<(), HostError> {
        plug(&self.partition, &self.workers, bus).map_err(HostError::Refused)
    }

    fn eject(&self, instance: Uuid, done: Ejected) -> Result<(), HostError> {
        let asked = self.partition.eject(&instance, done);
        asked.map_err(|error| HostError::Refused(text(error)))
    }

    fn eject_function(&self, instance: Uuid, function: u8, done: Ejected) -> Result<(), HostError> {
        let asked = self.partition.eject_function(&instance, function, done);
        asked.map_err(|error| HostError::Refused(text(error)))
    }

    fn remove_function(&self, instance: Uuid, function: u8) -> Result<(), HostError> {
        let removed = self.partition.remove_function(&instance, function);
        removed
            .map(drop)
            .map_err(|error| HostError::Refused(text(error)))
    }

    fn remove(&self, instance: Uuid) -> Result<(), HostError> {
        match self.partition.remove(&instance) {
            true => Ok(()),
            false => Err(HostError::Refused(format!("there is no bus {instance}"))),
        }
    }

    fn reset(&self) -> Result<(), HostError> {
        let reset = || self.partition.reset();
        self.guest.reset_with(reset).map_err(HostError::Refused)
    }

    fn settle(&self) {
        self.workers.settle();
    }

    fn counters(&self) -> PartitionCounters {
        self.partition.counters()
    }

    fn buses(&self) -> Vec<BusReport> {
        self.partition.buses()
    }

    fn iommu(&self) -> Option<IommuReport> {
        self.partition.iommu()
    }
}

#[cfg(test)]
mod tests;

//! The façade: one object that a VMM builds, hands exits to, and plugs functions into.
//!
//! ```text
//!   vCPU exits                 Partition                        workers
//!   ----------   ------------------------------------------   -----------
//!   MSR      --> PartitionMsrs, UserSynic
//!   OUT port --> hypercall::dispatch --> VmBus (enqueue) ....> vmbus
//!                                    \-> Bus::retarget
//!                                    \-> PvIommu
//!   MMIO     --> MmioSpace --> config window, BARs, MSI-X
//!                              ring signal ..................> vpci-<n>
//! ```
//!
//! Lock order: the partition's own lock guards plugging and unplugging only; it is taken before
//! any lock of a layer below, and by no exit. [`Partition::buses`] takes it too, on whatever thread the
//! VMM asks for a report. No worker is adopted under it.
#![forbid(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;

use crate::cpuid::{self, CpuidConfig, CpuidLeaf, Features};
use crate::device_id::LogicalDeviceId;
use crate::hv::HvStatus;
use crate::hypercall::{
    CallCounters, CallRegisters, Dispatcher, InterruptGroup, KernelCalls, MessageCalls,
    MessageGroup, Outcome, PageCode, PostMessage,
};
use crate::mem::GuestRam;
use crate::msr::{ForwardMsr, GpFault, MsrConfig, MsrEffect, MsrError, PartitionMsrs};
use crate::pviommu::{
    AddDeviceError, IommuConfig, IommuConfigError, IommuGroup, IommuReport, PvIommu,
};
use crate::synic::{SintLines, SynicPort};
use crate::synic::{SynicConfig, SynicCounters, UserSynic};
use crate::vmbus::{ChannelDevice, ChannelId, OfferError, VmBus, VmBusConfig, VmBusCounters};
use crate::vmm::{BarMapper, Clock, ConnectionEvents, Doorbells, MsiSink, WorkerHost};
use crate::vpci::bus::{Bus, BusConfig, BusError, BusHost, BusReport};
use crate::vpci::function::{FunctionSpec, PciFunction};
use crate::vpci::mmio::{MmioCounters, MmioError, MmioSpace};
use crate::vpci::registry::{DeviceRegistry, DuplicateId};
use crate::vpci::{EjectError, Ejected};

/// Most virtual CPUs of a partition: Linux's Hyper-V maximum on x86
/// (docs/spec/hyperv-guest-interface.md, section 7).
pub const MAX_VPS: usize = 2048;

/// What the VM is made of, as far as this library needs to know.
#[derive(Debug, Clone)]
pub struct PartitionConfig {
    /// APIC id of each virtual CPU; the position is the VP index. 1 to 2048 entries.
    pub apic_ids: Vec<u32>,
    /// Frequency of the guest's TSC in Hz.
    pub tsc_hz: u64,
    /// Input clock of the local APIC timer in Hz (10^9 for KVM's in-kernel APIC unless changed).
    pub apic_hz: u64,
    /// Guest physical ranges for vPCI buses: the same that the firmware describes as the VMBus
    /// device's `_CRS` (docs/spec/hyperv-guest-interface.md, sections 11.1 and 12).
    pub mmio: Vec<Range<u64>>,
    /// Optional parts of the interface.
    pub features: Features,
    /// One-byte I/O port that the hypercall page writes (docs/spec/kvm.md, section 6.1).
    pub hypercall_port: u8,
    /// Limits of the VMBus server.
    pub vmbus: VmBusConfig,
    /// The pvIOMMU, if the VM is to have one. Functions that are to be behind it say so when they
    /// are plugged in.
    pub iommu: Option<IommuConfig>,
}

/// What the VMM provides.
#[derive(Debug, Clone)]
pub struct PartitionHost {
    /// Guest RAM.
    pub ram: GuestRam,
    /// Raises interrupts.
    pub msi: Arc<dyn MsiSink>,
    /// Runs workers.
    pub workers: Arc<dyn WorkerHost>,
    /// The partition's reference time.
    pub clock: Arc<dyn Clock>,
    /// Doorbells, where the host has them.
    pub doorbells: Option<Arc<dyn Doorbells>>,
    /// Maps BARs of host devices into the guest, where the VMM can.
    pub bars: Option<Arc<dyn BarMapper>>,
}

/// What the host's kernel does itself in hybrid mode (docs/spec/kvm.md, section 1).
///
/// A guest sees the same with and without it, but for the calls of [`KernelCalls`] and their
/// recommendation in CPUID.
#[derive(Debug, Clone)]
pub struct KernelMode {
    /// Raises SINTs.
    pub lines: Arc<dyn SintLines>,
    /// Takes the signals of open channels; with [`KernelCalls::signal_event`].
    pub connections: Option<Arc<dyn ConnectionEvents>>,
    /// Which calls it answers.
    pub calls: KernelCalls,
}

/// Why a partition could not be built.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// The number of virtual CPUs is out of range.
    #[error("{count} virtual CPUs; a partition has 1 to {MAX_VPS}")]
    VpCount {
        /// Number asked for.
        count: usize,
    },
    /// A register of the partition cannot work as configured.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// An MMIO range is malformed, or overlaps RAM or another one.
    #[error(transparent)]
    Mmio(#[from] MmioError),
    /// The pvIOMMU cannot be as configured.
    #[error(transparent)]
    Iommu(#[from] IommuConfigError),
    /// The VMM's loop refused the VMBus worker.
    #[error("the worker loop refused a worker")]
    Worker(#[source] io::Error),
}

/// Why a bus was not plugged in. Nothing has changed and the guest was told nothing.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Two live functions would share a logical device id.
    #[error(transparent)]
    DuplicateId(#[from] DuplicateId),
    /// The bus or a function of it is malformed.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// VMBus cannot offer another channel, or the instance GUID is taken.
    #[error(transparent)]
    Offer(#[from] OfferError),
    /// The pvIOMMU has no room for the functions.
    #[error(transparent)]
    Iommu(#[from] AddDeviceError),
}

/// A bus to plug in: its instance GUID and its functions.
#[derive(Debug)]
pub struct BusSpec {
    /// Instance GUID. Linux takes the PCI domain of the bus from its data2, which must be 1 to
    /// 0x7FFF and should be unique (docs/spec/vpci.md, section 1.1).
    pub instance: Uuid,
    /// Its functions.
    pub functions: Vec<FunctionSpec>,
}

/// Counts since the partition was created.
#[derive(Debug, Clone)]
pub struct PartitionCounters {
    /// Hypercalls by code and status.
    pub hypercalls: CallCounters,
    /// SynIC messages and events.
    pub synic: SynicCounters,
    /// VMBus control messages.
    pub vmbus: VmBusCounters,
    /// MMIO accesses.
    pub mmio: MmioCounters,
}

/// A guest partition as Hyper-V would show it, as far as passed-through PCI devices go.
///
/// All methods take `&self` and may be called from any thread. Those for exits run in place on the
/// virtual CPU's thread and never wait for a worker.
#[derive(Debug)]
pub struct Partition {
    cpuid: CpuidConfig,
    /// In hybrid mode.
    kernel_calls: Option<KernelCalls>,
    apic_ids: Arc<[u32]>,
    host: PartitionHost,
    msrs: PartitionMsrs,
    synic: Arc<UserSynic>,
    vmbus: Arc<VmBus>,
    calls: Dispatcher,
    mmio: Arc<MmioSpace>,
    registry: Arc<DeviceRegistry>,
    iommu: Option<Arc<PvIommu>>,
    /// Buses in the order in which they were plugged in. Held while plugging, removing and
    /// resetting only.
    buses: Mutex<Vec<Plugged>>,
}

/// A bus that is plugged in.
#[derive(Debug)]
struct Plugged {
    bus: Arc<Bus>,
    channel: ChannelId,
}

impl Partition {
    /// Builds a partition with an empty VMBus.
    ///
    /// # Errors
    ///
    /// [`PartitionError`], naming what cannot work.
    pub fn new(config: PartitionConfig, host: PartitionHost) -> Result<Self, PartitionError> {
        Self::build(config, host, None)
    }

    /// The same in hybrid mode: the host's kernel keeps a copy of some MSRs, which
    /// [`Partition::kernel_msrs`] and [`Partition::write_msr_forwarding`] give it.
    ///
    /// # Errors
    ///
    /// [`PartitionError`], naming what cannot work.
    pub fn with_kernel(
        config: PartitionConfig,
        host: PartitionHost,
        kernel: KernelMode,
    ) -> Result<Self, PartitionError> {
        Self::build(config, host, Some(kernel))
    }

    fn build(
        config: PartitionConfig,
        host: PartitionHost,
        kernel: Option<KernelMode>,
    ) -> Result<Self, PartitionError> {
        let count = config.apic_ids.len();
        if count == 0 || count > MAX_VPS {
            return Err(PartitionError::VpCount { count });
        }
        let vp_count = count as u32;
        let apic_ids: Arc<[u32]> = config.apic_ids.into();
        let msr_config = MsrConfig {
            vp_count,
            features: config.features,
            hypercall_port: config.hypercall_port,
            tsc_hz: config.tsc_hz,
            apic_hz: config.apic_hz,
        };
        let mut msrs = PartitionMsrs::new(msr_config, host.ram.clone(), host.clock.clone())?;
        let synic_config = SynicConfig {
            apic_ids: apic_ids.clone(),
            queue_limit: config.vmbus.limits.synic_queue,
        };
        let mut synic = UserSynic::new(&synic_config, host.ram.clone(), host.msi.clone());
        if let Some(kernel) = &kernel {
            msrs = msrs.with_code(PageCode::hybrid(config.hypercall_port, &kernel.calls));
            synic = synic.with_lines(kernel.lines.clone());
        }
        let synic = Arc::new(synic);
        let port: Arc<dyn SynicPort> = synic.clone();
        let vmbus = VmBus::new(config.vmbus, host.ram.clone(), port, &*host.workers)
            .map_err(PartitionError::Worker)?;
        if let Some(events) = kernel
            .as_ref()
            .and_then(|kernel| kernel.connections.clone())
        {
            vmbus.set_connection_events(events);
        }
        let mmio = MmioSpace::new(host.ram.clone(), config.mmio)?;
        let registry = Arc::new(DeviceRegistry::default());
        let iommu = match config.iommu {
            Some(iommu) => Some(PvIommu::new(iommu, host.ram.clone())?),
            None => None,
        };
        let mut calls = Dispatcher::new(host.ram.clone(), config.features)
            .with_group(Arc::new(MessageGroup::new(Arc::new(Connections {
                vmbus: vmbus.clone(),
            }))))
            .with_group(Arc::new(InterruptGroup::new(registry.clone(), vp_count)));
        if let Some(iommu) = &iommu {
            calls = calls.with_group(Arc::new(IommuGroup::new(iommu.clone())));
        }
        Ok(Self {
            cpuid: CpuidConfig {
                vp_count,
                features: config.features,
                iommu: iommu.is_some(),
            },
            kernel_calls: kernel.map(|kernel| kernel.calls),
            apic_ids,
            host,
            msrs,
            synic,
            vmbus,
            calls,
            mmio,
            registry,
            iommu,
            buses: Mutex::new(Vec::new()),
        })
    }

    /// The CPUID leaves to merge into every virtual CPU's table, after dropping every other leaf
    /// of 0x40000000..=0x400000FF.
    pub fn cpuid_leaves(&self) -> Vec<CpuidLeaf> {
        let mut leaves = cpuid::leaves(&self.cpuid);
        if let Some(calls) = &self.kernel_calls {
            cpuid::recommend_kernel_calls(&mut leaves, calls);
        }
        leaves
    }

    /// The I/O port whose 4-byte writes are hypercalls.
    pub fn hypercall_port(&self) -> u8 {
        self.msrs.hypercall_port()
    }

    /// A guest read of an MSR of 0x40000000..=0x400001FF on VP `vp`.
    ///
    /// # Errors
    ///
    /// [`GpFault`]: inject #GP(0).
    pub fn read_msr(&self, vp: u32, msr: u32) -> Result<u64, GpFault> {
        if UserSynic::owns_msr(msr) {
            self.synic.read_msr(vp, msr)
        } else {
            self.msrs.read(vp, msr)
        }
    }

    /// A guest write of an MSR of 0x40000000..=0x400001FF on VP `vp`. The effect says what the VMM
    /// has to do besides. In hybrid mode `forward` puts what the host's kernel has a copy of into that
    /// copy of the same VP; one that does not leaves the kernel with a SINT that is masked, for example,
    /// and loses its interrupts. Without hybrid mode it is never called: `&mut |_, _| {}` will do.
    ///
    /// # Errors
    ///
    /// [`GpFault`]: inject #GP(0).
    pub fn write_msr_forwarding(
        &self,
        vp: u32,
        msr: u32,
        value: u64,
        forward: ForwardMsr<'_>,
    ) -> Result<MsrEffect, GpFault> {
        let mut nowhere = |_, _| {};
        let forward = match self.kernel_calls {
            Some(_) => forward,
            None => &mut nowhere,
        };
        if UserSynic::owns_msr(msr) {
            self.synic.write_msr_forwarding(vp, msr, value, forward)?;
            return Ok(MsrEffect::None);
        }
        let effect = self.msrs.write_forwarding(vp, msr, value, forward)?;
        if let (MsrEffect::GuestOsIdCleared, Some(iommu)) = (effect, &self.iommu) {
            iommu.guest_gone();
        }
        Ok(effect)
    }

    /// The MSRs of a VP of which the host's kernel must have a copy, with their values now, in the
    /// order in which to write them: before the guest runs, and after each reset or restore. Empty
    /// without hybrid mode.
    pub fn kernel_msrs(&self, vp: u32) -> Vec<(u32, u64)> {
        if self.kernel_calls.is_none() {
            return Vec::new();
        }
        let mut all = vec![self.msrs.forwarded_msr()];
        all.extend(self.synic.forwarded_msrs(vp));
        all
    }

    /// A hypercall: a 4-byte write to [`Partition::hypercall_port`].
    pub fn hypercall(&self, registers: &mut dyn CallRegisters) -> Outcome {
        self.calls.call(self.msrs.hypercalls_enabled(), registers)
    }

    /// A guest load of 1, 2, 4 or 8 bytes from `gpa`. False if the address is not in an MMIO range
    /// of this partition; `data` is unchanged then.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.mmio.mmio_read(gpa, data)
    }

    /// A guest store of 1, 2, 4 or 8 bytes to `gpa`. False if the address is not in an MMIO range
    /// of this partition.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) -> bool {
        self.mmio.mmio_write(gpa, data)
    }

    /// Plugs in a bus with its functions and offers it to the guest, now or when it connects.
    ///
    /// # Errors
    ///
    /// [`PlugError`]; the partition and the guest are as before then.
    pub fn plug(&self, spec: BusSpec) -> Result<(), PlugError> {
        // A clash is found before anything is made; one that comes about meanwhile when it is registered.
        let numbers: Vec<u8> = spec.functions.iter().map(|f| f.number).collect();
        self.registry.check(&spec.instance, &numbers)?;
        let host = BusHost {
            ram: self.host.ram.clone(),
            mmio: self.mmio.clone(),
            msi: self.host.msi.clone(),
            apic_ids: self.apic_ids.clone(),
            doorbells: self.host.doorbells.clone(),
            bars: self.host.bars.clone(),
            iommu: self.iommu.clone(),
        };
        let config = BusConfig {
            instance: spec.instance,
            numa_node: None,
        };
        // Not under the lock: adopting a worker may wait for a thread that somebody has paused, who saves.
        let bus = Bus::new(config, spec.functions, host, &*self.host.workers)?;
        let mut buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        // Registered before the offer: the guest may call as soon as it knows the bus.
        self.registry.insert(&bus)?;
        match self.enter(&bus) {
            Ok(channel) => buses.push(Plugged { bus, channel }),
            Err(error) => {
                // The guest never had it.
                self.forget(&bus, || {});
                return Err(error);
            }
        }
        Ok(())
    }

    /// Makes a bus known to the pvIOMMU and to the guest.
    fn enter(&self, bus: &Arc<Bus>) -> Result<ChannelId, PlugError> {
        self.enter_iommu(bus)?;
        // Devices are connected once: only when nothing can go wrong any more. Whatever takes an
        // offer's room holds the lock that the caller has.
        self.vmbus.check_offer(&bus.identity())?;
        bus.connect();
        Ok(self.vmbus.offer(bus.clone())?)
    }

    /// Adds a bus's functions to the pvIOMMU.
    fn enter_iommu(&self, bus: &Arc<Bus>) -> Result<(), AddDeviceError> {
        let Some(iommu) = &self.iommu else {
            return Ok(());
        };
        for (id, mode, backend) in bus.iommu_devices() {
            iommu.add_device(id, mode, backend)?;
        }
        Ok(())
    }

    /// Forgets the ids of a bus's functions; `switch_off` takes them away from the guest.
    fn forget(&self, bus: &Arc<Bus>, switch_off: impl FnOnce()) {
        self.registry.remove(bus);
        // What the bus does from now on must not reach those who get its ids.
        bus.leave_iommu();
        if let Some(iommu) = &self.iommu {
            for id in bus.ids() {
                iommu.begin_removal(id);
            }
        }
        switch_off();
        for (id, is_quiet) in bus.quiet_functions() {
            self.leave_iommu(id, is_quiet);
        }
    }

    /// The pvIOMMU forgets a function. In this order: reset, bus mastering off, registers out of the
    /// guest's reach, and only then this; because one that is quiet may from now on be where the other
    /// devices of its IOMMU group are, so that these are not blocked with it (docs/passthrough.md).
    fn leave_iommu(&self, id: LogicalDeviceId, is_quiet: bool) {
        match &self.iommu {
            Some(iommu) if is_quiet => iommu.remove_quiet_device(id),
            Some(iommu) => iommu.remove_device(id),
            None => {}
        }
    }

    /// Asks the guest to let go of a bus (orderly removal, docs/spec/vpci.md, section 8). `done` runs
    /// once, when it has or has lost the bus otherwise; then, or when patience is at its end (60 s is
    /// usual: a guest may never answer), the caller takes the bus away with [`Self::remove`]. `done`
    /// must not call into the partition.
    ///
    /// # Errors
    ///
    /// [`EjectError`]; `done` does not run then.
    pub fn eject(&self, instance: &Uuid, done: Ejected) -> Result<(), EjectError> {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        find(&buses, instance)?.eject(done)
    }

    /// Asks the guest to let go of one function of a bus, as [`Self::eject`] asks for all; then, or
    /// when patience is at its end, the caller takes it away with [`Self::remove_function`].
    ///
    /// # Errors
    ///
    /// [`EjectError`]; `done` does not run then. Function 0 goes with its bus only. One ejection of a
    /// bus or of a function of it is under way at a time.
    pub fn eject_function(
        &self,
        instance: &Uuid,
        function: u8,
        done: Ejected,
    ) -> Result<(), EjectError> {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        find(&buses, instance)?.eject_function(function, done)
    }

    /// Takes one function of a bus away at once, and gives its device back. When this returns its DMA
    /// is drained and none will come, it raises no interrupt, the guest reads all ones from it, and
    /// hypercalls do not know it; after that the guest is told, by new bus relations. The other
    /// functions go on undisturbed. Its place stays empty until the bus is plugged in anew. Must not be
    /// called from a device's callback.
    ///
    /// A guest that was not asked before ([`Self::eject_function`]), or did not answer, keeps a driver
    /// on a device that reads all ones (docs/spec/vpci.md, section 5).
    ///
    /// Memory of a device of the host that the VMM's [`BarMapper`] cannot unmap, tried once more when the
    /// last user of the function is gone, stays within the guest's reach until the VM ends. That is
    /// logged; the mapper keeps it in place, and so the host's device in use
    /// ([`FunctionReport::failed_unmaps`](crate::vpci::FunctionReport::failed_unmaps) counts it while the
    /// function is there).
    ///
    /// # Errors
    ///
    /// [`EjectError`] but `Busy`; nothing has changed then.
    pub fn remove_function(
        &self,
        instance: &Uuid,
        function: u8,
    ) -> Result<Arc<dyn PciFunction>, EjectError> {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        let bus = find(&buses, instance)?;
        bus.check_removable(function)?;
        self.registry.remove_function(bus, function);
        // What it does from now on must not reach who gets its id.
        bus.function_leaves_iommu(function);
        let id = LogicalDeviceId::new(instance, function);
        if let Some(iommu) = &self.iommu {
            iommu.begin_removal(id);
        }
        bus.take_function(function, |is_quiet| self.leave_iommu(id, is_quiet))
    }

    /// Takes a bus away at once, with all its functions (surprise removal). When this returns their
    /// DMA is drained and none will come, they raise no interrupt, the guest reads all ones from
    /// them, and hypercalls do not know them. The devices are dropped, whatever the guest does about it:
    /// what they hold is free as soon as no other thread is inside one of them. The guest is told by a
    /// rescinded offer; the instance GUID can be plugged in again when the guest has released the channel
    /// (docs/spec/vpci.md, section 8). What cannot be unmapped stays, as in [`Self::remove_function`].
    ///
    /// False if no such bus is plugged in. Must not be called from a device's callback.
    pub fn remove(&self, instance: &Uuid) -> bool {
        let mut buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |plugged: &Plugged| plugged.bus.config().instance == *instance;
        let Some(index) = buses.iter().position(is_it) else {
            return false;
        };
        let Plugged { bus, channel } = buses.remove(index);
        self.forget(&bus, || bus.remove());
        self.vmbus.revoke(channel);
        // Or an open bus would keep its devices until VMBus' worker comes to it.
        self.vmbus.settle();
        true
    }

    /// The VM is being reset: connection, domains, devices and registers go back to their
    /// power-on state; buses stay plugged in. Call it while no virtual CPU runs, and before RAM is
    /// filled for the next boot: until it returns devices may still write there, and what was under
    /// the hypercall page comes back.
    pub fn reset(&self) {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        self.vmbus.reset();
        for plugged in &*buses {
            plugged.bus.reset();
        }
        if let Some(iommu) = &self.iommu {
            iommu.reset();
        }
        self.synic.reset();
        self.msrs.reset();
    }

    /// What is plugged in, with its interrupt and DMA counts, in order of plugging.
    pub fn buses(&self) -> Vec<BusReport> {
        let buses = self.buses.lock().unwrap_or_else(PoisonError::into_inner);
        buses.iter().map(|plugged| plugged.bus.report()).collect()
    }

    /// The pvIOMMU's domains, devices and faults; `None` if the VM has none.
    pub fn iommu(&self) -> Option<IommuReport> {
        self.iommu.as_ref().map(|iommu| iommu.report())
    }

    /// Counts since the partition was created.
    pub fn counters(&self) -> PartitionCounters {
        PartitionCounters {
            hypercalls: self.calls.counters(),
            synic: self.synic.counters(),
            vmbus: self.vmbus.counters(),
            mmio: self.mmio.counters(),
        }
    }
}

/// The bus of this name.
fn find<'a>(buses: &'a [Plugged], instance: &Uuid) -> Result<&'a Arc<Bus>, EjectError> {
    let mut all = buses.iter().map(|plugged| &plugged.bus);
    let found = all.find(|bus| bus.config().instance == *instance);
    found.ok_or(EjectError::NoSuchBus)
}

/// The message and event hypercalls, answered by VMBus: no other connection exists.
#[derive(Debug)]
struct Connections {
    vmbus: Arc<VmBus>,
}

impl MessageCalls for Connections {
    fn post_message(&self, message: &PostMessage<'_>) -> Result<(), HvStatus> {
        self.vmbus
            .post_message(message.connection_id, message.message_type, message.payload)
    }

    fn signal_event(&self, connection_id: u32, flag: u16) -> Result<(), HvStatus> {
        self.vmbus.signal_event(connection_id, flag)
    }
}

mod state;
#[cfg(test)]
mod tests;

pub use state::{PartitionState, PartitionStateError, PluggedState, StateInHardware};

//! How to embed the library: every call into it that a VMM makes is in this file.
//!
//! In the order of a VM's life: make the devices ([`Functions::build`]), build a [`Partition`] and
//! plug them in ([`Embedding::new`]), give its CPUID leaves to every vCPU ([`Embedding::cpuid`]),
//! hand it the exits ([`Embedding::hypercall`], [`Embedding::read_msr`], [`Embedding::write_msr`],
//! [`Embedding::mmio_read`], [`Embedding::mmio_write`]), and tell it of a reset
//! ([`Embedding::reset`]). While the VM runs, buses come and go ([`Embedding::plug`],
//! [`Embedding::eject`], [`Embedding::remove`]) or lose one function ([`Embedding::eject_function`],
//! [`Embedding::remove_function`]), and it can be saved and restored as a whole
//! ([`Embedding::stop`], [`Embedding::save`], [`Embedding::restore`]).
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kvm_bindings::{KvmIrqRouting, kvm_cpuid_entry2};
use kvm_ioctls::{ReadMsrExit, VcpuFd, VmFd};
use uuid::Uuid;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vm_vpci::backend::shadow::{Shadow, ShadowBackend, ShadowConfig};
use vm_vpci::cpuid::Features;
use vm_vpci::devices::event_loop::{EventLoop, Paused};
use vm_vpci::devices::testdev::TestDevice;
use vm_vpci::devices::virtio::{Blk, BlkConfig, MAX_BLK_QUEUES, Rng, RngConfig, VirtioStateError};
use vm_vpci::kvm::cpuid::{CpuidOptions, VcpuPlace, guest_cpuid};
use vm_vpci::kvm::hybrid::HybridSupport;
use vm_vpci::kvm::{
    self, HostSupport, HypervExit, InternalError, KvmDoorbells, KvmError, KvmMsiSink, KvmSintLines,
    StepError,
};
use vm_vpci::mem::GuestRam;
use vm_vpci::msr::DEFAULT_HYPERCALL_PORT;
use vm_vpci::pviommu::{IommuConfig, IommuMode};
use vm_vpci::vmbus::VmBusConfig;
use vm_vpci::vmm::{Clock, Doorbells, MonotonicClock};
use vm_vpci::vpci;
use vm_vpci::vpci::function::PciFunction;
use vm_vpci::vpci::interrupts::VectorCounters;
pub(crate) use vm_vpci::vpci::{EjectError as UnplugError, Ejected};
use vm_vpci::{BusSpec, FunctionSpec, Partition, PartitionConfig, PartitionHost};

use crate::api::{BusStatus, FunctionStatus, Listing, MachineState};
use crate::counters;
use crate::error::Error;
use crate::incarnation::{Incarnation, Incarnations};
use crate::layout::{LOW_WINDOW, Layout, Range};
use crate::memory::PluggedRam;
use crate::notices::Notice;
use crate::passthrough::PassThrough;
use crate::recall::{self, Asked};
use crate::report::{DmaReport, DomainReport, FirstStageReport, FunctionReport, VectorReport};
use crate::snapshot::{DeviceState, EmbeddingState, RestoreError, SaveError, SavedDevice};
use crate::spec::{self, Kind, PlacedFunction, domain_hint, logical_id};

/// Entries into the guest, one after the other, that KVM may end because of the same instruction.
const MAX_TRIES: u32 = 8;
/// Time for the first execution of an instruction that KVM cannot emulate. All other vCPUs wait
/// meanwhile, so a guest that provokes an exception there must not have much; a busy host that needs more
/// gets twice as much each time.
const STEP_TIME: Duration = Duration::from_millis(20);

/// Attempts, one after the other, to get an instruction done that KVM cannot emulate.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    /// Entries that KVM ended because an access was made while an event was delivered.
    deliveries: u32,
    /// Steps after which the vCPU was where it had been.
    steps: u32,
}

/// Threads that serve buses and devices: one, so that a bus is not held up by a disk, and one more
/// for every disk queue, up to this many.
const MAX_WORKER_THREADS: usize = 4;

/// Devices and the threads they work on, ready for a VM.
#[derive(Debug)]
pub(crate) struct Functions {
    workers: Arc<EventLoop>,
    cpus: u8,
    buses: Vec<BusSpec>,
    devices: Vec<Device>,
    /// Devices of the host, which need the VM's RAM first.
    hosts: Vec<PlacedFunction>,
    /// Some function is behind the pvIOMMU, so there has to be one.
    iommu: bool,
}

impl Functions {
    /// Makes every device, for a VM with `cpus` vCPUs.
    ///
    /// # Errors
    ///
    /// [`Error`]: an image cannot be used, or the host has no room for threads.
    pub(crate) fn build(placed: &[PlacedFunction], cpus: u8) -> Result<Self, Error> {
        let threads = NonZeroUsize::MIN.saturating_add(usize::from(cpus));
        let threads = threads.min(NonZeroUsize::MIN.saturating_add(MAX_WORKER_THREADS - 1));
        let workers = EventLoop::new("vpci", threads).map_err(Error::host("threads"))?;
        Self::on(Arc::new(workers), placed, cpus)
    }

    /// True if the VM gets a pvIOMMU.
    pub(crate) fn has_iommu(&self) -> bool {
        self.iommu
    }

    /// Makes devices that work on `workers`.
    fn on(workers: Arc<EventLoop>, placed: &[PlacedFunction], cpus: u8) -> Result<Self, Error> {
        let mut functions = Self {
            workers,
            cpus,
            buses: Vec::new(),
            devices: Vec::new(),
            hosts: Vec::new(),
            iommu: placed.iter().any(|function| function.iommu),
        };
        for function in placed {
            if let Some(device) = functions.device(function, cpus)? {
                functions.put(function, device);
            } else {
                functions.hosts.push(function.clone());
            }
        }
        Ok(functions)
    }

    /// Opens the devices of the host.
    fn open_hosts(&mut self, passthrough: &PassThrough) -> Result<(), Error> {
        for function in std::mem::take(&mut self.hosts) {
            let Kind::Vfio(device) = &function.kind else {
                continue;
            };
            let opened = passthrough.open(device, &function);
            let opened = opened.map_err(|source| Error::PassThrough {
                spec: format!("vfio,host={}", device.address),
                source,
            })?;
            self.put(&function, opened);
        }
        Ok(())
    }

    /// Makes an emulated device; `None` for one of the host.
    fn device(
        &mut self,
        placed: &PlacedFunction,
        cpus: u8,
    ) -> Result<Option<Arc<dyn PciFunction>>, Error> {
        let refused = Error::host("an event descriptor");
        match &placed.kind {
            Kind::Blk {
                path,
                readonly,
                queues,
            } => {
                let id = logical_id(placed.bus, placed.function);
                let config = BlkConfig {
                    file: path.clone(),
                    readonly: *readonly,
                    queues: queues.unwrap_or(cpus.into()).min(MAX_BLK_QUEUES),
                    iommu: placed.iommu,
                    id: format!("vpci-{id:08x}"),
                };
                let disk = Blk::new(config, &*self.workers).map_err(Error::Disk)?;
                self.remember(placed, Handle::Blk(disk.clone()));
                Ok(Some(disk))
            }
            Kind::Testdev => {
                let serial = logical_id(placed.bus, placed.function);
                let device = TestDevice::new(serial, &*self.workers).map_err(refused)?;
                self.remember(placed, Handle::Testdev(device.clone()));
                Ok(Some(device))
            }
            Kind::Rng => {
                let config = RngConfig {
                    iommu: placed.iommu,
                };
                let device = Rng::new(config, &*self.workers).map_err(refused)?;
                self.remember(placed, Handle::Rng(device.clone()));
                Ok(Some(device))
            }
            Kind::Vfio(_) => Ok(None),
        }
    }

    fn remember(&mut self, placed: &PlacedFunction, handle: Handle) {
        self.devices.push(Device {
            bus: placed.bus,
            function: placed.function,
            handle,
        });
    }

    fn put(&mut self, placed: &PlacedFunction, device: Arc<dyn PciFunction>) {
        let mode = match placed.iommu {
            true => IommuMode::On,
            false => IommuMode::Off,
        };
        let function = FunctionSpec::new(placed.function, device).with_iommu(mode);
        let instance = placed.bus;
        match self.buses.iter_mut().find(|bus| bus.instance == instance) {
            Some(bus) => bus.functions.push(function),
            None => self.buses.push(BusSpec {
                instance,
                functions: vec![function],
            }),
        }
    }
}

/// A device whose state this program can save, and its place.
#[derive(Debug)]
struct Device {
    bus: Uuid,
    function: u8,
    handle: Handle,
}

/// The device itself.
#[derive(Debug)]
enum Handle {
    Blk(Arc<Blk>),
    Rng(Arc<Rng>),
    Testdev(Arc<TestDevice>),
}

impl Handle {
    /// The word of `--vpci`.
    fn kind(&self) -> &'static str {
        match self {
            Self::Blk(_) => "blk",
            Self::Rng(_) => "rng",
            Self::Testdev(_) => "testdev",
        }
    }

    fn save(&self) -> Result<DeviceState, VirtioStateError> {
        Ok(match self {
            Self::Blk(device) => DeviceState::Blk(device.save()?),
            Self::Rng(device) => DeviceState::Rng(device.save()?),
            Self::Testdev(device) => DeviceState::Testdev(device.save()),
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), String> {
        match (self, state) {
            (Self::Blk(device), DeviceState::Blk(state)) => {
                device.restore(state).map_err(|error| error.to_string())?;
                // The image may have another size by now.
                match device.resize() {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }
            }
            (Self::Rng(device), DeviceState::Rng(state)) => {
                device.restore(state).map_err(|error| error.to_string())
            }
            (Self::Testdev(device), DeviceState::Testdev(state)) => {
                device.restore(*state).map_err(|error| error.to_string())
            }
            _ => Err(format!("the saved function is {}", state.kind())),
        }
    }
}

/// Workers stand still and nothing is plugged in or out while this lives.
#[derive(Debug)]
pub(crate) struct Stopped<'a> {
    devices: MutexGuard<'a, Vec<Device>>,
    _workers: Paused<'a>,
}

/// The library inside this VMM.
#[derive(Debug)]
pub(crate) struct Embedding {
    partition: Partition,
    features: Features,
    msi: Arc<KvmMsiSink>,
    /// In hybrid mode.
    lines: Option<Arc<KvmSintLines>>,
    /// For devices that are plugged in later.
    workers: Arc<EventLoop>,
    clock: Arc<MonotonicClock>,
    passthrough: PassThrough,
    ram: PluggedRam,
    /// With a pvIOMMU: carries its domains to devices of the host.
    shadow: Option<Arc<Shadow>>,
    cpus: u8,
    devices: Mutex<Vec<Device>>,
    /// Locked after the devices.
    incarnations: Mutex<Incarnations>,
    /// Held from the choice of a bus's name on: without it two clients would be given the same.
    plugging: Mutex<()>,
}

/// What the host's KVM can do, as far as the library has a use for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Host {
    /// What is optional.
    pub(crate) support: HostSupport,
    /// How to do hybrid mode; none keeps everything in user space.
    pub(crate) hybrid: Option<HybridSupport>,
    /// Where the partition's reference time starts, in units of 100 ns.
    pub(crate) reference_time: u64,
}

impl Embedding {
    /// Builds the partition for a VM that has its vCPUs, whose number is their APIC id, and plugs
    /// the devices in.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub(crate) fn new(
        vm: &Arc<VmFd>,
        vcpus: &[VcpuFd],
        ram: &PluggedRam,
        layout: &Layout,
        host: Host,
        mut functions: Functions,
    ) -> Result<Self, Error> {
        let msi = Arc::new(KvmMsiSink::new(vm.clone()));
        let doorbells: Option<Arc<dyn Doorbells>> = host
            .support
            .any_length_doorbells
            .then(|| Arc::new(KvmDoorbells::new(vm.clone())) as _);
        let window = |range: Range| range.start..range.end();
        let features = Features {
            // Linux up to 6.1 prefers this counter to the invariant TSC, and each look at the time
            // is an exit then (docs/decisions.md, D-018).
            reference_counter: false,
            ..Features::default()
        };
        let mut config = PartitionConfig {
            apic_ids: (0..vcpus.len() as u32).collect(),
            features,
            tsc_hz: vcpus.first().map_or(Ok(0), kvm::tsc_hz)?,
            apic_hz: kvm::APIC_TIMER_HZ,
            mmio: vec![window(LOW_WINDOW), window(layout.high_window)],
            hypercall_port: DEFAULT_HYPERCALL_PORT,
            vmbus: VmBusConfig::default(),
            iommu: None,
        };
        let clock = Arc::new(MonotonicClock::starting_at(host.reference_time));
        let lines = match host.hybrid {
            Some(hybrid) => Some(connect_sints(vm, vcpus, hybrid)?),
            None => None,
        };
        let guest_ram = GuestRam::new(ram.map());
        let shadow = functions.iommu.then(|| {
            let config = ShadowConfig {
                physical_bits: layout.address_bits,
                ..ShadowConfig::default()
            };
            let tracker = ram.slots().clone();
            Arc::new(Shadow::new(config, guest_ram.clone(), tracker))
        });
        let mut routes = kvm::irqchip_routes();
        routes.extend(lines.iter().flat_map(|lines| lines.routes()));
        let first_gsi = kvm::IRQCHIP_GSIS + vcpus.len() as u32;
        let carrier = shadow
            .clone()
            .map(|shadow| Arc::new(ShadowBackend(shadow)) as _);
        let passthrough = PassThrough::new(vm, guest_ram.clone(), routes, first_gsi, carrier);
        let passthrough = passthrough.map_err(Error::host("an epoll descriptor"))?;
        if functions.iommu {
            let told = IommuConfig {
                physical_bits: layout.address_bits,
                ..IommuConfig::default()
            };
            config.iommu = Some(passthrough.prepare(&functions.hosts, told));
        }
        let partition_host = PartitionHost {
            ram: guest_ram,
            msi: msi.clone(),
            workers: functions.workers.clone(),
            clock: clock.clone(),
            doorbells,
            bars: Some(passthrough.bars.clone()),
        };
        let partition = match host.hybrid.zip(lines.clone()) {
            None => Partition::new(config, partition_host)?,
            Some((hybrid, lines)) => {
                let kernel = hybrid.kernel_mode(vm, lines);
                Partition::with_kernel(config, partition_host, kernel)?
            }
        };
        functions.open_hosts(&passthrough)?;
        for bus in functions.buses {
            partition.plug(bus)?;
        }
        Ok(Self {
            partition,
            features,
            msi,
            lines,
            workers: functions.workers,
            clock,
            passthrough,
            ram: ram.clone(),
            shadow,
            cpus: functions.cpus,
            devices: Mutex::new(functions.devices),
            incarnations: Mutex::default(),
            plugging: Mutex::default(),
        })
    }

    /// Gives KVM its copy of MSRs on a vCPU: before it runs, and after a reset. There is none but in
    /// hybrid mode.
    ///
    /// # Errors
    ///
    /// [`KvmError`].
    pub(crate) fn set_kernel_msrs(&self, vp: u32, vcpu: &VcpuFd) -> Result<(), KvmError> {
        kvm::forward_msrs(vcpu, &self.partition.kernel_msrs(vp))
    }

    /// The CPUID table of one vCPU, from what KVM supports.
    pub(crate) fn cpuid(
        &self,
        host: &[kvm_cpuid_entry2],
        place: VcpuPlace,
        options: CpuidOptions,
    ) -> Vec<kvm_cpuid_entry2> {
        guest_cpuid(host, &self.partition.cpuid_leaves(), place, options)
    }

    /// True if the guest is told that its TSC is invariant.
    pub(crate) fn tsc_invariant(&self) -> bool {
        self.features.tsc_invariant
    }

    /// What the guest has written to the register that unveils the invariant TSC.
    pub(crate) fn tsc_invariant_control(&self, vp: u32) -> u64 {
        let msr = vm_vpci::hv::msr::TSC_INVARIANT_CONTROL;
        // Absent where the feature is off.
        self.partition.read_msr(vp, msr).unwrap_or(0)
    }

    /// True if there is a pvIOMMU.
    pub(crate) fn has_iommu(&self) -> bool {
        self.partition.iommu().is_some()
    }

    /// True if an OUT to `port` is a hypercall.
    pub(crate) fn is_hypercall_port(&self, port: u16) -> bool {
        port == u16::from(self.partition.hypercall_port())
    }

    /// An OUT to the hypercall port.
    ///
    /// # Errors
    ///
    /// KVM's error; the vCPU cannot go on.
    pub(crate) fn hypercall(&self, vcpu: &mut VcpuFd) -> Result<(), kvm_ioctls::Error> {
        kvm::hypercall::answer(vcpu, |registers| self.partition.hypercall(registers))
    }

    /// A read of a synthetic MSR.
    pub(crate) fn read_msr(&self, vp: u32, exit: ReadMsrExit<'_>) {
        match self.partition.read_msr(vp, exit.index) {
            Ok(value) => *exit.data = value,
            Err(_) => *exit.error = 1,
        }
    }

    /// A write of a synthetic MSR.
    ///
    /// # Errors
    ///
    /// KVM's error; the vCPU cannot go on.
    pub(crate) fn write_msr(&self, vp: u32, vcpu: &mut VcpuFd) -> Result<(), KvmError> {
        kvm::answer_wrmsr(vcpu, |msr, value, forward| {
            self.partition.write_msr_forwarding(vp, msr, value, forward)
        })
    }

    /// A KVM_EXIT_HYPERV: a hypercall that KVM passes on. False if it is about something else.
    ///
    /// # Errors
    ///
    /// KVM's error; the vCPU cannot go on.
    pub(crate) fn hyperv_exit(&self, vcpu: &mut VcpuFd) -> Result<bool, kvm_ioctls::Error> {
        let exit = kvm::answer_hyperv(vcpu, |registers| self.partition.hypercall(registers))?;
        Ok(matches!(exit, HypervExit::Hypercall(_)))
    }

    /// A load from an address that is not RAM.
    pub(crate) fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if !self.partition.mmio_read(gpa, data) {
            data.fill(0xff);
        }
    }

    /// A store to an address that is not RAM.
    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if !self.partition.mmio_write(gpa, data) {
            log::debug!("store of {} bytes to {gpa:#x} goes nowhere", data.len());
        }
    }

    /// True for RAM. A store to it leaves the guest where its page is tracked, or was a moment ago; nothing
    /// else does.
    pub(crate) fn is_ram(&self, gpa: u64) -> bool {
        self.ram.map().address_in_range(GuestAddress(gpa))
    }

    /// A store to RAM. False if there is nothing that tracks pages.
    pub(crate) fn tracked_store(&self, vcpu: &mut VcpuFd) -> bool {
        let shadow = self.shadow.as_ref();
        shadow.is_some_and(|shadow| kvm::answer_store(vcpu, shadow, self.ram.slots()))
    }

    /// Something that KVM cannot emulate on `vp`: if it may be a store to a tracked page, gets it
    /// done. Names what is not about tracked pages, or cannot be done.
    ///
    /// # Errors
    ///
    /// [`StepError`]; the vCPU cannot go on.
    pub(crate) fn get_done(
        &self,
        vp: u32,
        vcpu: &mut VcpuFd,
        tries: &mut Tries,
    ) -> Result<Option<InternalError>, StepError> {
        match (kvm::internal_error(vcpu), &self.shadow) {
            (Some(InternalError::Delivery { .. }), _) if tries.deliveries < MAX_TRIES => {
                tries.deliveries += 1;
            }
            (Some(InternalError::Delivery { gpa: Some(gpa) }), Some(shadow))
                if shadow.give_up(gpa) =>
            {
                tries.deliveries = 0;
            }
            (Some(InternalError::Emulation), Some(shadow)) if tries.steps < MAX_TRIES => {
                let time = STEP_TIME * (1 << tries.steps);
                let slots = self.ram.slots();
                let again = tries.steps > 0;
                match kvm::step_over(vcpu, vp as usize, shadow, slots, time, again)? {
                    true => tries.steps = 0,
                    false => tries.steps += 1,
                }
            }
            (other, _) => return Ok(other),
        }
        Ok(None)
    }

    /// The machine is being reset; no vCPU runs.
    pub(crate) fn reset(&self) {
        self.partition.reset();
    }

    /// Stops the workers of buses and devices, and whoever would plug, eject or remove, until the
    /// result is dropped.
    pub(crate) fn stop(&self) -> Stopped<'_> {
        // In this order: whoever plugs waits for a worker thread with the devices locked.
        let devices = self.devices();
        Stopped {
            devices,
            _workers: self.workers.pause(),
        }
    }

    /// The library and the devices as plain data. Neither vCPUs nor workers run.
    ///
    /// # Errors
    ///
    /// [`SaveError`]; nothing has changed.
    pub(crate) fn save(&self, stopped: &Stopped<'_>) -> Result<EmbeddingState, SaveError> {
        let devices = &stopped.devices;
        let partition = self.partition.save()?;
        let mut saved = Vec::with_capacity(devices.len());
        for device in devices.iter() {
            let (bus, function) = (device.bus, device.function);
            let failed = |source| SaveError::Device {
                bus,
                function,
                source,
            };
            saved.push(SavedDevice {
                bus,
                function,
                state: device.handle.save().map_err(failed)?,
            });
        }
        Ok(EmbeddingState {
            reference_time: self.clock.reference_time(),
            partition,
            devices: saved,
        })
    }

    /// Takes over a saved state. Guest RAM is restored; neither vCPUs nor workers run.
    ///
    /// # Errors
    ///
    /// [`RestoreError`]; the VM must not run then.
    pub(crate) fn restore(
        &self,
        stopped: &Stopped<'_>,
        state: &EmbeddingState,
    ) -> Result<(), RestoreError> {
        let devices = &stopped.devices;
        let find = |saved: &&SavedDevice, device: &Device| {
            (saved.bus, saved.function) == (device.bus, device.function)
        };
        for saved in &state.devices {
            let same = |device: &Device| {
                find(&saved, device) && device.handle.kind() == saved.state.kind()
            };
            if !devices.iter().any(same) {
                return Err(RestoreError::Missing {
                    bus: saved.bus,
                    function: saved.function,
                    kind: saved.state.kind(),
                });
            }
        }
        let mut pairs = Vec::with_capacity(devices.len());
        for device in devices.iter() {
            let (bus, function) = (device.bus, device.function);
            match state.devices.iter().find(|saved| find(saved, device)) {
                Some(saved) => pairs.push((device, saved)),
                None => return Err(RestoreError::Surplus { bus, function }),
            }
        }
        self.partition.restore(&state.partition)?;
        for (device, saved) in pairs {
            let (bus, function) = (device.bus, device.function);
            device
                .handle
                .restore(&saved.state)
                .map_err(|reason| RestoreError::Device {
                    bus,
                    function,
                    reason,
                })?;
        }
        Ok(())
    }

    fn incarnations(&self) -> MutexGuard<'_, Incarnations> {
        self.incarnations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn devices(&self) -> MutexGuard<'_, Vec<Device>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Plugs the functions of one bus in while the VM runs, and gives its instance GUID.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing has changed.
    pub(crate) fn plug(&self, specs: &[String]) -> Result<Uuid, Error> {
        let _plugging = self.plugging.lock().unwrap_or_else(PoisonError::into_inner);
        let present: Vec<Uuid> = self.partition.buses().iter().map(|b| b.instance).collect();
        let placed = spec::parse(specs, &present)?;
        let mut functions = Functions::on(self.workers.clone(), &placed, self.cpus)?;
        functions.open_hosts(&self.passthrough)?;
        let Ok([bus]) = <[BusSpec; 1]>::try_from(functions.buses) else {
            return Err(Error::NotOneBus);
        };
        let instance = bus.instance;
        // Locked first: whoever removes the bus finds its devices.
        let mut devices = self.devices();
        self.partition.plug(bus)?;
        self.incarnations().begin(instance);
        devices.extend(functions.devices);
        Ok(instance)
    }

    /// Asks the guest to let go of a bus; `done` is called once when it has, or has lost it. Gives what
    /// tells the bus from a later one of the same name.
    ///
    /// # Errors
    ///
    /// [`UnplugError`].
    pub(crate) fn eject(&self, bus: &Uuid, done: Ejected) -> Result<Incarnation, UnplugError> {
        // Not while the VM is being saved, nor while somebody else plugs or removes.
        let _devices = self.devices();
        self.partition.eject(bus, done)?;
        Ok(self.incarnations().of(bus))
    }

    /// The same for one function of a bus.
    ///
    /// # Errors
    ///
    /// [`UnplugError`].
    pub(crate) fn eject_function(
        &self,
        bus: &Uuid,
        function: u8,
        done: Ejected,
    ) -> Result<Incarnation, UnplugError> {
        let _devices = self.devices();
        self.partition.eject_function(bus, function, done)?;
        Ok(self.incarnations().of(bus))
    }

    /// A descriptor that can be read from when [`notices`](Self::notices) has something to tell.
    pub(crate) fn notices_fd(&self) -> RawFd {
        self.passthrough.notices_fd()
    }

    /// What the host has said of its devices since the last call.
    pub(crate) fn notices(&self) -> Vec<Notice> {
        self.passthrough.notices()
    }

    /// Takes one function of a bus away at once; its device ends here.
    ///
    /// # Errors
    ///
    /// [`UnplugError`].
    pub(crate) fn remove_function(&self, bus: &Uuid, function: u8) -> Result<(), UnplugError> {
        self.take_function(&mut self.devices(), bus, function)
    }

    /// Takes a bus away at once.
    ///
    /// # Errors
    ///
    /// [`UnplugError::NoSuchBus`].
    pub(crate) fn remove(&self, bus: &Uuid) -> Result<(), UnplugError> {
        self.take_away(&mut self.devices(), bus)
    }

    /// Takes a bus, or one function of it, away at once, unless the bus is another one than it was.
    ///
    /// # Errors
    ///
    /// [`UnplugError`].
    pub(crate) fn remove_ejected(
        &self,
        bus: &Uuid,
        function: Option<u8>,
        was: Incarnation,
    ) -> Result<(), UnplugError> {
        let mut devices = self.devices();
        if self.incarnations().of(bus) != was {
            return Err(UnplugError::NoSuchBus);
        }
        match function {
            None => self.take_away(&mut devices, bus),
            Some(function) => self.take_function(&mut devices, bus, function),
        }
    }

    fn take_function(
        &self,
        devices: &mut Vec<Device>,
        bus: &Uuid,
        function: u8,
    ) -> Result<(), UnplugError> {
        self.partition.remove_function(bus, function)?;
        devices.retain(|device| (device.bus, device.function) != (*bus, function));
        Ok(())
    }

    fn take_away(&self, devices: &mut Vec<Device>, bus: &Uuid) -> Result<(), UnplugError> {
        if !self.partition.remove(bus) {
            return Err(UnplugError::NoSuchBus);
        }
        self.incarnations().end(bus);
        devices.retain(|device| device.bus != *bus);
        Ok(())
    }

    /// What is plugged in.
    pub(crate) fn list(&self, state: MachineState) -> Listing {
        let buses = self.partition.buses();
        Listing {
            state,
            buses: buses.iter().map(bus_status).collect(),
            domains: self.partition.iommu().map(|_| self.domains()),
        }
    }

    /// Looks at the disks' images again, whose size may have changed.
    pub(crate) fn measure_disks(&self) {
        for device in &*self.devices() {
            if let Handle::Blk(disk) = &device.handle
                && let Err(error) = disk.resize()
            {
                log::warn!("a disk keeps its size: {error}");
            }
        }
    }

    /// Every function with its counts.
    pub(crate) fn report(&self) -> Vec<FunctionReport> {
        let mut functions = Vec::new();
        for bus in self.partition.buses() {
            functions.extend(bus.functions.iter().map(|function| FunctionReport {
                bus: bus.instance.to_string(),
                function: function.number,
                kind: function.kind.to_owned(),
                logical_id: logical_id(bus.instance, function.number),
                domain_hint: domain_hint(bus.instance),
                vectors: vectors(function),
                dma: DmaReport {
                    faults: function.dma.faults,
                    last_fault: function.last_fault.map(|fault| fault.to_string()),
                },
                first_stage: self.passthrough.carrier(bus.instance, function.number).map(
                    |carrier| FirstStageReport {
                        by: carrier.name(),
                        why_not_nested: carrier.why_not_nested().map(ToString::to_string),
                    },
                ),
            }));
        }
        functions
    }

    /// The domains of the pvIOMMU.
    pub(crate) fn domains(&self) -> Vec<DomainReport> {
        let report = self.partition.iommu().unwrap_or_default();
        let domains = report.domains.iter().map(|domain| DomainReport {
            number: domain.number,
            devices: domain.devices,
            faults: domain.faults,
        });
        domains.collect()
    }

    /// Flushes of device domains: calls, and elements of calls with a list.
    pub(crate) fn flushes(&self) -> u64 {
        let counters = self.partition.iommu().map(|iommu| iommu.counters);
        counters.map_or(0, |counters| counters.flushes + counters.flushed_ranges)
    }

    /// Calls that mapped and that unmapped something for devices of the host, to follow tables of the
    /// guest.
    pub(crate) fn host_mappings(&self) -> (u64, u64) {
        let counters = self.shadow.as_ref().map(|shadow| shadow.counters());
        counters.map_or((0, 0), |counters| (counters.maps, counters.unmaps))
    }

    /// The library's counters by name.
    pub(crate) fn counters(&self) -> BTreeMap<String, u64> {
        let mut counters = counters::by_name(&self.partition.counters());
        counters.extend(counters::buses_by_name(&self.partition.buses()));
        counters.insert("msi.undelivered".into(), self.msi.undelivered());
        counters.insert("vfio.failures".into(), self.passthrough.failures());
        counters.insert("vfio.errors".into(), self.passthrough.errors());
        if let Some(iommu) = self.partition.iommu() {
            counters.extend(counters::iommu_by_name(&iommu.counters));
        }
        if let Some(shadow) = &self.shadow {
            counters.extend(counters::shadow_by_name(&shadow.counters()));
        }
        if let Some(lines) = &self.lines {
            counters.insert("kvm.sints_lost".into(), lines.lost());
        }
        counters
    }
}

impl recall::Functions for Embedding {
    fn ask_back(&self, bus: &Uuid, function: u8, done: Ejected) -> Result<Asked, UnplugError> {
        // Function 0, which the only one of a bus is, goes with the bus.
        let function = (function != 0).then_some(function);
        let incarnation = match function {
            None => self.eject(bus, done)?,
            Some(function) => self.eject_function(bus, function, done)?,
        };
        Ok(Asked {
            function,
            incarnation,
        })
    }

    fn take_back(&self, bus: &Uuid, asked: Asked) -> Result<(), UnplugError> {
        self.remove_ejected(bus, asked.function, asked.incarnation)
    }
}

fn vectors(function: &vpci::FunctionReport) -> Vec<VectorReport> {
    let counts = (0..).zip(&function.vectors);
    let report = |(index, count): (u16, &VectorCounters)| VectorReport {
        index,
        raised: count.raised,
        suppressed: count.suppressed,
    };
    counts.map(report).collect()
}

fn bus_status(bus: &vpci::BusReport) -> BusStatus {
    let function = |function: &vpci::FunctionReport| FunctionStatus {
        function: function.number,
        kind: function.kind.to_owned(),
        logical_id: logical_id(bus.instance, function.number),
        iommu: function.iommu != IommuMode::Off,
        bars: (0u8..)
            .zip(function.bars)
            .filter_map(|(index, gpa)| Some((index.to_string(), gpa?)))
            .collect(),
        live_messages: function.live_messages,
        vectors: vectors(function),
        dma_faults: function.dma.faults,
        last_fault: function.last_fault.map(|fault| fault.to_string()),
    };
    BusStatus {
        bus: bus.instance.to_string(),
        domain_hint: domain_hint(bus.instance),
        open: bus.open,
        version: bus
            .version
            .map(|v| format!("{}.{}", v.code() >> 16, v.code() & 0xffff)),
        functions: bus.functions.iter().map(function).collect(),
    }
}

/// Switches KVM's SynIC on, and connects its SINTs beside the interrupts of KVM's own chips, which
/// are all that this VMM has routes for.
fn connect_sints(
    vm: &VmFd,
    vcpus: &[VcpuFd],
    hybrid: HybridSupport,
) -> Result<Arc<KvmSintLines>, Error> {
    for vcpu in vcpus {
        hybrid.prepare_vcpu(vcpu)?;
    }
    let lines = KvmSintLines::new(vm, vcpus.len() as u32, kvm::IRQCHIP_GSIS)?;
    let mut routes = kvm::irqchip_routes();
    routes.extend(lines.routes());
    let refused = Error::kvm("route its interrupts");
    let table = KvmIrqRouting::from_entries(&routes)
        .map_err(|_| refused(kvm_ioctls::Error::new(libc::E2BIG)))?;
    vm.set_gsi_routing(&table).map_err(refused)?;
    Ok(Arc::new(lines))
}

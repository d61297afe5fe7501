//! The machine: KVM's VM, its RAM and vCPUs, and what happens to all of them at once.
#![forbid(unsafe_code)]

mod save;

use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, kvm_irqchip,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress};
use vm_vpci::gate::RunGate;
use vm_vpci::kvm::cpuid::{self, CpuidOptions, VcpuPlace};
use vm_vpci::kvm::hybrid::HybridSupport;
use vm_vpci::kvm::{self, HostSupport, xsave};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::Killable;

use crate::acpi;
use crate::cli::HypervMode;
use crate::console::{InputPump, console};
use crate::control::{Command, Control};
use crate::embed::{Embedding, Functions, Host, Tries};
use crate::error::Error;
use crate::firmware;
use crate::kernel::{self, BootSource, Entry, KernelError};
use crate::layout::{self, Layout};
use crate::long_mode;
use crate::marks::Marks;
use crate::memory::{PluggedRam, map_ram};
use crate::ports;
use crate::signals::{VcpuThreads, kick_signal};
use crate::snapshot::{self, MachineSnapshot, RestoreError, Shape};
use crate::vcpu::{Exchange, Shared, Vcpu};
use crate::vcpu_state::InitialState;

/// What to build.
#[derive(Debug)]
pub(crate) struct MachineConfig {
    /// Kernel, initrd and command line.
    pub(crate) boot: BootSource,
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// RAM in bytes.
    pub(crate) memory: u64,
    /// Who answers hypercalls.
    pub(crate) hyperv: HypervMode,
}

/// A VM with its vCPU threads, which wait for [`Machine::resume`].
pub(crate) struct Machine {
    vm: Arc<VmFd>,
    ram: PluggedRam,
    layout: Layout,
    boot: BootSource,
    cpus: u8,
    irqchips: [kvm_irqchip; 3],
    shape: Shape,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Machine {
    /// Builds everything up to the first instruction of the guest; or, for a VM that was saved,
    /// everything that [`Machine::restore`] needs.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing is left running then.
    pub(crate) fn build(
        kvm: &Kvm,
        config: MachineConfig,
        functions: Functions,
        saved: Option<&MachineSnapshot>,
    ) -> Result<(Self, InputPump), Error> {
        let host = Host {
            reference_time: saved.map_or(0, |saved| saved.embedding.reference_time),
            support: HostSupport::check(kvm)?,
            hybrid: hybrid(kvm, config.hyperv)?,
        };
        let host_cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(Error::kvm("tell its CPUID"))?;
        let xsave = xsave::find_fault(kvm, host_cpuid.as_slice());
        if let Some(fault) = xsave {
            log::warn!("the guest gets no XSAVE, because this host's is not sound: {fault}");
        }
        let layout = Layout::new(
            config.memory,
            cpuid::physical_address_bits(host_cpuid.as_slice()),
        )?;
        let max = kvm.get_max_vcpus();
        if usize::from(config.cpus) > max {
            let asked = config.cpus;
            return Err(Error::TooManyCpus { asked, max });
        }
        let vm = Arc::new(create_vm(kvm)?);
        if let Some(hybrid) = host.hybrid {
            hybrid.prepare_vm(&vm)?;
        }
        let gate = Arc::new(RunGate::new(config.cpus.into()));
        let threads = Arc::new(VcpuThreads::default());
        let tracked = functions.has_iommu();
        let ram = PluggedRam::plug(&vm, map_ram(&layout)?, tracked, &gate, &threads)?;
        let serial_irq = EventFd::new(EFD_NONBLOCK).map_err(Error::host("an eventfd"))?;
        vm.register_irqfd(&serial_irq, ports::SERIAL_IRQ)
            .map_err(Error::kvm("connect the serial port's interrupt"))?;
        let serial = saved.map(|saved| &saved.ports.serial);
        let (ports, pump) = console(serial_irq, serial).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => RestoreError::Serial.into(),
            _ => Error::host("an eventfd")(error),
        })?;

        let vcpus = create_vcpus(&vm, config.cpus)?;
        let embedding = Embedding::new(&vm, &vcpus, &ram, &layout, host, functions)?;
        let shared = Arc::new(Shared {
            control: Control::new(vcpus.len()).map_err(Error::host("an eventfd"))?,
            ports,
            embedding,
            marks: Marks::default(),
            exits: AtomicU64::new(0),
            entry: Mutex::new(Entry::default()),
            exchange: Exchange::default(),
            gate,
            threads,
        });
        let tsc_hz = vcpus.first().map_or(Ok(0), kvm::tsc_hz)?;
        let mut machine = Self {
            irqchips: read_irqchips(&vm)?,
            shape: Shape {
                memory: config.memory,
                hybrid: host.hybrid.is_some(),
                iommu: shared.embedding.has_iommu(),
                tsc_hz,
                address_bits: layout.address_bits,
                cpuid: Vec::new(),
            },
            vm,
            ram,
            layout,
            boot: config.boot,
            cpus: config.cpus,
            shared,
            threads: Vec::new(),
        };
        if saved.is_none() {
            machine.load()?;
        }
        for (index, mut fd) in (0u32..).zip(vcpus) {
            let place = VcpuPlace {
                apic_id: index,
                count: config.cpus.into(),
            };
            let options = CpuidOptions {
                tsc_deadline: host.support.tsc_deadline,
                tsc_invariant: machine.shared.embedding.tsc_invariant(),
                xsave: xsave.is_none(),
            };
            let table = machine
                .shared
                .embedding
                .cpuid(host_cpuid.as_slice(), place, options);
            machine.shape.cpuid.push(snapshot::cpuid_table(&table));
            set_cpuid(&fd, &table)?;
            kvm::prepare_vcpu(&mut fd);
            machine.shared.embedding.set_kernel_msrs(index, &fd)?;
            let initial = InitialState::prepare(kvm, &fd, index)?;
            machine.start_thread(index, fd, initial)?;
        }
        Ok((machine, pump))
    }

    fn start_thread(&mut self, index: u32, fd: VcpuFd, initial: InitialState) -> Result<(), Error> {
        let mut vcpu = Vcpu {
            index,
            fd,
            initial,
            tries: Tries::default(),
            shared: self.shared.clone(),
        };
        vcpu.reset()?;
        let thread = vcpu.start().map_err(Error::host("a thread"))?;
        self.threads.push(thread);
        Ok(())
    }

    /// What the threads share.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Writes everything that a boot needs into RAM.
    fn load(&self) -> Result<(), Error> {
        let ram = self.ram.map();
        let entry = kernel::load(&self.boot, &self.layout, ram)?;
        long_mode::write_tables(ram).map_err(|_| KernelError::Ram {
            gpa: layout::PAGE_TABLES,
        })?;
        firmware::write(ram).map_err(|_| KernelError::Ram {
            gpa: firmware::RESET_VECTOR,
        })?;
        let windows = (layout::LOW_WINDOW, self.layout.high_window);
        let tables = acpi::build(layout::ACPI_TABLES, self.cpus, windows.0, windows.1);
        ram.write_slice(&tables, GuestAddress(layout::ACPI_TABLES))
            .map_err(|_| KernelError::Ram {
                gpa: layout::ACPI_TABLES,
            })?;
        *self.shared.entry.lock().unwrap_or_else(|e| e.into_inner()) = entry;
        Ok(())
    }

    /// Lets the vCPUs run.
    pub(crate) fn resume(&self) {
        self.shared.control.order(Command::Run);
    }

    /// Stops all vCPUs between two instructions.
    pub(crate) fn pause(&self) {
        let kick = || self.kick();
        self.shared.control.order_and_wait(Command::Pause, kick);
    }

    /// Brings a paused machine to its state after power-on, with the kernel loaded again.
    ///
    /// # Errors
    ///
    /// [`Error`]: the machine cannot go on.
    pub(crate) fn reset(&self) -> Result<(), Error> {
        self.shared.embedding.reset();
        self.shared.ports.reset();
        for chip in &self.irqchips {
            self.vm
                .set_irqchip(chip)
                .map_err(Error::kvm("reset the interrupt controllers"))?;
        }
        self.load()?;
        // Already paused, so nobody needs a kick.
        self.shared.control.order_and_wait(Command::Reset, || {});
        Ok(())
    }

    fn kick(&self) {
        for thread in &self.threads {
            if let Err(error) = thread.kill(kick_signal()) {
                log::error!("cannot interrupt a vCPU: {error}");
            }
        }
    }
}

impl Drop for Machine {
    /// Ends the vCPU threads.
    fn drop(&mut self) {
        self.shared.control.order(Command::Quit);
        while self.threads.iter().any(|thread| !thread.is_finished()) {
            self.kick();
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread has panicked");
            }
        }
    }
}

/// Whether KVM takes part in answering hypercalls, and how.
///
/// # Errors
///
/// [`Error::NoKernelMode`]: it was asked for, and cannot.
fn hybrid(kvm: &Kvm, mode: HypervMode) -> Result<Option<HybridSupport>, Error> {
    if mode == HypervMode::User {
        return Ok(None);
    }
    match HybridSupport::check(kvm) {
        Ok(support) => {
            log::info!("KVM answers the hypercalls that it can");
            Ok(Some(support))
        }
        Err(error) if mode == HypervMode::Kernel => Err(Error::NoKernelMode(error)),
        Err(error) => {
            log::info!("hypercalls are answered in user space: {error}");
            Ok(None)
        }
    }
}

/// A VM with its irqchip and everything that [`kvm::prepare_vm`] sets up, without RAM and vCPUs.
///
/// # Errors
///
/// [`Error`].
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().map_err(Error::kvm("create a VM"))?;
    vm.set_identity_map_address(layout::IDENTITY_MAP)
        .map_err(Error::kvm("place its identity map"))?;
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(Error::kvm("place its task state segment"))?;
    vm.create_irq_chip()
        .map_err(Error::kvm("create interrupt controllers"))?;
    kvm::prepare_vm(&vm)?;
    Ok(vm)
}

fn create_vcpus(vm: &VmFd, count: u8) -> Result<Vec<VcpuFd>, Error> {
    (0..u64::from(count))
        .map(|index| vm.create_vcpu(index).map_err(Error::kvm("create a vCPU")))
        .collect()
}

fn set_cpuid(fd: &VcpuFd, table: &[kvm_bindings::kvm_cpuid_entry2]) -> Result<(), Error> {
    let refused = Error::kvm("take the guest's CPUID");
    let table =
        CpuId::from_entries(table).map_err(|_| refused(kvm_ioctls::Error::new(libc::E2BIG)))?;
    fd.set_cpuid2(&table).map_err(refused)
}

/// The interrupt controllers as they are after power-on.
fn read_irqchips(vm: &VmFd) -> Result<[kvm_irqchip; 3], Error> {
    let mut chips = [
        KVM_IRQCHIP_PIC_MASTER,
        KVM_IRQCHIP_PIC_SLAVE,
        KVM_IRQCHIP_IOAPIC,
    ]
    .map(|chip_id| kvm_irqchip {
        chip_id,
        ..Default::default()
    });
    for chip in &mut chips {
        vm.get_irqchip(chip)
            .map_err(Error::kvm("tell its interrupt controllers"))?;
    }
    Ok(chips)
}

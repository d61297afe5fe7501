//! KVM's part of a VM: the VM itself, its memory, and its vCPUs at the puppet's first instruction.
#![allow(unsafe_code)]

use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KvmIrqRouting, kvm_cpuid_entry2,
    kvm_lapic_state, kvm_mp_state, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_vpci::cpuid::Features;
use vm_vpci::kvm::cpuid::{CpuidOptions, VcpuPlace, guest_cpuid};
use vm_vpci::kvm::hybrid::HybridSupport;
use vm_vpci::kvm::{self, HostSupport, KvmSintLines, xsave};
use vm_vpci::{KernelMode, Partition};
use vpci_puppet::layout::{self, CommandPage, InterruptLog, LOG_OFFSET, vp_block};
use vpci_puppet::{AddressError, PageTables, io_permission};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Where KVM may put what it needs of the guest's address space on some hosts.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const KVM_TSS: usize = 0xfffb_d000;

/// The `vm-memory` type behind all memory here.
pub(super) type Memory = GuestMemoryMmap<()>;

/// Names what KVM, or the host, refused.
pub(super) fn refused<E: fmt::Display>(what: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{what}: {error}")
}

/// This host's KVM, and what it says of itself.
pub(super) struct KvmHost {
    kvm: Kvm,
    support: HostSupport,
    /// How to do hybrid mode; none keeps everything in user space.
    hybrid: Option<HybridSupport>,
    cpuid: Vec<kvm_cpuid_entry2>,
    xsave: bool,
}

impl Debug for KvmHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KvmHost")
            .field("support", &self.support)
            .finish_non_exhaustive()
    }
}

impl KvmHost {
    /// Opens `/dev/kvm`, for VMs in hybrid mode or not.
    pub(super) fn open(hybrid: bool) -> Result<Self, String> {
        let kvm = Kvm::new().map_err(refused("/dev/kvm"))?;
        let support = HostSupport::check(&kvm).map_err(|error| error.to_string())?;
        let hybrid = match hybrid {
            true => Some(HybridSupport::check(&kvm).map_err(|error| error.to_string())?),
            false => None,
        };
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("KVM does not tell its CPUID"))?
            .as_slice()
            .to_vec();
        let xsave = xsave::find_fault(&kvm, &cpuid).is_none();
        Ok(Self {
            kvm,
            support,
            hybrid,
            cpuid,
            xsave,
        })
    }

    /// Whether doorbells can be offered.
    pub(super) fn has_doorbells(&self) -> bool {
        self.support.any_length_doorbells
    }

    /// Most vCPUs of a VM.
    pub(super) fn max_vcpus(&self) -> usize {
        self.kvm.get_max_vcpus()
    }

    /// A VM with its interrupt controllers and `vps` vCPUs.
    pub(super) fn create(&self, vps: u32) -> Result<(Arc<VmFd>, Vec<VcpuFd>), String> {
        let vm = self.kvm.create_vm().map_err(refused("KVM makes no VM"))?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(refused("KVM does not place its identity map"))?;
        vm.set_tss_address(KVM_TSS)
            .map_err(refused("KVM does not place its task state segment"))?;
        vm.create_irq_chip()
            .map_err(refused("KVM makes no interrupt controllers"))?;
        kvm::prepare_vm(&vm).map_err(|error| error.to_string())?;
        if let Some(hybrid) = self.hybrid {
            hybrid.prepare_vm(&vm).map_err(|error| error.to_string())?;
        }
        let vcpus = (0..u64::from(vps))
            .map(|index| vm.create_vcpu(index))
            .collect::<Result<_, _>>()
            .map_err(refused("KVM makes no vCPU"))?;
        Ok((Arc::new(vm), vcpus))
    }

    /// In hybrid mode, switches KVM's SynIC on and connects its SINTs.
    pub(super) fn kernel_mode(
        &self,
        vm: &Arc<VmFd>,
        vcpus: &[VcpuFd],
    ) -> Result<Option<KernelMode>, String> {
        let Some(hybrid) = self.hybrid else {
            return Ok(None);
        };
        for vcpu in vcpus {
            hybrid
                .prepare_vcpu(vcpu)
                .map_err(|error| error.to_string())?;
        }
        let lines = KvmSintLines::new(vm, vcpus.len() as u32, kvm::IRQCHIP_GSIS)
            .map_err(|error| error.to_string())?;
        let mut routes = kvm::irqchip_routes();
        routes.extend(lines.routes());
        let table = KvmIrqRouting::from_entries(&routes).map_err(|_| "too many routes")?;
        vm.set_gsi_routing(&table)
            .map_err(refused("KVM does not route its interrupts"))?;
        Ok(Some(hybrid.kernel_mode(vm, Arc::new(lines))))
    }

    /// Gives vCPU `vp` of `vps` its CPUID and notes its state after power-on.
    pub(super) fn prepare(
        &self,
        fd: &mut VcpuFd,
        (vp, vps): (u32, u32),
        partition: &Partition,
        features: Features,
    ) -> Result<InitialState, String> {
        let place = VcpuPlace {
            apic_id: vp,
            count: vps,
        };
        let options = CpuidOptions {
            tsc_deadline: self.support.tsc_deadline,
            tsc_invariant: features.tsc_invariant,
            xsave: self.xsave,
        };
        let table = guest_cpuid(&self.cpuid, &partition.cpuid_leaves(), place, options);
        let table = CpuId::from_entries(&table).map_err(|_| "the CPUID table is too long")?;
        fd.set_cpuid2(&table)
            .map_err(refused("KVM does not take the CPUID table"))?;
        kvm::prepare_vcpu(fd);
        kvm::forward_msrs(fd, &partition.kernel_msrs(vp)).map_err(|error| error.to_string())?;
        InitialState::of(fd, vp)
    }
}

/// What a vCPU holds before it runs, to return to at a reset.
#[derive(Debug)]
pub(super) struct InitialState {
    vp: u32,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl InitialState {
    fn of(fd: &VcpuFd, vp: u32) -> Result<Self, String> {
        let reset = fd.get_sregs().map_err(refused("system registers"))?;
        let sregs = vpci_puppet::kvm::system_registers(&reset, vp);
        fd.set_sregs(&sregs).map_err(refused("system registers"))?;
        // Only now in the form of the x2APIC.
        let mut lapic = fd.get_lapic().map_err(refused("local APIC"))?;
        vpci_puppet::kvm::enable_local_apic(&mut lapic);
        Ok(Self {
            vp,
            sregs,
            lapic,
            events: fd.get_vcpu_events().map_err(refused("events"))?,
        })
    }

    /// Puts the vCPU, whose last exit is complete, at the puppet's first instruction.
    pub(super) fn restore(&self, fd: &VcpuFd) -> Result<(), String> {
        let failed = |what| {
            let vp = self.vp;
            move |error| format!("KVM refuses the {what} of VP {vp}: {error}")
        };
        let runnable = kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        };
        fd.set_mp_state(runnable)
            .map_err(failed("activity state"))?;
        fd.set_sregs(&self.sregs)
            .map_err(failed("system registers"))?;
        fd.set_regs(&vpci_puppet::kvm::registers())
            .map_err(failed("registers"))?;
        fd.set_lapic(&self.lapic).map_err(failed("local APIC"))?;
        fd.set_vcpu_events(&self.events).map_err(failed("events"))
    }
}

/// Maps memory for guest physical `ranges` and gives it to the VM, in slots from `first_slot` on.
pub(super) fn plug_memory(
    vm: &VmFd,
    first_slot: u32,
    ranges: &[Range<u64>],
) -> Result<Memory, String> {
    let ranges: Vec<(GuestAddress, usize)> = ranges
        .iter()
        .map(|range| {
            let size = range.end.saturating_sub(range.start);
            (GuestAddress(range.start), size as usize)
        })
        .collect();
    let memory = Memory::from_ranges(&ranges).map_err(refused("guest memory"))?;
    for (slot, region) in (first_slot..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the slot covers exactly one mapping of `memory`. Whoever made the VM keeps the
        // memory until no vCPU of the VM runs any more.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(refused("KVM takes no guest memory"))?;
    }
    Ok(memory)
}

/// The puppet's memory, as the host sees it.
#[derive(Debug)]
pub(super) struct PuppetMemory {
    memory: Memory,
    image: Vec<u8>,
}

impl PuppetMemory {
    /// Gives a VM the puppet for `vps` VPs.
    pub(super) fn plug(vm: &VmFd, slot: u32, vps: u32) -> Result<Self, String> {
        let range = layout::BASE..layout::BASE + layout::size(vps);
        let memory = plug_memory(vm, slot, &[range])?;
        let image = vpci_puppet::image(vps);
        let puppet = Self { memory, image };
        puppet.write(layout::BASE, puppet.image.as_slice());
        Ok(puppet)
    }

    /// Writes VP `vp`'s own pages again as they were at first.
    pub(super) fn reset_vp(&self, vp: u32) {
        let offset = |address: u64| (address - layout::BASE) as usize;
        let block = offset(vp_block(vp))..offset(vp_block(vp + 1));
        self.write(vp_block(vp), &self.image[block]);
    }

    /// Maps the GiB around `address` for all VPs.
    pub(super) fn map(&self, tables: &mut PageTables, address: u64) -> Result<(), AddressError> {
        tables.map(address, |at, entry| self.write(at, &entry))
    }

    pub(super) fn page(&self, vp: u32) -> CommandPage {
        self.read(vp_block(vp))
    }

    pub(super) fn set_page(&self, vp: u32, page: &CommandPage) {
        self.write(vp_block(vp), page);
    }

    pub(super) fn log(&self, vp: u32) -> InterruptLog {
        self.read(vp_block(vp) + LOG_OFFSET)
    }

    /// Lets code of VP `vp` at CPL 3 use `port`, whatever its I/O privilege level.
    pub(super) fn allow_port(&self, vp: u32, port: u16) {
        if let Some((at, mask)) = io_permission(vp, port) {
            let byte: u8 = self.read(at);
            self.write(at, &(byte & !mask));
        }
    }

    /// All addresses come from the puppet's layout, of which the memory holds everything.
    fn write<T: IntoBytes + Immutable + ?Sized>(&self, address: u64, value: &T) {
        if let Err(error) = self
            .memory
            .write_slice(value.as_bytes(), GuestAddress(address))
        {
            log::error!("the puppet's memory: {error}");
        }
    }

    fn read<T: FromBytes + IntoBytes>(&self, address: u64) -> T {
        let mut value = T::new_zeroed();
        if let Err(error) = self
            .memory
            .read_slice(value.as_mut_bytes(), GuestAddress(address))
        {
            log::error!("the puppet's memory: {error}");
        }
        value
    }
}

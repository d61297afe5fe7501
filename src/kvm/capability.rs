//! Capabilities of the host, and those that a VM has to switch on.
#![forbid(unsafe_code)]

use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_IOEVENTFD_ANY_LENGTH,
    KVM_CAP_X2APIC_API, KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    KVM_X86_QUIRK_SLOT_ZAP_ALL, Msrs, kvm_enable_cap, kvm_msr_entry,
};
use kvm_ioctls::{
    Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, SyncReg, VcpuFd, VmFd,
};

use super::survey::{CAPABILITIES, Need};
use crate::hv::msr as hv;

/// First synthetic MSR (docs/spec/hyperv-guest-interface.md, section 2).
const SYNTHETIC_MSR_BASE: u32 = 0x4000_0000;
/// Number of synthetic MSRs that are taken from KVM.
const SYNTHETIC_MSR_COUNT: u32 = 512;

/// Invalid argument.
pub(super) const EINVAL: i32 = 22;

/// Why a VM cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host's KVM lacks capabilities.
    #[error("this host's KVM lacks {}: a kernel of version 5.10 or later is needed", missing.join(", "))]
    Missing {
        /// Names of the capabilities.
        missing: Vec<&'static str>,
    },
    /// KVM refused a call.
    #[error("KVM refuses to {what}: {source}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

pub(super) fn refused(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |source| KvmError::Refused { what, source }
}

/// What the host's KVM offers of the things that are optional here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSupport {
    /// A store of any width can ring a doorbell.
    pub any_length_doorbells: bool,
    /// KVM's local APIC has the TSC-deadline timer.
    pub tsc_deadline: bool,
}

impl HostSupport {
    /// Looks for everything that this module cannot do without (docs/spec/kvm.md, section 2).
    ///
    /// # Errors
    ///
    /// [`KvmError::Missing`] names what is not there.
    pub fn check(kvm: &Kvm) -> Result<Self, KvmError> {
        let missing: Vec<&str> = CAPABILITIES
            .iter()
            .filter(|entry| entry.need == Need::Required && !entry.satisfied_by(entry.value(kvm)))
            .map(|entry| entry.name)
            .collect();
        if !missing.is_empty() {
            return Err(KvmError::Missing { missing });
        }
        Ok(Self {
            any_length_doorbells: has(kvm, KVM_CAP_IOEVENTFD_ANY_LENGTH),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }
}

fn has(kvm: &Kvm, capability: u32) -> bool {
    kvm.check_extension_raw(capability.into()) > 0
}

/// Prepares a VM that has its irqchip and no vCPU yet: wide APIC ids, exits on what KVM cannot
/// emulate, and all synthetic MSRs to user space, with or without Hyper-V emulation in KVM
/// (docs/spec/kvm.md, sections 3 and 5).
///
/// # Errors
///
/// [`KvmError::Refused`].
pub fn prepare_vm(vm: &VmFd) -> Result<(), KvmError> {
    let x2apic = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    enable(vm, KVM_CAP_X2APIC_API, x2apic.into()).map_err(refused("use wide APIC ids"))?;
    // Both are improvements only; kernels before 5.14 and 6.12 do without.
    for (capability, value) in [
        (KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1),
        (KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL),
    ] {
        if let Err(error) = enable(vm, capability, value.into()) {
            log::debug!("KVM capability {capability} stays off: {error}");
        }
    }
    enable(
        vm,
        KVM_CAP_X86_USER_SPACE_MSR,
        KVM_MSR_EXIT_REASON_FILTER.into(),
    )
    .map_err(refused("give MSR accesses to user space"))?;
    filter_msrs(vm, |_| false)
}

/// Takes the synthetic MSRs from KVM, but for reads of those that `kept` names.
pub(super) fn filter_msrs(vm: &VmFd, kept: impl Fn(u32) -> bool) -> Result<(), KvmError> {
    const BYTES: usize = SYNTHETIC_MSR_COUNT as usize / 8;
    let mut reads = [0; BYTES];
    for offset in 0..SYNTHETIC_MSR_COUNT {
        reads[offset as usize / 8] |= u8::from(kept(SYNTHETIC_MSR_BASE + offset)) << (offset % 8);
    }
    let range = |flags, bitmap| MsrFilterRange {
        flags,
        base: SYNTHETIC_MSR_BASE,
        msr_count: SYNTHETIC_MSR_COUNT,
        bitmap,
    };
    let ranges = [
        range(MsrFilterRangeFlags::READ, &reads[..]),
        range(MsrFilterRangeFlags::WRITE, &[0; BYTES][..]),
    ];
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges)
        .map_err(refused("filter the synthetic MSRs"))
}

fn enable(vm: &VmFd, cap: u32, value: u64) -> Result<(), kvm_ioctls::Error> {
    let mut request = kvm_enable_cap {
        cap,
        ..Default::default()
    };
    request.args[0] = value;
    vm.enable_cap(&request)
}

/// Makes a vCPU hand out its registers with every exit, which costs nothing and spares the
/// hypercall path all register ioctls (docs/spec/kvm.md, section 10).
pub fn prepare_vcpu(vcpu: &mut VcpuFd) {
    vcpu.set_sync_valid_reg(SyncReg::Register);
    vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
}

/// Carries out [`MsrEffect::TscInvariant`](crate::msr::MsrEffect::TscInvariant): a KVM with Hyper-V
/// emulation shows or hides the guest's invariant-TSC bit by its own copy of the MSR. A KVM without
/// does not know the MSR, and shows the bit (docs/spec/kvm.md, section 4).
///
/// # Errors
///
/// [`KvmError::Refused`].
pub fn forward_tsc_invariant(vcpu: &VcpuFd, value: u64) -> Result<(), KvmError> {
    write_msr(vcpu, hv::TSC_INVARIANT_CONTROL, value)
        .map(|_| ())
        .map_err(refused("take the invariant-TSC control"))
}

/// Writes KVM's copies of MSRs of a vCPU, in this order:
/// [`Partition::kernel_msrs`](crate::Partition::kernel_msrs).
///
/// # Errors
///
/// [`KvmError::Refused`].
pub fn forward_msrs(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), KvmError> {
    for (msr, value) in msrs {
        match write_msr(vcpu, *msr, *value) {
            Ok(true) => {}
            Ok(false) => {
                let unknown = kvm_ioctls::Error::new(EINVAL);
                return Err(refused("take the guest's value of a synthetic MSR")(
                    unknown,
                ));
            }
            Err(error) => return Err(refused("take synthetic MSRs")(error)),
        }
    }
    Ok(())
}

/// Writes an MSR as the host. False if KVM does not know it or refuses the value.
fn write_msr(vcpu: &VcpuFd, index: u32, data: u64) -> Result<bool, kvm_ioctls::Error> {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[entry]).map_err(|_| kvm_ioctls::Error::new(EINVAL))?;
    vcpu.set_msrs(&msrs).map(|written| written == 1)
}

/// Frequency of the guest's TSC in Hz.
///
/// # Errors
///
/// [`KvmError::Refused`]: the host's TSC is not constant.
pub fn tsc_hz(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    vcpu.get_tsc_khz()
        .map(|khz| u64::from(khz) * 1000)
        .map_err(refused("tell the TSC frequency"))
}

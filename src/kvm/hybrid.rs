//! Hybrid mode: KVM answers the hypercalls that it can, and raises SINTs by its own SynIC
//! (docs/spec/kvm.md, sections 1, 6.2 and 7.2).
//!
//! Beside the calls of [`super`], in this order:
//!
//! 1. [`HybridSupport::check`]: is everything there, and does it work?
//! 2. [`HybridSupport::prepare_vm`], after [`super::prepare_vm`];
//! 3. [`HybridSupport::prepare_vcpu`] for each vCPU, once all exist, in VP order;
//! 4. [`KvmSintLines::new`](super::KvmSintLines::new), and its routes, with the VMM's own, into the
//!    table of routes;
//! 5. [`HybridSupport::kernel_mode`] for [`Partition::with_kernel`](crate::Partition::with_kernel);
//! 6. [`super::forward_msrs`] with what [`Partition::kernel_msrs`](crate::Partition::kernel_msrs)
//!    says, before the guest runs and after each reset and restore;
//! 7. MSR writes go to [`super::answer_wrmsr`], and KVM_EXIT_HYPERV to [`super::answer_hyperv`].
#![forbid(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC2, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::capability::{filter_msrs, refused};
use super::cpuid::find;
use super::probe::{self, ProbeFault};
use super::survey::{CAPABILITIES, Need};
use super::{KvmConnections, KvmError, KvmSintLines};
use crate::hv::msr;
use crate::hypercall::{CallInstruction, KernelCalls};
use crate::partition::KernelMode;
use crate::synic::UserSynic;

/// Why hybrid mode is not possible on a host.
#[derive(Debug, thiserror::Error)]
pub enum HybridError {
    /// KVM lacks capabilities.
    #[error("this host's KVM lacks {}", missing.join(", "))]
    Missing {
        /// Names of the capabilities.
        missing: Vec<&'static str>,
    },
    /// The instruction for hypercalls is not known for the host's CPU.
    #[error("this host's CPU is neither AMD's nor Intel's kind")]
    Vendor,
    /// All is there, but does not work.
    #[error("the Hyper-V emulation of this host's KVM does not pass its probe: {0}")]
    Probe(#[from] ProbeFault),
}

/// The proof that a host's KVM can do hybrid mode, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HybridSupport {
    instruction: CallInstruction,
}

impl HybridSupport {
    /// Looks for every capability, and tries them in a scratch VM.
    ///
    /// # Errors
    ///
    /// [`HybridError`] names what is not there.
    pub fn check(kvm: &Kvm) -> Result<Self, HybridError> {
        let missing: Vec<&str> = CAPABILITIES
            .iter()
            .filter(|entry| entry.need == Need::Hybrid && !entry.satisfied_by(entry.value(kvm)))
            .map(|entry| entry.name)
            .collect();
        if !missing.is_empty() {
            return Err(HybridError::Missing { missing });
        }
        let host = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(|source| ProbeFault::Refused {
                what: "tell its CPUID",
                source,
            })?;
        let instruction = call_instruction(host.as_slice()).ok_or(HybridError::Vendor)?;
        let support = Self { instruction };
        probe::run(kvm, &support, host.as_slice())?;
        Ok(support)
    }

    /// Lets KVM answer reads of the SynIC's MSRs. Writes go on to be trapped: they are checked, and
    /// pages zeroed, before KVM gets its copy, and a write of EOM is how the guest says that a slot
    /// is free (docs/spec/kvm.md, sections 5 and 7.2).
    ///
    /// # Errors
    ///
    /// [`KvmError::Refused`].
    pub fn prepare_vm(&self, vm: &VmFd) -> Result<(), KvmError> {
        filter_msrs(vm, |number| {
            UserSynic::owns_msr(number) && number != msr::EOM
        })
    }

    /// Switches a vCPU's SynIC on. It needs an in-kernel local APIC.
    ///
    /// # Errors
    ///
    /// [`KvmError::Refused`].
    pub fn prepare_vcpu(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let request = kvm_enable_cap {
            cap: KVM_CAP_HYPERV_SYNIC2,
            ..Default::default()
        };
        vcpu.enable_cap(&request)
            .map_err(refused("switch its SynIC on"))
    }

    /// What a partition in the VM behind `vm` has to know.
    pub fn kernel_mode(&self, vm: &Arc<VmFd>, lines: Arc<KvmSintLines>) -> KernelMode {
        KernelMode {
            lines,
            connections: Some(Arc::new(KvmConnections::new(vm.clone()))),
            calls: self.calls(),
        }
    }

    /// The calls that KVM answers: all of them, as each has a capability that was checked.
    pub(super) fn calls(&self) -> KernelCalls {
        KernelCalls {
            instruction: self.instruction,
            flush: true,
            send_ipi: true,
            spin_wait: true,
            signal_event: true,
        }
    }
}

/// The instruction by the vendor that the host's CPU names in leaf 0.
fn call_instruction(host: &[kvm_cpuid_entry2]) -> Option<CallInstruction> {
    let leaf = find(host, 0, 0)?;
    let mut vendor = [0; 12];
    let words = [leaf.ebx, leaf.edx, leaf.ecx];
    for (bytes, word) in vendor.chunks_exact_mut(4).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    match &vendor {
        b"AuthenticAMD" | b"HygonGenuine" => Some(CallInstruction::Vmmcall),
        b"GenuineIntel" | b"CentaurHauls" | b"  Shanghai  " => Some(CallInstruction::Vmcall),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| vendor[at + i]));
        vec![kvm_cpuid_entry2 {
            eax: 0xd,
            ebx: word(0),
            edx: word(4),
            ecx: word(8),
            ..Default::default()
        }]
    }

    #[test]
    fn the_vendor_decides_the_instruction() {
        let of = |vendor| call_instruction(&host(vendor));
        assert_eq!(of(b"AuthenticAMD"), Some(CallInstruction::Vmmcall));
        assert_eq!(of(b"HygonGenuine"), Some(CallInstruction::Vmmcall));
        assert_eq!(of(b"GenuineIntel"), Some(CallInstruction::Vmcall));
        assert_eq!(of(b"Microsoft Hv"), None);
        assert_eq!(call_instruction(&[]), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let error = HybridError::Missing {
            missing: vec!["KVM_CAP_HYPERV", "KVM_CAP_HYPERV_SYNIC2"],
        };
        assert_eq!(
            error.to_string(),
            "this host's KVM lacks KVM_CAP_HYPERV, KVM_CAP_HYPERV_SYNIC2"
        );
    }

    #[test]
    fn a_host_either_passes_or_says_why_not() {
        let Ok(kvm) = Kvm::new() else {
            println!("SKIPPED a_host_either_passes_or_says_why_not: no /dev/kvm");
            return;
        };
        let all = CAPABILITIES
            .iter()
            .filter(|entry| entry.need == Need::Hybrid)
            .all(|entry| entry.satisfied_by(entry.value(&kvm)));
        match HybridSupport::check(&kvm) {
            Ok(_) => assert!(all),
            Err(HybridError::Missing { missing }) => assert!(!all && !missing.is_empty()),
            Err(error) => panic!("{error}"),
        }
    }
}

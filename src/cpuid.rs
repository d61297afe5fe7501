//! CPUID leaves that make a guest find Hyper-V (docs/spec/hyperv-guest-interface.md, section 1).
//!
//! [`leaves`] gives the minimal profile with which Linux brings up VMBus and `pci-hyperv`. What the
//! VMM must do elsewhere in its CPUID table:
//!
//! - remove every leaf of 0x40000000 to 0x4FFFFFFF that is there already. A visible KVM signature,
//!   at any base, makes Linux a KVM guest, and VMBus never loads;
//! - set bit 31 of ECX of leaf 1 (hypervisor present);
//! - with [`Features::tsc_invariant`], set bit 8 of EDX of leaf 0x80000007, and only on a host whose
//!   TSC is invariant (docs/spec/kvm.md, section 4).
//!
//! The leaves at 0x40000080 to 0x40000082 are part of the table even when they are zero: Linux 7.3
//! reads 0x40000082 unconditionally, and KVM answers a missing leaf with the data of another one
//! where the guest's vendor is Intel.
#![forbid(unsafe_code)]

use crate::hv::cpuid as hv;
use crate::hypercall::KernelCalls;

/// What is offered to the guest beyond the mandatory interface. CPUID ([`leaves`]), the MSRs
/// ([`crate::msr::PartitionMsrs`]) and the hypercall dispatcher must be given the same features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// MSR TIME_REF_COUNT, a clock source of last resort. Linux up to 6.1 prefers it to the invariant
    /// TSC, and each look at the time is an exit then: better off where `tsc_invariant` is on.
    pub reference_counter: bool,
    /// MSRs TSC_FREQUENCY and APIC_FREQUENCY. Without kvm-clock, PIT, HPET and PM timer a guest has
    /// no other way to learn them, and does not boot.
    pub frequencies: bool,
    /// MSR TSC_INVARIANT_CONTROL. Without it Linux marks the TSC unstable.
    pub tsc_invariant: bool,
    /// Fast hypercalls may pass up to 112 bytes of input, in RDX, R8 and XMM0-5.
    pub xmm_input: bool,
    /// Fast hypercalls may return output in registers.
    pub xmm_output: bool,
    /// Announces the lock bit of MSR HYPERCALL, which works in any case.
    pub hypercall_lock: bool,
    /// MSIs carry 15-bit destination ids: needed once APIC ids exceed 255, and only right when the
    /// VMM's IO-APIC and MSI path take them.
    pub extended_destination: bool,
}

impl Default for Features {
    /// The minimal profile (docs/spec/hyperv-guest-interface.md, section 1.4) on a host with an
    /// invariant TSC.
    fn default() -> Self {
        Self {
            reference_counter: true,
            frequencies: true,
            tsc_invariant: true,
            xmm_input: false,
            xmm_output: false,
            hypercall_lock: false,
            extended_destination: false,
        }
    }
}

/// What [`leaves`] needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Number of VPs, reported as the maximum.
    pub vp_count: u32,
    /// Optional parts of the interface.
    pub features: Features,
    /// The VM has a pvIOMMU.
    pub iommu: bool,
}

/// One CPUID leaf. None of the Hyper-V leaves has subleaves: ECX on input is not significant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidLeaf {
    /// EAX on input.
    pub function: u32,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// The Hyper-V leaves, in ascending order, the same on every VP.
pub fn leaves(config: &CpuidConfig) -> Vec<CpuidLeaf> {
    let [ebx, ecx, edx] = hv::VENDOR;
    let destination = config.features.extended_destination;
    vec![
        CpuidLeaf {
            function: hv::LEAF_VENDOR,
            eax: hv::LEAF_HARDWARE,
            ebx,
            ecx,
            edx,
        },
        CpuidLeaf {
            function: hv::LEAF_INTERFACE,
            eax: hv::INTERFACE,
            ..Default::default()
        },
        empty(hv::LEAF_VERSION),
        features(config),
        CpuidLeaf {
            function: hv::LEAF_RECOMMENDATIONS,
            // Nothing outside the guest can emulate AutoEOI (docs/spec/kvm.md, section 4).
            eax: (hv::Recommendations::RELAXED_TIMING | hv::Recommendations::DEPRECATE_AUTO_EOI)
                .bits(),
            ebx: hv::SPIN_NEVER_NOTIFY,
            ..Default::default()
        },
        CpuidLeaf {
            function: hv::LEAF_LIMITS,
            eax: config.vp_count,
            ..Default::default()
        },
        empty(hv::LEAF_HARDWARE),
        empty(hv::LEAF_STACK_VENDOR),
        CpuidLeaf {
            function: hv::LEAF_STACK_INTERFACE,
            eax: if destination { hv::STACK_INTERFACE } else { 0 },
            ..Default::default()
        },
        CpuidLeaf {
            function: hv::LEAF_STACK_PROPERTIES,
            eax: if destination {
                hv::StackProperties::EXTENDED_DESTINATION.bits()
            } else {
                0
            },
            ..Default::default()
        },
    ]
}

/// Recommends the calls that the host's kernel answers, in `leaves` as [`leaves`] made them.
///
/// AutoEOI stays deprecated, although KVM's SynIC has it: it forces slow interrupt paths on the host
/// (docs/spec/hyperv-guest-interface.md#hyperv-guest-interface-1-3).
pub fn recommend_kernel_calls(leaves: &mut [CpuidLeaf], calls: &KernelCalls) {
    use hv::Recommendations;
    let mut hints = Recommendations::empty();
    hints.set(Recommendations::REMOTE_TLB_FLUSH, calls.flush);
    hints.set(Recommendations::CLUSTER_IPI, calls.send_ipi);
    // One bit for both kinds of calls.
    let sparse = calls.flush && calls.send_ipi;
    hints.set(Recommendations::EX_PROCESSOR_MASKS, sparse);
    for leaf in leaves {
        if leaf.function == hv::LEAF_RECOMMENDATIONS {
            leaf.eax |= hints.bits();
            if calls.spin_wait {
                leaf.ebx = hv::SPIN_ATTEMPTS;
            }
        }
    }
}

fn empty(function: u32) -> CpuidLeaf {
    CpuidLeaf {
        function,
        ..Default::default()
    }
}

fn features(config: &CpuidConfig) -> CpuidLeaf {
    let offered = &config.features;
    use hv::{Features, PrivilegesHigh, PrivilegesLow};
    let mut low = PrivilegesLow::SYNIC | PrivilegesLow::HYPERCALL | PrivilegesLow::VP_INDEX;
    low.set(PrivilegesLow::TIME_REF_COUNT, offered.reference_counter);
    low.set(PrivilegesLow::FREQUENCY_MSRS, offered.frequencies);
    low.set(PrivilegesLow::TSC_INVARIANT, offered.tsc_invariant);
    let mut features = Features::empty();
    features.set(Features::FREQUENCY_MSRS, offered.frequencies);
    features.set(
        Features::XMM_INPUT,
        offered.xmm_input || mutant!("cpuid-xmm-offered"),
    );
    features.set(Features::XMM_OUTPUT, offered.xmm_output);
    features.set(Features::HYPERCALL_MSR_LOCK, offered.hypercall_lock);
    features.set(Features::DEVICE_DOMAINS, config.iommu);
    features.set(Features::S1_DEVICE_DOMAINS, config.iommu);
    CpuidLeaf {
        function: hv::LEAF_FEATURES,
        eax: low.bits(),
        ebx: (PrivilegesHigh::POST_MESSAGES | PrivilegesHigh::SIGNAL_EVENTS).bits(),
        ecx: 0,
        edx: features.bits(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(features: Features, function: u32) -> CpuidLeaf {
        let config = CpuidConfig {
            vp_count: 4,
            features,
            iommu: false,
        };
        let all = leaves(&config);
        let mut found = all.iter().filter(|leaf| leaf.function == function);
        let leaf = *found.next().expect("leaf present");
        assert!(found.next().is_none(), "leaf {function:#x} given twice");
        leaf
    }

    #[test]
    fn the_minimal_profile_has_what_linux_demands_and_nothing_it_must_not_see() {
        let vendor = leaf(Features::default(), 0x4000_0000);
        assert!((0x4000_0005..=0x4000_ffff).contains(&vendor.eax));
        let leaf3 = leaf(Features::default(), 0x4000_0003);
        assert_eq!(
            leaf3.eax,
            1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 11 | 1 << 15
        );
        assert_eq!(leaf3.ebx, 1 << 4 | 1 << 5);
        assert_eq!(leaf3.edx, 1 << 8);
        let leaf4 = leaf(Features::default(), 0x4000_0004);
        assert_eq!(leaf4.eax, 1 << 5 | 1 << 9);
        assert_eq!(leaf4.ebx, 0xffff_ffff);
        assert_eq!(leaf(Features::default(), 0x4000_0005).eax, 4);
        for function in 0x4000_0080..=0x4000_0082 {
            assert_eq!(leaf(Features::default(), function), empty(function));
        }
    }

    #[test]
    fn a_pviommu_sets_both_device_domain_bits() {
        let config = CpuidConfig {
            vp_count: 4,
            features: Features::default(),
            iommu: true,
        };
        let all = leaves(&config);
        let leaf3 = all.iter().find(|leaf| leaf.function == 0x4000_0003);
        assert_eq!(leaf3.unwrap().edx, 1 << 8 | 1 << 24 | 1 << 25);
    }

    #[test]
    fn every_leaf_up_to_the_announced_maximum_is_given() {
        let max = leaf(Features::default(), 0x4000_0000).eax;
        for function in 0x4000_0000..=max {
            leaf(Features::default(), function);
        }
    }

    #[test]
    fn calls_of_the_kernel_are_recommended_one_by_one() {
        let with = |flush, send_ipi, spin_wait| {
            let config = CpuidConfig {
                vp_count: 1,
                features: Features::default(),
                iommu: false,
            };
            let mut all = leaves(&config);
            let plain = all.clone();
            let calls = KernelCalls {
                instruction: crate::hypercall::CallInstruction::Vmmcall,
                flush,
                send_ipi,
                spin_wait,
                signal_event: true,
            };
            recommend_kernel_calls(&mut all, &calls);
            let changed: Vec<_> = all.iter().zip(&plain).filter(|(a, b)| a != b).collect();
            assert!(changed.iter().all(|(leaf, _)| leaf.function == 0x4000_0004));
            let leaf = all.iter().find(|leaf| leaf.function == 0x4000_0004);
            leaf.map(|leaf| (leaf.eax, leaf.ebx)).expect("leaf present")
        };
        let base = 1 << 5 | 1 << 9;
        assert_eq!(with(false, false, false), (base, !0));
        assert_eq!(with(true, false, false), (base | 1 << 2, !0));
        assert_eq!(with(false, true, true), (base | 1 << 10, 0xfff));
        let all = base | 1 << 2 | 1 << 10 | 1 << 11;
        assert_eq!(with(true, true, true), (all, 0xfff));
    }

    #[test]
    fn each_feature_moves_its_own_bits() {
        let none = Features {
            reference_counter: false,
            frequencies: false,
            tsc_invariant: false,
            ..Features::default()
        };
        assert_eq!(leaf(none, 0x4000_0003).eax, 1 << 2 | 1 << 5 | 1 << 6);
        assert_eq!(leaf(none, 0x4000_0003).edx, 0);
        let all = Features {
            xmm_input: true,
            xmm_output: true,
            hypercall_lock: true,
            extended_destination: true,
            ..none
        };
        assert_eq!(leaf(all, 0x4000_0003).edx, 1 << 4 | 1 << 15 | 1 << 18);
        assert_eq!(leaf(all, 0x4000_0081).eax, 0x3123_5356);
        assert_eq!(leaf(all, 0x4000_0082).eax, 1 << 2);
    }
}

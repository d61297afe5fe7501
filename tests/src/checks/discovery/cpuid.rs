//! CPUID leaves (docs/spec/hyperv-guest-interface.md, sections 1 and 14).
#![forbid(unsafe_code)]

use vm_vpci::cpuid::Features;

use super::{NONE, machine_with};
use crate::check::{Check, Context, REAL, Verdict, equal, holds};
use crate::model::kernel::msr;

const VENDOR: u32 = 0x4000_0000;
const INTERFACE: u32 = 0x4000_0001;
const FEATURES: u32 = 0x4000_0003;
const HINTS: u32 = 0x4000_0004;
const LIMITS: u32 = 0x4000_0005;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "discovery.cpuid.hypervisor-bit",
        "CPUID.1:ECX[31] says that there is a hypervisor, on every VP.",
        &["HV-1-01", "HV-1-02", "HV-1.4-01"],
        hypervisor_bit,
    )
    .on(REAL),
    Check::new(
        "discovery.cpuid.vendor",
        "Leaf 0x40000000 has the signature and a highest leaf in the range that Linux takes.",
        &["HV-1-03", "HV-1-04", "HV-1.4-01"],
        vendor,
    ),
    Check::new(
        "discovery.cpuid.interface",
        "Leaf 0x40000001 is \"Hv#1\" and nothing else.",
        &["HV-1-05"],
        interface,
    ),
    Check::new(
        "discovery.cpuid.every-leaf",
        "Every leaf up to the highest is the host's own, the version and hardware leaves zero.",
        &["HV-1-06", "HV-1-10", "HV-1-11", "HV-1-12", "HV-1-16"],
        every_leaf,
    ),
    Check::new(
        "discovery.cpuid.privileges",
        "The privileges are exactly those whose MSRs and calls are there.",
        &[
            "HV-1-07",
            "HV-1.1-01",
            "HV-1.1-02",
            "HV-1.1-03",
            "HV-1.1-04",
            "HV-1.1-05",
            "HV-1.1-06",
            "HV-1.1-07",
            "HV-1.1-08",
            "HV-1.1-09",
            "HV-1.1-10",
            "HV-1.1-11",
            "HV-1.1-12",
            "HV-1.1-13",
            "HV-1.1-15",
            "HV-1.1-17",
            "HV-1.1-19",
            "HV-1.4-01",
        ],
        privileges,
    ),
    Check::new(
        "discovery.cpuid.no-root-and-no-isolation",
        "No privilege makes the guest a root partition, isolated, or call what is not there.",
        &[
            "HV-1.2-01",
            "HV-1.2-02",
            "HV-1.2-03",
            "HV-1.2-04",
            "HV-1.2-05",
            "HV-1.2-06",
            "HV-14-01",
        ],
        high_privileges,
    ),
    Check::new(
        "discovery.cpuid.features",
        "Leaf 0x40000003 EDX has frequencies and, when configured, XMM and the lock bit alone.",
        &[
            "HV-1.2-07",
            "HV-1.2-08",
            "HV-1.2-09",
            "HV-1.2-10",
            "HV-1.2-11",
        ],
        features,
    ),
    Check::new(
        "discovery.cpuid.each-feature-moves-its-own-bits",
        "A host without an optional part shows neither its privilege nor its feature bit.",
        &[
            "HV-1.1-02",
            "HV-1.1-11",
            "HV-1.1-13",
            "HV-1.2-07",
            "HV-1.2-08",
            "HV-1.2-10",
        ],
        each_feature,
    ),
    Check::new(
        "discovery.cpuid.hints",
        "The hints are relaxed timing and no AutoEOI, and what the host's kernel offers; without that a \
         spinning VP need not notify.",
        &[
            "HV-1-08",
            "HV-1.3-01",
            "HV-1.3-02",
            "HV-1.3-03",
            "HV-1.3-04",
            "HV-1.3-05",
            "HV-1.3-06",
            "HV-1.3-07",
            "HV-1.3-08",
            "HV-1.3-09",
            "HV-1.3-10",
            "HV-1.3-11",
            "HV-1.3-12",
            "HV-14-01",
        ],
        hints,
    ),
    Check::new(
        "discovery.cpuid.limits",
        "Leaf 0x40000005 has the number of VPs, or does not report it.",
        &["HV-1-09"],
        limits,
    ),
    Check::new(
        "discovery.cpuid.stack-leaves-are-zero",
        "Leaves 0x40000080 to 0x40000082 are there and zero, so that no guest sees random bits.",
        &["HV-1-13", "HV-1-14", "HV-1-15", "HV-1-16", "HV-14-01"],
        stack_leaves,
    ),
    Check::new(
        "discovery.cpuid.extended-destination",
        "With 15-bit MSI destinations, leaf 0x40000081 is \"VS#1\" and 0x40000082 has bit 2 alone.",
        &["HV-1-15", "HV-1-17"],
        extended_destination,
    ),
    Check::new(
        "discovery.cpuid.no-other-hypervisor",
        "No other hypervisor's signature is at any base that Linux looks at.",
        &["HV-1-18", "HV-1-19"],
        no_other_hypervisor,
    ),
    Check::new(
        "discovery.cpuid.same-on-every-vp",
        "Every VP sees the same leaves.",
        &["HV-1-07"],
        same_on_every_vp,
    ),
    Check::new(
        "discovery.cpuid.invariant-tsc",
        "The invariant TSC is visible after the guest has asked for it.",
        &["HV-2-22", "HV-1.1-15"],
        invariant_tsc,
    )
    .on(REAL),
];

fn hypervisor_bit(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for vp in 0..vm.vps() {
        let [_, _, ecx, _] = vm.cpuid(vp, 1)?;
        equal(format!("CPUID.1:ECX[31] of VP {vp}"), ecx >> 31, 1)?;
    }
    Ok(())
}

fn vendor(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [eax, ebx, ecx, edx] = vm.cpuid(0, VENDOR)?;
    let signature = [0x7263_694d, 0x666f_736f, 0x7648_2074];
    equal("EBX, ECX, EDX of 0x40000000", [ebx, ecx, edx], signature)?;
    holds(
        format!("0x40000005 <= EAX of 0x40000000 <= 0x4000ffff: {eax:#x}"),
        (LIMITS..=0x4000_ffff).contains(&eax),
    )
}

fn interface(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [eax, ..] = vm.cpuid(0, INTERFACE)?;
    equal("EAX of 0x40000001", eax, 0x3123_7648)
}

fn every_leaf(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [highest, ..] = vm.cpuid(0, VENDOR)?;
    for leaf in (0x4000_0002..=highest).filter(|leaf| !(FEATURES..=LIMITS).contains(leaf)) {
        equal(format!("CPUID {leaf:#x}"), vm.cpuid(0, leaf)?, [0; 4])?;
    }
    Ok(())
}

/// EAX of 0x40000003 for what is configured: reference counter 1, SynIC 2, hypercalls 5, VP index
/// 6, frequencies 11, invariant TSC 15.
fn expected_privileges(features: &Features) -> u32 {
    1 << 2
        | 1 << 5
        | 1 << 6
        | u32::from(features.reference_counter) << 1
        | u32::from(features.frequencies) << 11
        | u32::from(features.tsc_invariant) << 15
}

/// EDX of 0x40000003 for what is configured.
fn expected_features(features: &Features) -> u32 {
    u32::from(features.xmm_input) << 4
        | u32::from(features.frequencies) << 8
        | u32::from(features.xmm_output) << 15
        | u32::from(features.hypercall_lock) << 18
}

fn privileges(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [eax, ..] = vm.cpuid(0, FEATURES)?;
    let expected = expected_privileges(&vm.setup().features);
    equal("EAX of 0x40000003", eax, expected)
}

fn high_privileges(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [_, ebx, ecx, _] = vm.cpuid(0, FEATURES)?;
    equal("EBX of 0x40000003", ebx, 1 << 4 | 1 << 5)?;
    equal("ECX of 0x40000003", ecx, 0)
}

fn features(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [_, _, _, edx] = vm.cpuid(0, FEATURES)?;
    equal(
        "EDX of 0x40000003",
        edx,
        expected_features(&vm.setup().features),
    )
}

fn each_feature(context: &Context) -> Verdict {
    let alone: [fn(&mut Features); 7] = [
        |_| {},
        |features| features.reference_counter = true,
        |features| features.frequencies = true,
        |features| features.tsc_invariant = true,
        |features| features.xmm_input = true,
        |features| features.xmm_output = true,
        |features| features.hypercall_lock = true,
    ];
    for change in alone {
        let mut features = NONE;
        change(&mut features);
        let vm = machine_with(context, features)?;
        let [eax, _, _, edx] = vm.cpuid(0, FEATURES)?;
        let what = format!("EAX and EDX of 0x40000003 with {features:?}");
        let expected = (expected_privileges(&features), expected_features(&features));
        equal(what, (eax, edx), expected)?;
    }
    Ok(())
}

fn hints(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [eax, ebx, ..] = vm.cpuid(0, HINTS)?;
    // Flushing TLBs, sending IPIs, both with sparse sets; a number of tries before a long wait.
    let (calls, tries) = match context.is_hybrid() {
        true => (1 << 2 | 1 << 10 | 1 << 11, 0xfff),
        false => (0, u32::MAX),
    };
    equal("EAX of 0x40000004", eax, 1 << 5 | 1 << 9 | calls)?;
    equal("EBX of 0x40000004", ebx, tries)
}

fn limits(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let [eax, ..] = vm.cpuid(0, LIMITS)?;
    holds(
        format!("EAX of 0x40000005 is 0 or at least the number of VPs: {eax}"),
        eax == 0 || eax >= vm.vps(),
    )
}

fn stack_leaves(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for leaf in 0x4000_0080..=0x4000_0082 {
        equal(format!("CPUID {leaf:#x}"), vm.cpuid(0, leaf)?, [0; 4])?;
    }
    Ok(())
}

fn extended_destination(context: &Context) -> Verdict {
    let features = Features {
        extended_destination: true,
        ..Features::default()
    };
    let vm = machine_with(context, features)?;
    equal(
        "CPUID 0x40000081",
        vm.cpuid(0, 0x4000_0081)?,
        [0x3123_5356, 0, 0, 0],
    )?;
    equal(
        "CPUID 0x40000082",
        vm.cpuid(0, 0x4000_0082)?,
        [1 << 2, 0, 0, 0],
    )
}

fn no_other_hypervisor(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for base in (0x4000_0100..0x4001_0000).step_by(0x100) {
        let [_, ebx, ecx, edx] = vm.cpuid(0, base)?;
        let signature: Vec<u8> = [ebx, ecx, edx]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        for other in [
            &b"KVMKVMKVM\0\0\0"[..],
            b"XenVMMXenVMM",
            b"VMwareVMware",
            b"Linux KVM Hv",
        ] {
            holds(
                format!(
                    "no signature {:?} at {base:#x}",
                    String::from_utf8_lossy(other)
                ),
                signature != other,
            )?;
        }
    }
    Ok(())
}

fn same_on_every_vp(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for leaf in (VENDOR..=0x4000_0010).chain(0x4000_0080..=0x4000_0082) {
        let first = vm.cpuid(0, leaf)?;
        for vp in 1..vm.vps() {
            equal(
                format!("CPUID {leaf:#x} of VP {vp}"),
                vm.cpuid(vp, leaf)?,
                first,
            )?;
        }
    }
    Ok(())
}

fn invariant_tsc(context: &Context) -> Verdict {
    let vm = context.usual()?;
    vm.wrmsr(0, msr::TSC_INVARIANT_CONTROL, 1)?;
    for vp in 0..vm.vps() {
        let [_, _, _, edx] = vm.cpuid(vp, 0x8000_0007)?;
        equal(format!("CPUID.80000007:EDX[8] of VP {vp}"), edx >> 8 & 1, 1)?;
    }
    Ok(())
}

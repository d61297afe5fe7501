//! MSRs that are there before anything else is (docs/spec/hyperv-guest-interface.md, sections 2,
//! 7, 8 and 10).
#![forbid(unsafe_code)]

use super::{NONE, machine_with};
use crate::bed::BedKind;
use crate::check::{Check, Context, SIM, Verdict, equal, holds, is_gp};
use crate::host::{APIC_HZ, SIM_TSC_HZ, Setup};
use crate::model::kernel::{Kernel, msr};
use crate::model::vm::Vm;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "discovery.msr.reset-values",
        "Every MSR has its reset value on every VP.",
        &[
            "HV-2-01",
            "HV-2-02",
            "HV-2-07",
            "HV-2-10",
            "HV-2-11",
            "HV-2-12",
            "HV-2-13",
            "HV-2-14",
            "HV-2-15",
            "HV-2-16",
            "HV-2-22",
            "HV-1.4-02",
        ],
        reset_values,
    ),
    Check::new(
        "discovery.msr.vp-index",
        "VP_INDEX is the number of the VP: unique, dense, stable.",
        &["HV-2-03", "HV-7-01", "HV-7-02"],
        vp_index,
    ),
    Check::new(
        "discovery.msr.read-only",
        "A write to a read-only MSR is #GP and changes nothing.",
        &["HV-2-03", "HV-2-06", "HV-2-08", "HV-2-12", "HV-2-24"],
        read_only,
    ),
    Check::new(
        "discovery.msr.unknown",
        "Every MSR of the synthetic range that is not offered is #GP, read and written.",
        &[
            "HV-2-04", "HV-2-05", "HV-2-09", "HV-2-17", "HV-2-18", "HV-2-19", "HV-2-20", "HV-2-21",
            "HV-2-23",
        ],
        unknown,
    ),
    Check::new(
        "discovery.msr.not-offered",
        "The MSRs of an optional part that is not offered are #GP.",
        &["HV-2-06", "HV-2-08", "HV-2-22", "HV-2-23"],
        not_offered,
    ),
    Check::new(
        "discovery.msr.frequencies",
        "The frequencies are not zero, and the same on every VP.",
        &["HV-2-08", "HV-1.1-16", "HV-1.1-17"],
        frequencies,
    ),
    Check::new(
        "discovery.msr.frequencies-as-configured",
        "The frequencies are those that the machine was made with.",
        &["HV-2-08", "HV-1.1-17"],
        frequencies_as_configured,
    )
    .on(SIM),
    Check::new(
        "discovery.msr.reference-time",
        "TIME_REF_COUNT does not go back, from whichever VP it is read.",
        &["HV-2-06", "HV-8-01"],
        reference_time,
    ),
    Check::new(
        "discovery.msr.reference-tsc-is-storage",
        "REFERENCE_TSC takes what Linux writes at a kexec although the page is not offered.",
        &["HV-2-07", "HV-1.4-02"],
        reference_tsc,
    ),
    Check::new(
        "discovery.msr.vp-assist-page",
        "VP_ASSIST_PAGE keeps what is written, each VP its own.",
        &["HV-2-10", "HV-1.4-02"],
        vp_assist_page,
    ),
    Check::new(
        "discovery.msr.tsc-invariant",
        "TSC_INVARIANT_CONTROL takes bit 0 once; other bits, and clearing it, are #GP.",
        &["HV-2-22"],
        tsc_invariant,
    ),
    Check::new(
        "discovery.msr.partition-wide",
        "GUEST_OS_ID, HYPERCALL and REFERENCE_TSC are one register for all VPs.",
        &["HV-2-01", "HV-2-02", "HV-2-07", "HV-4-09"],
        partition_wide,
    ),
    Check::new(
        "discovery.msr.guest-os-id",
        "GUEST_OS_ID takes any value.",
        &["HV-2-01"],
        guest_os_id,
    ),
    Check::new(
        "discovery.msr.preserved-bits",
        "Bits of page MSRs and SINTs without a rule are kept as written.",
        &[
            "HV-2-02", "HV-2-13", "HV-2-14", "HV-2-16", "HV-2-27", "HV-6-01",
        ],
        preserved_bits,
    ),
    Check::new(
        "discovery.msr.reset",
        "A reset of the machine brings every MSR back to its reset value.",
        &["HV-10-04", "HV-10-09"],
        reset,
    ),
];

/// Reset values by MSR (docs/spec/hyperv-guest-interface.md, section 2).
fn check_reset_values(vm: &Vm) -> Verdict {
    let zero = [
        msr::GUEST_OS_ID,
        msr::HYPERCALL,
        msr::REFERENCE_TSC,
        msr::VP_ASSIST_PAGE,
        msr::SCONTROL,
        msr::SIEFP,
        msr::SIMP,
        msr::EOM,
        msr::TSC_INVARIANT_CONTROL,
    ];
    let sints = (0..16).map(|sint| (msr::SINT0 + sint, 1 << 16));
    let values = zero.map(|msr| (msr, 0)).into_iter().chain(sints);
    for (number, value) in values.chain([(msr::SVERSION, 1)]) {
        for vp in 0..vm.vps() {
            let what = format!("reset value of MSR {number:#x} on VP {vp}");
            equal(what, vm.rdmsr(vp, number)?, value)?;
        }
    }
    Ok(())
}

fn reset_values(context: &Context) -> Verdict {
    check_reset_values(&context.usual()?)
}

fn vp_index(context: &Context) -> Verdict {
    let vm = context.machine(&Setup {
        vps: 4,
        ..Setup::default()
    })?;
    for _ in 0..2 {
        for vp in 0..vm.vps() {
            equal(
                format!("VP_INDEX of VP {vp}"),
                vm.rdmsr(vp, msr::VP_INDEX)?,
                vp.into(),
            )?;
        }
        vm.reset()?;
    }
    Ok(())
}

fn read_only(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let constant = [
        msr::VP_INDEX,
        msr::TSC_FREQUENCY,
        msr::APIC_FREQUENCY,
        msr::SVERSION,
    ];
    for number in constant.into_iter().chain([msr::TIME_REF_COUNT]) {
        let before = vm.rdmsr(1, number)?;
        for value in [before, 0, 1, u64::MAX] {
            is_gp(
                format!("WRMSR {number:#x} <- {value:#x}"),
                vm.wrmsr(1, number, value),
            )?;
        }
        let after = vm.rdmsr(1, number)?;
        let what = format!("MSR {number:#x} after the attempts");
        if number == msr::TIME_REF_COUNT {
            holds(what, after >= before)?;
        } else {
            equal(what, after, before)?;
        }
    }
    Ok(())
}

fn is_offered(number: u32) -> bool {
    matches!(
        number,
        0x4000_0000..=0x4000_0002
            | 0x4000_0020..=0x4000_0023
            | 0x4000_0073
            | 0x4000_0080..=0x4000_0084
            | 0x4000_0090..=0x4000_009f
            | 0x4000_0118
    )
}

fn unknown(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for number in (0x4000_0000..=0x4000_01ff).filter(|number| !is_offered(*number)) {
        is_gp(format!("RDMSR {number:#x}"), vm.rdmsr(0, number))?;
        for value in [0, 1] {
            is_gp(
                format!("WRMSR {number:#x} <- {value}"),
                vm.wrmsr(0, number, value),
            )?;
        }
    }
    Ok(())
}

fn not_offered(context: &Context) -> Verdict {
    let vm = machine_with(context, NONE)?;
    let optional = [
        msr::TIME_REF_COUNT,
        msr::TSC_FREQUENCY,
        msr::APIC_FREQUENCY,
        msr::TSC_INVARIANT_CONTROL,
    ];
    for number in optional {
        is_gp(format!("RDMSR {number:#x}"), vm.rdmsr(0, number))?;
        is_gp(format!("WRMSR {number:#x} <- 1"), vm.wrmsr(0, number, 1))?;
    }
    Ok(())
}

fn frequencies(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for number in [msr::TSC_FREQUENCY, msr::APIC_FREQUENCY] {
        let first = vm.rdmsr(0, number)?;
        // A TSC or a timer below 1 MHz is a wrong unit.
        holds(
            format!("MSR {number:#x} is in Hz: {first}"),
            first > 1_000_000,
        )?;
        equal(
            format!("MSR {number:#x} of VP 1"),
            vm.rdmsr(1, number)?,
            first,
        )?;
    }
    Ok(())
}

fn frequencies_as_configured(context: &Context) -> Verdict {
    let vm = context.usual()?;
    equal(
        "TSC_FREQUENCY",
        vm.rdmsr(0, msr::TSC_FREQUENCY)?,
        SIM_TSC_HZ,
    )?;
    equal("APIC_FREQUENCY", vm.rdmsr(0, msr::APIC_FREQUENCY)?, APIC_HZ)
}

fn reference_time(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let mut last = 0;
    for round in 0..100 {
        let now = vm.rdmsr(round % vm.vps(), msr::TIME_REF_COUNT)?;
        holds(format!("reference time {now} after {last}"), now >= last)?;
        last = now;
    }
    let start = std::time::Instant::now();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let passed = vm.rdmsr(0, msr::TIME_REF_COUNT)? - last;
    // The host was asleep for at least 20 ms, and the guest cannot have seen more than passed.
    let most = start.elapsed().as_nanos() as u64 / 100 + 10_000_000;
    holds(
        format!("{passed} units of 100 ns in 20 ms of the host's time"),
        (199_000..=most).contains(&passed),
    )
}

fn reference_tsc(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let value = vm.rdmsr(0, msr::REFERENCE_TSC)?;
    vm.wrmsr(0, msr::REFERENCE_TSC, value & !1)?;
    let page = vm.pages(1)?;
    vm.wrmsr(0, msr::REFERENCE_TSC, page | 1)?;
    equal("REFERENCE_TSC", vm.rdmsr(0, msr::REFERENCE_TSC)?, page | 1)?;
    vm.wrmsr(0, msr::REFERENCE_TSC, page)?;
    equal("REFERENCE_TSC", vm.rdmsr(0, msr::REFERENCE_TSC)?, page)
}

fn vp_assist_page(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for vp in 0..vm.vps() {
        let page = vm.pages(1)?;
        vm.wrmsr(vp, msr::VP_ASSIST_PAGE, page | 1)?;
        equal(
            "VP_ASSIST_PAGE",
            vm.rdmsr(vp, msr::VP_ASSIST_PAGE)?,
            page | 1,
        )?;
        if vp + 1 < vm.vps() {
            equal(
                "VP_ASSIST_PAGE of the next VP",
                vm.rdmsr(vp + 1, msr::VP_ASSIST_PAGE)?,
                0,
            )?;
        }
    }
    Ok(())
}

fn tsc_invariant(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for value in [2, 3, 1 << 63] {
        let result = vm.wrmsr(0, msr::TSC_INVARIANT_CONTROL, value);
        is_gp(format!("TSC_INVARIANT_CONTROL <- {value:#x}"), result)?;
    }
    for _ in 0..2 {
        vm.wrmsr(0, msr::TSC_INVARIANT_CONTROL, 1)?;
        equal(
            "TSC_INVARIANT_CONTROL",
            vm.rdmsr(1, msr::TSC_INVARIANT_CONTROL)?,
            1,
        )?;
    }
    is_gp(
        "TSC_INVARIANT_CONTROL <- 0",
        vm.wrmsr(0, msr::TSC_INVARIANT_CONTROL, 0),
    )?;
    equal(
        "TSC_INVARIANT_CONTROL",
        vm.rdmsr(0, msr::TSC_INVARIANT_CONTROL)?,
        1,
    )
}

fn partition_wide(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    vm.wrmsr(1, msr::REFERENCE_TSC, 0x5000)?;
    for vp in 0..vm.vps() {
        equal(
            "HYPERCALL",
            vm.rdmsr(vp, msr::HYPERCALL)?,
            kernel.page() | 1,
        )?;
        equal("REFERENCE_TSC", vm.rdmsr(vp, msr::REFERENCE_TSC)?, 0x5000)?;
    }
    vm.wrmsr(1, msr::GUEST_OS_ID, 0x1234)?;
    equal(
        "GUEST_OS_ID of VP 0",
        vm.rdmsr(0, msr::GUEST_OS_ID)?,
        0x1234,
    )
}

fn guest_os_id(context: &Context) -> Verdict {
    let vm = context.usual()?;
    for value in [1, 0x8100 << 48, u64::MAX, 0] {
        vm.wrmsr(0, msr::GUEST_OS_ID, value)?;
        equal("GUEST_OS_ID", vm.rdmsr(1, msr::GUEST_OS_ID)?, value)?;
    }
    Ok(())
}

fn preserved_bits(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let page = vm.pages(1)?;
    vm.wrmsr(0, msr::GUEST_OS_ID, 1)?;
    for (number, value) in [
        (msr::SIMP, page | 0xffe),
        (msr::SIEFP, page | 0xabc),
        (msr::HYPERCALL, page | 0xffc),
        (msr::SINT0 + 5, 0xdead_beef_ff01_0000 | 0x5500 | 0x41),
    ] {
        vm.wrmsr(0, number, value)?;
        equal(format!("MSR {number:#x}"), vm.rdmsr(0, number)?, value)?;
    }
    Ok(())
}

fn reset(context: &Context) -> Verdict {
    let vm = context.usual()?;
    Kernel::boot(&vm)?;
    vm.wrmsr(0, msr::REFERENCE_TSC, 0x5000)?;
    // On a real CPU the bit stays until the VMM resets the CPU as well.
    if context.bed() == BedKind::Sim {
        vm.wrmsr(0, msr::TSC_INVARIANT_CONTROL, 1)?;
    }
    for sint in 0..16 {
        vm.wrmsr(1, msr::SINT0 + sint, 0x41)?;
    }
    vm.reset()?;
    check_reset_values(&vm)
}

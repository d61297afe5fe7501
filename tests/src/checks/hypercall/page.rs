//! The life of the hypercall page (docs/spec/hyperv-guest-interface.md, section 4).
#![forbid(unsafe_code)]

use vm_vpci::cpuid::Features;

use super::kernel;
use crate::check::{Check, Context, Verdict, equal, holds, is_gp, is_ud};
use crate::guest::Call;
use crate::host::Setup;
use crate::model::kernel::{Kernel, LINUX_ID, msr, status};
use crate::model::vm::PAGE;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "hypercall.page.enable",
        "An enabled page reads back in the MSR and takes calls from every VP.",
        &["HV-4-01", "HV-4-09", "HV-1.4-03"],
        page_enable,
    ),
    Check::new(
        "hypercall.page.begins-with-endbr64",
        "The page begins with ENDBR64, so that kernels with indirect branch tracking keep it on.",
        &["HV-4-04"],
        page_begins_with_endbr,
    ),
    Check::new(
        "hypercall.page.without-identity",
        "While GUEST_OS_ID is 0 the enable bit does not take, and nothing faults.",
        &["HV-4-02", "HV-3.4-26"],
        page_without_identity,
    ),
    Check::new(
        "hypercall.page.identity-cleared",
        "Writing GUEST_OS_ID = 0 disables the page; a call is #UD.",
        &["HV-2-01", "HV-10-05", "HV-3.4-26"],
        page_identity_cleared,
    ),
    Check::new(
        "hypercall.page.outside-ram",
        "A page outside RAM is #GP and changes nothing.",
        &["HV-2-26"],
        page_outside_ram,
    ),
    Check::new(
        "hypercall.page.move",
        "A page that moves works at its new place, and the RAM at the old one comes back.",
        &["HV-4-03", "HV-4-07"],
        page_move,
    ),
    Check::new(
        "hypercall.page.disable",
        "A disabled page keeps its address in the MSR; the RAM that it covered comes back.",
        &["HV-4-03", "HV-4-07"],
        page_disable,
    ),
    Check::new(
        "hypercall.page.needed",
        "Without an enabled page the same instructions elsewhere in RAM raise #UD.",
        &["HV-3.4-26", "HV-10-05"],
        page_needed,
    ),
    Check::new(
        "hypercall.page.enable-again",
        "Hibernation's way works: disable, then enable the same page again.",
        &["HV-4-07", "HV-4-08"],
        page_enable_again,
    ),
    Check::new(
        "hypercall.page.enable-twice",
        "Enabling a page that is enabled does not corrupt it.",
        &["HV-4-07"],
        page_enable_twice,
    ),
    Check::new(
        "hypercall.page.lock",
        "After the lock bit was set, writes to the MSR are #GP until a reset.",
        &["HV-4-06", "HV-1.2-10", "HV-10-09"],
        page_lock,
    ),
    Check::new(
        "hypercall.page.reset",
        "A reset takes the page away and gives the RAM back.",
        &["HV-10-04", "HV-10-09"],
        page_reset,
    ),
];

/// Calls through the page from `vp`: it must get through to the dispatcher.
fn works(kernel: &Kernel, vp: u32, page: u64) -> Verdict {
    let call = Call {
        entry: page,
        control: 0x1234,
        ..Call::default()
    };
    let rax = kernel.vm().hypercall(vp, &call)?.rax;
    equal(
        "status of an unknown call",
        rax as u16,
        status::INVALID_HYPERCALL_CODE,
    )
}

/// Calls into the page, which must hold UD2 again.
fn is_gone(kernel: &Kernel, page: u64) -> Verdict {
    let bytes = kernel.vm().read(page, PAGE as usize)?;
    holds(
        "the RAM under the page is back",
        bytes == [0x0f, 0x0b].repeat(PAGE as usize / 2),
    )?;
    let call = Call {
        entry: page,
        control: 0x1234,
        ..Call::default()
    };
    is_ud("a call", kernel.vm().hypercall(0, &call))
}

fn page_enable(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    for vp in 0..vm.vps() {
        equal(
            "HYPERCALL",
            vm.rdmsr(vp, msr::HYPERCALL)?,
            kernel.page() | 1,
        )?;
        works(&kernel, vp, kernel.page())?;
    }
    Ok(())
}

fn page_begins_with_endbr(context: &Context) -> Verdict {
    let kernel = kernel(context)?;
    let bytes = kernel.vm().read(kernel.page(), 4)?;
    equal(
        "first bytes of the page",
        bytes,
        vec![0xf3, 0x0f, 0x1e, 0xfa],
    )
}

fn page_without_identity(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let page = vm.pages(1)?;
    vm.write(page, &[0x0f, 0x0b].repeat(PAGE as usize / 2))?;
    vm.wrmsr(0, msr::HYPERCALL, page | 1)?;
    equal(
        "enable bit of HYPERCALL",
        vm.rdmsr(0, msr::HYPERCALL)? & 1,
        0,
    )?;
    let call = Call {
        entry: page,
        ..Call::default()
    };
    is_ud("a call", vm.hypercall(0, &call))
}

fn page_identity_cleared(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    works(&kernel, 0, kernel.page())?;
    vm.wrmsr(1, msr::GUEST_OS_ID, 0)?;
    equal(
        "enable bit of HYPERCALL",
        vm.rdmsr(0, msr::HYPERCALL)? & 1,
        0,
    )?;
    is_gone(&kernel, kernel.page())
}

fn page_outside_ram(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    let end = vm.setup().ram.last().map_or(0, |range| range.end);
    for gpa in [end, 0xf000_0000, 1 << 51, 0xffff_ffff_ffff_f000] {
        is_gp(
            format!("HYPERCALL <- {gpa:#x} | 1"),
            vm.wrmsr(0, msr::HYPERCALL, gpa | 1),
        )?;
    }
    equal("HYPERCALL", vm.rdmsr(0, msr::HYPERCALL)?, kernel.page() | 1)?;
    works(&kernel, 0, kernel.page())
}

fn page_move(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    let new = vm.pages(1)?;
    vm.wrmsr(1, msr::HYPERCALL, new | 1)?;
    works(&kernel, 0, new)?;
    is_gone(&kernel, kernel.page())
}

fn page_disable(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    vm.wrmsr(0, msr::HYPERCALL, kernel.page())?;
    equal("HYPERCALL", vm.rdmsr(1, msr::HYPERCALL)?, kernel.page())?;
    is_gone(&kernel, kernel.page())
}

fn page_needed(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    let copy = vm.pages(1)?;
    vm.write(copy, &vm.read(kernel.page(), PAGE as usize)?)?;
    vm.wrmsr(0, msr::HYPERCALL, kernel.page())?;
    let call = Call {
        entry: copy,
        control: 0x1234,
        ..Call::default()
    };
    is_ud("a call with the page disabled", vm.hypercall(0, &call))?;
    vm.wrmsr(0, msr::HYPERCALL, kernel.page() | 1)?;
    works(&kernel, 0, kernel.page())?;
    vm.wrmsr(0, msr::GUEST_OS_ID, 0)?;
    is_ud("a call without an identity", vm.hypercall(1, &call))
}

fn page_enable_again(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    for _ in 0..3 {
        let value = vm.rdmsr(0, msr::HYPERCALL)?;
        vm.wrmsr(0, msr::HYPERCALL, value & !1)?;
        is_gone(&kernel, kernel.page())?;
        let value = vm.rdmsr(0, msr::HYPERCALL)?;
        vm.wrmsr(0, msr::HYPERCALL, value | 1)?;
        works(&kernel, 1, kernel.page())?;
    }
    Ok(())
}

fn page_enable_twice(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    vm.wrmsr(0, msr::HYPERCALL, kernel.page() | 1)?;
    works(&kernel, 0, kernel.page())?;
    vm.wrmsr(0, msr::HYPERCALL, kernel.page())?;
    is_gone(&kernel, kernel.page())
}

fn page_lock(context: &Context) -> Verdict {
    let features = Features {
        hypercall_lock: true,
        ..Features::default()
    };
    let vm = context.machine(&Setup {
        features,
        ..Setup::default()
    })?;
    let kernel = Kernel::identify(&vm)?;
    let locked = kernel.page() | 3;
    vm.wrmsr(0, msr::HYPERCALL, locked)?;
    let other = vm.pages(1)?;
    for value in [0, kernel.page(), kernel.page() | 1, other | 1, locked] {
        for vp in 0..vm.vps() {
            is_gp(
                format!("HYPERCALL <- {value:#x}"),
                vm.wrmsr(vp, msr::HYPERCALL, value),
            )?;
        }
    }
    equal("HYPERCALL", vm.rdmsr(0, msr::HYPERCALL)?, locked)?;
    works(&kernel, 0, kernel.page())?;
    vm.reset()?;
    equal("HYPERCALL after the reset", vm.rdmsr(0, msr::HYPERCALL)?, 0)?;
    vm.wrmsr(0, msr::GUEST_OS_ID, LINUX_ID)?;
    vm.wrmsr(0, msr::HYPERCALL, other | 1)?;
    works(&kernel, 0, other)
}

fn page_reset(context: &Context) -> Verdict {
    let vm = context.usual()?;
    let kernel = Kernel::identify(&vm)?;
    vm.reset()?;
    equal("HYPERCALL", vm.rdmsr(0, msr::HYPERCALL)?, 0)?;
    is_gone(&kernel, kernel.page())
}

//! The puppet and its bed on this machine's KVM. What the library answers is for the checks; here
//! it is only whether the instructions are executed and what the guest saw is reported.

use std::time::{Duration, Instant};

use vm_vpci::hv::msr;
use vpci_puppet::Entry;

use super::*;
use crate::guest::{Call, Cpl, Fault, Guest};
use crate::host::LOW_MMIO;

const SOON: Duration = Duration::from_secs(30);
/// A hypercall page, and the control word of a fast call that nobody offers.
const PAGE: u64 = 0x20_0000;
const UNKNOWN_FAST: u64 = 0x1_007f;

/// A VM, or nothing where there is no KVM; a failure where one is demanded.
fn boot(test: &str, setup: &Setup) -> Option<KvmMachine> {
    boot_with_limit(test, setup, SOON)
}

fn boot_with_limit(test: &str, setup: &Setup, limit: Duration) -> Option<KvmMachine> {
    let bed = KvmBed::default();
    if let Err(reason) = bed.available() {
        let demanded = std::env::var("VPCI_REQUIRE").unwrap_or_default();
        assert!(!demanded.split(',').any(|bed| bed == "kvm"), "{reason}");
        println!("SKIPPED {test}: {reason}");
        return None;
    }
    Some(KvmMachine::boot(bed.host().unwrap(), setup, limit).unwrap())
}

fn enable_hypercalls(guest: &dyn Guest) {
    guest.wrmsr(0, msr::GUEST_OS_ID, 1).unwrap();
    guest.wrmsr(0, msr::HYPERCALL, PAGE | 1).unwrap();
}

fn unknown_call() -> Call {
    Call {
        entry: PAGE,
        control: UNKNOWN_FAST,
        rdx: 0x1122_3344_5566_7788,
        r8: 9,
        ..Call::default()
    }
}

#[test]
fn instructions_give_what_the_host_answers_on_each_vp() {
    let setup = Setup {
        vps: 3,
        ..Setup::default()
    };
    let Some(vm) = boot("instructions_give_what_the_host_answers_on_each_vp", &setup) else {
        return;
    };
    let guest = &vm.guest;
    for vp in 0..3 {
        let [eax, ebx, ecx, edx] = guest.cpuid(vp, 0x4000_0000, 0).unwrap();
        assert!(eax >= 0x4000_0005);
        let vendor = [ebx, ecx, edx].map(u32::to_le_bytes).concat();
        assert_eq!(vendor, b"Microsoft Hv");
        assert_eq!(guest.rdmsr(vp, msr::VP_INDEX), Ok(vp.into()));
    }
    guest
        .wrmsr(1, msr::GUEST_OS_ID, 0x8765_4321_1234_5678)
        .unwrap();
    assert_eq!(guest.rdmsr(2, msr::GUEST_OS_ID), Ok(0x8765_4321_1234_5678));
    for width in [1, 2, 4, 8] {
        let value = guest.mmio_read(2, LOW_MMIO, width).unwrap();
        assert_eq!(value, u64::MAX >> (64 - 8 * width), "nothing is there");
        guest.mmio_write(2, LOW_MMIO, width, 0).unwrap();
    }
    assert!(vm.counters().mmio != Default::default());
}

#[test]
fn exceptions_end_the_instruction_and_nothing_else() {
    let Some(vm) = boot(
        "exceptions_end_the_instruction_and_nothing_else",
        &Setup::default(),
    ) else {
        return;
    };
    let guest = &vm.guest;
    for _ in 0..3 {
        let fault = guest.rdmsr(1, 0x4000_01ff).unwrap_err();
        assert!(fault.is_gp(), "{fault}");
        let address = Entry::Rdmsr.address();
        assert!(matches!(fault, Fault::Exception { address: at, .. } if at == address));
        assert!(guest.wrmsr(1, msr::VP_INDEX, 1).unwrap_err().is_gp());
        let call = Call {
            entry: Entry::UndefinedInstruction.address(),
            ..Call::default()
        };
        assert!(guest.hypercall(1, &call).unwrap_err().is_ud());
        assert_eq!(guest.rdmsr(1, msr::VP_INDEX), Ok(1));
    }
}

#[test]
fn a_hypercall_keeps_all_but_its_result() {
    let Some(vm) = boot("a_hypercall_keeps_all_but_its_result", &Setup::default()) else {
        return;
    };
    let guest = &vm.guest;
    enable_hypercalls(&**guest);
    for (vp, xmm) in [(0, None), (1, Some([1, 2, 3, 4, 5, u128::MAX]))] {
        let call = Call {
            xmm,
            ..unknown_call()
        };
        let returned = guest.hypercall(vp, &call).unwrap();
        assert_eq!(returned.rax, 2);
        assert_eq!(returned.rcx, call.control);
        assert_eq!((returned.rdx, returned.r8), (call.rdx, call.r8));
        assert!(returned.preserved);
        if let Some(xmm) = xmm {
            assert_eq!(returned.xmm, xmm);
        }
    }
}

#[test]
fn what_a_callee_changes_is_noticed() {
    let Some(vm) = boot("what_a_callee_changes_is_noticed", &Setup::default()) else {
        return;
    };
    // Each ends in RET. The last leaves something on the stack.
    let changing: [&[u8]; 4] = [
        &[0x48, 0xff, 0xc3, 0xc3],       // inc rbx
        &[0x49, 0xff, 0xc7, 0xc3],       // inc r15
        &[0x0f, 0x10, 0xc1, 0xc3],       // movups xmm0, xmm1
        &[0x58, 0x6a, 0x00, 0x50, 0xc3], // pop rax; push 0; push rax
    ];
    let same: [&[u8]; 2] = [&[0x48, 0xff, 0xc0, 0xc3], &[0x90, 0xc3]]; // inc rax; nop
    for (code, preserved) in changing
        .map(|code| (code, false))
        .into_iter()
        .chain(same.map(|code| (code, true)))
    {
        vm.guest.memory().write(PAGE, code).unwrap();
        let returned = vm.guest.hypercall(0, &unknown_call()).unwrap();
        assert_eq!(returned.preserved, preserved, "{code:x?}");
    }
}

#[test]
fn code_at_cpl_3_runs_and_comes_back() {
    let Some(vm) = boot("code_at_cpl_3_runs_and_comes_back", &Setup::default()) else {
        return;
    };
    let guest = &vm.guest;
    let user = |entry| Call {
        entry,
        cpl: Cpl::User,
        ..unknown_call()
    };
    // mov rax, cs; ret
    guest.memory().write(PAGE, &[0x8c, 0xc8, 0xc3]).unwrap();
    for vp in [0, 1] {
        let returned = guest.hypercall(vp, &user(PAGE)).unwrap();
        assert_eq!(returned.rax as u16 & 3, 3);
        assert!(returned.preserved);
    }
    assert!(
        guest
            .hypercall(0, &user(Entry::Rdmsr.address()))
            .unwrap_err()
            .is_gp()
    );
    // The host sees the call, and refuses it.
    enable_hypercalls(&**guest);
    let fault = guest.hypercall(0, &user(PAGE)).unwrap_err();
    assert!(fault.is_ud(), "{fault}");
    assert_eq!(guest.hypercall(0, &unknown_call()).map(|r| r.rax), Ok(2));
}

#[test]
fn interrupts_come_while_a_vp_waits_and_before() {
    let Some(vm) = boot(
        "interrupts_come_while_a_vp_waits_and_before",
        &Setup::default(),
    ) else {
        return;
    };
    let guest = &vm.guest;
    let next = |vp, timeout| guest.next_interrupt(vp, timeout).unwrap();
    assert_eq!(next(0, Duration::ZERO), None);
    let start = Instant::now();
    assert_eq!(next(0, Duration::from_millis(50)), None);
    assert!(start.elapsed() >= Duration::from_millis(50));
    let msi = vm_vpci::vmm::Msi::fixed;
    let sink = guest.msi();
    for vector in [0x21, 0x51, 0xff] {
        sink.raise_msi(msi(1, vector));
    }
    let mut got: Vec<_> = (0..3).map(|_| next(1, Duration::ZERO).unwrap()).collect();
    got.sort_unstable();
    assert_eq!(got, [0x21, 0x51, 0xff]);
    assert_eq!(next(1, Duration::ZERO), None);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for vector in 0x30..0x50 {
                std::thread::sleep(Duration::from_millis(3));
                sink.raise_msi(msi(0, vector));
            }
        });
        let mut got: Vec<_> = (0..0x20).map(|_| next(0, SOON).unwrap()).collect();
        // Two that wait at the same time, on a slow machine, come in the order of their priority.
        got.sort_unstable();
        assert_eq!(got, (0x30..0x50).collect::<Vec<_>>());
    });
}

#[test]
fn a_reset_brings_a_vp_back_from_where_it_is_stuck() {
    let test = "a_reset_brings_a_vp_back_from_where_it_is_stuck";
    let Some(vm) = boot_with_limit(test, &Setup::default(), Duration::from_secs(1)) else {
        return;
    };
    let guest = &vm.guest;
    enable_hypercalls(&**guest);
    guest.wrmsr(0, msr::GUEST_OS_ID, 5).unwrap();
    guest.msi().raise_msi(vm_vpci::vmm::Msi::fixed(1, 0x60));
    // HLT with interrupts off, at an address where nothing returns from.
    guest.memory().write(0x30_0000, &[0xf4]).unwrap();
    let call = Call {
        entry: 0x30_0000,
        ..Call::default()
    };
    let stuck = guest.hypercall(0, &call).unwrap_err();
    assert!(matches!(stuck, Fault::Host(_)), "{stuck}");
    assert_eq!(guest.rdmsr(0, msr::VP_INDEX), Err(stuck));
    vm.reset().unwrap();
    assert_eq!(guest.rdmsr(0, msr::VP_INDEX), Ok(0));
    assert_eq!(guest.rdmsr(0, msr::GUEST_OS_ID), Ok(0));
    assert_eq!(guest.next_interrupt(1, Duration::ZERO), Ok(None));
}

#[test]
fn vps_run_at_the_same_time() {
    let Some(vm) = boot("vps_run_at_the_same_time", &Setup::default()) else {
        return;
    };
    enable_hypercalls(&*vm.guest);
    std::thread::scope(|scope| {
        for vp in 0..2 {
            let guest = &vm.guest;
            scope.spawn(move || {
                for _ in 0..50 {
                    assert_eq!(guest.hypercall(vp, &unknown_call()).map(|r| r.rax), Ok(2));
                    assert_eq!(guest.rdmsr(vp, msr::VP_INDEX), Ok(vp.into()));
                }
            });
        }
    });
    assert_eq!(vm.counters().hypercalls.unknown_codes, 100);
}

#[test]
fn a_vm_of_too_many_vps_is_not_possible() {
    let setup = Setup {
        vps: MAX_VPS + 1,
        ..Setup::default()
    };
    let bed = KvmBed::default();
    if bed.available().is_ok() {
        assert!(matches!(bed.boot(&setup), Err(BootError::Unsupported(_))));
    }
}

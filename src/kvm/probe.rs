//! Does KVM's Hyper-V emulation do what hybrid mode relies on? Tried in a scratch VM.
//!
//! Two questions, in the order of their cost: does a signal on a line of the SynIC reach the local
//! APIC, and does a guest's hypercall instruction reach KVM's Hyper-V calls, one with an eventfd and
//! one that user space has to answer?
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_EXIT_HYPERV, KvmIrqRouting, kvm_cpuid_entry2, kvm_lapic_state, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::hybrid::HybridSupport;
use super::sint::{IRQCHIP_GSIS, KvmSintLines, irqchip_routes};
use super::{HypervExit, KvmConnections, KvmError, answer_hyperv, forward_msrs};
use crate::cpuid::{CpuidConfig, Features, leaves};
use crate::hv::hypercall::{Control, SIGNAL_EVENT};
use crate::hv::msr;
use crate::hv::synic::VMBUS_SINT;
use crate::hypercall::{CallInstruction, Outcome};
use crate::synic::SintLines;
use crate::vmm::ConnectionEvents;

/// Where the code is.
const CODE: u64 = 0x1000;
const PAGE: usize = 0x1000;
/// The port by which the code reports a result.
const PORT: u8 = 0x10;
/// Vector of the SINT.
const VECTOR: u8 = 0x51;
/// Connections of the two calls: with an eventfd, and unknown to KVM.
const KNOWN: u32 = 0x2001;
const UNKNOWN: u32 = 0x2002;
/// What user space answers: a status of its own.
const ANSWER: u64 = 0x1234;
/// Exits that the code makes, and some.
const MAX_EXITS: u32 = 8;
/// Offsets in the register page of a local APIC: spurious-interrupt vector, interrupt requests.
const APIC_SPIV: usize = 0xf0;
const APIC_SPIV_ENABLE: u8 = 1;
const APIC_IRR: usize = 0x200;

/// What the probe found.
#[derive(Debug, thiserror::Error)]
pub enum ProbeFault {
    /// KVM refused a call.
    #[error("KVM refuses to {what}: {source}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
    /// KVM refused a call of those that a VM in hybrid mode needs.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// There is no memory for the scratch VM.
    #[error("no memory for a scratch VM")]
    Memory,
    /// A signal on a SINT's line did not reach the local APIC.
    #[error("a signal of a SINT does not reach the local APIC")]
    Sint,
    /// A hypercall did not end as it must.
    #[error("a hypercall does not reach its handler: {0}")]
    Hypercall(&'static str),
}

fn fault(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> ProbeFault {
    move |source| ProbeFault::Refused { what, source }
}

/// Tries everything.
///
/// # Errors
///
/// [`ProbeFault`]: what does not work.
pub(super) fn run(
    kvm: &Kvm,
    support: &HybridSupport,
    host: &[kvm_cpuid_entry2],
) -> Result<(), ProbeFault> {
    // Mapped before the VM is made, and so unmapped after it is gone.
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(CODE), PAGE)])
        .map_err(|_| ProbeFault::Memory)?;
    let vm = kvm.create_vm().map_err(fault("create a VM"))?;
    vm.create_irq_chip()
        .map_err(fault("create interrupt controllers"))?;
    super::prepare_vm(&vm)?;
    support.prepare_vm(&vm)?;
    let vm = Arc::new(vm);
    let vcpu = vm.create_vcpu(0).map_err(fault("create a vCPU"))?;
    support.prepare_vcpu(&vcpu)?;
    try_sint(&vm, &vcpu)?;
    try_calls(&vm, vcpu, &ram, support.calls().instruction, host)
}

fn try_sint(vm: &VmFd, vcpu: &VcpuFd) -> Result<(), ProbeFault> {
    let lines = KvmSintLines::new(vm, 1, IRQCHIP_GSIS)?;
    let mut routes = irqchip_routes();
    routes.extend(lines.routes());
    let table = KvmIrqRouting::from_entries(&routes).map_err(|_| ProbeFault::Memory)?;
    vm.set_gsi_routing(&table)
        .map_err(fault("route the SINTs"))?;
    let sint = msr::SINT0 + u32::from(VMBUS_SINT);
    forward_msrs(vcpu, &[(sint, VECTOR.into()), (msr::SCONTROL, 1)])?;
    let mut apic = vcpu.get_lapic().map_err(fault("tell a local APIC"))?;
    apic.regs[APIC_SPIV + 1] |= APIC_SPIV_ENABLE as std::os::raw::c_char;
    vcpu.set_lapic(&apic)
        .map_err(fault("enable a local APIC"))?;
    lines.raise(0, VMBUS_SINT);
    let apic = vcpu.get_lapic().map_err(fault("tell a local APIC"))?;
    if !is_requested(&apic, VECTOR) {
        return Err(ProbeFault::Sint);
    }
    Ok(())
}

/// True if `vector` waits in the interrupt requests of a local APIC: 32 bits every 16 bytes.
fn is_requested(apic: &kvm_lapic_state, vector: u8) -> bool {
    let vector = usize::from(vector);
    let byte = apic.regs[APIC_IRR + vector / 32 * 16 + vector % 32 / 8];
    byte as u8 & 1 << (vector % 8) != 0
}

fn try_calls(
    vm: &Arc<VmFd>,
    mut vcpu: VcpuFd,
    ram: &GuestMemoryMmap<()>,
    instruction: CallInstruction,
    host: &[kvm_cpuid_entry2],
) -> Result<(), ProbeFault> {
    let eventfd = EventFd::new(EFD_NONBLOCK).map_err(|_| ProbeFault::Memory)?;
    let connections = KvmConnections::new(vm.clone());
    // SAFETY: `eventfd` lives to the end of this function.
    let borrowed = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    connections
        .add(KNOWN, borrowed)
        .map_err(|_| ProbeFault::Hypercall("a connection takes no eventfd"))?;
    let address = ram
        .write_slice(&code(instruction), GuestAddress(CODE))
        .and_then(|()| ram.get_host_address(GuestAddress(CODE)))
        .map_err(|_| ProbeFault::Memory)?;
    let slot = kvm_userspace_memory_region {
        guest_phys_addr: CODE,
        memory_size: PAGE as u64,
        userspace_addr: address as u64,
        ..Default::default()
    };
    // SAFETY: the slot is the one page of `ram`, which the caller keeps for longer than the VM runs.
    unsafe { vm.set_user_memory_region(slot) }.map_err(fault("take memory"))?;
    set_registers(&vcpu, host)?;
    forward_msrs(&vcpu, &[(msr::GUEST_OS_ID, 1)])?;
    let results = results(&mut vcpu)?;
    if results != [0, ANSWER as u32] {
        return Err(ProbeFault::Hypercall("its result is not its handler's"));
    }
    if !matches!(eventfd.read(), Ok(1)) {
        return Err(ProbeFault::Hypercall("a signal rings no eventfd"));
    }
    connections
        .remove(KNOWN)
        .map_err(|_| ProbeFault::Hypercall("a connection keeps its eventfd"))
}

/// Runs the code and collects what it reports, with the second call answered from here.
fn results(vcpu: &mut VcpuFd) -> Result<[u32; 2], ProbeFault> {
    let mut results = [u32::MAX; 2];
    let mut reported = 0;
    let mut answered = false;
    for _ in 0..MAX_EXITS {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, data)) if port == u16::from(PORT) => {
                let bytes = data.first_chunk().copied().unwrap_or_default();
                results[reported] = u32::from_le_bytes(bytes);
                reported += 1;
                if reported == results.len() {
                    return match answered {
                        true => Ok(results),
                        false => Err(ProbeFault::Hypercall("an unknown one is not passed on")),
                    };
                }
            }
            Ok(VcpuExit::Hyperv) => answered |= answer(vcpu)?,
            Ok(_) => return Err(ProbeFault::Hypercall("the instruction does something else")),
            Err(error) if error.errno() == EINTR => {}
            Err(error) => return Err(fault("run a vCPU")(error)),
        }
    }
    Err(ProbeFault::Hypercall("it comes again and again"))
}

/// Interrupted system call.
const EINTR: i32 = 4;

/// Answers the second call. True if it is that.
fn answer(vcpu: &mut VcpuFd) -> Result<bool, ProbeFault> {
    debug_assert_eq!(vcpu.get_kvm_run().exit_reason, KVM_EXIT_HYPERV);
    let mut input = None;
    let exit = answer_hyperv(vcpu, |registers| {
        input = Some((registers.control(), registers.input()));
        Outcome::Complete { result: ANSWER }
    });
    let exit = exit.map_err(fault("take the answer to a hypercall"))?;
    let expected = (signal_control(), u64::from(UNKNOWN));
    Ok(matches!(exit, HypervExit::Hypercall(_)) && input == Some(expected))
}

/// HvSignalEvent in its fast form.
fn signal_control() -> u64 {
    Control::FAST | u64::from(SIGNAL_EVENT)
}

/// 32-bit code that makes two calls and reports EAX after each: control in EDX:EAX, input in EBX:ECX
/// (docs/spec/hyperv-guest-interface.md, section 3.2).
fn code(instruction: CallInstruction) -> Vec<u8> {
    let mut code = Vec::new();
    for connection in [KNOWN, UNKNOWN] {
        // mov eax, control; xor edx, edx; xor ebx, ebx; mov ecx, connection
        code.push(0xb8);
        code.extend((signal_control() as u32).to_le_bytes());
        code.extend([0x31, 0xd2, 0x31, 0xdb, 0xb9]);
        code.extend(connection.to_le_bytes());
        code.extend(instruction.bytes());
        // out PORT, eax
        code.extend([0xe7, PORT]);
    }
    code
}

/// Protected mode without paging, and an interrupt table that makes any exception a shutdown.
fn set_registers(vcpu: &VcpuFd, host: &[kvm_cpuid_entry2]) -> Result<(), ProbeFault> {
    let hyperv = leaves(&CpuidConfig {
        vp_count: 1,
        features: Features::default(),
        iommu: false,
    });
    let place = super::cpuid::VcpuPlace {
        apic_id: 0,
        count: 1,
    };
    let options = super::cpuid::CpuidOptions {
        tsc_deadline: false,
        tsc_invariant: false,
        xsave: false,
    };
    let table = super::cpuid::guest_cpuid(host, &hyperv, place, options);
    let table = CpuId::from_entries(&table).map_err(|_| ProbeFault::Memory)?;
    vcpu.set_cpuid2(&table).map_err(fault("take CPUID"))?;
    let mut sregs = vcpu
        .get_sregs()
        .map_err(fault("tell the system registers"))?;
    let segment = |type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    // Code: execute, read, accessed. Data: read, write, accessed.
    sregs.cs = segment(0xb);
    let data = segment(3);
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.cr0 |= 1;
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    vcpu.set_sregs(&sregs)
        .map_err(fault("take system registers"))?;
    let mut regs = vcpu.get_regs().map_err(fault("tell the registers"))?;
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.set_regs(&regs).map_err(fault("take registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_found_where_the_apic_keeps_it() {
        let mut apic = kvm_lapic_state::default();
        assert!(!is_requested(&apic, 0x51));
        apic.regs[0x220 + 2] = 2;
        assert!(is_requested(&apic, 0x51));
        assert!(!is_requested(&apic, 0x52));
    }

    #[test]
    fn the_code_makes_both_calls() {
        let code = code(CallInstruction::Vmmcall);
        assert_eq!(code.len(), 2 * 19);
        assert_eq!(code[..5], [0xb8, 0x5d, 0, 1, 0]);
        let calls = code.windows(3).filter(|bytes| *bytes == [0x0f, 0x01, 0xd9]);
        assert_eq!(calls.count(), 2);
        assert_eq!(code[10..14], KNOWN.to_le_bytes());
        assert_eq!(code[19 + 10..19 + 14], UNKNOWN.to_le_bytes());
    }
}

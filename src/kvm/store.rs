//! Stores to tracked pages, as they leave the guest.
#![allow(unsafe_code)]

use std::io;
use std::time::Duration;

use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_MMIO, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    kvm_guest_debug,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use super::exchange::{self, MAX_LEN, ZERO_FLAG, is_exchange};
use super::hypercall::is_long_mode;
use super::tracking::KvmRam;
use crate::backend::shadow::Shadow;
use crate::mem::{GuestRam, PAGE_SIZE};

/// Carries out the store with which `vcpu` just left the guest, if it is one to RAM: to a page that
/// is tracked, or was a moment ago. False if it is something else; nothing has happened then.
///
/// The value of a LOCK CMPXCHG that another vCPU overtook is not stored: the guest sees the
/// instruction fail, as it would have on a processor (docs/spec/kvm.md, section 9.3).
///
/// The thread is outside the gate and holds no lock under which slots of `ram` change.
/// [`prepare_vcpu`](super::prepare_vcpu) was called for the vCPU.
pub fn answer_store(vcpu: &mut VcpuFd, shadow: &Shadow, ram: &KvmRam) -> bool {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_MMIO {
        return false;
    }
    // SAFETY: KVM fills the `mmio` member for KVM_EXIT_MMIO, and it is plain data.
    let mmio = unsafe { run.__bindgen_anon_1.mmio };
    let gpa = mmio.phys_addr;
    let Some(data) = mmio.data.get(..mmio.len as usize) else {
        return false;
    };
    if mmio.is_write == 0 || !shadow.ram().is_writable(gpa, data.len() as u64) {
        return false;
    }
    let (regs, sregs) = {
        let sync = vcpu.sync_regs();
        (sync.regs, sync.sregs)
    };
    let mut code = [0; MAX_LEN];
    // Nobody knows of a 32-bit guest that uses the pvIOMMU.
    let len = match is_long_mode(&sregs) && matches!(data.len(), 2 | 4 | 8) {
        // While slots change KVM does not find the tables of the CPU.
        true => ram.with_slots_kept(|| read_before(vcpu, shadow.ram(), regs.rip, &mut code)),
        false => 0,
    };
    let store = exchange::Store {
        code: &code[MAX_LEN - len..],
        regs: &regs,
        sregs: &sregs,
        gpa,
        data,
    };
    if !is_exchange(&store) {
        // RAM was looked for above; it is gone since.
        let _ = shadow.store(gpa, data);
        return true;
    }
    if regs.rflags & ZERO_FLAG == 0 {
        // It failed, and would write back what it read some time ago.
        return true;
    }
    let expected = regs.rax.to_le_bytes();
    if let Ok(Err(current)) = shadow.compare_exchange(gpa, &expected[..data.len()], data) {
        let regs = &mut vcpu.sync_regs_mut().regs;
        // As the instruction does: 4 bytes clear the upper half, 2 leave the rest alone.
        let mut rax = match data.len() {
            4 => [0; 8],
            _ => expected,
        };
        rax[..data.len()].copy_from_slice(&current[..data.len()]);
        regs.rax = u64::from_le_bytes(rax);
        regs.rflags &= !ZERO_FLAG;
        vcpu.set_sync_dirty_reg(SyncReg::Register);
    }
    true
}

/// Reads the code before `rip` into the end of `code`, and gives the number of bytes.
fn read_before(vcpu: &VcpuFd, ram: &GuestRam, rip: u64, code: &mut [u8; MAX_LEN]) -> usize {
    let mut len = 0;
    while len < MAX_LEN {
        // Page by page, backwards.
        let Some(last) = rip.checked_sub(len as u64 + 1) else {
            break;
        };
        let page = last & !(PAGE_SIZE - 1);
        let count = ((last - page) as usize + 1).min(MAX_LEN - len);
        let first = last - (count as u64 - 1);
        let Ok(translation) = vcpu.translate_gva(first) else {
            break;
        };
        let end = MAX_LEN - len;
        let into = &mut code[end - count..end];
        if translation.valid == 0 || ram.read(translation.physical_address, into).is_err() {
            break;
        }
        len += count;
    }
    len
}

/// What KVM could not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InternalError {
    /// Emulate an instruction, which may be a store to a tracked page.
    Emulation,
    /// Emulate an access that was made while an event was delivered, or that seems so: on AMD KVM looks
    /// at the type of the event alone and not at whether there is one (kernel:
    /// arch/x86/kvm/svm/svm.c, svm_check_emulate_instruction), and QEMU's processor leaves the type of
    /// the last event that the guest took. A vCPU that enters the guest once more comes through then.
    /// One that does not has its stack in a tracked page, of which [`Shadow::give_up`] lets go.
    Delivery {
        /// What the access was to, if KVM says it.
        gpa: Option<u64>,
    },
    /// Something else, by its number.
    Other(u32),
}

/// What KVM could not do, if `vcpu` just left the guest for that.
pub fn internal_error(vcpu: &mut VcpuFd) -> Option<InternalError> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: KVM fills the `internal` member for KVM_EXIT_INTERNAL_ERROR, and it is plain data.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    Some(match internal.suberror {
        KVM_INTERNAL_ERROR_EMULATION => InternalError::Emulation,
        KVM_INTERNAL_ERROR_DELIVERY_EV => InternalError::Delivery {
            // The fourth of five (kernel: arch/x86/kvm/x86.c, kvm_prepare_event_vectoring_exit). Before
            // 6.14 it may be missing.
            gpa: (internal.ndata >= 5)
                .then_some(internal.data[3])
                .filter(|gpa| *gpa != u64::MAX),
        },
        other => InternalError::Other(other),
    })
}

/// Why an instruction that KVM cannot emulate was not executed either. The guest cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// RAM could not be made writable, or the tables be tracked again.
    #[error("KVM refuses to change guest RAM: {0}")]
    Ram(#[from] io::Error),
    /// Nobody would take the vCPU out of the guest.
    #[error("no thread to watch the execution of one instruction: {0}")]
    Watch(#[source] io::Error),
    /// KVM refused to run the vCPU for one instruction.
    #[error("KVM refuses to execute one instruction: {0}")]
    Kvm(#[from] kvm_ioctls::Error),
    /// The vCPU stopped for another reason.
    #[error("KVM cannot execute an instruction: {0}")]
    Exit(String),
}

/// Lets `vcpu` execute one instruction that KVM cannot emulate, on pages that are writable meanwhile
/// and with all other vCPUs held; then the tables are followed anew
/// (docs/spec/kvm.md, section 9.2). The thread is outside the gate; `number` is that of the vCPU there.
///
/// An exception that the instruction raises ends the step only when its handler is done, so after
/// `time` the vCPU is taken out of the guest wherever it is. Any other kick does the same.
///
/// A thread lives for the time of the step, and guest debugging of the vCPU is off afterwards.
///
/// With more pages tracked than [`ShadowConfig::max_stepped_pages`] nothing is executed: pages are let go of
/// so that the vCPU can go on by itself ([`Shadow::with_pages_writable`]). `again` says that the last call
/// returned false and that the vCPU is back with the same exit.
///
/// True if the vCPU is at another instruction now, or has fewer pages in its way. One for which it is false
/// may do with more time.
///
/// # Errors
///
/// [`StepError`].
///
/// [`ShadowConfig::max_stepped_pages`]: crate::backend::shadow::ShadowConfig::max_stepped_pages
pub fn step_over(
    vcpu: &mut VcpuFd,
    number: usize,
    shadow: &Shadow,
    ram: &KvmRam,
    time: Duration,
    again: bool,
) -> Result<bool, StepError> {
    let before = vcpu.get_regs()?.rip;
    let mut step = || {
        ram.with_kick_after(number, time, || step(vcpu))
            .map_err(StepError::Watch)?
    };
    let stepped = shadow.with_pages_writable(again, || ram.with_pages_writable(&mut step));
    match stepped {
        Ok(stepped) => stepped??,
        Err(let_go) => return Ok(let_go.writable),
    }
    Ok(vcpu.get_regs()?.rip != before)
}

/// Executes one instruction, or less if somebody takes the vCPU out of the guest.
fn step(vcpu: &mut VcpuFd) -> Result<(), StepError> {
    let debug = |control| kvm_guest_debug {
        control,
        ..Default::default()
    };
    let enable = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
    // Without interrupts, where KVM can (5.15): else the step may end in a handler, and the
    // instruction comes back here.
    if vcpu
        .set_guest_debug(&debug(enable | KVM_GUESTDBG_BLOCKIRQ))
        .is_err()
    {
        vcpu.set_guest_debug(&debug(enable))?;
    }
    let result = match vcpu.run() {
        Ok(kvm_ioctls::VcpuExit::Debug(_) | kvm_ioctls::VcpuExit::Intr) => Ok(()),
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(other) => Err(StepError::Exit(format!("{other:?}"))),
    };
    vcpu.set_guest_debug(&debug(0))?;
    result
}

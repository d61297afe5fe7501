//! Hypercalls as they arrive from KVM: an OUT to the hypercall port, made by the hypercall page
//! (docs/spec/kvm.md, section 6.1).
//!
//! Registers come and go through the shared `kvm_run` page, so a call costs no ioctl. Only code
//! that wants XMM registers pays one.
#![allow(unsafe_code)]

use kvm_bindings::{KVM_EXIT_IO, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, kvm_regs, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuFd};

use crate::hypercall::{CallRegisters, Outcome, XmmBlock};
use crate::mem::PAGE_SIZE;

/// Size of the OUT in the hypercall page, in bytes.
const OUT_SIZE: u8 = 4;
/// Vector of the invalid-opcode exception.
const INVALID_OPCODE: u8 = 6;
/// Extended Feature Enable Register: long mode active.
const EFER_LMA: u64 = 1 << 10;
/// Offset of XMM0 in the legacy part of the XSAVE area, in 32-bit words.
const XSAVE_XMM: usize = 160 / 4;
/// Words of all sixteen XMM registers.
const XMM_WORDS: usize = 64;
/// Offset of MXCSR, in 32-bit words, and its initial value.
const XSAVE_MXCSR: usize = 24 / 4;
const MXCSR_INITIAL: u32 = 0x1f80;
/// Offset of XSTATE_BV, in 32-bit words.
const XSAVE_BV: usize = 512 / 4;
/// XSTATE_BV bit of the SSE state.
const XSTATE_SSE: u32 = 2;

/// Answers the OUT to the hypercall port that `vcpu` just made: `call` gets the registers and says
/// how the call ends, which is then carried out.
///
/// The hypercall page makes an OUT that is 4 bytes wide and not repeated. Any other one to its
/// port, and every one of a vCPU that [`super::prepare_vcpu`] was not called for, is answered with
/// the invalid-opcode exception.
///
/// # Errors
///
/// KVM's error. The guest cannot go on then.
pub fn answer(
    vcpu: &mut VcpuFd,
    call: impl FnOnce(&mut dyn CallRegisters) -> Outcome,
) -> Result<(), kvm_ioctls::Error> {
    let Some(mut registers) = Registers::take(vcpu) else {
        return inject_invalid_opcode(vcpu);
    };
    match call(&mut registers) {
        Outcome::Complete { result } => registers.complete(result),
        Outcome::Restart { control } => registers.restart(control),
        Outcome::InvalidOpcode => return inject_invalid_opcode(vcpu),
    }
    vcpu.set_sync_dirty_reg(SyncReg::Register);
    Ok(())
}

/// Registers of a vCPU that stopped at the OUT of the hypercall page.
struct Registers<'a> {
    vcpu: &'a mut VcpuFd,
    /// As the guest left them.
    regs: kvm_regs,
    cpl: u8,
    long_mode: bool,
}

impl<'a> Registers<'a> {
    fn take(vcpu: &'a mut VcpuFd) -> Option<Self> {
        let wanted = u64::from(KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS);
        let run = vcpu.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO || run.kvm_valid_regs & wanted != wanted {
            return None;
        }
        // SAFETY: KVM fills the `io` member for KVM_EXIT_IO, and it is plain data.
        let io = unsafe { run.__bindgen_anon_1.io };
        if io.size != OUT_SIZE || io.count != 1 {
            return None;
        }
        let shared = vcpu.sync_regs_mut();
        let (cpl, long_mode) = (shared.sregs.ss.dpl, is_long_mode(&shared.sregs));
        let regs = shared.regs;
        Some(Self {
            vcpu,
            regs,
            cpl,
            long_mode,
        })
    }

    fn complete(&mut self, result: u64) {
        let long_mode = self.long_mode;
        let regs = &mut self.vcpu.sync_regs_mut().regs;
        if long_mode {
            regs.rax = result;
        } else {
            (regs.rdx, regs.rax) = halves(result);
        }
    }

    fn restart(&mut self, control: u64) {
        let long_mode = self.long_mode;
        let regs = &mut self.vcpu.sync_regs_mut().regs;
        if long_mode {
            regs.rcx = control;
        } else {
            (regs.rdx, regs.rax) = halves(control);
        }
        // The page's first instruction, not its OUT: KVM may still step over the OUT.
        regs.rip &= !(PAGE_SIZE - 1);
    }
}

impl CallRegisters for Registers<'_> {
    fn cpl(&self) -> u8 {
        self.cpl
    }

    fn control(&self) -> u64 {
        control(&self.regs, self.long_mode)
    }

    fn input(&self) -> u64 {
        input(&self.regs, self.long_mode)
    }

    fn output(&self) -> u64 {
        output(&self.regs, self.long_mode)
    }

    fn xmm(&mut self) -> Option<XmmBlock> {
        // Not KVM_GET_FPU: it returns the legacy area as it lies there, whatever XSTATE_BV says.
        let xsave = self.vcpu.get_xsave().ok()?;
        Some(xmm_of(&xsave.region))
    }

    fn set_xmm(&mut self, xmm: &XmmBlock) {
        let result = self.vcpu.get_xsave().and_then(|mut xsave| {
            put_xmm(&mut xsave.region, xmm);
            // SAFETY: the area was filled by KVM for this vCPU; a guest with states that need more
            // than its 4 KiB is refused by KVM_GET_XSAVE.
            unsafe { self.vcpu.set_xsave(&xsave) }
        });
        if let Err(error) = result {
            log::error!("XMM output of a hypercall is lost: {error}");
        }
    }
}

pub(super) fn is_long_mode(sregs: &kvm_sregs) -> bool {
    sregs.efer & EFER_LMA != 0 && sregs.cs.l == 1
}

fn control(regs: &kvm_regs, long_mode: bool) -> u64 {
    if long_mode {
        regs.rcx
    } else {
        joined(regs.rdx, regs.rax)
    }
}

fn input(regs: &kvm_regs, long_mode: bool) -> u64 {
    if long_mode {
        regs.rdx
    } else {
        joined(regs.rbx, regs.rcx)
    }
}

fn output(regs: &kvm_regs, long_mode: bool) -> u64 {
    if long_mode {
        regs.r8
    } else {
        joined(regs.rdi, regs.rsi)
    }
}

/// A 64-bit value in two 32-bit registers.
fn joined(high: u64, low: u64) -> u64 {
    high << 32 | low & 0xffff_ffff
}

fn halves(value: u64) -> (u64, u64) {
    (value >> 32, value & 0xffff_ffff)
}

/// Raises the invalid-opcode exception before the next instruction of a vCPU.
pub(super) fn inject_invalid_opcode(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = INVALID_OPCODE;
    events.exception.has_error_code = 0;
    vcpu.set_vcpu_events(&events)
}

/// XMM0 to XMM5 of an XSAVE area; zero while the guest has not used SSE.
fn xmm_of(region: &[u32]) -> XmmBlock {
    let mut xmm = [0; size_of::<XmmBlock>()];
    if region[XSAVE_BV] & XSTATE_SSE != 0 {
        for (bytes, word) in xmm.chunks_exact_mut(4).zip(&region[XSAVE_XMM..]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }
    xmm
}

/// Replaces XMM0 to XMM5 in an XSAVE area.
fn put_xmm(region: &mut [u32], xmm: &XmmBlock) {
    if region[XSAVE_BV] & XSTATE_SSE == 0 {
        // The other registers were in their initial state, which the area need not show.
        region[XSAVE_XMM..XSAVE_XMM + XMM_WORDS].fill(0);
        region[XSAVE_MXCSR] = MXCSR_INITIAL;
        region[XSAVE_BV] |= XSTATE_SSE;
    }
    for (bytes, word) in xmm.as_chunks().0.iter().zip(&mut region[XSAVE_XMM..]) {
        *word = u32::from_le_bytes(*bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_follow_the_convention_of_the_mode() {
        let regs = kvm_regs {
            rax: 0xaaaa_aaaa_0000_0001,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            rsi: 5,
            rdi: 6,
            r8: 8,
            ..Default::default()
        };
        let all = |long| {
            (
                control(&regs, long),
                input(&regs, long),
                output(&regs, long),
            )
        };
        assert_eq!(all(true), (3, 4, 8));
        assert_eq!(all(false), (4 << 32 | 1, 2 << 32 | 3, 6 << 32 | 5));
        assert_eq!(halves(4 << 32 | 1), (4, 1));
    }

    #[test]
    fn only_a_64_bit_code_segment_is_long_mode() {
        let mut sregs = kvm_sregs {
            efer: EFER_LMA,
            ..Default::default()
        };
        assert!(!is_long_mode(&sregs), "compatibility mode");
        sregs.cs.l = 1;
        assert!(is_long_mode(&sregs));
        sregs.efer = 0;
        assert!(!is_long_mode(&sregs));
    }

    #[test]
    fn xmm_registers_are_zero_until_the_guest_uses_them() {
        let mut region = [0u32; 1024];
        region[XSAVE_XMM] = 0x0403_0201;
        assert_eq!(xmm_of(&region), [0; 96]);
        region[XSAVE_BV] = XSTATE_SSE;
        assert_eq!(xmm_of(&region)[..5], [1, 2, 3, 4, 0]);
    }

    #[test]
    fn xmm_output_of_a_guest_without_sse_use_starts_from_the_initial_state() {
        let mut region = [0xffu32; 1024];
        region[XSAVE_BV] = 1;
        let xmm: XmmBlock = std::array::from_fn(|i| i as u8);
        put_xmm(&mut region, &xmm);
        assert_eq!(xmm_of(&region), xmm);
        assert_eq!(region[XSAVE_BV], 3);
        assert_eq!(region[XSAVE_MXCSR], MXCSR_INITIAL);
        assert_eq!(region[XSAVE_XMM + 24], 0);
        assert_eq!(region[XSAVE_XMM + XMM_WORDS], 0xff);
        region[XSAVE_XMM + 24] = 7;
        put_xmm(&mut region, &xmm);
        assert_eq!(region[XSAVE_XMM + 24], 7, "XMM6 stays");
    }
}

//! What a guest's virtual CPUs can do: all that a bed has to provide.
#![forbid(unsafe_code)]

use std::fmt::{self, Debug};
use std::ops::Range;
use std::time::Duration;

use vm_vpci::mem::GuestRam;

/// Exception vector of an undefined opcode (#UD).
pub const INVALID_OPCODE: u8 = 6;
/// Exception vector of a general protection fault (#GP).
pub const GENERAL_PROTECTION: u8 = 13;

/// Why an instruction of the guest did not complete.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The CPU took an exception, which the guest's handler reports.
    #[error("exception {} at {address:#x}", vector_name(*vector, *error_code))]
    Exception {
        /// Exception vector, 0 to 31.
        vector: u8,
        /// Error code, for the vectors that have one.
        error_code: Option<u32>,
        /// Linear address of the instruction that faulted, where the bed knows it; 0 otherwise.
        address: u64,
    },
    /// The bed cannot go on: the VM stopped, the host's own call failed, the stub does not answer.
    #[error("the host cannot go on: {0}")]
    Host(String),
}

impl Fault {
    /// True for #GP(0).
    pub fn is_gp(&self) -> bool {
        matches!(self, Self::Exception { vector, error_code, .. }
            if *vector == GENERAL_PROTECTION && matches!(error_code, None | Some(0)))
    }

    /// True for #UD.
    pub fn is_ud(&self) -> bool {
        matches!(self, Self::Exception { vector, .. } if *vector == INVALID_OPCODE)
    }
}

fn vector_name(vector: u8, error_code: Option<u32>) -> String {
    let name = match vector {
        0 => "#DE",
        1 => "#DB",
        3 => "#BP",
        INVALID_OPCODE => "#UD",
        8 => "#DF",
        11 => "#NP",
        12 => "#SS",
        GENERAL_PROTECTION => "#GP",
        14 => "#PF",
        _ => return format!("{vector}"),
    };
    match error_code {
        Some(code) => format!("{name}({code:#x})"),
        None => name.to_owned(),
    }
}

/// Privilege level at which the guest's code runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cpl {
    /// CPL 0.
    #[default]
    Kernel,
    /// CPL 3, with the I/O privilege level at 3: the CPU itself lets the call through to the host.
    User,
}

/// Registers at a call into a hypercall page, 64-bit convention
/// (docs/spec/hyperv-guest-interface.md, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Call {
    /// Guest physical address that is called (near call, identity-mapped): the start of the
    /// hypercall page, or of any other code.
    pub entry: u64,
    /// RCX: control word.
    pub control: u64,
    /// RDX: GPA of the input, or the first fast input.
    pub rdx: u64,
    /// R8: GPA of the output, or the second fast input.
    pub r8: u64,
    /// XMM0 to XMM5; a bed loads a pattern of its own if absent.
    pub xmm: Option<[u128; 6]>,
    /// Privilege level of the caller.
    pub cpl: Cpl,
}

/// Registers after the call returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Returned {
    /// RAX: the result value.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// XMM0 to XMM5.
    pub xmm: [u128; 6],
    /// True if RBX, RSI, RDI, RBP, RSP, R9 to R15 and, where [`Call::xmm`] is absent, the XMM
    /// registers have the values from before the call.
    pub preserved: bool,
}

/// The guest's side of a VM: every method is what one instruction of a guest does.
///
/// Methods take `&self`: several threads may each drive a VP of their own at the same time. Calls
/// for one VP are executed one after the other.
pub trait Guest: Send + Sync + Debug {
    /// Number of VPs. VP indices and APIC ids are `0..vps()`.
    fn vps(&self) -> u32;

    /// The guest's RAM: accesses are loads and stores of the guest.
    fn memory(&self) -> &GuestRam;

    /// Page-aligned part of RAM that the bed does not use itself. The model takes its pages here;
    /// it reads as zero at first.
    fn free_ram(&self) -> Range<u64>;

    /// CPUID: EAX, EBX, ECX, EDX.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    fn cpuid(&self, vp: u32, leaf: u32, subleaf: u32) -> Result<[u32; 4], Fault>;

    /// RDMSR.
    ///
    /// # Errors
    ///
    /// [`Fault`]: #GP where the host refuses.
    fn rdmsr(&self, vp: u32, msr: u32) -> Result<u64, Fault>;

    /// WRMSR.
    ///
    /// # Errors
    ///
    /// [`Fault`]: #GP where the host refuses.
    fn wrmsr(&self, vp: u32, msr: u32, value: u64) -> Result<(), Fault>;

    /// A near call to [`Call::entry`] with the given registers. A rep call that the host restarts
    /// is continued as the CPU does it, until it returns.
    ///
    /// # Errors
    ///
    /// [`Fault`]: what the code at the entry raises, such as #UD for a call that is not allowed.
    fn hypercall(&self, vp: u32, call: &Call) -> Result<Returned, Fault>;

    /// A load of `width` bytes (1, 2, 4 or 8) from an address that is not RAM.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    fn mmio_read(&self, vp: u32, gpa: u64, width: usize) -> Result<u64, Fault>;

    /// A store of the low `width` bytes (1, 2, 4 or 8) of `value` to an address that is not RAM.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    fn mmio_write(&self, vp: u32, gpa: u64, width: usize, value: u64) -> Result<(), Fault>;

    /// Enables interrupts on the VP until one arrives, and returns its vector; `None` if none
    /// arrives within `timeout`. Writes EOI. Vectors that wait at the same time come in no
    /// particular order, and one that is raised again before the VP took it may come only once. A
    /// bed without time first lets the host do what it has been told, and ignores the timeout.
    ///
    /// # Errors
    ///
    /// [`Fault`].
    fn next_interrupt(&self, vp: u32, timeout: Duration) -> Result<Option<u8>, Fault>;
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            control, rdx, r8, ..
        } = self;
        write!(f, "control {control:#x} rdx {rdx:#x} r8 {r8:#x}")?;
        if self.cpl == Cpl::User {
            f.write_str(" at CPL 3")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_told_apart_and_print_their_mnemonic() {
        let gp = Fault::Exception {
            vector: GENERAL_PROTECTION,
            error_code: Some(0),
            address: 0x1000,
        };
        assert!(gp.is_gp() && !gp.is_ud());
        assert_eq!(gp.to_string(), "exception #GP(0x0) at 0x1000");
        let ud = Fault::Exception {
            vector: INVALID_OPCODE,
            error_code: None,
            address: 0,
        };
        assert!(ud.is_ud() && !ud.is_gp());
        assert!(!Fault::Host("gone".into()).is_gp());
    }
}

//! KVM's exits of hybrid mode: hypercalls that its Hyper-V emulation passes on, and MSR writes of
//! which it gets a copy.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_EXIT_HYPERV, KVM_EXIT_HYPERV_HCALL, KVM_EXIT_HYPERV_SYNIC, KVM_EXIT_X86_WRMSR,
    kvm_hyperv_exit,
};
use kvm_ioctls::VcpuFd;

use super::capability::{forward_msrs, refused};
use super::hypercall::inject_invalid_opcode;
use super::{KvmError, forward_tsc_invariant};
use crate::hv::HvStatus;
use crate::hv::hypercall::{Control, SIGNAL_EVENT, result_word};
use crate::hypercall::{CallRegisters, Outcome};
use crate::msr::{ForwardMsr, GpFault, MsrEffect};

/// What a KVM_EXIT_HYPERV is about (docs/spec/kvm.md, sections 6.2 and 7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HypervExit {
    /// KVM took a write of SCONTROL, SIEFP or SIMP. Not seen where writes of these are trapped, as
    /// [`HybridSupport::prepare_vm`](super::hybrid::HybridSupport::prepare_vm) has it.
    Synic {
        /// The MSR.
        msr: u32,
    },
    /// A hypercall to answer.
    Hypercall(PassedCall),
    /// Something else, by KVM's number.
    Other(u32),
}

/// A hypercall that KVM passes on: CPL 0, hypercalls enabled, no rep call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassedCall {
    control: u64,
    params: [u64; 2],
}

impl PassedCall {
    /// KVM has looked for the connection of a HvSignalEvent, and so fetched the input of one in
    /// memory: what comes is the fast form, whatever the control word says
    /// (docs/spec/kvm.md, section 6.2, pitfall).
    fn new(input: u64, params: [u64; 2]) -> Self {
        let fetched = Control(input).code() == SIGNAL_EVENT;
        Self {
            control: input | if fetched { Control::FAST } else { 0 },
            params,
        }
    }
}

impl CallRegisters for PassedCall {
    fn cpl(&self) -> u8 {
        0
    }

    fn control(&self) -> u64 {
        self.control
    }

    fn input(&self) -> u64 {
        self.params[0]
    }

    fn output(&self) -> u64 {
        self.params[1]
    }
}

fn decode(exit: &kvm_hyperv_exit) -> HypervExit {
    match exit.type_ {
        KVM_EXIT_HYPERV_SYNIC => {
            // SAFETY: KVM fills the `synic` member for this type, and it is plain data.
            let synic = unsafe { exit.u.synic };
            HypervExit::Synic { msr: synic.msr }
        }
        KVM_EXIT_HYPERV_HCALL => {
            // SAFETY: KVM fills the `hcall` member for this type, and it is plain data.
            let call = unsafe { exit.u.hcall };
            HypervExit::Hypercall(PassedCall::new(call.input, call.params))
        }
        other => HypervExit::Other(other),
    }
}

/// Answers the KVM_EXIT_HYPERV with which `vcpu` just stopped: `call` gets the registers of a
/// hypercall and says how it ends, which is then carried out. Returns what the exit was about, of
/// which [`HypervExit::Other`] has no answer.
///
/// # Errors
///
/// KVM's error. The guest cannot go on then.
pub fn answer_hyperv(
    vcpu: &mut VcpuFd,
    call: impl FnOnce(&mut dyn CallRegisters) -> Outcome,
) -> Result<HypervExit, kvm_ioctls::Error> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_HYPERV {
        return Ok(HypervExit::Other(0));
    }
    // SAFETY: KVM fills the `hyperv` member for KVM_EXIT_HYPERV, and it is plain data.
    let exit = decode(unsafe { &run.__bindgen_anon_1.hyperv });
    let HypervExit::Hypercall(mut registers) = exit else {
        return Ok(exit);
    };
    let result = match call(&mut registers) {
        Outcome::Complete { result } => Some(result),
        // KVM passes no rep call on, so there is none to go on with.
        Outcome::Restart { .. } => Some(result_word(Err(HvStatus::INVALID_HYPERCALL_INPUT), 0)),
        Outcome::InvalidOpcode => None,
    };
    // It becomes RAX in any case.
    vcpu.get_kvm_run().__bindgen_anon_1.hyperv.u.hcall.result = result.unwrap_or_default();
    if result.is_none() {
        inject_invalid_opcode(vcpu)?;
    }
    Ok(exit)
}

/// Answers the WRMSR of a synthetic MSR with which `vcpu` just stopped: `write` gets its number and
/// value, and what puts a value into KVM's copy of an MSR. Both modes may use it.
///
/// # Errors
///
/// [`KvmError`]: KVM's copy is not what it must be, so the guest cannot go on.
pub fn answer_wrmsr(
    vcpu: &mut VcpuFd,
    write: impl FnOnce(u32, u64, ForwardMsr<'_>) -> Result<MsrEffect, GpFault>,
) -> Result<(), KvmError> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_X86_WRMSR {
        let wrong = kvm_ioctls::Error::new(super::capability::EINVAL);
        return Err(refused("say which MSR was written")(wrong));
    }
    // SAFETY: KVM fills the `msr` member for KVM_EXIT_X86_WRMSR, and it is plain data.
    let (index, value) = unsafe {
        let msr = &run.__bindgen_anon_1.msr;
        (msr.index, msr.data)
    };
    let mut forwarded = Ok(());
    let effect = write(index, value, &mut |msr, value| {
        if forwarded.is_ok() {
            forwarded = forward_msrs(vcpu, &[(msr, value)]);
        }
    });
    forwarded?;
    match effect {
        Ok(MsrEffect::TscInvariant(value)) => forward_tsc_invariant(vcpu, value),
        Ok(MsrEffect::None | MsrEffect::GuestOsIdCleared) => Ok(()),
        Err(GpFault) => {
            vcpu.get_kvm_run().__bindgen_anon_1.msr.error = 1;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hypercall(input: u64, params: [u64; 2]) -> kvm_hyperv_exit {
        let mut exit = kvm_hyperv_exit {
            type_: KVM_EXIT_HYPERV_HCALL,
            ..Default::default()
        };
        exit.u.hcall.input = input;
        exit.u.hcall.params = params;
        exit
    }

    fn passed(input: u64, params: [u64; 2]) -> PassedCall {
        match decode(&hypercall(input, params)) {
            HypervExit::Hypercall(call) => call,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_message_comes_with_the_address_of_its_input() {
        let call = passed(0x5c, [0x1000, 0x2000]);
        assert_eq!((call.cpl(), call.control()), (0, 0x5c));
        assert_eq!((call.input(), call.output()), (0x1000, 0x2000));
    }

    #[test]
    fn a_signal_comes_with_its_input_fetched_whatever_its_form_was() {
        for control in [0x5d, 0x1_005d] {
            let call = passed(control, [0x2001, 0]);
            assert_eq!((call.control(), call.input()), (0x1_005d, 0x2001));
        }
        // Another code with the same low bits is not one.
        assert_eq!(passed(0x805d, [0x2001, 0]).control(), 0x805d);
    }

    #[test]
    fn other_exits_are_told_apart() {
        let mut exit = kvm_hyperv_exit {
            type_: KVM_EXIT_HYPERV_SYNIC,
            ..Default::default()
        };
        exit.u.synic.msr = 0x4000_0083;
        assert_eq!(decode(&exit), HypervExit::Synic { msr: 0x4000_0083 });
        exit.type_ = 3;
        assert_eq!(decode(&exit), HypervExit::Other(3));
    }

    proptest! {
        #[test]
        fn nothing_but_the_form_of_a_signal_changes(input: u64, params: [u64; 2]) {
            let call = passed(input, params);
            let fast = if input as u16 == 0x5d { 1 << 16 } else { 0 };
            prop_assert_eq!(call.control(), input | fast);
            prop_assert_eq!([call.input(), call.output()], params);
        }
    }
}

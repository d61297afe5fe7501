//! What a guest finds before it calls anything: CPUID leaves, privileges, MSRs
//! (docs/spec/hyperv-guest-interface.md, sections 1, 2, 7, 8 and 14).
#![forbid(unsafe_code)]

mod cpuid;
mod msrs;

use vm_vpci::cpuid::Features;

use crate::check::{Check, Context, Failure};
use crate::host::Setup;
use crate::model::vm::Vm;

/// All checks of this area.
pub const CHECKS: [&[Check]; 2] = [cpuid::CHECKS, msrs::CHECKS];

/// The usual machine with other features.
fn machine_with(context: &Context, features: Features) -> Result<Vm, Failure> {
    context.machine(&Setup {
        features,
        ..Setup::default()
    })
}

/// No optional part at all.
const NONE: Features = Features {
    reference_counter: false,
    frequencies: false,
    tsc_invariant: false,
    xmm_input: false,
    xmm_output: false,
    hypercall_lock: false,
    extended_destination: false,
};

//! KVM transport: what connects a [`crate::partition::Partition`] to a VM made with `kvm-ioctls`.
//!
//! VMM-only mode (docs/spec/kvm.md, section 1): works on every KVM, with and without its own
//! Hyper-V emulation. The order of the calls, and what each is for:
//!
//! 1. [`HostSupport::check`]: is everything there that this module needs?
//! 2. [`prepare_vm`], after the irqchip and before the first vCPU: capabilities and MSR filter;
//! 3. [`xsave::find_fault`] once, then [`cpuid::guest_cpuid`] for each vCPU, before it runs: the Hyper-V leaves, and the host's
//!    leaves made fit for a guest without KVM's paravirtual interface;
//! 4. [`prepare_vcpu`] once for each vCPU;
//! 5. [`KvmMsiSink`] and [`KvmDoorbells`] are handed to the partition, and for passed-through
//!    devices [`KvmBarMapper`] and [`KvmLines`]; [`KvmVfio`] is handed to whoever opens these;
//! 6. on an OUT to the hypercall port, [`hypercall::answer`]; MSR and MMIO exits carry all they
//!    need themselves.
//!
//! Hybrid mode, in which KVM's own Hyper-V emulation takes part, adds [`hybrid`] to it.

mod bars;
mod capability;
mod connections;
pub mod cpuid;
mod doorbell;
mod exchange;
mod exit;
pub mod hybrid;
pub mod hypercall;
mod lines;
mod msi;
mod probe;
mod sint;
mod slots;
mod store;
pub mod survey;
mod tracking;
mod vfio;
pub mod xsave;

pub use bars::KvmBarMapper;
pub use capability::{
    HostSupport, KvmError, forward_msrs, forward_tsc_invariant, prepare_vcpu, prepare_vm, tsc_hz,
};
pub use connections::KvmConnections;
pub use doorbell::KvmDoorbells;
pub use exit::{HypervExit, PassedCall, answer_hyperv, answer_wrmsr};
pub use lines::{DEFAULT_MAX_LINES, KvmLines, KvmRoutes, RouteTable};
pub use msi::KvmMsiSink;
pub use probe::ProbeFault;
pub use sint::{IRQCHIP_GSIS, KvmSintLines, irqchip_routes};
pub use store::{InternalError, StepError, answer_store, internal_error, step_over};
pub use tracking::KvmRam;
pub use vfio::KvmVfio;

/// Input clock of KVM's in-kernel local APIC timer in Hz, unless the VMM changed it with
/// KVM_CAP_X86_APIC_BUS_CYCLES_NS (docs/spec/kvm.md, section 4).
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;

#[cfg(all(test, not(loom)))]
mod tracking_tests;
